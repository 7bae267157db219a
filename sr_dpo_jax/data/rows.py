"""Records of a file or data set -> checked pairs, one row at a time.

    hh_rlhf        whole transcripts `chosen`, `rejected`; the prompt runs up to the last "\\n\\nAssistant:"
    ultrafeedback  `prompt`, message lists `chosen`, `rejected`, and their two scores where there are any
    preference     text or messages, with or without `prompt`; each row may have another of these forms
    sft            `messages`, of which the last is the response, or `prompt` and `completion`; text or messages

Each row becomes a `Pair` or a `BadRow`; no row is repaired or silently dropped, and no column that says something.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from sr_dpo_jax.data.messages import (
    FIRST_ROLES,
    Message,
    checked_id,
    checked_messages,
    checked_text,
    get,
    kind_of,
    template_options,
)
from sr_dpo_jax.data.records import BadRow, Record, UnusableError, records_of
from sr_dpo_jax.errors import UsageError

HH_MARKER = "\n\nAssistant:"
RESPONSES = ("chosen", "rejected")
COLUMNS = (
    *("id", "prompt_id", "system", "prompt", *RESPONSES, "completion", "messages", "score_chosen", "score_rejected"),
    *("tools", "chat_template_kwargs"),
)
"""The columns that are read."""
UNREAD = ("question", "instruction", "input", "query", "context", "history", "conversation", "conversations", "images")
"""Columns that are part of the prompt where data has them, under names that are not ours."""


@dataclass(frozen=True)
class Pair:
    """One prompt with two responses, neither of them blank. A response keeps the space it starts with."""

    id: str
    """The row's `id` (in ultrafeedback also `prompt_id`), or its 0-based number where it has none."""
    file: str
    """The path or hub name as given."""
    line: int
    """The 1-based line, or the 1-based row where a file has no lines."""
    prompt: str | tuple[Message, ...]
    """Text, or a conversation that ends with a user or tool message."""
    chosen: str
    rejected: str | None
    """None where there is one response a row, `chosen`, as in `sft`."""
    chosen_score: float | None = None
    rejected_score: float | None = None
    template_options: str = ""
    """JSON of the row's `tools` and `chat_template_kwargs`, which go to the chat template; empty without them."""


