"""A preference file or hub data set -> checked pairs, one row at a time.

    hh_rlhf        whole transcripts `chosen`, `rejected`; the prompt runs up to the last "\\n\\nAssistant:"
    ultrafeedback  `prompt`, message lists `chosen`, `rejected`, and their two scores (the binarized release)
    preference     text or messages, with or without `prompt`; each row may have another of these forms

Each row becomes a `Pair` or a `BadRow`; no row is repaired or silently dropped.
"""

import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import pyarrow
import pyarrow.parquet

from sr_dpo_jax.errors import UsageError

FILE_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
ROLES = ("system", "user", "assistant", "tool")
HH_MARKER = "\n\nAssistant:"
COLUMNS = ("id", "prompt_id", "prompt", "chosen", "rejected", "score_chosen", "score_rejected")
"""The columns that are read. The digest of a hub data set covers these alone."""


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; `role` is one of `ROLES`."""

    role: str
    content: str


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
    rejected: str
    chosen_score: float | None = None
    rejected_score: float | None = None


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used. The reason holds none of its text, because reasons end up in logs and bug reports."""

    file: str
    line: int
    reason: str


class UnusableError(Exception):
    """The reason why a row cannot be used. Readers of rows catch it and make it a `BadRow` or a line of their error."""


def read_rows(path: str, *, format: str, split: str, revision: str | None = None) -> Iterator[Pair | BadRow]:
    """Reads one source as a stream, each row once, in order.

    Args:
      path: a .jsonl, .jsonl.gz or .parquet file, or a directory or hub name ("owner/name") that
        `datasets.load_dataset` reads. No code that comes with the data is run.
      format: one of `FORMATS`.
      split: the split of a directory or hub data set; files have none.
      revision: the branch, tag or commit of a hub name.

    Returns:
      An iterator of `Pair` and `BadRow`. Blank lines at the end of a file are ignored; one before the last row is bad.

    Raises:
      UsageError: at the call, for an unknown format or a path that cannot be a source; from the iterator, for a file
        or data set that cannot be read to its end, such as a truncated gzip file.
    """
    if format not in FORMATS:
        raise UsageError(f"data.format={format!r} is not known; choose one of {', '.join(FORMATS)}")
    if not _is_file(path, revision):
        records = _hub_records(path, split, revision)
    elif path.endswith(".parquet"):
        records = _parquet_records(path)
    else:
        records = json_records(path)
    return _checked(records, path, format)


def content_digest(path: str, *, split: str, revision: str | None = None) -> str:
    """Computes the sha256 (hex) of the bytes of a file, or of the rows of a directory or hub data set.

    Raises:
      UsageError: as in `read_rows`.
    """
    if _is_file(path, revision):
        try:
            with open(path, "rb") as data:
                return hashlib.file_digest(data, "sha256").hexdigest()
        except OSError as error:
            _cannot_read(path, error)
    digest = hashlib.sha256()
    for _, row in _hub_records(path, split, revision):
        digest.update(json.dumps(row, sort_keys=True, default=repr).encode() + b"\n")
    return digest.hexdigest()


def _is_file(file: str, revision: str | None) -> bool:
    """Tells an existing file from a directory or a possible hub name."""
    if os.path.exists(file):
        if not os.path.isdir(file) and not file.endswith(FILE_SUFFIXES):
            raise UsageError(f"{file}: not a known kind of file; data.path takes {', '.join(FILE_SUFFIXES)}")
        if revision is not None:
            raise UsageError(f"{file}: revision={revision!r} pins a hub name, but this is on disk; remove the revision")
        return not os.path.isdir(file)
    if file.endswith(FILE_SUFFIXES) or file.startswith(("/", "./", "../", "~")):
        raise UsageError(f"{file}: no such file or directory; correct data.path (it is relative to where you run)")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", file):
        raise UsageError(f"{file}: neither an existing file nor a hub name like owner/name; correct data.path")
    return False


def _cannot_read(file: str, error: OSError) -> NoReturn:
    raise UsageError(f"{file}: cannot be read ({error.strerror or type(error).__name__})") from error


# Records: (1-based line, row), where the row is a BadRow if the line could not be parsed.


def json_records(file: str) -> Iterator[tuple[int, Any]]:
    """Yields number and value of each line of a .jsonl or .jsonl.gz file, a `BadRow` for one that cannot be parsed.

    Raises:
      UsageError: the file cannot be read to its end.
    """
    last = 0
    try:
        with (gzip.open if file.endswith(".gz") else open)(file, "rb") as lines:
            for line, data in enumerate(lines, 1):
                if not data.strip():
                    continue
                for blank in range(last + 1, line):
                    yield blank, BadRow(file, blank, "blank line")
                last = line
                try:
                    yield line, _parse(data.rstrip(b"\r\n"))
                except UnusableError as error:
                    yield line, BadRow(file, line, str(error))
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UsageError(f"{file}: truncated or corrupt gzip data; fetch or compress the file again") from error
    except OSError as error:
        _cannot_read(file, error)


