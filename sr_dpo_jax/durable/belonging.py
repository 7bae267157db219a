"""Whether a checkpoint belongs where it stands: what it holds is compared with its name and with the run around it."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sr_dpo_jax.durable.files import json_digest
from sr_dpo_jax.errors import UsageError

DELETED = (
    "was deleted while it was read, by a run that keeps only its newest checkpoints; run this again, which takes a "
    "newer one, or raise checkpoint.keep"
)


def run_id_of(root: Path) -> str | None:
    """Reads the id that a run keeps wherever it is moved: drawn at its first start, in its manifest since.

    None where there is none, or where a flipped bit has made it another one: its steps tell.
    """
    try:
        manifest = json.loads((root / "manifest.json").read_text(encoding="utf-8"))
        run_id, digest = manifest["run_id"], manifest.get("run_id_digest")  # earlier versions wrote no digest
        return run_id if isinstance(run_id, str) and digest in (None, json_digest(run_id)) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def stored_position(path: Path) -> dict[str, Any]:
    """Reads the position that a step holds, as Orbax writes JSON; empty where it cannot be read: its digest tells."""
    try:
        position = json.loads((path / "position" / "metadata").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return position if isinstance(position, dict) else {}


def newest_position(root: Path) -> dict[str, Any]:
    """Reads the position that the highest step of a run holds; empty where there is no step that belongs to the run."""
    run_id = run_id_of(root)
    steps = sorted(
        (path for path in (root / "checkpoints").glob("*") if path.name.isdigit()), key=lambda p: int(p.name)
    )
    return next((stored_position(path) for path in reversed(steps) if stranger(path, run_id) is None), {})


def steps_named(directory: Path, suffix: str) -> list[Path]:
    """Lists the directories of steps that a suffix of their names puts out of use; other files are not ours."""
    found = directory.glob(f"*{suffix}")
    return [path for path in found if path.is_dir() and path.name.removesuffix(suffix).isdigit()]


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Refuses a step that a training run deletes while the block reads it; other errors pass as they are.

    Raises:
      UsageError: the directory is gone, of which the block's error is only the sign.
    """
    try:
        yield
    except (ValueError, OSError, AttributeError) as error:
        if path.is_dir():
            raise
        raise UsageError(f"{path}: {DELETED}") from error


def stranger(path: Path, run_id: str | None) -> str | None:
    """Says why the step in a directory does not belong there, or may not; None where it does.

    Args:
      path: `checkpoints/<step>`.
      run_id: the run whose checkpoints they are; None where that is not known.
    """
    position = stored_position(path)
    if "next_step" not in position:  # as where another program is still copying it to here
        return "its position cannot be read"
    step, of = position["next_step"], position.get("run_id", run_id)
    if str(step) != path.name:
        return f"it holds step {step}: it was copied or renamed; name it {step}, or move it away"
    if run_id is not None and of != run_id:
        return f"it is a checkpoint of another run ({of}, this is {run_id}); move it away"
    return None
