"""Makes pairs of typical lengths, without any text: enough for a plan where the data itself is not at hand.

Lengths are log-normal, with means and tails as measured on the data sets that the formats are named after, in tokens of
vocabularies of 30,000 to 130,000; they are drawn from a fixed seed and cut as `data/tokens.py` cuts.
"""

import dataclasses

import numpy as np

from sr_dpo_jax.data.dataset import Report, TokenizedPairs


@dataclasses.dataclass(frozen=True)
class Typical:
    """The lengths of a data set: for each part the mean in tokens, and the standard deviation of the logarithm."""

    pairs: int
    """The number of pairs of the training split."""
    prompt: tuple[float, float]
    chosen: tuple[float, float]
    rejected: tuple[float, float]


HH = Typical(pairs=160_800, prompt=(113, 0.88), chosen=(39, 0.9), rejected=(49, 0.9))
"""95 of 100 prompts are shorter than 326 tokens."""
ULTRAFEEDBACK = Typical(pairs=61_135, prompt=(180, 0.9), chosen=(300, 0.7), rejected=(300, 0.7))
LENGTHS = {"hh_rlhf": HH, **dict.fromkeys(("ultrafeedback", "preference", "sft"), ULTRAFEEDBACK)}


def typical_pairs(
    format: str,
    *,
    least_pairs: int,
    head_tokens: int,
    augmentation_tokens: int,
    max_length: int,
    max_prompt_length: int,
) -> TokenizedPairs:
    """Makes pairs of typical lengths, always the same ones; all their tokens are 0, and all prompts have one head.

    Args:
      format: a key of `LENGTHS`.
      least_pairs: the number of pairs, where that is more than the data set has.
      head_tokens, augmentation_tokens: the tokens of the template head and of p.
      max_length, max_prompt_length: the limits of `data.tokens.truncate`, in tokens.
    """
    rng, typical = np.random.default_rng(0), LENGTHS[format]
    pairs = max(typical.pairs, least_pairs)
    prompt, chosen, rejected = (_draw(rng, *getattr(typical, name), pairs) for name in ("prompt", "chosen", "rejected"))
    prompt += head_tokens
    longer = np.maximum(chosen, rejected)
    prompt = np.where(prompt + longer > max_length, np.minimum(prompt, max_prompt_length), prompt)
    room = np.where(prompt + longer > max_length, max_length - max_prompt_length, max_length)
    lengths = np.stack([prompt, np.minimum(chosen, room), np.minimum(rejected, room)], axis=1)
    ends = np.cumsum(lengths).reshape(-1, 3)
    starts = np.concatenate([[0], ends[:-1, 2]])
    return TokenizedPairs(
        tokens=np.zeros(ends[-1, -1], np.int32),
        offsets=np.concatenate([starts[:, None], ends], axis=1),
        head=np.zeros(head_tokens, np.int32),
        augmentation=np.zeros(augmentation_tokens, np.int32),
        ids=tuple(map(str, range(pairs))),
        chosen_score=np.full(pairs, np.nan, np.float32),
        rejected_score=np.full(pairs, np.nan, np.float32),
        source=np.zeros(pairs, np.int32),
        line=np.arange(1, pairs + 1),
        files=("typical pairs",),
        source_weights=np.ones(1),
        content_digest="",
        report=Report(pairs, pairs, (), 0, 0, 0, 0),
    )


def _draw(rng: np.random.Generator, mean: float, sigma: float, count: int) -> np.ndarray:
    return np.maximum(1, rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, count).astype(np.int64))
