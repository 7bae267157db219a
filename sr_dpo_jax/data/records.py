"""Files, directories and hub data sets -> numbered records, as they stand there; `rows.py` makes pairs of them.

    .jsonl, .json          JSON lines, or in .json one array; compressed with .gz, .bz2 or .zst
    .csv                   text columns under a line of names
    .parquet               every column
    a directory            its data files, each read by itself; a data set as `datasets` saved it; or what
                           `datasets.load_dataset` makes of it
    owner/name             a data set of the hub

No code that comes with data is run.
"""

import codecs
import contextlib
import csv
import glob
import hashlib
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, NoReturn

import pyarrow
import pyarrow.parquet

from sr_dpo_jax.errors import UsageError

COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
"""The names by which pyarrow knows the compression of a file with this end."""
JSON_ENDS = tuple(end + more for end in (".jsonl", ".json") for more in ("", *COMPRESSED))
FILE_ENDS = (*JSON_ENDS, ".csv", ".parquet")
MOST_JSON_BYTES = 2**31
"""The most bytes of a .json file that is one array, as it is read at once."""
Record = tuple[int, Any]
"""The 1-based line, or row where there are no lines, and the row: a `BadRow` where it could not be parsed."""


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used. The reason holds none of its text, because reasons end up in logs and bug reports."""

    file: str
    line: int
    reason: str


class UnusableError(Exception):
    """The reason why a row cannot be used. Readers of rows catch it and make it a `BadRow` or a line of their error."""


def files_of(path: str, *, split: str, revision: str | None = None) -> list[str]:
    """Lists what a source is read from: the files of a glob pattern or directory, or the path itself.

    A directory is read file by file, in the order of their names, where all files of its split are of known kinds; so
    a bad row is named by file and line. Another directory, and a hub name, is one data set.

    Raises:
      UsageError: nothing is there, or it is no known kind of file.
    """
    place = os.path.expanduser(path)
    if revision is None and glob.has_magic(place) and not os.path.exists(place):
        found = sorted(name for name in glob.glob(place, recursive=True) if os.path.isfile(name))
        if not found:
            raise UsageError(f"{path}: no file matches; correct data.path (it is relative to where you run)")
        for name in found:
            _is_file(name, None)
        return found
    if os.path.isdir(place) and revision is None and not _saved_by_datasets(place):
        return _split_files(place, split) or [place]
    return [place]


def records_of(
    path: str, *, split: str, revision: str | None = None, columns: Callable[[Sequence[str]], list[str]]
) -> Iterator[Record]:
    """Reads a file, directory or hub data set as a stream of records, each once, in order.

    Args:
      path: one of `files_of`.
      split: the split of a directory or hub data set; files have none.
      revision: the branch, tag or commit of a hub name.
      columns: picks from the columns of a table those that are read; refuses by UsageError.

    Raises:
      UsageError: at the call, where the path cannot be a source; from the iterator, for a file or data set that cannot
        be read to its end, such as a truncated gzip file.
    """
    if not _is_file(path, revision):
        return _table_records(path, split, revision, columns)
    if path.endswith(".parquet"):
        return _parquet_records(path, columns)
    return _csv_records(path, columns) if path.endswith(".csv") else json_records(path)


def content_digest(path: str, *, split: str, revision: str | None = None) -> str:
    """Computes the sha256 (hex) of the bytes of the files of a source, or of the rows of a data set.

    Raises:
      UsageError: as in `records_of`.
    """
    digests = [
        digest_of(name, split=split, revision=revision) for name in files_of(path, split=split, revision=revision)
    ]
    return digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()


def digest_of(path: str, *, split: str, revision: str | None = None) -> str:
    """Computes the sha256 (hex) of one of `files_of`; arguments and errors as in `content_digest`."""
    if _is_file(path, revision):
        try:
            with open(path, "rb") as data:
                return hashlib.file_digest(data, "sha256").hexdigest()
        except OSError as error:
            _cannot_read(path, error)
    digest = hashlib.sha256()
    for _, row in _table_records(path, split, revision, list):
        digest.update(json.dumps(row, sort_keys=True, default=repr).encode() + b"\n")
    return digest.hexdigest()


def kind_of_file(path: str) -> str:
    """Gives the end of a file's name, which decides how it is read; empty for a data set."""
    return next((end for end in FILE_ENDS if path.endswith(end)), "")