def _parse(data: bytes) -> Any:
    if b"\0" in data:
        raise UnusableError(f"NUL byte at byte {data.index(0) + 1} of the line")
    try:
        return json.loads(data.decode(), parse_constant=_refuse_constant, object_pairs_hook=_each_key_once)
    except UnicodeDecodeError as error:
        raise UnusableError(f"bad UTF-8 at byte {error.start + 1} of the line") from error
    except json.JSONDecodeError as error:
        raise UnusableError(f"bad JSON: {error.msg.rstrip(': ')} at column {error.colno}") from error
    except RecursionError as error:
        raise UnusableError("bad JSON: nested too deeply") from error
    except ValueError as error:  # Python refuses to convert integers of thousands of digits
        raise UnusableError("bad JSON: a number has too many digits") from error


def _each_key_once(members: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(members)) < len(members):
        raise UnusableError("bad JSON: an object has a key twice")
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise UnusableError(f"bad JSON: {name} is not JSON")


def _parquet_records(file: str) -> Iterator[tuple[int, Any]]:
    line = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            columns = _columns(table.schema_arrow.names, file)
            for batch in table.iter_batches(batch_size=1024, columns=columns):
                for row in batch.to_pylist():
                    line += 1
                    yield line, row
    except (pyarrow.ArrowException, ValueError, OverflowError, LookupError) as error:  # no UTF-8, no date or time zone
        raise UsageError(f"{file}: not a sound parquet file, after row {line}; fetch or write it again") from error
    except OSError as error:
        _cannot_read(file, error)


def _hub_records(name: str, split: str, revision: str | None) -> Iterator[tuple[int, Any]]:
    import datasets  # takes seconds, which a run on plain files is spared

    try:
        table = datasets.load_dataset(name, split=split, revision=revision)
    except datasets.exceptions.DatasetGenerationError as error:
        # A trap: the error's text may quote the data, so it is left out.
        raise UsageError(f"{name}: its files cannot be read as one data set; check that they are sound") from error
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError) as error:
        first_line = str(error).partition("\n")[0]
        raise UsageError(f"{name}, split {split!r}: cannot be loaded as a data set: {first_line}") from error
    table = table.select_columns(_columns(table.column_names, name))
    rows = (
        dict(zip(batch, row, strict=True)) for batch in table.iter(1024) for row in zip(*batch.values(), strict=True)
    )
    yield from enumerate(rows, 1)


def _columns(names: list[str], file: str) -> list[str]:
    for name in COLUMNS:
        if (count := names.count(name)) > 1 or (count == 0 and name in ("chosen", "rejected")):
            there = f"are {count} columns" if count else "is no column"
            raise UsageError(f"{file}: there {there} {name!r}; correct data.path or rename it")
    return [name for name in COLUMNS if name in names]


def _checked(records: Iterator[tuple[int, Any]], file: str, format: str) -> Iterator[Pair | BadRow]:
    for line, row in records:
        if isinstance(row, BadRow):
            yield row
            continue
        try:
            if not isinstance(row, dict):
                raise UnusableError(f"expected an object, got {_kind(row)}")
            prompt, chosen, rejected = FORMATS[format](row)
            for side, response in (("chosen", chosen), ("rejected", rejected)):
                if not response.strip():
                    raise UnusableError(f"empty {side} response")
            scores = (None, None) if format == "hh_rlhf" else _scores(row, required=format == "ultrafeedback")
            row_id = checked_id(row, ("id", "prompt_id") if format == "ultrafeedback" else ("id",), line)
            yield Pair(row_id, file, line, prompt, chosen, rejected, *scores)
        except UnusableError as error:
            yield BadRow(file, line, str(error))


def _hh_rlhf(row: dict) -> tuple[str, str, str]:
    (prompt, chosen), (other, rejected) = (_transcript(row, side) for side in ("chosen", "rejected"))
    if prompt != other:
        raise UnusableError("the prompts of chosen and rejected differ")
    return prompt, chosen, rejected


def _transcript(row: dict, side: str) -> tuple[str, str]:
    head, marker, response = checked_text(_get(row, side), side).rpartition(HH_MARKER)
    if not marker:
        raise UnusableError(f'{side} holds no "\\n\\nAssistant:"')
    return head + marker, response


def _ultrafeedback(row: dict) -> tuple[tuple[Message, ...], str, str]:
    checked_text(_get(row, "prompt"), "prompt")
    return _two_conversations(row)


def _preference(row: dict) -> tuple[str | tuple[Message, ...], str, str]:
    prompt, chosen, rejected = row.get("prompt"), _get(row, "chosen"), _get(row, "rejected")
    if isinstance(chosen, list) != isinstance(rejected, list):
        raise UnusableError(f"chosen is {_kind(chosen)} but rejected is {_kind(rejected)}")
    if isinstance(chosen, list):
        return _two_conversations(row) if prompt is None else _explicit_messages(prompt, chosen, rejected)
    chosen, rejected = checked_text(chosen, "chosen"), checked_text(rejected, "rejected")
    if prompt is None:
        return _implicit_text(chosen, rejected)
    return checked_text(prompt, "prompt"), chosen, rejected


