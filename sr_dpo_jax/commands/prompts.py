"""Reads a file of prompts for generation, and any other file of JSON lines of which every line must be usable."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

from sr_dpo_jax.data.messages import Message, checked_id, checked_messages, checked_text, template_options
from sr_dpo_jax.data.records import BadRow, UnusableError, json_records
from sr_dpo_jax.data.rows import after_system
from sr_dpo_jax.errors import UsageError

LISTED = 20
KEYS = ("prompt", "messages", "turns")
"""The keys that may hold a line's prompt; the first one that a line has counts."""
IDS = ("id", "question_id")

Line = TypeVar("Line")


@dataclasses.dataclass(frozen=True)
class PromptLine:
    """One line of the file."""

    id: str
    """The line's own `id`, else its 0-based number."""
    prompt: str | tuple[Message, ...]
    later_turns: tuple[str, ...]
    """The user's next texts, one after each response; empty unless the line has `turns`."""
    row: dict[str, Any]
    """The whole line as it was, to be written out again beside its response."""
    template_options: str = ""
    """Its `tools` and `chat_template_kwargs`, as in a `Pair`."""

    @property
    def key(self) -> str:
        return next(key for key in KEYS if key in self.row)


def read_prompts(path: str) -> list[PromptLine]:
    """Reads a .jsonl or .jsonl.gz file, each line with `prompt` (text or messages), `messages` or `turns`.

    The text of a key `system` stands before a conversation, as in the rows of training.

    Raises:
      UsageError: the file cannot be read, holds no line, or lines cannot be used, with each line and reason.
    """
    return usable_lines(path, "prompt", _line)


def usable_lines(path: str, what: str, parse: Callable[[dict[str, Any], int], Line]) -> list[Line]:
    """Parses every line of a .jsonl or .jsonl.gz file; all that is wrong with them is told at once.

    Args:
      path: the file.
      what: the word for what a line holds, for messages.
      parse: takes a line's object and 1-based number; raises UnusableError where the line cannot be used.

    Raises:
      UsageError: the file cannot be read, holds no line, or lines cannot be used, with each line and reason.
    """
    lines, bad = [], []
    for number, row in json_records(path):
        try:
            if not isinstance(row, dict):
                raise UnusableError(row.reason if isinstance(row, BadRow) else "not an object")
            lines.append(parse(row, number))
        except UnusableError as error:
            bad.append(f"line {number}: {error}")
    if bad:
        more = [f"and {len(bad) - LISTED} more"] if len(bad) > LISTED else []
        raise UsageError("\n  ".join([f"{path}: {len(bad)} {what}s cannot be used:", *bad[:LISTED], *more]))
    if not lines:
        raise UsageError(f"{path}: holds no {what}; write one JSON object a line")
    return lines


def _line(row: dict[str, Any], number: int) -> PromptLine:
    key = next((key for key in KEYS if key in row), None)
    if key is None:
        raise UnusableError("missing key 'prompt' (text or messages)")
    value, later_turns = row[key], ()
    if key == "turns":
        if not isinstance(value, list) or not value:
            raise UnusableError("turns: expected a list of texts")
        first, *later_turns = turns = [checked_text(text, f"turns[{number}]") for number, text in enumerate(value)]
        if not all(turns):
            raise UnusableError("turns: empty text")
        prompt = (Message("user", first),)
    elif key == "prompt" and isinstance(value, str):
        prompt = checked_text(value, key)
        if not prompt:
            raise UnusableError("prompt: empty text")
    else:
        prompt = checked_messages(value, key)
        if not prompt or prompt[-1].role not in ("user", "tool"):
            raise UnusableError(f"{key}: must end with a user or tool message")
        if all(message.role != "user" for message in prompt):
            raise UnusableError(f"{key}: holds no user message")
    if row.get("system") and isinstance(prompt, str):
        raise UnusableError("system: a prompt of plain text has no place for it; give messages, or remove it")
    prompt = after_system(row.get("system"), prompt)
    options = template_options(row, prompt)
    return PromptLine(checked_id(row, IDS, number), prompt, tuple(later_turns), row, options)
