"""A hub name -> files in the hub's local cache, or only the headers of its weight files, without fetching the weights.

Next: `files.py`, which reads what lies on the disk.
"""

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from huggingface_hub import errors as hub_errors
from huggingface_hub import list_repo_files, parse_safetensors_file_metadata, snapshot_download

from sr_dpo_jax.errors import UsageError

COMMIT = re.compile(r"[0-9a-f]{40}")
UNFINISHED = "*.incomplete"
"""The names that the hub's client gives to files until they are complete."""
REFUSALS = (hub_errors.HfHubHTTPError, hub_errors.HTTPError, hub_errors.HFValidationError, OSError)
"""The errors that the hub's client raises when it cannot give what was asked for."""

Header = dict[str, tuple[tuple[int, ...], str]]
"""The shape and type of every tensor of a file, by its name; the type as safetensors calls it."""


@contextlib.contextmanager
def _refusals(what: str) -> Iterator[None]:
    try:
        yield
    except REFUSALS as error:
        raise UsageError(f"{what}: {reason_of(error)}") from error


def fetch(name: str, *, revision: str | None, files: Sequence[str]) -> Path:
    """Fetches files of a hub name that the local cache does not have yet.

    Args:
      name: owner/name.
      revision: a branch, tag or commit; None for the main branch.
      files: names or patterns.

    Returns:
      The directory of the snapshot in the local cache, named as its commit.

    Raises:
      UsageError: the hub refuses or cannot be reached, or the revision resolves to no commit.
    """
    with _refusals(f"model.path={name}" + ("" if revision is None else f" at model.revision={revision}")):
        snapshot = Path(snapshot_download(name, revision=revision, allow_patterns=list(files)))
    if not COMMIT.fullmatch(snapshot.name):
        raise UsageError(f"model.revision={revision}: resolves to {snapshot.name!r}, no commit; correct it")
    return snapshot


def file_names(name: str, *, commit: str) -> list[str]:
    """Lists the names of the files of a commit; raises UsageError where the hub refuses or cannot be reached."""
    with _refusals(name):
        return list_repo_files(name, revision=commit)


def headers(name: str, paths: Iterable[Path], *, commit: str) -> dict[Path, Header | str]:
    """Reads the headers of weight files, which are their first bytes, without fetching the files.

    Args:
      name: owner/name.
      paths: where the files would lie in the snapshot of `commit`.
      commit: the commit of the snapshot.

    Returns:
      The header of each file, or the reason why it has none.

    Raises:
      UsageError: the hub refuses or cannot be reached.
    """
    headers_of: dict[Path, Header | str] = {}
    with _refusals(name):
        for path in paths:
            where = f"{name}, {path.name}"
            try:
                tensors = parse_safetensors_file_metadata(name, path.name, revision=commit).tensors
                headers_of[path] = {tensor: (tuple(info.shape), info.dtype) for tensor, info in tensors.items()}
            except hub_errors.EntryNotFoundError:
                headers_of[path] = f"{where}: missing on the hub; choose another model or revision"
            except (hub_errors.SafetensorsParsingError, hub_errors.NotASafetensorsRepoError):
                headers_of[path] = f"{where}: not a sound safetensors file; choose another model or revision"
    return headers_of


def unfinished(directory: Path) -> list[str]:
    """Lists downloads that were cut short, in a directory or in the hub's cache that it is a snapshot of."""
    places = [directory, directory / ".cache" / "huggingface" / "download", *blobs_of(directory)]
    return sorted(str(file) for place in places for file in place.glob(UNFINISHED))


def blobs_of(directory: Path) -> list[Path]:
    """Gives the folder of the hub's cache that a snapshot's links lead to; none for a directory of another kind."""
    is_snapshot = directory.parent.name == "snapshots" and COMMIT.fullmatch(directory.name)
    return [directory.parent.parent / "blobs"] if is_snapshot else []


def reason_of(error: Exception) -> str:
    """Says why the hub gave nothing, and what to do; the client's own words hold addresses and headers."""
    match error:
        case hub_errors.RevisionNotFoundError():
            return "the hub has no such revision; correct model.revision"
        case hub_errors.GatedRepoError():
            return "its owner asks for consent; give it on the hub, and set HF_TOKEN"
        case hub_errors.RepositoryNotFoundError():
            return "neither a directory nor a name on the hub; correct it, or set HF_TOKEN if it is private"
        case hub_errors.LocalEntryNotFoundError():
            return (
                "neither a directory nor in the local cache, and the hub cannot be reached; check name and revision, "
                "the network and HF_HUB_OFFLINE"
            )
        case hub_errors.HFValidationError():
            return "neither a directory nor of the form owner/name; correct it"
        case hub_errors.OfflineModeIsEnabled():
            return "HF_HUB_OFFLINE is set, so the hub was not asked; unset it"
    return f"cannot be fetched ({type(error).__name__}); check the network, the disk and HF_TOKEN"