def _is_file(file: str, revision: str | None) -> bool:
    """Tells an existing file from a directory or a possible hub name."""
    if os.path.exists(file):
        if not os.path.isdir(file) and not file.endswith(FILE_ENDS):
            raise UsageError(f"{file}: not a known kind of file; data.path takes {', '.join(FILE_ENDS)}")
        if revision is not None:
            raise UsageError(f"{file}: revision={revision!r} pins a hub name, but this is on disk; remove the revision")
        return not os.path.isdir(file)
    if file.endswith(FILE_ENDS) or file.startswith(("/", "./", "../")):
        raise UsageError(f"{file}: no such file or directory; correct data.path (it is relative to where you run)")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", file):
        raise UsageError(f"{file}: neither an existing file nor a hub name like owner/name; correct data.path")
    return False


def _saved_by_datasets(directory: str) -> str | None:
    """Names the file that tells a data set, or several by split, as `save_to_disk` writes them; None elsewhere."""
    marks = ("dataset_dict.json", "state.json")
    return next((mark for mark in marks if os.path.isfile(os.path.join(directory, mark))), None)


def _split_files(directory: str, split: str) -> list[str] | None:
    """Lists the files of a directory's split as `datasets` finds them; None where it would not read them one by one."""
    if os.path.isfile(os.path.join(directory, "README.md")):  # it may say which files make up which data set
        return None
    from datasets import data_files  # takes seconds, which a run on plain files is spared

    try:
        base = glob.escape(directory)  # in which `datasets` looks for patterns
        patterns = data_files.get_data_patterns(base)
        found = data_files.DataFilesDict.from_patterns(patterns, base_path=base).get(split, [])
    except (OSError, ValueError):  # no data files: what reads the directory as a whole says so
        return None
    known = sorted(str(name) for name in found if str(name).endswith(FILE_ENDS))
    if 0 < len(known) < len(found):  # `datasets` would read one kind of them and leave the others out
        other = next(str(name) for name in found if str(name) not in known)
        raise UsageError(
            f"{directory}: {other} is not a known kind of file; name those to read, as by {directory}/*"
            f"{os.path.splitext(known[0])[1]}"
        )
    return known or None


def _cannot_read(file: str, error: OSError) -> NoReturn:
    raise UsageError(f"{file}: cannot be read ({error.strerror or type(error).__name__})") from error


@contextlib.contextmanager
def _opened(file: str) -> Iterator[BinaryIO]:
    """Opens a file for reading, unpacks it and leaves out a byte order mark; a file that ends early is a UsageError."""
    compression = next((name for end, name in COMPRESSED.items() if file.endswith(end)), None)
    try:
        with contextlib.ExitStack() as stack:
            data: Any = stack.enter_context(open(file, "rb"))
            if compression is not None:
                data = stack.enter_context(pyarrow.CompressedInputStream(data, compression))
                data = io.BufferedReader(data)
            if data.peek(len(codecs.BOM_UTF8)).startswith(codecs.BOM_UTF8):
                data.read(len(codecs.BOM_UTF8))
            yield data
    except (EOFError, zlib.error, pyarrow.ArrowException) as error:
        raise UsageError(f"{file}: truncated or corrupt {compression} data; fetch or compress it again") from error
    except OSError as error:
        if compression is not None and error.strerror is None:  # as pyarrow says that data is corrupt
            raise UsageError(f"{file}: truncated or corrupt {compression} data; fetch or compress it again") from error
        _cannot_read(file, error)


def json_records(file: str) -> Iterator[Record]:
    """Yields number and value of each line of a file of JSON lines, a `BadRow` for one that cannot be parsed.

    A .json file may hold one array instead, whose entries are numbered.

    Raises:
      UsageError: the file cannot be read to its end.
    """
    last = 0
    with _opened(file) as lines:
        if any(file.endswith((".json", f".json{end}")) for end in COMPRESSED) and _begins_an_array(lines):
            yield from enumerate(_array(file, lines.read(MOST_JSON_BYTES + 1)), 1)
            return
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


