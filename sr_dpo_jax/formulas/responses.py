"""Losses of both log-ratios apart, or of all pairs of a step: APO, NCA, BCO, SPPO and AOT.

Arguments as `losses.py` describes them; r⁺ and r⁻ are the log-ratios of the chosen and of the rejected response.
"""

import jax
import jax.numpy as jnp

from sr_dpo_jax.formulas.margins import shifted, smoothed

Array = jax.Array


def apo_down(
    chosen_log_ratio: Array,
    rejected_log_ratio: Array,
    refinement: Array | None = None,
    *,
    beta: float,
    lam: float = 0.0,
) -> Array:
    """`σ(β·r⁺) + 1 − σ(β·(r⁺ − r⁻) − λΔ)`: lowers both responses, the rejected one more.

    Δ shifts the second term, the one that has a margin.

    Args:
      chosen_log_ratio: r⁺, `[pairs]` float32, nats.
      rejected_log_ratio: r⁻, `[pairs]` float32, nats.
      refinement: Δ, `[pairs]` float32; no gradient flows into it. None for the plain loss.
      beta: β > 0.
      lam: λ ≥ 0, the weight of Δ.

    Returns:
      `[pairs]` float32, from 0 to 2; 1 where r⁺ = r⁻ = Δ = 0.

    Reference: arXiv:2408.06266 eq. 8.
    """
    logit = shifted(beta * (chosen_log_ratio - rejected_log_ratio), refinement, lam=lam)
    return jax.nn.sigmoid(beta * chosen_log_ratio) + jax.nn.sigmoid(-logit)


def apo_zero(chosen_log_ratio: Array, rejected_log_ratio: Array, *, beta: float) -> Array:
    """`1 − σ(β·r⁺) + σ(β·r⁻)`: raises the chosen response and lowers the rejected one.

    Args:
      chosen_log_ratio: r⁺, `[pairs]` float32, nats.
      rejected_log_ratio: r⁻, `[pairs]` float32, nats.
      beta: β > 0.

    Returns:
      `[pairs]` float32, from 0 to 2; 1 where r⁺ = r⁻ = 0.

    Reference: arXiv:2408.06266 eq. 7.
    """
    return jax.nn.sigmoid(-beta * chosen_log_ratio) + jax.nn.sigmoid(beta * rejected_log_ratio)


def nca_pair(chosen_log_ratio: Array, rejected_log_ratio: Array, *, beta: float) -> Array:
    """`−log σ(β·r⁺) − ½·log σ(−β·r⁺) − ½·log σ(−β·r⁻)`.

    Args:
      chosen_log_ratio: r⁺, `[pairs]` float32, nats.
      rejected_log_ratio: r⁻, `[pairs]` float32, nats.
      beta: β > 0.

    Returns:
      `[pairs]` float32; 2·ln 2 where r⁺ = r⁻ = 0.

    Reference: arXiv:2402.05369, noise contrastive alignment, of two responses.
    """
    chosen, rejected = beta * chosen_log_ratio, beta * rejected_log_ratio
    lowered = jax.nn.log_sigmoid(-chosen) + jax.nn.log_sigmoid(-rejected)
    return -jax.nn.log_sigmoid(chosen) - 0.5 * lowered


def bco_pair(chosen_log_ratio: Array, rejected_log_ratio: Array, *, beta: float) -> Array:
    """`−log σ(β·r⁺) − log σ(−β·r⁻)`: a classifier of each response, without the shift of rewards of the paper.

    Args:
      chosen_log_ratio: r⁺, `[pairs]` float32, nats.
      rejected_log_ratio: r⁻, `[pairs]` float32, nats.
      beta: β > 0.

    Returns:
      `[pairs]` float32; 2·ln 2 where r⁺ = r⁻ = 0.

    Reference: arXiv:2404.04656, binary classifier optimization.
    """
    return -jax.nn.log_sigmoid(beta * chosen_log_ratio) - jax.nn.log_sigmoid(-beta * rejected_log_ratio)


def sppo_hard(chosen_log_ratio: Array, rejected_log_ratio: Array, *, beta: float) -> Array:
    """`(r⁺ − 1/(2β))² + (r⁻ + 1/(2β))²`: SPPO with the winning probabilities 1 and 0.

    Args:
      chosen_log_ratio: r⁺, `[pairs]` float32, nats.
      rejected_log_ratio: r⁻, `[pairs]` float32, nats.
      beta: β > 0, 1/η of the paper.

    Returns:
      `[pairs]` float32, nats²; 1/(2β²) where r⁺ = r⁻ = 0.

    Reference: arXiv:2405.00675 eq. 4.7.
    """
    target = 1.0 / (2.0 * beta)
    return jnp.square(chosen_log_ratio - target) + jnp.square(rejected_log_ratio + target)


def aot(
    preference: Array,
    reference_preference: Array,
    refinement: Array | None = None,
    *,
    beta: float,
    lam: float = 0.0,
    label_smoothing: float = 0.0,
) -> Array:
    """`dpo` of `h = sort(β·d − λΔ) − sort(β·d_ref)`: the policy's preferences exceed the reference's in distribution.

    Sorts over all pairs that it is given, so these must be those of the whole step, and what it returns belongs to
    ranks and no longer to pairs.

    Args:
      preference: d = log π(y⁺|x) − log π(y⁻|x), `[pairs]` float32, nats.
      reference_preference: d_ref, the same of the reference, `[pairs]` float32, nats.
      refinement: Δ, `[pairs]` float32; no gradient flows into it. None for the plain loss.
      beta: β > 0.
      lam: λ ≥ 0, the weight of Δ.
      label_smoothing: ε in [0, 0.5), assumed share of flipped labels.

    Returns:
      `[pairs]` float32, lowest rank first; ln 2 where d = d_ref and Δ = 0.

    Reference: arXiv:2406.05882, paired.
    """
    policy = jnp.sort(shifted(beta * preference, refinement, lam=lam))
    return smoothed(policy - jnp.sort(beta * reference_preference), label_smoothing)


def aot_unpaired(
    chosen_log_ratio: Array,
    rejected_log_ratio: Array,
    refinement: Array | None = None,
    *,
    beta: float,
    lam: float = 0.0,
    label_smoothing: float = 0.0,
) -> Array:
    """`dpo` of `h = sort(β·r⁺ − λΔ) − sort(β·r⁻)`: the chosen responses exceed the rejected ones in distribution.

    Sorts over all pairs that it is given, so these must be those of the whole step, and what it returns belongs to
    ranks and no longer to pairs. Δ of a pair shifts its chosen response.

    Args:
      chosen_log_ratio: r⁺, `[pairs]` float32, nats.
      rejected_log_ratio: r⁻, `[pairs]` float32, nats.
      refinement: Δ, `[pairs]` float32; no gradient flows into it. None for the plain loss.
      beta: β > 0.
      lam: λ ≥ 0, the weight of Δ.
      label_smoothing: ε in [0, 0.5), assumed share of flipped labels.

    Returns:
      `[pairs]` float32, lowest rank first; ln 2 where r⁺ = r⁻ = Δ = 0.

    Reference: arXiv:2406.05882, unpaired.
    """
    chosen = jnp.sort(shifted(beta * chosen_log_ratio, refinement, lam=lam))
    return smoothed(chosen - jnp.sort(beta * rejected_log_ratio), label_smoothing)
