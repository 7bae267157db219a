"""The data contract: packed, prefix-sharing rows of whole preference pairs, and the glossary of their fields.

A row holds many pairs, one after the other, each laid out as

    [ rejected, reversed | prompt | chosen ]        (SFT: [ prompt | chosen ])

so that the prompt passes through the model once. Rotary positions restart after the prompt for both responses, and
count back from it on the reversed side. A chosen token then sees keys from the start of its prompt up to itself, and
a rejected token from itself to the end of its prompt: one contiguous range, two integers a query. In augmented rows
the tokens of the template head and of p stand once at the start of the row, every later token sees them too, and the
prompts go without their copy of the head. Where heads differ (system messages), p stands in each prompt instead, after
its own head, and augmented rows are laid out as plain ones.

    R  rows of a micro-batch      A  micro-batches of a step (gradient accumulation)
    T  tokens of a row            B  pairs of a step
    M  scored positions of a row  side  0 chosen, 1 rejected

Next: `train/train_step.py`, which takes a batch of rows and gives the next state.
"""

import dataclasses

import jax
import numpy as np

CHOSEN, REJECTED = 0, 1
SIDES = 2

Array = jax.Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """Packed rows, int32. Unused tokens see themselves alone; unused scored positions have slot 2·B."""

    tokens: Array
    """`[A, R, T]`, token ids; 0 where unused."""
    positions: Array
    """`[A, R, T]`, rotary positions."""
    key_start: Array
    """`[A, R, T]`, first index of the row that this token sees, beside the prefix."""
    key_end: Array
    """`[A, R, T]`, one past the last index that this token sees."""
    source: Array
    """`[A, R, M]`, index of the row whose hidden state predicts the target. The last prompt position predicts the
    first token of both responses."""
    target: Array
    """`[A, R, M]`, the token id that is scored."""
    slot: Array
    """`[A, R, M]`, 2·pair + side, with the pair's number within the step."""
    prefix_tokens: int = dataclasses.field(default=0, metadata={"static": True})
    """Tokens at the start of every row that all later tokens of it see: head and p, or none. None too where p stands
    in each prompt."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """One step: the same pairs in plain and augmented rows, and their scores by the frozen reference."""

    plain: Rows
    augmented: Rows | None
    """The rows with p; None where the objective does not need them."""
    reference: Array | None = None
    """`[B, 2]` float32, nats: log π_ref of each response (cached reference only)."""
    reference_augmented: Array | None = None
    """`[B, 2]` float32, nats: the same with p ⊕ x."""
    against: Rows | None = None
    """The rows with a second instruction in the place of p; None where there is none."""
    refinement: Array | None = None
    """`[B]` float32: Δ of each pair, where it is known before step 0."""


@dataclasses.dataclass(frozen=True)
class Placed:
    """A pair and its place: `slot` is 2·pair. `rejected` is None for SFT."""

    slot: int
    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray | None


def build_row(
    pairs: list[Placed], *, row_length: int, scored: int, unused_slot: int, head_tokens: int, prefix: np.ndarray
) -> dict[str, np.ndarray]:
    """Lays pairs out in one row.

    Args:
      pairs: in the order in which they stand.
      row_length: T.
      scored: M.
      unused_slot: 2·B.
      head_tokens: how many tokens of each prompt the prefix stands for; 0 for plain rows.
      prefix: ids of head and p; empty for plain rows.

    Returns:
      The array fields of `Rows`, each `[T]` or `[M]` int32.

    Raises:
      ValueError: the pairs need more tokens or scored positions than the row has.
    """
    row = {name: np.zeros(row_length, np.int32) for name in ("tokens", "positions", "key_start", "key_end")}
    row["key_start"][:] = np.arange(row_length)
    row["key_end"][:] = np.arange(1, row_length + 1)
    row |= {name: np.zeros(scored, np.int32) for name in ("source", "target", "slot")}
    row["slot"][:] = unused_slot
    row["tokens"][: len(prefix)] = prefix
    row["positions"][: len(prefix)] = np.arange(len(prefix))
    row["key_start"][: len(prefix)] = 0
    start, scored_start = len(prefix), 0
    for pair in pairs:
        prompt = pair.prompt[head_tokens:]
        rejected = pair.prompt[:0] if pair.rejected is None else pair.rejected
        end, scored_end = start + len(rejected) + len(prompt) + len(pair.chosen), scored_start + len(pair.chosen)
        scored_end += len(rejected)
        if end > row_length or scored_end > scored:
            raise ValueError(f"a row of {row_length} tokens and {scored} scored positions is too short for its pairs")
        _lay_out(row, start, scored_start, pair.slot, len(prefix), prompt, pair.chosen, rejected)
        start, scored_start = end, scored_end
    return row


def _lay_out(
    row: dict[str, np.ndarray],
    start: int,
    scored_start: int,
    slot: int,
    prefix_tokens: int,
    prompt: np.ndarray,
    chosen: np.ndarray,
    rejected: np.ndarray,
) -> None:
    prompt_start = start + len(rejected)
    prompt_end = prompt_start + len(prompt)
    end = prompt_end + len(chosen)
    backward, forward = slice(start, prompt_start), slice(prompt_start, end)
    row["tokens"][backward] = rejected[::-1]
    row["tokens"][forward] = np.concatenate([prompt, chosen])
    first_response_position = prefix_tokens + len(prompt)
    row["positions"][backward] = first_response_position + np.arange(len(rejected))[::-1]
    row["positions"][forward] = prefix_tokens + np.arange(end - prompt_start)
    row["key_end"][backward] = prompt_end  # key_start and key_end are already at the token itself
    row["key_start"][forward] = prompt_start
    # A prompt that is all head has its last token at the end of the prefix.
    last_prompt = prompt_end - 1 if len(prompt) else prefix_tokens - 1
    for side, response, first, towards_end in (
        (CHOSEN, chosen, prompt_end, 1),
        (REJECTED, rejected, prompt_start - 1, -1),
    ):
        if len(response):
            here = slice(scored_start, scored_start + len(response))
            row["source"][here] = first + towards_end * (np.arange(len(response)) - 1)
            row["source"][scored_start] = last_prompt
            row["target"][here] = response
            row["slot"][here] = slot + side
            scored_start += len(response)
