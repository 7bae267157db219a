"""Weight files -> parameters on the mesh, shard by shard: a host reads only the slices that its own devices hold.

Beside the shards themselves, host memory holds one slice of one tensor. On the way to an accelerator it also holds
up to two shards of one stacked parameter; on CPU devices the host's buffer becomes the device's.
"""

import contextlib
import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from safetensors import safe_open

from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.weights.directory import ModelDirectory, check
from sr_dpo_jax.weights.families import tensors_of
from sr_dpo_jax.weights.files import read_headers
from sr_dpo_jax.weights.layout import Block, Bounds, Params, blocks_of, flatten, names_of, unflatten

log = logging.getLogger(__name__)

ALIGNMENT_BYTES = 64
"""A CPU device adopts a buffer that starts on such a boundary, and copies any other."""
ROWS = 4096
"""So many of a slice are looked through at a time for numbers that are not finite."""
TYPES = {"F16": np.float16, "BF16": ml_dtypes.bfloat16, "F32": np.float32, "F64": np.float64}
"""What safetensors calls the types that are read."""


def load_params(directory: ModelDirectory, abstract: Any, shardings: Any, *, dtype: np.dtype) -> Params:
    """Reads the weights onto the mesh. Shards that several devices of this host hold alike are read once.

    Args:
      directory: from `open_directory`.
      abstract: tree of abstract nnx parameters; metadata `axes` gives each one's layout.
      shardings: where each parameter goes, the same tree.
      dtype: what the parameters are held in; every tensor is converted from its own type.

    Raises:
      UsageError: as `check`, or a tensor holds numbers that are not finite in `dtype`.
    """
    where = check(directory, abstract)
    flat_abstract, flat_shardings = flatten(abstract), flatten(shardings)
    loaded, pending = {}, []
    with contextlib.ExitStack() as opened:
        files = {path: opened.enter_context(safe_open(path, framework="numpy")) for path in set(where.values())}
        _report_types(directory, where, dtype)
        for tensor in tensors_of(directory.architecture, directory.model_type):
            blocks = blocks_of(tensor, flat_abstract)
            names = names_of(tensor, directory.architecture.layers)
            pieces: dict[str, list[jax.Array]] = {param: [] for param in tensor.params}
            for bounds, devices in _distinct_shards(tensor.params, flat_abstract, flat_shardings):
                buffers = _read_shard(files, where, names, blocks, bounds, dtype)
                jax.block_until_ready(pending)  # the buffers before these are free now
                for param, buffer in buffers.items():
                    pieces[param] += [jax.device_put(buffer, device) for device in devices]
                pending = [pieces[param][-1] for param in buffers]
                del buffers, buffer
            for param in tensor.params:
                shape, sharding = flat_abstract[param].shape, flat_shardings[param]
                loaded[param] = jax.make_array_from_single_device_arrays(shape, sharding, pieces[param])
    return unflatten(loaded)


def _distinct_shards(
    params: Sequence[str], abstract: Mapping[str, Any], shardings: Mapping[str, Any]
) -> Iterator[tuple[dict[str, Bounds], list[jax.Device]]]:
    """What this process's devices hold of the parameters of one tensor, each shard once, with its devices."""
    shards: dict[tuple[Bounds, ...], list[jax.Device]] = {}
    indices = {param: shardings[param].addressable_devices_indices_map(abstract[param].shape) for param in params}
    for device in indices[params[0]]:
        bounds = tuple(_bounds(indices[param][device], abstract[param].shape) for param in params)
        shards.setdefault(bounds, []).append(device)
    for bounds, devices in shards.items():
        yield dict(zip(params, bounds, strict=True)), devices


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> Bounds:
    """Start and stop on each axis; jax writes a whole axis as slice(None)."""
    return tuple(side.indices(size)[:2] for side, size in zip(index, shape, strict=True))


def _read_shard(
    files: Mapping[Path, Any],
    where: Mapping[str, Path],
    names: Sequence[tuple[str, int | None]],
    blocks: Sequence[Block],
    bounds: Mapping[str, Bounds],
    dtype: np.dtype,
) -> dict[str, np.ndarray]:
    """One shard of each parameter of a tensor, all layers, read layer by layer."""
    buffers = {param: _aligned([stop - start for start, stop in sides], dtype) for param, sides in bounds.items()}
    for name, layer in names:
        slices = files[where[name]].get_slice(name)
        for block in blocks:
            wanted = block.wanted(bounds)
            for param, part in block.parts(slices[block.region(wanted)], wanted).items():
                buffer = buffers[param][... if layer is None else layer]
                with np.errstate(over="ignore"):  # a float64 that float32 cannot hold; found below
                    buffer[...] = part
                if not _all_finite(buffer):
                    raise UsageError(
                        f"{where[name]}: {name} holds numbers that are not finite in {np.dtype(dtype).name}; the file "
                        "is damaged, or training broke it: fetch it again, or choose another model.path"
                    )
    return buffers


def _all_finite(array: np.ndarray) -> bool:
    return all(np.isfinite(array[start : start + ROWS]).all() for start in range(0, len(array), ROWS))


def _report_types(directory: ModelDirectory, where: Mapping[str, Path], dtype: np.dtype) -> None:
    """Says in which types the tensors lie, and which of those `dtype` rounds."""
    headers = read_headers(sorted(set(where.values()))).values()
    types = Counter(kind for header in headers for name, (_, kind) in header.items() if name in where)
    rounded = [kind for kind in sorted(types) if not np.can_cast(TYPES[kind], dtype)]
    log.info(
        "%s: tensors by type: %s; held in %s%s",
        directory.path,
        ", ".join(f"{number} {kind}" for kind, number in sorted(types.items())),
        np.dtype(dtype).name,
        f" (model.param_dtype), to which {', '.join(rounded)} is rounded" if rounded else "",
    )


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An array of no particular content that starts on a boundary of ALIGNMENT_BYTES."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + ALIGNMENT_BYTES, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT_BYTES
    return memory[start : start + size].view(dtype).reshape(shape)
