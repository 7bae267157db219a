"""Digests of a checkpoint: one for each array shard as it lay on the devices, compared with what the disk gives back.

    checkpoints/<step>/digests/<process>-of-<processes>.json

Every process hashes the shards that it owns, reads them back once the checkpoint is committed, and only then writes the
digests, with those of the files that hold the shards; process 0 adds all other files (tree, shapes, data position,
configuration). A step is verified when every process has done so. Index ranges identify a shard, so any mesh and any
number of processes can check what another one wrote. The digest (XXH3, 128 bits) finds damage, not an adversary's work.

Next: `checkpoint.py`, which calls all this.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import ml_dtypes  # noqa: F401 (gives NumPy the type bfloat16)
import numpy as np
import tensorstore
import xxhash

from sr_dpo_jax.durable import files

DIRECTORY = "digests"
STATE = "state"
READERS = 4
"""Threads that read; each holds one whole shard in memory while it is hashed."""
ARRAY_FILE = re.compile(rf"{STATE}/(d/|manifest\.ocdbt$|ocdbt\.process_(\d+)/)")
"""The files that hold arrays; group 2 is the process that wrote them."""
FLOATS = ("float64", "float32", "float16", "bfloat16")

Ranges = tuple[tuple[int, int], ...]
"""The start and stop of a shard along each axis of the whole array."""


class Unverified(Exception):
    """The step has no complete set of digests: a kill came before it was verified, or no run of ours saved it."""


class Damaged(Exception):
    """The bytes on the disk are not those that were saved."""


@dataclass(frozen=True)
class Shard:
    """The place of one shard in its array, and the digest of its bytes."""

    name: str
    """The array's path in the saved tree, as Orbax writes it: keys joined by dots."""
    ranges: Ranges
    digest: str


def host_shards(tree: Any) -> list[tuple[str, Ranges, np.ndarray]]:
    """Copies the shards that this process owns (first replicas) to host arrays, each with its name and ranges.

    Call it after the checkpointer has copied the tree to the host: jax keeps that copy with the array, so nothing is
    transferred twice. The host arrays stay as they are when the tree is donated to the next step.
    """
    shards = []
    for path, leaf in jax.tree.leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        for shard in leaf.addressable_shards:
            if shard.replica_id == 0:
                ranges = tuple(part.indices(size)[:2] for part, size in zip(shard.index, leaf.shape, strict=True))
                shards.append((name, ranges, np.asarray(shard.data)))
    return shards


def digest_of(array: np.ndarray) -> str:
    """Computes the digest of an array's type, shape and bytes."""
    array = np.ascontiguousarray(array)
    state = xxhash.xxh3_128(f"{array.dtype.name} {array.shape}".encode())
    state.update(array.reshape(-1).view(np.uint8))
    return state.hexdigest()


def digest_shards(shards: Iterable[tuple[str, Ranges, np.ndarray]]) -> list[Shard]:
    """Computes the digests of host shards.

    Raises:
      FloatingPointError: a shard holds NaN or infinity; such a state must never be resumed from.
    """
    digests = []
    for name, ranges, array in shards:
        if array.dtype.name in FLOATS and not np.isfinite(array).all():
            raise FloatingPointError(f"{name} holds values that are not finite")
        digests.append(Shard(name, ranges, digest_of(array)))
    return digests


def check_shards(step_directory: Path, shards: Iterable[Shard]) -> None:
    """Reads every shard from the disk and compares digests; raises Damaged with the name of one that differs."""
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
    _in_threads(check, shards)


def write(step_directory: Path, shards: Iterable[Shard], *, process: int, processes: int) -> None:
    """Writes this process's file of digests; call it once its shards are checked."""
    own = [name for name in _files(step_directory) if _writer(name) == process]
    digests = _in_threads(lambda name: _file_digest(step_directory / name), own)
    content = {
        "shards": [[shard.name, shard.ranges, shard.digest] for shard in shards],
        "files": dict(zip(own, digests, strict=True)),
    }
    text = json.dumps(content)
    directory = step_directory / DIRECTORY
    directory.mkdir(exist_ok=True)
    files.write_text(
        directory / _file_name(process, processes), json.dumps({"digest": _digest_of_text(text), "content": text})
    )


def is_verified(step_directory: Path) -> bool:
    """Tells whether all processes verified what they had saved; damage since then is found by `check` alone."""
    return _digest_files(step_directory) is not None


def check(step_directory: Path, *, prefix: str = "", share: tuple[int, int] = (0, 1)) -> None:
    """Compares a step on the disk with its digests.

    Args:
      step_directory: `checkpoints/<step>`.
      prefix: the start of the names of the arrays that are checked; "" checks all of them, and every file.
      share: (k, n) checks every n-th shard and file, from k on, so that n processes divide the reading.

    Raises:
      Unverified: its digests are missing or incomplete.
      Damaged: its bytes are not those that were saved; names the array or file.
    """
    digest_files = _digest_files(step_directory)
    if digest_files is None:
        raise Unverified("it was never verified: saving was cut short, or the directory is not a checkpoint of a run")
    shards: list[Shard] = []
    digests: dict[str, str] = {}
    for file in digest_files:
        content = _load(file)
        shards += [Shard(name, tuple(map(tuple, ranges)), digest) for name, ranges, digest in content["shards"]]
        digests |= content["files"]

    def check_file(name: str) -> None:
        try:
            digest = _file_digest(step_directory / name)
        except OSError as error:
            raise Damaged(f"{name} cannot be read ({error.strerror})") from None
        if digest != digests[name]:
            raise Damaged(f"{name} does not match its digest")

    part = slice(share[0], None, share[1])
    # With a prefix, files that hold arrays are not read whole: the arrays that matter are checked by themselves.
    _in_threads(check_file, [name for name in sorted(digests)[part] if not prefix or not ARRAY_FILE.match(name)])
    check_shards(step_directory, [shard for shard in shards if shard.name.startswith(prefix)][part])


def _in_threads(function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    with ThreadPoolExecutor(READERS, "read-back") as pool:
        return list(pool.map(function, items))


def _open(step_directory: Path, name: str) -> Any:
    store = {"driver": "ocdbt", "base": f"file://{step_directory / STATE}/", "path": f"{name}/"}
    try:
        return tensorstore.open({"driver": "auto", "kvstore": store}, open=True, read=True).result()
    except (ValueError, OSError) as error:
        raise Damaged(f"{name} cannot be opened ({_first_line(error)})") from None


def _files(step_directory: Path) -> list[str]:
    """Lists the names of all files of a step except the digests."""
    paths = (path for path in sorted(step_directory.rglob("*")) if path.is_file())
    names = (path.relative_to(step_directory).as_posix() for path in paths)
    return [name for name in names if not name.startswith(f"{DIRECTORY}/")]


def _writer(name: str) -> int:
    """Gives the process that digests a file: the one that wrote it, or process 0 for files that all share."""
    match = ARRAY_FILE.match(name)
    return int(match[2]) if match and match[2] else 0


def _file_digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, xxhash.xxh3_128).hexdigest()


def _digest_files(step_directory: Path) -> list[Path] | None:
    """Gives the digest files of all processes, or None where one is missing."""
    directory = step_directory / DIRECTORY
    for first in directory.glob("0-of-*.json"):
        processes = re.fullmatch(r"0-of-(\d+)\.json", first.name)
        if processes:
            paths = [directory / _file_name(process, int(processes[1])) for process in range(int(processes[1]))]
            if all(path.is_file() for path in paths):
                return paths
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
