"""Preference files -> pairs that the model can take: tokenised, counted in the log, and within its lengths and ids."""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from sr_dpo_jax.data import dataset
from sr_dpo_jax.data.dataset import Source, TokenizedPairs
from sr_dpo_jax.data.tokenizer_fit import require_embedded
from sr_dpo_jax.model.architecture import Architecture, require_exact_positions

log = logging.getLogger(__name__)


def read_pairs(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    architecture: Architecture,
    *,
    first_pairs: int | None = None,
    augmentation_prompt: str | None,
    against: str | None = None,
    **settings: Any,
) -> TokenizedPairs:
    """Reads, checks and tokenises `sources`; touches no device.

    `first_pairs` keeps only this many, the first. `augmentation_prompt` is p, `against` a second instruction that is
    to take its place; `settings` are the other arguments of `dataset.prepare`.

    Raises:
      UsageError: unusable rows, sequences longer than those for which the model's rotary embedding is known, or ids
        that the model does not have.
    """
    pairs = dataset.prepare(sources, tokenizer, augmentation_prompt=augmentation_prompt, **settings)
    if against is not None:
        second = dataset.prepare(sources, tokenizer, augmentation_prompt=against, **settings)
        pairs = dataclasses.replace(pairs, against=second.augmentation)
    report = pairs.report
    log.info(
        f"{', '.join(source.path for source in sources)}: {report.pairs} pairs of {report.rows} rows; skipped "
        f"{len(report.bad_rows)} bad; truncated {report.truncated_prompts} prompts and {report.truncated_responses} "
        f"responses; {report.identical_pairs} pairs of two equal responses, {report.duplicate_pairs} that came before"
    )
    if first_pairs is not None:
        pairs = dataset.first(pairs, first_pairs)
    _require_lengths(pairs, architecture)
    require_embedded(pairs, vocabulary_tokens=architecture.vocabulary_tokens)
    return pairs


def _require_lengths(pairs: TokenizedPairs, architecture: Architecture) -> None:
    """Refuses sequences for which the rotary embedding is not known; warns of those the model was not made for."""
    longest = int((pairs.prompt_tokens + np.maximum(pairs.chosen_tokens, pairs.rejected_tokens)).max())
    p_tokens = max(len(pairs.augmentation), len(pairs.against))
    longest += p_tokens
    what = f"the longest sequence has {longest} tokens, {p_tokens} of them p"
    require_exact_positions(architecture, longest, what=what, remedy="lower data.max_length")
    if longest > architecture.context_tokens:
        log.warning(
            "the longest sequence has %d tokens with p, but model.path was made for %d (max_position_embeddings)",
            longest,
            architecture.context_tokens,
        )
