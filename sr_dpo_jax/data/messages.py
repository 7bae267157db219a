"""The messages of a conversation, and what a row hands to the chat template beside them, checked."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sr_dpo_jax.data.records import UnusableError

ROLES = ("system", "developer", "user", "assistant", "tool")
FIRST_ROLES = ("system", "developer")
EXTRAS = ("name", "tool_calls", "tool_call_id")
"""What a message may hold beside role and content; the chat template decides what it makes of it."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; `role` is one of `ROLES`."""

    role: str
    content: str
    extras: str = ""
    """JSON of what else it holds, of `EXTRAS`; empty where it holds nothing else."""

    def as_dict(self) -> dict[str, Any]:
        """Gives the message as a chat template takes it."""
        return {"role": self.role, "content": self.content, **(json.loads(self.extras) if self.extras else {})}


def checked_messages(value: Any, key: str) -> tuple[Message, ...]:
    """Checks a list of messages; raises UnusableError with `key` and the number of the message."""
    if not isinstance(value, list):
        raise UnusableError(f"{key}: expected a list of messages, got {kind_of(value)}")
    messages = []
    for number, item in enumerate(value, 1):
        where = f"{key}, message {number}"
        if not isinstance(item, dict):
            raise UnusableError(f"{where}: expected an object, got {kind_of(item)}")
        role = checked_text(get(item, "role", f"{where}: "), f"{where}, role")
        if role not in ROLES:
            raise UnusableError(f"{where}: the role must be one of {', '.join(ROLES)}")
        extras = {
            name: value
            for name, value in item.items()
            if name not in ("role", "content") and value not in (None, [], "", {})
        }
        # A trap: what a chat template does not know of changes nothing, and the text would be another one in silence.
        if unknown := sorted(extras.keys() - set(EXTRAS)):
            raise UnusableError(f"{where}: holds {unknown[0][:40]!r}, which is not supported")
        if not isinstance(calls := extras.get("tool_calls", []), list):
            raise UnusableError(f"{where}, tool_calls: expected a list, got {kind_of(calls)}")
        content = _content(item.get("content") if extras else get(item, "content", f"{where}: "), extras, where)
        # In the order of the row, which a template writes out.
        messages.append(Message(role, content, _json_of(extras, where) if extras else ""))
    return tuple(messages)


def _content(value: Any, extras: Mapping[str, Any], where: str) -> str:
    """Gives the text of a message, which may come in parts; a message that calls tools may have none."""
    if value is None and "tool_calls" in extras:
        return ""
    if isinstance(value, list):
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in value):
            raise UnusableError(f"{where}, content: holds parts that are no text, which is not supported")
        value = "".join(checked_text(part.get("text"), f"{where}, content") for part in value)
    return checked_text(value, f"{where}, content")


def template_options(row: Mapping[str, Any], prompt: str | tuple[Message, ...]) -> str:
    """Gives JSON of what a row hands to the chat template beside its messages; raises UnusableError for what cannot be.

    A value may be JSON text, as tables keep what has another shape in every row.
    """
    options: dict[str, Any] = {}
    for key, kind in (("tools", list), ("chat_template_kwargs", dict)):
        value = row.get(key)
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise UnusableError(f"{key}: is text, and no JSON") from error
        if value in (None, [], {}):
            continue
        if not isinstance(value, kind):
            raise UnusableError(f"{key}: expected {'a list' if kind is list else 'an object'}, got {kind_of(value)}")
        options[key] = value
    if options and isinstance(prompt, str):
        raise UnusableError(
            f"{next(iter(options))}: a prompt of plain text goes through no chat template; give messages"
        )
    return _json_of(options, " or ".join(options)) if options else ""


def _json_of(value: Any, name: str) -> str:
    try:
        return json.dumps(_without_nulls(value))
    except RecursionError as error:
        raise UnusableError(f"{name}: nested too deeply") from error
    except TypeError as error:  # as a table may hold
        raise UnusableError(f"{name}: holds a date, bytes or another value that JSON lacks; give it as text") from error


def _without_nulls(value: Any) -> Any:
    """Leaves out members that are null: a table gives every object the keys of all others."""
    if isinstance(value, dict):
        return {key: _without_nulls(member) for key, member in value.items() if member is not None}
    return [_without_nulls(member) for member in value] if isinstance(value, list) else value


def checked_id(row: dict, keys: tuple[str, ...], line: int) -> str:
    """Gives the first id that a row has under `keys`, or its 0-based number; raises UnusableError for another type."""
    key = next((key for key in keys if row.get(key) is not None), None)
    if key is None:
        return str(line - 1)
    if isinstance(row[key], bool) or not isinstance(row[key], str | int):
        raise UnusableError(f"{key}: expected text or an integer, got {kind_of(row[key])}")
    return checked_text(str(row[key]), key)


def get(row: dict, key: str, prefix: str = "") -> Any:
    """Gives the value of a key; raises UnusableError where it is missing."""
    if key not in row:
        raise UnusableError(f"{prefix}missing key {key!r}")
    return row[key]


def checked_text(value: Any, name: str) -> str:
    """Checks a text that a tokenizer can encode; raises UnusableError with its name."""
    if not isinstance(value, str):
        raise UnusableError(f"{name}: expected text, got {kind_of(value)}")
    if "\0" in value:
        raise UnusableError(f"{name}: holds a NUL character")
    # A trap: JSON can hold half of a surrogate pair, which no tokenizer can encode.
    if not value.isascii() and re.search("[\ud800-\udfff]", value):
        raise UnusableError(f"{name}: holds a lone surrogate, which is not valid Unicode")
    return value


def kind_of(value: Any) -> str:
    """Names the type of a JSON value, for messages."""
    kinds = {str: "text", dict: "an object", list: "a list", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number" if isinstance(value, int | float) else "another type")
