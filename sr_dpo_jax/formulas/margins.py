"""Losses of one margin: robust DPO, hinge, EXO, DiscoPOP, SimPO and ORPO. Arguments as `losses.py` describes them."""

import math

import jax
import jax.numpy as jnp

Array = jax.Array


def shifted(margin: Array, refinement: Array | None, *, lam: float) -> Array:
    """`margin − λΔ`, or the margin itself where there is no Δ or λ is the number 0.

    Compiled, `margin − 0·Δ` may be rounded elsewhere than `margin` where a sum follows: so nothing is subtracted.

    Args:
      margin: `[pairs]` float32, of the unit that Δ is subtracted in: β·m of a logistic loss.
      refinement: Δ, `[pairs]` float32; no gradient flows into it. None for a plain loss.
      lam: λ ≥ 0, the weight of Δ.

    Returns:
      `[pairs]` float32.
    """
    if refinement is None or (isinstance(lam, int | float) and lam == 0):
        return margin
    return margin - lam * jax.lax.stop_gradient(refinement)


def smoothed(logit: Array, label_smoothing: float) -> Array:
    """`−(1 − ε)·log σ(h) − ε·log σ(−h)`, the logistic loss of labels of which a share ε may be flipped.

    Args:
      logit: h, `[pairs]` float32.
      label_smoothing: ε in [0, 0.5).

    Returns:
      `[pairs]` float32; ln 2 where h = 0.
    """
    if label_smoothing == 0.0:
        return -jax.nn.log_sigmoid(logit)
    return -(1.0 - label_smoothing) * jax.nn.log_sigmoid(logit) - label_smoothing * jax.nn.log_sigmoid(-logit)


def robust(
    margin: Array, refinement: Array | None = None, *, beta: float, lam: float = 0.0, label_smoothing: float = 0.0
) -> Array:
    """`[−(1 − ε)·log σ(h) + ε·log σ(−h)] / (1 − 2ε)` with `h = β·m − λΔ`, ε = `label_smoothing`.

    Its mean over labels of which a share ε is flipped is the mean of `dpo` over the true ones.

    Args:
      margin: m, `[pairs]` float32, nats.
      refinement: Δ, `[pairs]` float32; no gradient flows into it. None for the plain loss.
      beta: β > 0.
      lam: λ ≥ 0, the weight of Δ.
      label_smoothing: ε in [0, 0.5), the share of flipped labels.

    Returns:
      `[pairs]` float32, below 0 where h is large; ln 2 where m = Δ = 0.

    Reference: arXiv:2403.00409.
    """
    logit = shifted(beta * margin, refinement, lam=lam)
    clean, flipped = jax.nn.log_sigmoid(logit), jax.nn.log_sigmoid(-logit)
    return (label_smoothing * flipped - (1.0 - label_smoothing) * clean) / (1.0 - 2.0 * label_smoothing)


def hinge(margin: Array, refinement: Array | None = None, *, beta: float, lam: float = 0.0) -> Array:
    """`max(0, 1 − h)` with `h = β·m − λΔ`.

    Args:
      margin: m, `[pairs]` float32, nats.
      refinement: Δ, `[pairs]` float32; no gradient flows into it. None for the plain loss.
      beta: β > 0.
      lam: λ ≥ 0, the weight of Δ.

    Returns:
      `[pairs]` float32; 1 where m = Δ = 0. At h = 1 the gradient is 0.

    Reference: the calibration loss of arXiv:2305.10425, on margins over the reference as in arXiv:2309.06657.
    """
    return jax.nn.relu(1.0 - shifted(beta * margin, refinement, lam=lam))


