"""Digests of a checkpoint: one for each array shard as it lay on the devices, compared with what the disk gives back.

    checkpoints/<step>/digests/<process>-of-<processes>.json

Every process hashes the shards that it owns, reads them back once the checkpoint is committed, and only then writes
them down, with the digests of the files that hold them; process 0 adds all other files (tree, shapes, data position,
configuration). A step is verified when every process has done so. A shard is known by its index ranges, so any mesh and
any number of processes can check what another one wrote. The digest (XXH3, 128 bits) is made for damage, not for an
adversary.

Next: `checkpoint.py`, which says when.
"""

import json
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import ml_dtypes  # noqa: F401 (gives NumPy the type bfloat16)
import numpy as np
import tensorstore
import xxhash

DIRECTORY = "digests"
STATE = "state"
READERS = 4
"""Shards read at once; each is whole in memory while it is hashed."""
ARRAY_FILE = re.compile(rf"{STATE}/(d/|manifest\.ocdbt$|ocdbt\.process_(\d+)/)")
"""Files that hold arrays; group 2 is the process that wrote them."""
BLOCK_BYTES = 1 << 24
FLOATS = ("float64", "float32", "float16", "bfloat16")

Ranges = tuple[tuple[int, int], ...]
"""Start and stop along each axis of the whole array."""


class Unverified(Exception):
    """The step has no complete set of digests: a kill came before it was verified, or it was never one of ours."""


class Damaged(Exception):
    """What is on the disk is not what was saved."""


@dataclass(frozen=True)
class Shard:
    """One shard's place in its array, and the digest of its bytes."""

    name: str
    """The array's path in the saved tree, as Orbax writes it: keys joined by dots."""
    ranges: Ranges
    digest: str


def host_shards(tree: Any) -> list[tuple[str, Ranges, np.ndarray]]:
    """The shards that this process owns (first replicas), as host arrays.

    Call it after the checkpointer has copied the tree to the host: jax keeps that copy with the array, so that nothing
    is transferred twice. The arrays stay as they are when the tree is given away to the next step.
    """
    found = []
    for path, leaf in jax.tree.leaves_with_path(tree):
        name = ".".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", None)))) for key in path)
        for shard in leaf.addressable_shards:
            if shard.replica_id == 0:
                ranges = tuple(part.indices(size)[:2] for part, size in zip(shard.index, leaf.shape, strict=True))
                found.append((name, ranges, np.asarray(shard.data)))
    return found


def digest_of(array: np.ndarray) -> str:
    """Digest of type, shape and bytes."""
    array = np.ascontiguousarray(array)
    state = xxhash.xxh3_128(f"{array.dtype.name} {array.shape}".encode())
    state.update(array.reshape(-1).view(np.uint8))
    return state.hexdigest()


def digest_shards(shards: Iterable[tuple[str, Ranges, np.ndarray]]) -> list[Shard]:
    """Digests of host shards.

    Raises:
      FloatingPointError: a shard holds NaN or infinity; such a state must never be resumed from.
    """
    found = []
    for name, ranges, array in shards:
        if array.dtype.name in FLOATS and not np.isfinite(array).all():
            raise FloatingPointError(f"{name} holds values that are not finite")
        found.append(Shard(name, ranges, digest_of(array)))
    return found


def check_shards(step_directory: Path, shards: Iterable[Shard]) -> None:
    """Reads every shard from the disk and compares digests; raises Damaged naming the first that differs."""
    arrays: dict[str, Any] = {}

    def check(shard: Shard) -> None:
        try:
            # A missing chunk reads as zeros, which the digest tells from what was saved.
            part = arrays[shard.name][tuple(slice(*bounds) for bounds in shard.ranges)].read().result()
        except (ValueError, OSError) as error:
            raise Damaged(f"{shard.name} cannot be read ({_first_line(error)})") from None
        if digest_of(part) != shard.digest:
            raise Damaged(f"{shard.name}{list(shard.ranges)} does not match its digest")

    shards = list(shards)
    for name in sorted({shard.name for shard in shards}):
        arrays[name] = _open(step_directory, name)
    with ThreadPoolExecutor(READERS, "read-back") as pool:
        for _ in pool.map(check, shards):
            pass


def write(step_directory: Path, shards: Iterable[Shard], *, process: int, processes: int) -> None:
    """This process's part of the digests, once its shards are checked."""
    own = [name for name in _files(step_directory) if _writer(name) == process]
    with ThreadPoolExecutor(READERS, "read-back") as pool:
        files = dict(zip(own, pool.map(lambda name: _file_digest(step_directory / name), own), strict=True))
    content = {"shards": [[shard.name, shard.ranges, shard.digest] for shard in shards], "files": files}
    text = json.dumps(content)
    directory = step_directory / DIRECTORY
    directory.mkdir(exist_ok=True)
    partial = directory / f"{process}.partial"
    partial.write_text(json.dumps({"digest": _digest_of_text(text), "content": text}), encoding="utf-8")
    partial.replace(directory / _file_name(process, processes))


