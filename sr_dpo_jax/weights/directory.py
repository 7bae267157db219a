"""A Hugging Face directory or hub name -> its architecture and its weight files, checked against that architecture.

Weights are safetensors: one file, or an index `model.safetensors.index.json` with its `weight_map`. Nothing else is
read: no pickle, no code, no file outside the directory. No device is touched, except for the digest in a run of several
processes.

Next: `read.py`, which brings the weights to the devices.
"""

import contextlib
import dataclasses
import hashlib
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import transformers
from huggingface_hub.errors import StrictDataclassError
from jax.experimental import multihost_utils
from safetensors import safe_open

from sr_dpo_jax.durable.files import sampled_digest
from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.model.architecture import Architecture
from sr_dpo_jax.weights import hub
from sr_dpo_jax.weights.families import Tensor, architecture_of, require_known, tensors_of
from sr_dpo_jax.weights.files import (
    ADAPTER_CONFIG,
    CONFIG,
    FLOATS,
    GENERATION_CONFIG,
    INDEX,
    LISTED,
    TEMPLATES,
    TOKENIZER_FILES,
    read_headers,
    read_json,
    refuse_escape,
    refuse_other_tokenizers,
    weight_files,
)
from sr_dpo_jax.weights.hub import Header
from sr_dpo_jax.weights.layout import blocks_of, file_shape, flatten, names_of

IGNORED = re.compile(r"\.(rotary_emb\.inv_freq|attention\.(bias|masked_bias))$")
"""Buffers in old files that are computed from the config, so they are not read."""
HEADS = ("lm_head.weight", "embed_out.weight")
"""Tensors that a tied model's files may hold beside the embedding, where they are equal to it."""
ROWS = 4096
"""Rows of a tensor that are compared, or searched for numbers that are not finite, at a time, to take no memory."""
MOST_LAYERS = 10_000
BAD_CONFIG = (ValueError, OSError, KeyError, TypeError, AttributeError, ArithmeticError, StrictDataclassError)
"""The errors that transformers and the families' tables raise on fields that make no sense."""
SIZES = ("vocabulary_tokens", "hidden", "layers", "heads", "kv_heads", "head_dim", "mlp")
REFUSED_FIELDS = {
    "auto_map": (
        "asks for code of its own, which is never run; if model_type is of a built-in family and the weights are its "
        "own, as in Phi-3's repositories, use a copy of the directory whose config.json has no auto_map"
    ),
    "configuration_files": "names other files to be read in place of this one; keep one config.json without it",
    "quantization_config": "says that the weights are quantised, which is not supported; use those in bfloat16",
}
"""Fields of config.json that are refused, each with the reason and the remedy."""


@dataclasses.dataclass(frozen=True)
class ModelDirectory:
    """A local directory with a config, a tokenizer and, unless the weights are drawn from the seed, weights."""

    path: Path
    model_type: str
    architecture: Architecture
    revision: str | None
    """The commit that a hub name was resolved to; None for a directory that the user named."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The rows of the family's table."""
        return tensors_of(self.architecture, self.model_type)


