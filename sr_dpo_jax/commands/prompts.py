"""A file of prompts -> checked prompts, for generation."""

import dataclasses
from typing import Any

from sr_dpo_jax.data.rows import (
    BadRow,
    Message,
    UnusableError,
    checked_id,
    checked_messages,
    checked_text,
    json_records,
)
from sr_dpo_jax.errors import UsageError

LISTED = 20
KEYS = ("prompt", "messages", "turns")
"""Where a line's prompt stands; the first one that a line has counts."""


@dataclasses.dataclass(frozen=True)
class PromptLine:
    """One line of the file."""

    id: str
    """The line's own `id`, else its 0-based number."""
    prompt: str | tuple[Message, ...]
    later_turns: tuple[str, ...]
    """What the user says next, after each response; empty unless the line has `turns`."""
    row: dict[str, Any]
    """The whole line as it was, to be written out again beside its response."""

    @property
    def key(self) -> str:
        return next(key for key in KEYS if key in self.row)


def read_prompts(path: str) -> list[PromptLine]:
    """Reads a .jsonl or .jsonl.gz file, each line with `prompt` (text or messages), `messages` or `turns`.

    Raises:
      UsageError: the file cannot be read, holds no line, or lines cannot be used, with each line and reason.
    """
    lines, bad = [], []
    for number, row in json_records(path):
        try:
            lines.append(_line(row, number))
        except UnusableError as error:
            bad.append(f"line {number}: {error}")
    if bad:
        more = [f"and {len(bad) - LISTED} more"] if len(bad) > LISTED else []
        raise UsageError("\n  ".join([f"{path}: {len(bad)} prompts cannot be used:", *bad[:LISTED], *more]))
    if not lines:
        raise UsageError(f"{path}: holds no prompt; write one JSON object a line, with a `prompt`")
    return lines


def _line(row: Any, number: int) -> PromptLine:
    if isinstance(row, BadRow):
        raise UnusableError(row.reason)
    if not isinstance(row, dict):
        raise UnusableError("not an object")
    key = next((key for key in KEYS if key in row), None)
    if key is None:
        raise UnusableError("missing key 'prompt' (text or messages)")
    prompt, later_turns = row[key], ()
    if key == "turns":
        prompt, *later_turns = _turns(prompt)
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, str) and key == "prompt":
        prompt = checked_text(prompt, key)
        if not prompt:
            raise UnusableError("prompt: empty text")
    else:
        prompt = checked_messages(prompt, key)
        if not prompt or prompt[-1].role not in ("user", "tool"):
            raise UnusableError(f"{key}: must end with a user or tool message")
        if all(message.role != "user" for message in prompt):
            raise UnusableError(f"{key}: holds no user message")
    return PromptLine(checked_id(row, ("id", "question_id"), number), prompt, tuple(later_turns), row)


def _turns(value: Any) -> list[str]:
    if not isinstance(value, list) or not value:
        raise UnusableError("turns: expected a list of texts")
    turns = [checked_text(text, f"turns[{number}]") for number, text in enumerate(value)]
    if not all(turns):
        raise UnusableError("turns: empty text")
    return turns
