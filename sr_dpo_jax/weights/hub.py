"""A hub name -> files in the hub's local cache, or the headers of weight files alone; never their numbers unasked.

Next: `directory.py`, which says which files those are and checks them.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from huggingface_hub import errors as hub_errors
from huggingface_hub import list_repo_files, parse_safetensors_file_metadata, snapshot_download

from sr_dpo_jax.errors import UsageError

COMMIT = re.compile(r"[0-9a-f]{40}")
UNFINISHED = "*.incomplete"
"""What the hub's client calls a file until it has all of it."""
REFUSALS = (hub_errors.HfHubHTTPError, hub_errors.HTTPError, hub_errors.HFValidationError, OSError)
"""What the hub's client raises where it gives nothing."""

Header = dict[str, tuple[tuple[int, ...], str]]
"""Shape and type of every tensor of a file, the type as safetensors names it."""


def fetch(name: str, *, revision: str | None, files: Sequence[str]) -> Path:
    """The snapshot of a hub name in the local cache, these files (names or patterns) fetched as far as they are not.

    Raises:
      UsageError: the hub gives nothing, or the revision resolves to no commit.
    """
    try:
        snapshot = Path(snapshot_download(name, revision=revision, allow_patterns=list(files)))
    except REFUSALS as error:
        at = "" if revision is None else f" at model.revision={revision}"
        raise UsageError(f"model.path={name}{at}: {reason_of(error)}") from error
    if not COMMIT.fullmatch(snapshot.name):
        raise UsageError(f"model.revision={revision}: resolves to {snapshot.name!r}, no commit; correct it")
    return snapshot


def file_names(name: str, *, commit: str) -> list[str]:
    """Names of the files of a commit; raises UsageError where the hub gives nothing."""
    try:
        return list_repo_files(name, revision=commit)
    except REFUSALS as error:
        raise UsageError(f"{name}: {reason_of(error)}") from error


def headers(name: str, paths: Iterable[Path], *, commit: str) -> dict[Path, Header | str]:
    """The headers of weight files, which are their first bytes; for a file that has none, why.

    Args:
      name: of the hub.
      paths: where the files would lie in the snapshot of `commit`.
      commit: of the snapshot.

    Raises:
      UsageError: the hub gives nothing.
    """
    found: dict[Path, Header | str] = {}
    for path in paths:
        try:
            tensors = parse_safetensors_file_metadata(name, path.name, revision=commit).tensors
            found[path] = {tensor: (tuple(info.shape), info.dtype) for tensor, info in tensors.items()}
        except hub_errors.EntryNotFoundError:
            found[path] = f"{name}, {path.name}: missing on the hub; choose another model or revision"
        except (hub_errors.SafetensorsParsingError, hub_errors.NotASafetensorsRepoError):
            found[path] = f"{name}, {path.name}: not a sound safetensors file; choose another model or revision"
        except REFUSALS as error:
            raise UsageError(f"{name}: {reason_of(error)}") from error
    return found


def unfinished(directory: Path) -> list[str]:
    """Downloads that were cut short, of a directory or of the hub's cache that it is a snapshot of."""
    places = [directory, directory / ".cache" / "huggingface" / "download"]
    if directory.parent.name == "snapshots" and COMMIT.fullmatch(directory.name):
        places.append(directory.parent.parent / "blobs")
    return sorted(str(file) for place in places for file in place.glob(UNFINISHED))


def reason_of(error: Exception) -> str:
    """Why the hub gives nothing, and what to do; never the client's own words, which hold addresses and headers."""
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
