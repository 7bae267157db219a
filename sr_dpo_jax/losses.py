"""DPO, IPO and their self-refined forms: pure functions of margins, one loss a pair.

    log-ratio         log π(y|x) − log π_ref(y|x), summed over the response's tokens, nats
    margin            m  = log-ratio of chosen − log-ratio of rejected
    augmented margin  m̂  = the same with p ⊕ x in place of x, p the instruction of arXiv:2405.21040, section 3.2
    refinement        Δ  = β·m̂, a number and not a path for gradients

Every argument is float32 `[pairs]`; numbers are keyword-only. Nothing is averaged here: the caller divides once, by
the number of pairs, last.

The road from YAML to gradient ends here: `train/train_step.py` differentiates these.
"""

import jax
import jax.numpy as jnp

Array = jax.Array


def dpo(margin: Array, *, beta: float, label_smoothing: float = 0.0) -> Array:
    """`−(1 − ε)·log σ(β·m) − ε·log σ(−β·m)`, ε = `label_smoothing`.

    Args:
      margin: m, `[pairs]` float32, nats.
      beta: β > 0, strength of the pull towards the reference.
      label_smoothing: ε in [0, 0.5), assumed share of flipped labels.

    Returns:
      `[pairs]` float32; ln 2 where m = 0.

    Reference: arXiv:2305.18290 eq. 7 (arXiv:2405.21040 eq. 5); for ε > 0 conservative DPO, ericmitchell.ai/cdpo.pdf
    eq. 3.
    """
    reward = beta * margin
    if label_smoothing == 0.0:
        return -jax.nn.log_sigmoid(reward)
    return -(1.0 - label_smoothing) * jax.nn.log_sigmoid(reward) - label_smoothing * jax.nn.log_sigmoid(-reward)


def ipo(margin: Array, *, beta: float) -> Array:
    """`(m − 1/(2β))²` on sums of log-probs.

    Args:
      margin: m, `[pairs]` float32, nats.
      beta: β > 0, the τ of the IPO paper.

    Returns:
      `[pairs]` float32, nats²; 1/(4β²) where m = 0.

    Reference: arXiv:2310.12036 eq. 17 (arXiv:2405.21040 eq. 8).
    """
    return jnp.square(margin - 1.0 / (2.0 * beta))


def ipo_mean(
    chosen_log_ratio: Array, rejected_log_ratio: Array, chosen_tokens: Array, rejected_tokens: Array, *, beta: float
) -> Array:
    """IPO on length-normalised log-ratios: `(r⁺/|y⁺| − r⁻/|y⁻| − 1/(2β))²`.

    Args:
      chosen_log_ratio: r⁺, `[pairs]` float32, nats over the whole response.
      rejected_log_ratio: r⁻, likewise.
      chosen_tokens: |y⁺| ≥ 1, `[pairs]`, scored tokens, end-of-sequence included.
      rejected_tokens: |y⁻| ≥ 1, likewise.
      beta: β > 0; on the scale of nats per token, so not the β of `ipo`.

    Returns:
      `[pairs]` float32, (nats per token)².

    Reference: arXiv:2310.12036 eq. 17 with the normalisation that TRL's `ipo` applies.
    """
    return ipo(chosen_log_ratio / chosen_tokens - rejected_log_ratio / rejected_tokens, beta=beta)


def refinement(augmented_margin: Array, *, beta: float) -> Array:
    """`Δ = β·m̂`, under stop_gradient: how far apart the policy itself judges the two responses to be.

    Args:
      augmented_margin: m̂, `[pairs]` float32, nats.
      beta: the β of the objective, as eq. 12 writes it, for Sr-IPO too.

    Returns:
      `[pairs]` float32.

    Reference: arXiv:2405.21040 eq. 11 and 12.
    """
    return jax.lax.stop_gradient(beta * augmented_margin)


def sr_dpo(margin: Array, augmented_margin: Array, *, beta: float, lam: float) -> Array:
    """`−log σ(β·m − λΔ)`.

    Args:
      margin: m, `[pairs]` float32, nats.
      augmented_margin: m̂, `[pairs]` float32, nats; no gradient flows into it.
      beta: β > 0.
      lam: λ ≥ 0; 0 is `dpo`, bit for bit.

    Returns:
      `[pairs]` float32; ln 2 where m = m̂ = 0.

    Reference: arXiv:2405.21040 eq. 13, algorithm 1.
    """
    return -jax.nn.log_sigmoid(beta * margin - lam * refinement(augmented_margin, beta=beta))


def sr_ipo(margin: Array, augmented_margin: Array, *, beta: float, lam: float) -> Array:
    """`(m − λΔ − 1/(2β))²`.

    Args:
      margin: m, `[pairs]` float32, nats.
      augmented_margin: m̂, `[pairs]` float32, nats; no gradient flows into it.
      beta: β > 0.
      lam: λ ≥ 0; 0 is `ipo`, bit for bit.

    Returns:
      `[pairs]` float32, nats²; 1/(4β²) where m = m̂ = 0.

    Reference: arXiv:2405.21040 eq. 15, algorithm 2.
    """
    return ipo(margin - lam * refinement(augmented_margin, beta=beta), beta=beta)


def sft(chosen_logprob: Array) -> Array:
    """`−log π(y⁺|x)`, the sum over the response's tokens: supervised fine-tuning on the chosen response.

    Args:
      chosen_logprob: `[pairs]` float32, nats over the whole response.

    Returns:
      `[pairs]` float32, nats.

    The caller's mean is over pairs, so long responses weigh more, as in the code base that arXiv:2405.21040 builds on.
    """
    return -chosen_logprob