def is_verified(step_directory: Path) -> bool:
    """Whether all processes have verified what they wrote; says nothing of what happened to it since."""
    return _complete(step_directory) is not None


def check(step_directory: Path, *, prefix: str = "", share: tuple[int, int] = (0, 1)) -> None:
    """Compares a step on the disk with its digests.

    Args:
      step_directory: `checkpoints/<step>`.
      prefix: of the arrays that matter; "" is all of them, and every file.
      share: (k, n): only every n-th shard and file, from k on, so that n processes divide the reading.

    Raises:
      Unverified: its digests are missing or incomplete.
      Damaged: it is not what was saved; the message names the array or file.
    """
    files = _complete(step_directory)
    if files is None:
        raise Unverified("it was never verified: saving was cut short, or the directory is not a checkpoint of a run")
    shards: list[Shard] = []
    digests: dict[str, str] = {}
    for file in files:
        content = _load(file)
        shards += [Shard(name, tuple(map(tuple, ranges)), digest) for name, ranges, digest in content["shards"]]
        digests |= content["files"]
    _check_files(step_directory, {name: digests[name] for name in _share(sorted(digests), share)}, whole=prefix == "")
    check_shards(step_directory, _share([shard for shard in shards if shard.name.startswith(prefix)], share))


def _check_files(step_directory: Path, digests: Mapping[str, str], *, whole: bool) -> None:
    """Compares files with their digests; where not `whole`, not those that hold arrays, which are checked as arrays."""

    def check_file(name: str) -> None:
        try:
            found = _file_digest(step_directory / name)
        except OSError as error:
            raise Damaged(f"{name} cannot be read ({error.strerror})") from None
        if found != digests[name]:
            raise Damaged(f"{name} does not match its digest")

    with ThreadPoolExecutor(READERS, "read-back") as pool:
        for _ in pool.map(check_file, [name for name in digests if whole or not ARRAY_FILE.match(name)]):
            pass


def _share(items: list[Any], share: tuple[int, int]) -> list[Any]:
    return items[share[0] :: share[1]]


def _open(step_directory: Path, name: str) -> Any:
    store = {"driver": "ocdbt", "base": f"file://{step_directory / STATE}/", "path": f"{name}/"}
    try:
        return tensorstore.open({"driver": "auto", "kvstore": store}, open=True, read=True).result()
    except (ValueError, OSError) as error:
        raise Damaged(f"{name} cannot be opened ({_first_line(error)})") from None


def _files(step_directory: Path) -> list[str]:
    """Names of all files of a step but the digests."""
    files = (file for file in sorted(step_directory.rglob("*")) if file.is_file())
    names = (file.relative_to(step_directory).as_posix() for file in files)
    return [name for name in names if not name.startswith(f"{DIRECTORY}/")]


def _writer(name: str) -> int:
    """The process that digests a file: the one that wrote it, or process 0, which wrote what all share."""
    match = ARRAY_FILE.match(name)
    return int(match[2]) if match and match[2] else 0


def _file_digest(file: Path) -> str:
    state = xxhash.xxh3_128()
    with file.open("rb") as opened:
        while block := opened.read(BLOCK_BYTES):
            state.update(block)
    return state.hexdigest()


def _complete(step_directory: Path) -> list[Path] | None:
    """The files of all processes, or None where one is missing."""
    directory = step_directory / DIRECTORY
    for first in directory.glob("0-of-*.json"):
        processes = re.fullmatch(r"0-of-(\d+)\.json", first.name)
        if processes:
            files = [directory / _file_name(process, int(processes[1])) for process in range(int(processes[1]))]
            if all(file.is_file() for file in files):
                return files
    return None


def _load(file: Path) -> Mapping[str, Any]:
    try:
        outer = json.loads(file.read_text(encoding="utf-8"))
        if outer["digest"] == _digest_of_text(outer["content"]):
            return json.loads(outer["content"])
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{DIRECTORY}/{file.name} cannot be read ({type(error).__name__})") from None
    raise Damaged(f"{DIRECTORY}/{file.name} does not match its own digest")


def _file_name(process: int, processes: int) -> str:
    return f"{process}-of-{processes}.json"


def _digest_of_text(text: str) -> str:
    return xxhash.xxh3_128_hexdigest(text.encode())


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0].split(" [")[0][:200]
