"""The one place that knows how a file is written whole, how JSON lines are read, and what an output path must be.

A file is written under a temporary name beside its own and renamed: a reader sees the old file, the new one or none,
and never half of one. A process that is killed leaves the temporary name behind and the old file as it was.
"""

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sr_dpo_jax.errors import UsageError

log = logging.getLogger(__name__)

PROBE_BYTES = 1 << 16
SAMPLED, BLOCK_BYTES = 16, 1 << 16
"""The blocks of a large file by which it is told from another, and their size."""


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Gives a temporary name beside `path` to write to, and renames it to `path` when the block ends without an error.

    Several processes may write the same path at once: each has a temporary name of its own, and the last rename stays.
    Works for a directory too, where `path` does not exist. A link stays, and its target is written; a pipe or device
    such as /dev/stdout is written as it comes.
    """
    path = path.resolve()
    if path.exists() and not path.is_file() and not path.is_dir():
        yield path
        return
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        yield temporary
        temporary.rename(path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole, in UTF-8."""
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes a value as indented JSON, whole; letters of every script stay as they are."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def clear_way(path: Path, *, directory: bool = False) -> None:
    """Sets aside a directory that stands where a file is to be written, or what stands in the way of a `directory`."""
    if path.exists() and path.is_dir() != directory:
        aside = path.with_name(f"{path.name}.damaged-{secrets.token_hex(4)}")
        path.rename(aside)
        log.warning("%s: is %s directory; it is kept as %s", path, "no" if directory else "a", aside.name)


def json_digest(value: Any) -> str:
    """Computes the sha256 (hex) of a JSON value; the order of a mapping's keys plays no part."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sampled_digest(path: Path) -> str:
    """Digests the size of a large file and SAMPLED blocks of it, spread evenly: another file differs in nearly each.

    Raises:
      OSError: it cannot be read.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(f"{size} ".encode())
    with path.open("rb") as file:
        for start in sorted({max(size - BLOCK_BYTES, 0) * number // (SAMPLED - 1) for number in range(SAMPLED)}):
            file.seek(start)
            digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()


def lines_of(text: str) -> list[str]:
    """Splits a file of JSON lines into its lines, each with its line feed; the last one may lack it.

    A trap: `str.splitlines` also splits at characters that JSON leaves as they are within a text, such as U+2028.
    """
    return re.findall(r"[^\n]*\n|[^\n]+", text)


def finished_lines(path: Path) -> list[str]:
    """Gives the lines of a file of JSON lines that is appended to.

    A last line that a kill cut short is taken off the file, so that the next one does not stand behind half of it.
    """
    lines = lines_of(path.read_text(encoding="utf-8"))
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
        write_text(path, "".join(lines))
    return lines


def read_lines(path: Path) -> list[Any]:
    """Reads a whole file of JSON lines and returns their values."""
    return [json.loads(line) for line in lines_of(path.read_text(encoding="utf-8"))]


def pairs_file(held_out: str) -> str:
    """Names the file that `sr-dpo eval` writes the pairs of a held-out set to: `eval` → eval_pairs.jsonl, `eval/NAME` →
    eval_pairs_NAME.jsonl."""
    return f"{held_out.replace('eval', 'eval_pairs', 1).replace('/', '_')}.jsonl"


def require_output(path: Path, *, option: str = "--output") -> None:
    """Refuses an output file that cannot be written, before the work that it is for is begun.

    Raises:
      UsageError: the path is a directory, stands in no directory, or may not be written; names the option.
    """
    reason = None
    if path.is_dir():
        reason = "is a directory"
    elif not path.parent.is_dir():
        reason = f"{path.parent} is no directory"
    elif not os.access(path if path.exists() and not path.is_file() else path.resolve().parent, os.W_OK):
        reason = "no permission"
    if reason is not None:
        raise UsageError(f"{option} {path}: cannot be written ({reason}); name a file in an existing directory")


def require_writable(directory: Path) -> None:
    """Makes the directory, and tries in it every call that a run needs of a file system.

    These are making a file that does not exist, writing, syncing, appending, setting its time, renaming a file and a
    directory, and removing both; no links and no locks, which mounted buckets lack.

    Raises:
      UsageError: one of these fails, or the file does not hold what was written; names the call.
    """
    probe, call = directory / f".probe-{secrets.token_hex(8)}", "mkdir"
    inside, renamed = probe / "file", probe.with_suffix(".renamed")
    try:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            probe.mkdir()
            call = "create"
            with inside.open("xb") as file:
                call = "write"
                file.write(b"\0" * PROBE_BYTES)
                call = "fsync"
                file.flush()
                os.fsync(file.fileno())
            call = "append"
            with inside.open("ab") as file:
                file.write(b"\1")
            call = "utime"
            os.utime(inside)
            call = "rename"
            inside.rename(inside.with_name("other"))
            probe.rename(renamed)
            call = "read"
            if (renamed / "other").read_bytes() != b"\0" * PROBE_BYTES + b"\1":
                raise OSError(errno.EIO, "gives back other bytes than were written")
        finally:
            for left in (probe, renamed):
                shutil.rmtree(left, ignore_errors=True)
    except OSError as error:
        raise UsageError(
            f"{directory}: cannot be written ({call}: {error.strerror}); free space, change its permissions, or choose "
            "another output_dir"
        ) from error


def kept_lines(file: Path, keep: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Takes lines off a file, and gives those that stay.

    A last line that a kill cut short is dropped; its step is done again. Damage anywhere else stops no run: the file is
    set aside as it is, with a warning, and its good lines stay.
    """
    if not file.exists():
        return []
    kept, lines, damaged = [], [], False
    with file.open("rb") as opened:
        parts = opened.readlines()
    for number, content in enumerate(parts, 1):
        try:
            line = json.loads(content)
            if keep(line):
                kept.append(content.rstrip(b"\n") + b"\n")  # the last one may have lost its line feed
                lines.append(line)
        except (ValueError, KeyError, TypeError, RecursionError):
            damaged = damaged or number < len(parts) or content.endswith(b"\n")
    if damaged:
        aside = file.with_name(f"{file.name}.damaged-{secrets.token_hex(4)}")
        file.rename(aside)
        log.warning("%s: has damaged lines, which are dropped; the whole file is kept as %s", file, aside.name)
    with whole(file) as temporary:
        temporary.write_bytes(b"".join(kept))
    return lines


def require_room(directory: Path, *, checkpoint_bytes: int, checkpoints: int) -> None:
    """Raises UsageError where a disk has no room for this many more checkpoints, each of `checkpoint_bytes`."""
    free, needed = shutil.disk_usage(directory).free, checkpoint_bytes * checkpoints
    if free < needed:
        raise UsageError(
            f"{directory}: {free / 1e9:.1f} GB are free, and {checkpoints} more checkpoints of "
            f"{checkpoint_bytes / 1e9:.1f} GB will stand there at once; free space, lower checkpoint.keep, or choose "
            "another output_dir"
        )
