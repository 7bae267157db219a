"""Whether a run directory can take what a run will write: asked before the first step, not found out after a day.

Also how its files of lines are read and what its files of held-out pairs are called, for all who write and read them.
"""

import json
import os
import re
import secrets
import shutil
from pathlib import Path
from typing import Any

from sr_dpo_jax.errors import UsageError

PROBE_BYTES = 1 << 16


def lines_of(text: str) -> list[str]:
    """The lines of a file of JSON lines, each with its end; the last one may lack it.

    A trap: `str.splitlines` also splits at characters that JSON leaves as they are within a text, such as U+2028.
    """
    return re.findall(r"[^\n]*\n|[^\n]+", text)


def read_lines(path: Path) -> list[Any]:
    """The values of a file of JSON lines that is whole."""
    return [json.loads(line) for line in lines_of(path.read_text(encoding="utf-8"))]


def pairs_file(held_out: str) -> str:
    """Where `sr-dpo eval` writes the pairs of a set: eval_pairs.jsonl, or eval_pairs_NAME.jsonl of `eval/NAME`."""
    return f"{held_out.replace('eval', 'eval_pairs', 1).replace('/', '_')}.jsonl"


def require_writable(directory: Path) -> None:
    """Makes the directory, and writes, syncs, renames and removes a file in it, as saving will.

    Raises:
      UsageError: one of these fails.
    """
    probe = directory / f".probe-{secrets.token_hex(8)}"
    renamed = probe.with_suffix(".renamed")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            with probe.open("wb") as file:
                file.write(b"\0" * PROBE_BYTES)
                file.flush()
                os.fsync(file.fileno())
            probe.rename(renamed)
        finally:
            probe.unlink(missing_ok=True)
            renamed.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(
            f"{directory}: cannot be written ({error.strerror}); free space, change its permissions, or choose another "
            "output_dir"
        ) from error


def require_room(directory: Path, *, checkpoint_bytes: int, checkpoints: int) -> None:
    """Compares the free space with that of the checkpoints still to come.

    Args:
      directory: where they go; it exists.
      checkpoint_bytes: of one, uncompressed.
      checkpoints: how many more than now will stand there at once.

    Raises:
      UsageError: there is less.
    """
    free, needed = shutil.disk_usage(directory).free, checkpoint_bytes * checkpoints
    if free < needed:
        raise UsageError(
            f"{directory}: {free / 1e9:.1f} GB are free, and {checkpoints} more checkpoints of "
            f"{checkpoint_bytes / 1e9:.1f} GB "
            "will stand there at once; free space, lower checkpoint.keep, or choose another output_dir"
        )
