"""Cuts conversations that are too long by whole turns: half a turn behind another's header is no conversation."""

import dataclasses
from collections.abc import Iterator

from sr_dpo_jax.data.messages import FIRST_ROLES, Message
from sr_dpo_jax.data.records import BadRow
from sr_dpo_jax.data.rows import Pair
from sr_dpo_jax.data.tokens import PairEncoder, PairTokens


def fitted(
    encoder: PairEncoder,
    pair: Pair,
    tokens: PairTokens,
    *,
    max_length: int,
    max_prompt_length: int,
    prompt_truncation: str,
) -> tuple[PairTokens | BadRow, int]:
    """Drops turns of a conversation until its prompt need not be cut; text, and what fits, stays as it is.

    The system message and the last user message with what follows it always stay. With `keep_end` the oldest turns go
    first, with `keep_start` the newest. Where all that may go has gone, `tokens.truncate` cuts the last message of the
    user alone at its start.

    Args:
      encoder: encodes the shorter conversations.
      pair, tokens: the pair and its ids.
      max_length, max_prompt_length, prompt_truncation: as for `tokens.truncate`.

    Returns:
      The ids, or the reason why the row cannot be used, and the number of messages that were dropped.
    """
    if isinstance(pair.prompt, str) or not _too_long(tokens, max_length, max_prompt_length):
        return tokens, 0
    for prompt in _shorter(pair.prompt, keep_end=prompt_truncation == "keep_end"):
        (found,) = encoder.encode([dataclasses.replace(pair, prompt=prompt)])
        if isinstance(found, BadRow):
            return found, 0
        tokens, dropped = found, len(pair.prompt) - len(prompt)
        if not _too_long(tokens, max_length, max_prompt_length):
            return tokens, dropped
    left = pair.prompt[_last_turn(pair.prompt) :]
    # A trap: a cut that takes the whole message of the user goes on into the markers behind it.
    bare = (*pair.prompt[: _first_turn(pair.prompt)], dataclasses.replace(left[0], content="a"))
    (least,) = encoder.encode([dataclasses.replace(pair, prompt=bare)])
    if isinstance(least, BadRow):
        return least, 0
    if len(least.prompt) > max_prompt_length:
        reason = f"system message and markers of the template alone have {len(least.prompt)} tokens"
        return BadRow(pair.file, pair.line, f"{reason}; raise data.max_prompt_length"), 0
    if len(left) > 1 or prompt_truncation != "keep_end":
        within = "holds calls of tools" if len(left) > 1 else "would lose its end to data.prompt_truncation=keep_start"
        return BadRow(
            pair.file,
            pair.line,
            f"the prompt has {len(tokens.prompt)} tokens without the turns that can go, and the last turn {within}; "
            "raise data.max_prompt_length",
        ), 0
    return tokens, len(pair.prompt) - len(left) - _first_turn(pair.prompt)


def _too_long(tokens: PairTokens, max_length: int, max_prompt_length: int) -> bool:
    """Tells whether `tokens.truncate` would cut the prompt."""
    longest = max(len(tokens.chosen), len(tokens.rejected))
    return len(tokens.prompt) > max_prompt_length and len(tokens.prompt) + longest > max_length


def _shorter(prompt: tuple[Message, ...], *, keep_end: bool) -> Iterator[tuple[Message, ...]]:
    """Yields a conversation without one turn, two turns and so on; a turn begins with a message of the user."""
    first, last = _first_turn(prompt), _last_turn(prompt)
    starts = [number for number in range(first, last) if number == first or prompt[number].role == "user"]
    if keep_end:
        yield from (prompt[:first] + prompt[start:] for start in [*starts[1:], last] if start > first)
    else:
        yield from (prompt[:start] + prompt[last:] for start in reversed(starts))


def _first_turn(prompt: tuple[Message, ...]) -> int:
    return int(prompt[0].role in FIRST_ROLES)


def _last_turn(prompt: tuple[Message, ...]) -> int:
    """Gives the place of the last message of the user."""
    return max(number for number, message in enumerate(prompt) if message.role == "user")