def exo_pair(
    margin: Array, refinement: Array | None = None, *, beta: float, lam: float = 0.0, label_smoothing: float
) -> Array:
    """`σ(h)·[log σ(h) − log(1 − ε)] + σ(−h)·[log σ(−h) − log ε]`, a KL divergence, with `h = β·m − λΔ`.

    It is that of the policy's judgement (σ(h), σ(−h)) from the labels (1 − ε, ε), and 0 where the two agree.

    Args:
      margin: m, `[pairs]` float32, nats.
      refinement: Δ, `[pairs]` float32; no gradient flows into it. None for the plain loss.
      beta: β > 0.
      lam: λ ≥ 0, the weight of Δ.
      label_smoothing: ε in (0, 0.5); the paper takes 1e-3.

    Returns:
      `[pairs]` float32, nats; −ln 2 − ½·ln(ε(1 − ε)) where m = Δ = 0.

    Reference: arXiv:2402.00856 eq. 16.
    """
    logit = shifted(beta * margin, refinement, lam=lam)
    chosen, rejected = jax.nn.log_sigmoid(logit), jax.nn.log_sigmoid(-logit)
    of_chosen = jax.nn.sigmoid(logit) * (chosen - math.log1p(-label_smoothing))
    return of_chosen + jax.nn.sigmoid(-logit) * (rejected - math.log(label_smoothing))


def discopop(
    margin: Array, refinement: Array | None = None, *, beta: float, lam: float = 0.0, tau: float = 0.05
) -> Array:
    """`−(1 − g)·log σ(h) + g·exp(−h)` with the gate `g = σ(h/τ)` and `h = β·m − λΔ`.

    Args:
      margin: m, `[pairs]` float32, nats.
      refinement: Δ, `[pairs]` float32; no gradient flows into it. None for the plain loss.
      beta: β > 0.
      lam: λ ≥ 0, the weight of Δ.
      tau: τ > 0, the width of the gate.

    Returns:
      `[pairs]` float32; ½·(1 + ln 2) where m = Δ = 0.

    Reference: arXiv:2406.08414 eq. 5, log-ratio modulated loss.
    """
    logit = shifted(beta * margin, refinement, lam=lam)
    logistic = -jax.nn.log_sigmoid(logit) * jax.nn.sigmoid(-logit / tau)
    # The product of gate and exponential is infinity times 0 where h is far below 0: their logarithms are added.
    return logistic + jnp.exp(jax.nn.log_sigmoid(logit / tau) - logit)


def simpo(
    margin: Array, refinement: Array | None = None, *, beta: float, gamma: float = 0.5, lam: float = 0.0
) -> Array:
    """`−log σ(β·m − γ − λΔ)` with m the margin of log-probs per token, without a reference.

    Args:
      margin: log π(y⁺|x)/|y⁺| − log π(y⁻|x)/|y⁻|, `[pairs]` float32, nats a token.
      refinement: Δ, `[pairs]` float32; no gradient flows into it. None for the plain loss.
      beta: β > 0, the scale of the margin.
      gamma: γ ≥ 0, the target that β·m must exceed.
      lam: λ ≥ 0, the weight of Δ.

    Returns:
      `[pairs]` float32; log(1 + exp γ) where m = Δ = 0.

    Reference: arXiv:2405.14734 eq. 6.
    """
    return -jax.nn.log_sigmoid(shifted(beta * margin, refinement, lam=lam) - gamma)


def orpo(margin: Array, refinement: Array | None = None, *, beta: float, lam: float = 0.0) -> Array:
    """`−β·log σ(m − λΔ)` with m the margin of the log odds of a token, without a reference.

    It is the preference term of ORPO alone: the term of supervised fine-tuning is `sft` per token, beside it.

    Args:
      margin: log odds(y⁺) − log odds(y⁻), each as `log_odds` makes it, `[pairs]` float32, nats.
      refinement: Δ, `[pairs]` float32; no gradient flows into it. None for the plain loss.
      beta: β > 0, the weight of the term, λ in the paper on ORPO.
      lam: λ ≥ 0, the weight of Δ.

    Returns:
      `[pairs]` float32; β·ln 2 where m = Δ = 0.

    Reference: arXiv:2403.07691 eq. 6 and 7.
    """
    return -beta * jax.nn.log_sigmoid(shifted(margin, refinement, lam=lam))
