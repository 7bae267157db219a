"""Weight files -> parameters on the mesh, shard by shard: a host reads only the slices that its own devices hold.

Beside the shards themselves, host memory holds one slice of one tensor. On the way to an accelerator it also holds
up to two shards of one stacked parameter; on CPU devices the host's buffer becomes the device's.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import safe_open

from sr_dpo_jax.weights.directory import ModelDirectory, check
from sr_dpo_jax.weights.families import tensors_of
from sr_dpo_jax.weights.layout import Block, Bounds, Params, blocks_of, flatten, names_of, unflatten

ALIGNMENT_BYTES = 64
"""A CPU device adopts a buffer that starts on such a boundary, and copies any other."""


def load_params(directory: ModelDirectory, abstract: Any, shardings: Any, *, dtype: np.dtype) -> Params:
    """Reads the weights onto the mesh. Shards that several devices of this host hold alike are read once.

    Args:
      directory: from `open_directory`.
      abstract: tree of abstract nnx parameters; metadata `axes` gives each one's layout.
      shardings: where each parameter goes, the same tree.
      dtype: what the parameters are held in; every tensor is converted from its own type.

    Raises:
      UsageError: as `check`.
    """
    where = check(directory, abstract)
    flat_abstract, flat_shardings = flatten(abstract), flatten(shardings)
    loaded, pending = {}, []
    with contextlib.ExitStack() as opened:
        files = {path: opened.enter_context(safe_open(path, framework="numpy")) for path in set(where.values())}
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
                buffers[param][... if layer is None else layer] = part
    return buffers


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An array of no particular content that starts on a boundary of ALIGNMENT_BYTES."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + ALIGNMENT_BYTES, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT_BYTES
    return memory[start : start + size].view(dtype).reshape(shape)
