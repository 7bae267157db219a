"""These functions turn a log-ratio, or a log-prob, into the score of which the margin is taken, or into a weight."""

import math

import jax
import jax.numpy as jnp

Array = jax.Array

LARGEST_EXPONENT = 80.0
"""exp of more than 88 is infinity in float32: exponents are cut to this, as TRL cuts them."""


def divergence_score(log_ratio: Array, *, divergence: str, alpha: float | None = None) -> Array:
    """`f′(eʳ)`, up to a constant, of the f-divergence that holds the policy near the reference; r is the log-ratio.

        reverse_kl         r, that of DPO
        forward_kl         1 − e⁻ʳ
        js_divergence      ln 2 + log σ(r)
        alpha_divergence   (e^((α − 1)·r) − 1)/(α − 1); r where α = 1

    Args:
      log_ratio: r, float32 of any shape, nats.
      divergence: one of these names.
      alpha: α in [0, 1] of `alpha_divergence`; None for the others.

    Returns:
      Float32 of the shape of `log_ratio`; 0 where r = 0. No gradient flows where an exponent is above 80.

    Reference: arXiv:2309.16240.
    """
    match divergence:
        case "reverse_kl":
            return log_ratio
        case "forward_kl":
            return 1.0 - jnp.exp(jnp.minimum(-log_ratio, LARGEST_EXPONENT))
        case "js_divergence":
            return math.log(2) + jax.nn.log_sigmoid(log_ratio)
        case "alpha_divergence" if alpha is not None:
            if alpha == 1.0:
                return log_ratio
            return jnp.expm1(jnp.minimum((alpha - 1.0) * log_ratio, LARGEST_EXPONENT)) / (alpha - 1.0)
    raise ValueError(f"divergence={divergence!r}, alpha={alpha}: no such divergence")


def log_odds(mean_logprob: Array) -> Array:
    """`log(p/(1 − p)) = a − log(1 − eᵃ)` with `a = log p` the mean log-prob of a token.

    Args:
      mean_logprob: a ≤ 0, float32 of any shape, nats a token; counts as −1e-12 where it is larger, as odds would be
        infinite at 0.

    Returns:
      Float32 of the shape of `mean_logprob`, nats.

    Reference: arXiv:2403.07691 eq. 4.
    """
    bounded = jnp.minimum(mean_logprob, -1e-12)
    return bounded - jnp.log(-jnp.expm1(bounded))


def on_policy_weight(logprob: Array, log_squares: Array, tokens: Array) -> Array:
    """`exp((1/|y|) Σ_t [log π(y_t) − log Σ_v π(v)²])`, under stop_gradient: how much a response is the policy's own.

    A token counts as 1 where its probability is the mean one of tokens that the policy itself would draw there.

    Args:
      logprob: log π(y|x), float32 of any shape, nats.
      log_squares: Σ_t log Σ_v π(v)², with v the whole vocabulary, of the same shape.
      tokens: |y| ≥ 1, of the same shape.

    Returns:
      Float32 of the shape of `logprob`, above 0.

    Reference: arXiv:2406.11827 eq. 2, with sampled alignment.
    """
    return jnp.exp(jax.lax.stop_gradient(logprob - log_squares) / tokens)
