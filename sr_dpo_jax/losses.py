"""The losses: pure functions of margins, one loss a pair. Here DPO, IPO and their self-refined forms.

    log-ratio         log π(y|x) − log π_ref(y|x), summed over the response's tokens, nats
    preference        d  = log π(y⁺|x) − log π(y⁻|x), of the policy or of the reference
    margin            m  = log-ratio of chosen − log-ratio of rejected
    augmented margin  m̂  = the same with p ⊕ x in place of x, p the instruction of arXiv:2405.21040, section 3.2
    refinement        Δ, a number and not a path for gradients: β·m̂ in the paper, or the contrast c = d(p ⊕ x) − d(x)

Every argument is float32 `[pairs]`; numbers are keyword-only. A loss of a margin takes Δ as its last argument: it
shifts the margin by λΔ, and without it, or with λ = 0, the loss is the plain one bit for bit. Nothing is averaged here:
the caller divides once, by the number of pairs, last.

The other losses stand by kind in `formulas/`, and their names here too: those of one margin, those of both log-ratios
or of all pairs of a step, and what a log-ratio may become before the margin is taken.

The road from YAML to gradient ends here: `train/train_step.py` differentiates these.
"""

import jax
import jax.numpy as jnp

from sr_dpo_jax.formulas.margins import discopop, exo_pair, hinge, orpo, robust, shifted, simpo, smoothed
from sr_dpo_jax.formulas.responses import aot, aot_unpaired, apo_down, apo_zero, bco_pair, nca_pair, sppo_hard
from sr_dpo_jax.formulas.scores import divergence_score, log_odds, on_policy_weight

Array = jax.Array

__all__ = [
    "aot",
    "aot_unpaired",
    "apo_down",
    "apo_zero",
    "bco_pair",
    "contrast",
    "discopop",
    "divergence_score",
    "dpo",
    "exo_pair",
    "hinge",
    "ipo",
    "log_odds",
    "nca_pair",
    "on_policy_weight",
    "orpo",
    "refinement",
    "robust",
    "sft",
    "simpo",
    "sppo_hard",
    "sr_dpo",
    "sr_ipo",
]


def dpo(
    margin: Array, refinement: Array | None = None, *, beta: float, lam: float = 0.0, label_smoothing: float = 0.0
) -> Array:
    """`−(1 − ε)·log σ(h) − ε·log σ(−h)` with `h = β·m − λΔ`, ε = `label_smoothing`.

    Args:
      margin: m, `[pairs]` float32, nats.
      refinement: Δ, `[pairs]` float32; no gradient flows into it. None for plain DPO.
      beta: β > 0, strength of the pull towards the reference; OLMo 3 takes 5 on a margin per token.
      lam: λ ≥ 0, the weight of Δ.
      label_smoothing: ε in [0, 0.5), assumed share of flipped labels.

    Returns:
      `[pairs]` float32; ln 2 where m = Δ = 0.

    Reference: arXiv:2305.18290 eq. 7 (arXiv:2405.21040 eq. 5, and with Δ eq. 13); for ε > 0 conservative DPO,
    ericmitchell.ai/cdpo.pdf eq. 3.
    """
    return smoothed(shifted(beta * margin, refinement, lam=lam), label_smoothing)


def ipo(margin: Array, refinement: Array | None = None, *, beta: float, lam: float = 0.0) -> Array:
    """`(m − λΔ − 1/(2β))²` on sums of log-probs.

    Args:
      margin: m, `[pairs]` float32, nats.
      refinement: Δ, `[pairs]` float32; no gradient flows into it. None for plain IPO.
      beta: β > 0, the τ of the IPO paper.
      lam: λ ≥ 0, the weight of Δ.

    Returns:
      `[pairs]` float32, nats²; 1/(4β²) where m = Δ = 0.

    Reference: arXiv:2310.12036 eq. 17 (arXiv:2405.21040 eq. 8, and with Δ eq. 15).
    """
    return jnp.square(shifted(margin, refinement, lam=lam) - 1.0 / (2.0 * beta))


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


def contrast(preference_with_p: Array, preference_without: Array) -> Array:
    """`c = d(p ⊕ x) − d(x)`, under stop_gradient: the evidence of the model itself that y⁺ is the better response.

    By Bayes' rule it is log P(p|x, y⁺) − log P(p|x, y⁻): how much likelier the model holds the rating that p asks for
    to be that of the chosen response. In `dpo` it adds to the label's evidence with the weight λ = 1.

    Args:
      preference_with_p: d(p ⊕ x) = log π(y⁺|p ⊕ x) − log π(y⁻|p ⊕ x), `[pairs]` float32, nats.
      preference_without: d(x), likewise without p, or with a second instruction that asks for the opposite.

    Returns:
      `[pairs]` float32, nats. There is no β in it.

    The form with two instructions is that of arXiv:2402.11907.
    """
    return jax.lax.stop_gradient(preference_with_p - preference_without)


def sr_dpo(margin: Array, augmented_margin: Array, *, beta: float, lam: float) -> Array:
    """`−log σ(β·m − λΔ)` with the paper's `Δ = β·m̂`.

    Args:
      margin: m, `[pairs]` float32, nats.
      augmented_margin: m̂, `[pairs]` float32, nats; no gradient flows into it.
      beta: β > 0.
      lam: λ ≥ 0; 0 is `dpo`, bit for bit.

    Returns:
      `[pairs]` float32; ln 2 where m = m̂ = 0.

    Reference: arXiv:2405.21040 eq. 13, algorithm 1.
    """
    return dpo(margin, refinement(augmented_margin, beta=beta), beta=beta, lam=lam)


def sr_ipo(margin: Array, augmented_margin: Array, *, beta: float, lam: float) -> Array:
    """`(m − λΔ − 1/(2β))²` with the paper's `Δ = β·m̂`.

    Args:
      margin: m, `[pairs]` float32, nats.
      augmented_margin: m̂, `[pairs]` float32, nats; no gradient flows into it.
      beta: β > 0.
      lam: λ ≥ 0; 0 is `ipo`, bit for bit.

    Returns:
      `[pairs]` float32, nats²; 1/(4β²) where m = m̂ = 0.

    Reference: arXiv:2405.21040 eq. 15, algorithm 2.
    """
    return ipo(margin, refinement(augmented_margin, beta=beta), beta=beta, lam=lam)


def sft(chosen_logprob: Array) -> Array:
    """`−log π(y⁺|x)`, the sum over the response's tokens: supervised fine-tuning on the chosen response.

    Args:
      chosen_logprob: `[pairs]` float32, nats over the whole response.

    Returns:
      `[pairs]` float32, nats.

    The caller's mean is over pairs, so long responses weigh more, as in the code base that arXiv:2405.21040 builds on.
    """
    return -chosen_logprob
