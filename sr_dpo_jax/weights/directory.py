"""A Hugging Face directory -> architecture and sharded parameters, and back.

Format: safetensors, one file or an index `model.safetensors.index.json` with its `weight_map`. Nothing else is read:
no pickle, no code, no file outside the directory.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import ml_dtypes  # noqa: F401 (teaches NumPy, and through it safetensors, what bfloat16 is)
import numpy as np
import transformers
from huggingface_hub.errors import StrictDataclassError
from jax.experimental import multihost_utils
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.model.architecture import Architecture
from sr_dpo_jax.weights.families import Tensor, architecture_of, tensors_of

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
IGNORED = re.compile(r"\.(rotary_emb\.inv_freq|attention\.(bias|masked_bias))$")
"""Buffers that old files carry and that are computed from the config."""
FLOATS = ("F16", "BF16", "F32", "F64")

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class ModelDirectory:
    """A local directory with a config, a tokenizer and, unless the weights are to be drawn, weights."""

    path: Path
    model_type: str
    architecture: Architecture


def open_directory(path: str, *, revision: str | None = None) -> ModelDirectory:
    """Finds a directory, or fetches a hub name's config, tokenizer and safetensors, and reads its architecture.

    Raises:
      UsageError: nothing is there, it needs code of its own, or its architecture is not supported.
    """
    directory = Path(path)
    if not directory.is_dir():
        if directory.is_absolute() or path.startswith("."):
            raise UsageError(f"model.path={path}: no such directory; give a Hugging Face directory or hub name")
        directory = _fetch(path, revision)
    config_path = directory / "config.json"
    if not config_path.is_file():
        raise UsageError(f"{config_path}: missing; model.path must be a Hugging Face model directory")
    try:
        raw = json.loads(config_path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UsageError(f"{config_path}: not valid JSON ({error}); restore the file") from error
    if "auto_map" in raw:
        raise UsageError(f"{config_path}: auto_map asks for code of its own, which is never run; use a built-in family")
    try:
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
        architecture = architecture_of(config, where=str(config_path))
    except (ValueError, OSError, KeyError, TypeError, AttributeError, ZeroDivisionError, StrictDataclassError) as error:
        raise UsageError(f"{config_path}: not the configuration of a known model: {error}; restore the file") from error
    return ModelDirectory(directory, config.model_type, architecture)


def weights_digest(directory: ModelDirectory) -> str:
    """sha256 over config and weight files, as hexadecimal: what a reference cache and a run's manifest are keyed by."""
    with ThreadPoolExecutor() as pool:
        files = [directory.path / "config.json", *_weight_files(directory.path)]
        digests = list(pool.map(_file_digest, files))
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def check(directory: ModelDirectory, abstract: Any) -> dict[str, Path]:
    """Compares the headers of the weight files with the family's table; returns the file that holds each tensor.

    Raises:
      UsageError: tensors are missing, extra, mis-shaped or not floats (all named at once), or a file is damaged.
    """
    tensors, flat_abstract = tensors_of(directory.architecture, directory.model_type), _flatten(abstract)
    expected = {
        tensor.name.format(layer=layer): _file_shape(tensor, flat_abstract)
        for tensor in tensors
        for layer in _layers(tensor, directory.architecture)
    }
    where, problems = {}, []
    for path in _weight_files(directory.path):
        try:
            with safe_open(path, framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118 (not a mapping)
                    where[name] = path
                    part = file.get_slice(name)
                    if name in expected and tuple(part.get_shape()) != expected[name]:
                        problems.append(f"{name}: shape {tuple(part.get_shape())}, config.json asks {expected[name]}")
                    if name in expected and part.get_dtype() not in FLOATS:
                        problems.append(f"{name}: type {part.get_dtype()}, supported: {', '.join(FLOATS)}")
        except (SafetensorError, OSError) as error:
            raise UsageError(f"{path}: damaged or unreadable safetensors file ({error}); fetch it again") from error
    tied = {"lm_head.weight", "embed_out.weight"} if directory.architecture.tied else set()
    problems += [f"{name}: missing" for name in expected if name not in where]
    extra = (name for name in where if name not in expected and name not in tied and not IGNORED.search(name))
    problems += [f"{name}: not part of this architecture" for name in extra]
    if problems:
        listed = "\n  ".join(problems[:40]) + (f"\n  and {len(problems) - 40} more" if len(problems) > 40 else "")
        raise UsageError(f"{directory.path}: the weights do not fit config.json:\n  {listed}")
    return where


def load_params(directory: ModelDirectory, abstract: Any, shardings: Any, *, dtype: np.dtype) -> Params:
    """Reads the weights onto the mesh, one stacked parameter at a time; a host keeps what its own devices hold.

    Args:
      directory: from `open_directory`.
      abstract: tree of abstract nnx parameters; metadata `axes` gives each one's layout.
      shardings: where each parameter goes, the same tree.
      dtype: what the parameters are held in.

    Raises:
      UsageError: as `check`.
    """
    tensors = tensors_of(directory.architecture, directory.model_type)
    where = check(directory, abstract)
    flat_abstract, flat_shardings = _flatten(abstract), _flatten(shardings)
    loaded = {}
    for tensor in tensors:
        boxes = {param: _local_box(flat_shardings[param], flat_abstract[param].shape) for param in tensor.params}
        stacks = {param: np.empty([side.stop - side.start for side in box], dtype) for param, box in boxes.items()}
        for layer in _layers(tensor, directory.architecture):
            name = tensor.name.format(layer=layer)
            with safe_open(where[name], framework="numpy") as file:
                parts = from_file_layout(file.get_tensor(name), tensor, flat_abstract)
            for param, part in parts.items():
                if layer is None:
                    stacks[param][...] = part[boxes[param]]
                else:
                    stacks[param][layer] = part[boxes[param][1:]]  # layers are never sharded
        for param, stack in stacks.items():
            shape = flat_abstract[param].shape
            loaded[param] = jax.make_array_from_callback(
                shape, flat_shardings[param], partial(_from_box, stack, boxes[param], shape)
            )
    return _unflatten(loaded)


def _local_box(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> tuple[slice, ...]:
    """The smallest box around what this process's devices hold: all that a host needs to have in memory."""
    bounds = np.array([_bounds(index, shape) for index in sharding.addressable_devices_indices_map(shape).values()])
    starts, stops = bounds[..., 0].min(axis=0), bounds[..., 1].max(axis=0)
    return tuple(slice(int(start), int(stop)) for start, stop in zip(starts, stops, strict=True))


def _from_box(
    stack: np.ndarray, box: tuple[slice, ...], shape: tuple[int, ...], index: tuple[slice, ...]
) -> np.ndarray:
    """What one device holds, given as an index into the whole array, out of the box."""
    within = zip(_bounds(index, shape), box, strict=True)
    return stack[tuple(slice(start - side.start, stop - side.start) for (start, stop), side in within)]


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Start and stop on each axis; jax writes a whole axis as slice(None)."""
    return [side.indices(size)[:2] for side, size in zip(index, shape, strict=True)]


def save_params(
    params: Params, directory: ModelDirectory, abstract: Any, out: Path, *, dtype: np.dtype, shard_bytes: int
) -> None:
    """Writes the weights as sharded safetensors under their Hugging Face names; one layer is on the host at a time.

    All processes call it, process 0 writes. Files hold at most `shard_bytes`, or one tensor where that is larger.
    """
    tensors = tensors_of(directory.architecture, directory.model_type)
    flat, flat_abstract = _flatten(params), _flatten(abstract)
    names = [(tensor, layer) for tensor in tensors for layer in _layers(tensor, directory.architecture)]
    shards: list[list[tuple[Tensor, int | None]]] = [[]]
    held = 0
    for tensor, layer in names:
        size = sum(
            np.prod(flat[param].shape[layer is not None :], dtype=np.int64) * np.dtype(dtype).itemsize
            for param in tensor.params
        )
        if held and held + size > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append((tensor, layer))
        held += int(size)
    weight_map, total = {}, 0
    for number, shard in enumerate(shards, 1):
        file_name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        arrays = {}
        for tensor, layer in shard:
            parts = {param: _to_host(flat[param] if layer is None else flat[param][layer]) for param in tensor.params}
            name = tensor.name.format(layer=layer)
            arrays[name] = to_file_layout(parts, tensor, flat_abstract).astype(dtype)
            weight_map[name] = file_name
            total += arrays[name].nbytes
        if jax.process_index() == 0:
            save_file(arrays, out / file_name, metadata={"format": "pt"})
    if jax.process_index() == 0 and len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (out / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def from_file_layout(array: np.ndarray, tensor: Tensor, abstract: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """One tensor of one layer as the file has it -> each parameter's part of that layer."""
    axes = re.findall(r"\w+", tensor.layout)
    sizes = _sizes(tensor, abstract)
    array = array.reshape([sizes[axis] for axis in axes])
    parts = {}
    for number, param in enumerate(tensor.params):
        part = np.take(array, number, axis=axes.index("part")) if "part" in axes else array
        kept = [axis for axis in axes if axis != "part"]
        parts[param] = part.transpose([kept.index(axis) for axis in _own_axes(abstract[param], axes)])
    return parts


def to_file_layout(parts: Mapping[str, np.ndarray], tensor: Tensor, abstract: Mapping[str, Any]) -> np.ndarray:
    """The inverse of `from_file_layout`."""
    axes = re.findall(r"\w+", tensor.layout)
    kept = [axis for axis in axes if axis != "part"]
    arrays = []
    for param in tensor.params:
        own = _own_axes(abstract[param], axes)
        arrays.append(parts[param].transpose([own.index(axis) for axis in kept]))
    array = np.stack(arrays, axis=axes.index("part")) if "part" in axes else arrays[0]
    return np.ascontiguousarray(array.reshape(_file_shape(tensor, abstract)))


def _own_axes(param: Any, axes: list[str]) -> list[str]:
    """The parameter's axes but `layers`, under the names that the file's layout has for them."""
    own = [axis for axis in param.get_metadata()["axes"] if axis != "layers"]
    return [axis if axis in axes else axis.replace("kv_heads", "heads") for axis in own]


def _sizes(tensor: Tensor, abstract: Mapping[str, Any]) -> dict[str, int]:
    sizes = {"part": len(tensor.params)}
    for param in tensor.params:
        axes = abstract[param].get_metadata()["axes"]
        named = zip(
            _own_axes(abstract[param], re.findall(r"\w+", tensor.layout)),
            (size for axis, size in zip(axes, abstract[param].shape, strict=True) if axis != "layers"),
            strict=True,
        )
        sizes.update(named)
    return sizes


def _file_shape(tensor: Tensor, abstract: Mapping[str, Any]) -> tuple[int, ...]:
    sizes = _sizes(tensor, abstract)
    dimensions = re.findall(r"\(([^)]*)\)|(\w+)", tensor.layout)
    return tuple(int(np.prod([sizes[axis] for axis in (group or single).split()])) for group, single in dimensions)


def _layers(tensor: Tensor, architecture: Architecture) -> list[int | None]:
    return list(range(architecture.layers)) if "{layer}" in tensor.name else [None]


def _weight_files(directory: Path) -> list[Path]:
    index = directory / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise UsageError(f"{index}: damaged index ({error}); fetch it again") from error
    else:
        names = [SINGLE]
    for name in names:
        if Path(name).name != name:
            raise UsageError(f"{index}: weight_map names {name!r}, which is not a bare file name; nothing was read")
        if not (directory / name).is_file():
            raise UsageError(
                f"{directory / name}: missing; only safetensors weights are read (no .bin). To draw the weights from "
                "the seed instead, set model.init=random"
            )
    return [directory / name for name in names]


def _fetch(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UsageError(
            f"model.path={name}: neither a directory nor a hub name that can be fetched ({type(error).__name__}); "
            "check the name, model.revision, the network and HF_TOKEN"
        ) from error


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _to_host(array: jax.Array) -> np.ndarray:
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping) and not hasattr(tree, "flat_state"):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _unflatten(flat: Mapping[str, Any]) -> Params:
    tree: Params = {}
    for path, value in flat.items():
        *parents, leaf = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def iterate_shapes(abstract: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Path and shape of every parameter."""
    for path, param in _flatten(abstract).items():
        yield path, param.shape
