"""Preference files -> pairs that the model can take: tokenised, counted in the log, and within its lengths and ids."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from sr_dpo_jax.data import dataset
from sr_dpo_jax.data.chat_template import UNPLACED, UnplacedError
from sr_dpo_jax.data.dataset import Report, Source, TokenizedPairs
from sr_dpo_jax.data.tokenizer_fit import require_embedded
from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.model.architecture import Architecture, require_exact_positions

log = logging.getLogger(__name__)

P_LEFT_OUT = "refinement.prompt cannot {}, and the objective needs none: read without it"


def read_pairs(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    architecture: Architecture,
    *,
    first_pairs: int | None = None,
    augmentation_prompt: str | None,
    against: str | None = None,
    p_needed: bool = True,
    **settings: Any,
) -> TokenizedPairs:
    """Reads, checks and tokenises `sources`; touches no device.

    `first_pairs` keeps only this many, the first. `augmentation_prompt` is p, `against` a second instruction that is
    to take its place; `settings` are the other arguments of `dataset.prepare`. Where p is not needed, pairs in which it
    cannot stand are read without it.

    Raises:
      UsageError: unusable rows, sequences longer than those for which the model's rotary embedding is known, or ids
        that the model does not have.
    """
    prepare = partial(dataset.prepare, sources, tokenizer, **settings)
    if p_needed:
        pairs = prepare(augmentation_prompt=augmentation_prompt)
    else:
        pairs = _with_p_if_it_stands(prepare, augmentation_prompt)
    if against is not None:
        pairs = _with_second(pairs, prepare(augmentation_prompt=against))
    _log_outcome(pairs.report, sources, tokenizer)
    if first_pairs is not None:
        pairs = dataset.first(pairs, first_pairs)
    try:
        _require_fit(pairs, architecture)
    except UsageError:
        if p_needed or not len(pairs.augmentation):
            raise
        log.info("%s", P_LEFT_OUT.format("fit every sequence"))
        pairs = dataclasses.replace(pairs, augmentation=pairs.augmentation[:0], head_tokens=pairs.head_tokens[:0])
        _require_fit(pairs, architecture)
    if len(pairs.head_tokens):
        log.info(
            "prompts start with %d different heads (system messages): p stands in each prompt, not once a row, which "
            "makes rows with p longer by up to %d tokens a pair",
            heads_of(pairs),
            max(len(pairs.augmentation), len(pairs.against)),
        )
    return pairs


def _log_outcome(report: Report, sources: Sequence[Source], tokenizer: PreTrainedTokenizerBase) -> None:
    """Logs what became of the rows."""
    log.info(
        f"{', '.join(source.path for source in sources)}: {report.pairs} pairs of {report.rows} rows; skipped "
        f"{len(report.bad_rows)} bad; truncated {report.truncated_prompts} prompts and {report.truncated_responses} "
        f"responses; {report.identical_pairs} pairs of two equal responses, {report.duplicate_pairs} that came before"
    )
    if report.dropped_turns:
        log.info("%d messages were left out of conversations that were too long", report.dropped_turns)
    if report.text_prompts and tokenizer.chat_template is not None:
        log.info(
            "%d prompts are plain text, to which the chat template of model.path is not applied; give prompts as "
            "messages where it should be",
            report.text_prompts,
        )


def heads_of(pairs: TokenizedPairs) -> int:
    """Counts the different heads before p."""
    if not len(pairs.head_tokens):
        return 1
    starts = zip(pairs.offsets[:, 0], pairs.head_tokens, strict=True)
    return len({pairs.tokens[start : start + tokens].tobytes() for start, tokens in starts})


def _with_p_if_it_stands(prepare: Callable[..., TokenizedPairs], p: str | None) -> TokenizedPairs:
    """Reads the pairs with p, or without it where a prompt has no place for it."""
    try:
        pairs = prepare(augmentation_prompt=p)
        if not any(row.reason == UNPLACED for row in pairs.report.bad_rows):
            return pairs
    except UnplacedError:
        pass
    log.info("%s", P_LEFT_OUT.format("stand in every prompt"))
    return prepare(augmentation_prompt=None)


def _with_second(pairs: TokenizedPairs, second: TokenizedPairs) -> TokenizedPairs:
    """Takes the second instruction from the same pairs read with it; it must have a place wherever p has one."""
    differing = set(pairs.report.bad_rows) ^ set(second.report.bad_rows)
    if differing:
        row = min(differing, key=lambda row: (row.file, row.line))
        raise UsageError(
            f"{row.file}:{row.line}: refinement.prompt and refinement.against cannot both stand in this row: "
            f"{row.reason}; change the instruction, or remove the row"
        )
    return dataclasses.replace(pairs, against=second.augmentation)


def _require_fit(pairs: TokenizedPairs, architecture: Architecture) -> None:
    _require_lengths(pairs, architecture)
    require_embedded(pairs, vocabulary_tokens=architecture.vocabulary_tokens)


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