def open_directory(path: str, *, revision: str | None = None, weights: bool = True) -> ModelDirectory:
    """Finds a directory, or fetches the files of a hub name, and reads the architecture.

    Args:
      path: a directory, or a hub name such as `owner/name`.
      revision: the branch, tag or commit of a hub name.
      weights: whether the weights of a hub name are fetched too.

    Raises:
      UsageError: there is no such directory or name, it needs code of its own, or its architecture is not supported.
    """
    if not path.strip():
        raise UsageError(f"model.path={path!r}: is blank; give a Hugging Face directory or hub name")
    directory, commit = Path(path), None
    if directory.is_dir():
        if revision is not None:
            raise UsageError(f"model.revision={revision}: pins a hub name, but {path} is a directory; remove it")
    elif Path(path).is_absolute() or path.startswith((".", "~")):
        raise UsageError(f"model.path={path}: no such directory; give a Hugging Face directory or hub name")
    else:
        directory = _fetch(path, revision, weights)
        commit = directory.name
    for name in (CONFIG, GENERATION_CONFIG, *TOKENIZER_FILES, TEMPLATES):
        refuse_escape(directory, name)
    refuse_other_tokenizers(directory)
    config_path = directory / CONFIG
    if not config_path.is_file() and (directory / ADAPTER_CONFIG).is_file():
        base = read_json(directory / ADAPTER_CONFIG).get("base_model_name_or_path")
        raise UsageError(
            f"model.path={path}: is a PEFT adapter, not a model; to train on from it set lora.start to it and take its "
            f"base, {base}, as the model, or merge the two with PEFT's merge_and_unload"
        )
    if not config_path.is_file():
        raise UsageError(f"{config_path}: missing; model.path must be a Hugging Face model directory")
    raw = read_json(config_path)
    for field, reason in REFUSED_FIELDS.items():
        if raw.get(field) is not None:
            raise UsageError(f"{config_path}: {field} {reason}")
    require_known(raw.get("model_type"), where=str(config_path))
    layers = raw.get("num_hidden_layers")
    # A trap: transformers and the tables make lists of this length, which could fill the memory, so it is checked here.
    if isinstance(layers, int) and not 0 < layers <= MOST_LAYERS:
        raise UsageError(
            f"{config_path}: num_hidden_layers is not from 1 to {MOST_LAYERS:,}, as in every model; restore the file"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        architecture = architecture_of(config, where=str(config_path))
    except BAD_CONFIG as error:
        raise UsageError(f"{config_path}: not the configuration of a known model: {error}; restore the file") from error
    for name in SIZES:
        size = getattr(architecture, name)
        if not 0 < size < 10**7:
            raise UsageError(f"{config_path}: gives the model {name}={size}, which no model has; restore the file")
    return ModelDirectory(directory, config.model_type, architecture, commit)


def weights_digest(directory: ModelDirectory) -> str:
    """Computes the sha256 (hex) of config and weight files, which keys reference caches and stands in the manifest.

    In a run of several processes two of them read each file, so all must call it: of two hosts with copies of their
    own every difference is found, of more hosts those between the two that read a file.

    Raises:
      UsageError: two processes hold other bytes under one name, on all processes.
    """
    files = [directory.path / CONFIG, *weight_files(directory.path)[0]]
    digests = np.zeros((len(files), 32), np.uint8)
    together = jax.distributed.is_initialized() and jax.process_count() > 1
    process, processes = (jax.process_index(), jax.process_count()) if together else (0, 1)
    mine = [number for number in range(len(files)) if (number - process) % processes < 2]
    with ThreadPoolExecutor() as pool:
        for number, content in zip(mine, pool.map(_file_digest, [files[n] for n in mine]), strict=True):
            digests[number] = np.frombuffer(content, np.uint8)
    if together:
        digests = _agreed(np.asarray(multihost_utils.process_allgather(digests)), files)
    return hashlib.sha256("".join(digest.tobytes().hex() for digest in digests).encode()).hexdigest()


def _agreed(digests: np.ndarray, files: Sequence[Path]) -> np.ndarray:
    """Takes each file's digest from the processes that read it: `[processes, files, 32]`, zeros where one did not."""
    for number, path in enumerate(files):
        readers = [process for process in range(len(digests)) if digests[process, number].any()]
        differing = [process for process in readers if (digests[process, number] != digests[readers[0], number]).any()]
        if differing:
            raise UsageError(
                f"{path.name}: holds other bytes on process {differing[0]} than on process {readers[0]}; give all "
                f"hosts the same copy of {path.parent}"
            )
    return digests.max(axis=0)


def fingerprint(directory: ModelDirectory) -> str:
    """Digests the config, and samples of each weight file.

    A process compares it with the other ones before any reads weights. Damage to single bytes of one host's copy is
    left to `check` and to `weights_digest`, for which two hosts read each file.

    Raises:
      UsageError: a file cannot be read.
    """
    digest = hashlib.sha256((directory.path / CONFIG).read_bytes())
    for path in weight_files(directory.path)[0]:
        try:
            digest.update(f"{path.name} {sampled_digest(path)} ".encode())
        except OSError as error:
            raise UsageError(f"{path}: cannot be read ({error}); fetch it again") from error
    return digest.hexdigest()


def check(directory: ModelDirectory, abstract: Any) -> dict[str, Path]:
    """Compares index and headers of the weight files with the family's table.

    No device is touched. No numbers are read, except those of a head that stands beside the embedding it is tied to.

    Args:
      directory: from `open_directory`.
      abstract: tree of abstract nnx parameters.

    Returns:
      The file that holds each tensor, by the tensor's name.

    Raises:
      UsageError: files are missing or damaged, or tensors are missing, extra, mis-shaped, not floats, held twice, not
        where the index says, or tied but not alike; all are named at once.
    """
    files, weight_map = weight_files(directory.path)
    headers = read_headers(files)
    file_of = {name: path for path, header in headers.items() if not isinstance(header, str) for name in header}
    problems = faults(directory, abstract, headers, weight_map) + _untied(directory, file_of)
    if problems:
        raise UsageError(listing(directory, problems))
    return {name: file_of[name] for name in _expected(directory, abstract)}


def faults(
    directory: ModelDirectory,
    abstract: Any,
    headers: Mapping[Path, Header | str],
    weight_map: Mapping[str, str] | None,
) -> list[str]:
    """Lists all contradictions between headers, family's table and index; no number is read.

    Args:
      directory, abstract: as for `check`.
      headers: from `read_headers` or `hub.headers`.
      weight_map: from `weight_files`.
    """
    expected = _expected(directory, abstract)
    optional = set(HEADS) if directory.architecture.tied else set()
    mapped_to = weight_map or {}
    held: dict[str, list[str]] = {}
    problems, unreadable = [], set()
    for path, header in headers.items():
        if isinstance(header, str):
            problems.append(header)
            unreadable.add(path.name)
            continue
        for name, (shape, dtype) in header.items():
            held.setdefault(name, []).append(path.name)
            if name in expected and shape != expected[name]:
                problems.append(f"{name}: shape {shape}, {CONFIG} asks {expected[name]}")
            if name in expected and dtype not in FLOATS:
                problems.append(f"{name}: type {dtype}, supported: {', '.join(FLOATS)}")
    for name in sorted(expected.keys() | held.keys() | mapped_to.keys()):
        if name not in expected:
            if name not in optional and not IGNORED.search(name):
                problems.append(f"{name!r}: not part of this architecture")
            continue
        holders, mapped = held.get(name, []), mapped_to.get(name)
        if len(holders) > 1:
            problems.append(f"{name}: held by {' and by '.join(holders)}")
        elif not holders and mapped not in unreadable and not (weight_map is None and unreadable):
            problems.append(f"{name}: missing" + (f" from {mapped}, where {INDEX} has it" if mapped else ""))
        elif holders and weight_map is not None and mapped != holders[0]:
            problems.append(f"{name}: held by {holders[0]}, but {INDEX} says {mapped or 'nothing of it'}")
    return problems


def listing(directory: ModelDirectory, problems: Sequence[str]) -> str:
    """Writes the message that names the problems of the weights, the first `LISTED` of them."""
    more = [f"and {len(problems) - LISTED} more"] if len(problems) > LISTED else []
    title = f"{directory.path}: the weights are not what {CONFIG} asks for:"
    return "\n  ".join([title, *problems[:LISTED], *more])


def _expected(directory: ModelDirectory, abstract: Any) -> dict[str, tuple[int, ...]]:
    """Gives name and shape of every tensor that the weights must hold."""
    flat, layers = flatten(abstract), directory.architecture.layers
    return {
        name: file_shape(blocks_of(tensor, flat))
        for tensor in directory.tensors
        for name, _ in names_of(tensor, layers)
    }


def _untied(directory: ModelDirectory, file_of: Mapping[str, Path]) -> list[str]:
    """Lists heads that differ from the embedding they are tied to: transformers would untie them and use the head."""
    if not directory.architecture.tied:
        return []
    (table,) = [tensor.name for tensor in directory.tensors if tensor.params == ("embedding",)]
    return [
        f"{head}: is not {table}, to which {CONFIG} ties it; set tie_word_embeddings=false there, or remove the tensor"
        for head in HEADS
        if head in file_of and table in file_of and not _equal((file_of[head], head), (file_of[table], table))
    ]


def _equal(*tensors: tuple[Path, str]) -> bool:
    """Tells whether two tensors, each given as file and name, hold the same numbers."""
    with contextlib.ExitStack() as opened:
        first, second = (
            opened.enter_context(safe_open(path, framework="numpy")).get_slice(name) for path, name in tensors
        )
        if first.get_shape() != second.get_shape() or not {first.get_dtype(), second.get_dtype()} <= set(FLOATS):
            return False
        rows = first.get_shape()[0]
        parts = (slice(start, min(start + ROWS, rows)) for start in range(0, rows, ROWS))
        return all(np.array_equal(first[part], second[part]) for part in parts)


def _fetch(name: str, revision: str | None, weights: bool) -> Path:
    """Fetches the snapshot of a hub name: the weights last, and only the files that the index names."""
    side = [CONFIG, GENERATION_CONFIG, INDEX, *TOKENIZER_FILES, f"{TEMPLATES}/*.jinja"]
    snapshot = hub.fetch(name, revision=revision, files=side)
    if weights:
        hub.fetch(name, revision=snapshot.name, files=[file.name for file in weight_files(snapshot)[0]])
    return snapshot


def _file_digest(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error}); fetch it again") from error