def _explicit_messages(prompt: Any, chosen: list, rejected: list) -> tuple[tuple[Message, ...], str, str]:
    if isinstance(prompt, str):
        raise UnusableError(
            "prompt is text but the responses are lists: give a list of messages, or set data.format=ultrafeedback"
        )
    messages, responses = _prompt(checked_messages(prompt, "prompt")), []
    for side, value in (("chosen", chosen), ("rejected", rejected)):
        response = checked_messages(value, side)
        if len(response) != 1 or response[0].role != "assistant":
            raise UnusableError(f"{side}: expected exactly one assistant message after an explicit prompt")
        responses.append(response[0].content)
    return messages, *responses


def _two_conversations(row: dict) -> tuple[tuple[Message, ...], str, str]:
    """Splits two whole conversations, which must agree in all but their last messages: those are the responses."""
    chosen, rejected = (checked_messages(_get(row, side), side) for side in ("chosen", "rejected"))
    for side, conversation in (("chosen", chosen), ("rejected", rejected)):
        if not conversation or conversation[-1].role != "assistant":
            raise UnusableError(f"{side}: the last message must be the assistant's")
    if chosen[:-1] != rejected[:-1]:
        raise UnusableError("the prompts of chosen and rejected differ")
    return _prompt(chosen[:-1]), chosen[-1].content, rejected[-1].content


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


FORMATS = {"hh_rlhf": _hh_rlhf, "ultrafeedback": _ultrafeedback, "preference": _preference}
"""The function that splits a row into prompt, chosen and rejected, for each `data.format`."""


def _prompt(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    roles = [message.role for message in messages]
    if "user" not in roles:
        raise UnusableError("the prompt holds no user message")
    if roles[-1] not in ("user", "tool"):
        raise UnusableError("the prompt must end with a user or tool message")
    if "system" in roles[1:]:
        raise UnusableError("a system message stands after the first message")
    return messages


def checked_messages(value: Any, key: str) -> tuple[Message, ...]:
    """Checks a list of messages; raises UnusableError with `key` and the number of the message."""
    if not isinstance(value, list):
        raise UnusableError(f"{key}: expected a list of messages, got {_kind(value)}")
    messages = []
    for number, item in enumerate(value, 1):
        where = f"{key}, message {number}"
        if not isinstance(item, dict):
            raise UnusableError(f"{where}: expected an object, got {_kind(item)}")
        role = checked_text(_get(item, "role", f"{where}: "), f"{where}, role")
        if role not in ROLES:
            raise UnusableError(f"{where}: the role must be one of {', '.join(ROLES)}")
        content = checked_text(_get(item, "content", f"{where}: "), f"{where}, content")
        # A trap: tool calls and the like change what a chat template writes; without them it would be another text.
        if any(item[name] not in (None, [], "") for name in item.keys() - {"role", "content"}):
            raise UnusableError(f"{where}: holds more than role and content, which is not supported")
        messages.append(Message(role, content))
    return tuple(messages)


def _scores(row: dict, *, required: bool) -> tuple[float | None, float | None]:
    scores = []
    for key in ("score_chosen", "score_rejected"):
        value = _get(row, key) if required else row.get(key)
        if value is None and not required:
            scores.append(None)
        elif isinstance(value, bool) or not isinstance(value, int | float):
            raise UnusableError(f"{key}: expected a number, got {_kind(value)}")
        elif not abs(value) <= 1e38:  # scores are kept in float32, whose largest is 3.4e38; NaN is refused too
            raise UnusableError(f"{key}: not a finite number of ordinary size")
        else:
            scores.append(float(value))
    return scores[0], scores[1]


def checked_id(row: dict, keys: tuple[str, ...], line: int) -> str:
    """Gives the first id that a row has under `keys`, or its 0-based number; raises UnusableError for another type."""
    key = next((key for key in keys if row.get(key) is not None), None)
    if key is None:
        return str(line - 1)
    if isinstance(row[key], bool) or not isinstance(row[key], str | int):
        raise UnusableError(f"{key}: expected text or an integer, got {_kind(row[key])}")
    return checked_text(str(row[key]), key)


def _get(row: dict, key: str, prefix: str = "") -> Any:
    if key not in row:
        raise UnusableError(f"{prefix}missing key {key!r}")
    return row[key]


def checked_text(value: Any, name: str) -> str:
    """Checks a text that a tokenizer can encode; raises UnusableError with its name."""
    if not isinstance(value, str):
        raise UnusableError(f"{name}: expected text, got {_kind(value)}")
    if "\0" in value:
        raise UnusableError(f"{name}: holds a NUL character")
    # A trap: JSON can hold half of a surrogate pair, which no tokenizer can encode.
    if not value.isascii() and re.search("[\ud800-\udfff]", value):
        raise UnusableError(f"{name}: holds a lone surrogate, which is not valid Unicode")
    return value


def _kind(value: Any) -> str:
    kinds = {str: "text", dict: "an object", list: "a list", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number" if isinstance(value, int | float) else "another type")