@dataclass(frozen=True)
class Naming:
    """The names that a file's columns have, where they are not ours."""

    columns: Mapping[str, str]
    """The file's name of a column by ours."""
    ignored: Sequence[str] = ()
    """Columns of the file that are left unread although they may say something."""

    def picked(self, names: Sequence[str], file: str, format: str) -> list[str]:
        """Picks the columns of a table that are read.

        Raises:
          UsageError: one stands twice, one that the format needs is missing, or one that says something is not read.
        """
        needed = () if FORMATS[format] is _sft else RESPONSES
        for ours in COLUMNS:
            name, count = self.columns.get(ours, ours), names.count(self.columns.get(ours, ours))
            if count > 1 or (count == 0 and (ours in needed or ours in self.columns)):
                there = f"are {count} columns" if count else "is no column"
                raise UsageError(
                    f"{file}: there {there} {name!r}; correct data.path, or set data.columns={{{ours}: its name}}"
                )
        try:
            self._require_read(names)
        except UnusableError as error:
            raise UsageError(f"{file}: {error}") from error
        return [name for ours in COLUMNS if (name := self.columns.get(ours, ours)) in names and self._reads(name, ours)]

    def renamed(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Gives a row its columns under our names; raises UnusableError where one that says something is not read."""
        self._require_read([name for name, value in row.items() if value not in (None, "", [], {})])
        theirs = {ours: self.columns.get(ours, ours) for ours in COLUMNS}
        # A trap: without its prompt the common start of two responses would be taken for one.
        if "prompt" in self.columns and row.get(theirs["prompt"]) is None and row.get(theirs["messages"]) is None:
            raise UnusableError(f"missing key {theirs['prompt']!r}, which data.columns names as the prompt")
        return {ours: row[name] for ours, name in theirs.items() if name in row and self._reads(name, ours)}

    def _reads(self, name: str, ours: str) -> bool:
        return name not in self.ignored and (ours == name or ours in self.columns)

    def _require_read(self, names: Sequence[str]) -> None:
        read = {*self.columns.values(), *self.ignored}
        name = next((name for name in UNREAD if name in names and name not in read), None)
        if name is not None:
            raise UnusableError(
                f"holds {name!r}, which is not read: set data.columns={{prompt: {name}}}, or "
                f"data.ignored_columns=[{name}] where it says nothing"
            )


OUR_NAMES = Naming({})


def read_rows(
    path: str, *, format: str, split: str, revision: str | None = None, naming: Naming = OUR_NAMES
) -> Iterator[Pair | BadRow]:
    """Reads one file or data set as a stream, each row once, in order.

    Args:
      path: one of `records.files_of`.
      format: one of `FORMATS`.
      split: the split of a directory or hub data set; files have none.
      revision: the branch, tag or commit of a hub name.
      naming: the names of its columns.

    Returns:
      An iterator of `Pair` and `BadRow`. Blank lines at the end of a file are ignored; one before the last row is bad.

    Raises:
      UsageError: at the call, for an unknown format or a path that cannot be a source; from the iterator, for a file
        or data set that cannot be read to its end, such as a truncated gzip file.
    """
    if format not in FORMATS:
        raise UsageError(f"data.format={format!r} is not known; choose one of {', '.join(FORMATS)}")
    picked = partial(naming.picked, file=path, format=format)
    return _checked(records_of(path, split=split, revision=revision, columns=picked), path, format, naming)


def _checked(records: Iterator[Record], file: str, format: str, naming: Naming) -> Iterator[Pair | BadRow]:
    for line, row in records:
        if isinstance(row, BadRow):
            yield row
            continue
        try:
            if not isinstance(row, dict):
                raise UnusableError(f"expected an object, got {kind_of(row)}")
            row = naming.renamed(row)
            prompt, chosen, rejected = FORMATS[format](row)
            for side, response in (("chosen", chosen), ("rejected", rejected)):
                if response is not None and not response.strip():
                    raise UnusableError(f"empty {side} response")
            prompt, options = after_system(row.get("system"), prompt), template_options(row, prompt)
            scores = _scores(row) if FORMATS[format] in (_ultrafeedback, _preference) else (None, None)
            row_id = checked_id(row, ("id", "prompt_id") if format == "ultrafeedback" else ("id",), line)
            yield Pair(row_id, file, line, prompt, chosen, rejected, *scores, options)
        except UnusableError as error:
            yield BadRow(file, line, str(error))


def after_system(system: Any, prompt: str | tuple[Message, ...]) -> str | tuple[Message, ...]:
    """Puts the text of a column `system` before a conversation, which must have no system message of its own."""
    if system in (None, ""):
        return prompt
    checked_text(system, "system")
    if isinstance(prompt, str):
        raise UnusableError(
            "system: a prompt of plain text has no place for it; give messages, or set data.ignored_columns=[system]"
        )
    if prompt[0].role in FIRST_ROLES:
        if prompt[0].content != system:
            raise UnusableError("system: the conversation has another system message of its own")
        return prompt
    return Message("system", system), *prompt


def _hh_rlhf(row: dict) -> tuple[str, str, str]:
    (prompt, chosen), (other, rejected) = (_transcript(row, side) for side in ("chosen", "rejected"))
    if prompt != other:
        raise UnusableError("the prompts of chosen and rejected differ")
    return prompt, chosen, rejected


def _transcript(row: dict, side: str) -> tuple[str, str]:
    if isinstance(get(row, side), list):
        raise UnusableError(f"{side}: expected a transcript, got a list; messages need data.format=preference")
    head, marker, response = checked_text(row[side], side).rpartition(HH_MARKER)
    if not marker:
        raise UnusableError(f'{side} holds no "\\n\\nAssistant:"; text without it needs data.format=preference')
    return head + marker, response


def _ultrafeedback(row: dict) -> tuple[tuple[Message, ...], str, str]:
    checked_text(get(row, "prompt"), "prompt")
    return _two_conversations(row)


def _preference(row: dict) -> tuple[str | tuple[Message, ...], str, str]:
    prompt, chosen, rejected = row.get("prompt"), get(row, "chosen"), get(row, "rejected")
    if isinstance(chosen, list) != isinstance(rejected, list):
        raise UnusableError(f"chosen is {kind_of(chosen)} but rejected is {kind_of(rejected)}")
    if isinstance(chosen, list):
        return _two_conversations(row) if prompt is None else _explicit_messages(prompt, chosen, rejected)
    chosen, rejected = checked_text(chosen, "chosen"), checked_text(rejected, "rejected")
    if prompt is None:
        if row.get("messages") is not None:
            raise UnusableError(
                "messages: is not read beside two texts; give prompt, chosen and rejected as messages, or set "
                "data.ignored_columns=[messages] where it says nothing"
            )
        return _implicit_text(chosen, rejected)
    return checked_text(prompt, "prompt"), chosen, rejected


def _explicit_messages(
    prompt: Any, chosen: list, rejected: list, *, names: tuple[str, str] = RESPONSES
) -> tuple[tuple[Message, ...], str, str]:
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
        if len(chosen) > 1 or len(rejected) > 1:  # whole conversations, in which the prompt stands too
            pair = _two_conversations({"chosen": chosen, "rejected": rejected})
            if prompt[0]["content"] not in [message.content for message in pair[0] if message.role == "user"]:
                raise UnusableError("prompt: is no user message of the conversations in chosen and rejected")
            return pair
    messages, responses = _prompt(checked_messages(prompt, "prompt")), []
    for side, value in zip(names, (chosen, rejected), strict=True):
        response = checked_messages(value, side)
        if len(response) != 1 or response[0].role != "assistant":
            raise UnusableError(f"{side}: expected exactly one assistant message after an explicit prompt")
        responses.append(_response(response[0], side))
    return messages, *responses


def _response(message: Message, side: str) -> str:
    if message.extras:
        raise UnusableError(f"{side}: a response that calls tools, or has a name, is not supported")
    return message.content


def _two_conversations(row: dict) -> tuple[tuple[Message, ...], str, str]:
    """Splits two whole conversations, which must agree in all but their last messages: those are the responses."""
    chosen, rejected = (checked_messages(get(row, side), side) for side in ("chosen", "rejected"))
    for side, conversation in (("chosen", chosen), ("rejected", rejected)):
        if not conversation or conversation[-1].role != "assistant":
            raise UnusableError(f"{side}: the last message must be the assistant's")
    if chosen[:-1] != rejected[:-1]:
        raise UnusableError("the prompts of chosen and rejected differ")
    return _prompt(chosen[:-1]), _response(chosen[-1], "chosen"), _response(rejected[-1], "rejected")


def _implicit_text(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Ends the prompt before the last run of whitespace within the shared text that leaves both sides a response.

    A trap: a cut after the last shared character would end the prompt inside a word ("A ca" + "t" or "r"), which no
    model is ever asked to continue, and would leave no response where one side is the start of the other.
    """
    shared = len(os.path.commonprefix([chosen, rejected]))  # noqa: RUF071 texts, not paths
    for space in reversed(list(re.finditer(r"\s+", chosen[: shared + 1]))):
        cut = space.start()
        parts = chosen[:cut], chosen[cut:], rejected[cut:]
        if rejected[cut : cut + 1].isspace() and all(part.strip() for part in parts):
            return parts
    raise UnusableError("chosen and rejected share no first word: give an explicit prompt")


def _sft(row: dict) -> tuple[str | tuple[Message, ...], str, None]:
    """Splits a conversation before its last message, or takes prompt and completion."""
    if row.get("messages") is not None:
        if any(row.get(name) is not None for name in ("prompt", "completion")):
            raise UnusableError("messages: stands beside prompt or completion; give one form")
        conversation = checked_messages(row["messages"], "messages")
        if not conversation or conversation[-1].role != "assistant":
            raise UnusableError("messages: the last message must be the assistant's")
        return _prompt(conversation[:-1]), _response(conversation[-1], "messages"), None
    if any(row.get(name) is not None for name in RESPONSES):
        raise UnusableError("holds two responses: set data.format=preference, of which sft takes the chosen one")
    prompt, completion = get(row, "prompt"), get(row, "completion")
    if isinstance(completion, list):
        messages, response, _ = _explicit_messages(prompt, completion, completion, names=("completion",) * 2)
        return messages, response, None
    return checked_text(prompt, "prompt"), checked_text(completion, "completion"), None


FORMATS = {"hh_rlhf": _hh_rlhf, "ultrafeedback": _ultrafeedback, "preference": _preference, "sft": _sft}
"""The function that splits a row into prompt, chosen and rejected, for each `data.format`."""


def _prompt(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    roles = [message.role for message in messages]
    if "user" not in roles:
        raise UnusableError("the prompt holds no user message")
    if roles[-1] not in ("user", "tool"):
        raise UnusableError("the prompt must end with a user or tool message")
    if any(role in FIRST_ROLES for role in roles[1:]):
        raise UnusableError("a system message stands after the first message")
    return messages


NUMBER = re.compile(r"[-+]?\d{1,30}(\.\d*)?([eE][-+]?\d{1,3})?")


def _scores(row: dict) -> tuple[float | None, float | None]:
    scores = []
    for key in ("score_chosen", "score_rejected"):
        value = row.get(key)
        if isinstance(value, str) and NUMBER.fullmatch(value):  # a CSV file has text alone
            value = float(value)
        if value is None:
            scores.append(None)
        elif isinstance(value, bool) or not isinstance(value, int | float):
            raise UnusableError(f"{key}: expected a number, got {kind_of(value)}")
        elif not abs(value) <= 1e38:  # scores are kept in float32, whose largest is 3.4e38; NaN is refused too
            raise UnusableError(f"{key}: not a finite number of ordinary size")
        else:
            scores.append(float(value))
    return scores[0], scores[1]