def _begins_an_array(lines: Any) -> bool:
    return lines.peek(4096).lstrip()[:1] == b"["


def _array(file: str, data: bytes) -> list[Any]:
    if len(data) > MOST_JSON_BYTES:
        raise UsageError(f"{file}: an array of more than {MOST_JSON_BYTES:,} bytes; write it as JSON lines")
    try:
        rows = _parse(data)
    except UnusableError as error:
        raise UsageError(f"{file}: {error}, in an array; correct it, or write JSON lines, read one by one") from error
    return rows


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


def _csv_records(file: str, columns: Callable[[Sequence[str]], list[str]]) -> Iterator[Record]:
    """Yields the 1-based line on which each row ends, and its texts by column; an empty one is null."""
    csv.field_size_limit(MOST_JSON_BYTES - 1)  # of all readers; a transcript may be longer than the default
    with _opened(file) as data:
        rows = csv.reader(io.TextIOWrapper(data, "utf-8", newline=""), strict=True)
        try:
            names = next(rows, [])
            kept, blank = columns(names), []
            for row in rows:
                if not row:
                    blank.append(rows.line_num)
                    continue
                yield from ((line, BadRow(file, line, "blank line")) for line in blank)
                blank = []
                if len(row) != len(names):
                    yield rows.line_num, BadRow(file, rows.line_num, f"{len(row)} fields under {len(names)} names")
                    continue
                named = dict(zip(names, row, strict=True))
                yield rows.line_num, {name: named[name] or None for name in kept}
        except (csv.Error, UnicodeDecodeError) as error:
            reason = "bad UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
            where = f"{file}: not a sound CSV file near line {rows.line_num}"
            raise UsageError(f"{where} ({reason}); write it again") from error


def _parquet_records(file: str, columns: Callable[[Sequence[str]], list[str]]) -> Iterator[Record]:
    line = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=1024, columns=columns(table.schema_arrow.names)):
                for row in batch.to_pylist():
                    line += 1
                    yield line, row
    except (pyarrow.ArrowException, ValueError, OverflowError, LookupError) as error:  # no UTF-8, no date or time zone
        raise UsageError(f"{file}: not a sound parquet file, after row {line}; fetch or write it again") from error
    except OSError as error:
        _cannot_read(file, error)


def _table_records(
    name: str, split: str, revision: str | None, columns: Callable[[Sequence[str]], list[str]]
) -> Iterator[Record]:
    import datasets  # takes seconds, which a run on plain files is spared

    try:
        saved = _saved_by_datasets(name) if os.path.isdir(name) else None
        if saved is None:
            table = datasets.load_dataset(name, split=split, revision=revision)
        else:
            table = datasets.load_from_disk(name)
            if saved == "dataset_dict.json" and split not in table:
                raise UsageError(f"{name}: has no split {split!r}, but {', '.join(table)}; correct data.split")
            table = table[split] if saved == "dataset_dict.json" else table
    except datasets.exceptions.DatasetGenerationError as error:
        # A trap: the error's text may quote the data, so it is left out.
        raise UsageError(f"{name}: its files cannot be read as one data set; check that they are sound") from error
    except (LookupError, TypeError) as error:  # facts of a saved data set that are not as `datasets` writes them
        raise UsageError(
            f"{name}: is damaged or no data set as `datasets` saves it ({type(error).__name__}); save it there again"
        ) from error
    except (datasets.exceptions.DatasetsError, pyarrow.ArrowException, OSError, ValueError, RuntimeError) as error:
        first_line = str(error).partition("\n")[0]
        raise UsageError(f"{name}, split {split!r}: cannot be loaded as a data set: {first_line}") from error
    table = table.select_columns(columns(table.column_names))
    rows = (
        dict(zip(batch, row, strict=True)) for batch in table.iter(1024) for row in zip(*batch.values(), strict=True)
    )
    yield from enumerate(rows, 1)
