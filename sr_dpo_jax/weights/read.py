"""Weight files -> parameters on the mesh, shard by shard: each host reads only the slices that its devices hold.

Host memory holds one slice of one tensor at a time and, on the way to an accelerator, up to two shards of one stacked
parameter. On CPU devices the host's buffer becomes the device's.
"""

import contextlib
import logging
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict
from safetensors import safe_open

from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.model.decoder import Params
from sr_dpo_jax.weights.directory import ROWS, ModelDirectory, check
from sr_dpo_jax.weights.files import FLOATS, read_headers
from sr_dpo_jax.weights.layout import Block, Bounds, blocks_of, flatten, names_of

log = logging.getLogger(__name__)

ALIGNMENT_BYTES = 64
"""A CPU device adopts a buffer that starts on a multiple of this address, and copies any other."""


def load_params(
    directory: ModelDirectory, abstract: Any, shapes: Params, *, held: Callable[[str, jax.Array], Any] | None = None
) -> Params:
    """Reads the weights onto the mesh; a shard that several devices of this host hold is read once.

    Args:
      directory: from `open_directory`.
      abstract: tree of abstract nnx parameters; metadata `axes` names each one's axes.
      shapes: shape, type and sharding of each parameter that the files hold; every tensor is converted from its own
        type.
      held: called with the path of each parameter and its array, once that is complete; gives what is kept of it.

    Returns:
      The tree of sharded parameters, as nested dicts.

    Raises:
      UsageError: as in `check`, or a tensor holds numbers that are not finite in its type.
    """
    file_of = check(directory, abstract)
    flat_abstract, flat_shapes = flatten(abstract), flatten(shapes)
    loaded, pending = {}, []
    with contextlib.ExitStack() as opened:
        files = {path: opened.enter_context(safe_open(path, framework="numpy")) for path in set(file_of.values())}
        _report_types(directory, file_of, {leaf.dtype for leaf in flat_shapes.values()})
        for tensor in directory.tensors:
            blocks = blocks_of(tensor, flat_abstract)
            names = names_of(tensor, directory.architecture.layers)
            pieces: dict[str, list[jax.Array]] = {param: [] for param in tensor.params}
            for bounds, devices in _distinct_shards({param: flat_shapes[param] for param in tensor.params}):
                buffers = _read_shard(files, file_of, names, blocks, bounds, flat_shapes[tensor.params[0]].dtype)
                jax.block_until_ready(pending)  # frees the buffers of the shard before this one
                for param, buffer in buffers.items():
                    pieces[param] += [jax.device_put(buffer, device) for device in devices]
                pending = [pieces[param][-1] for param in buffers]
                del buffers, buffer
            for param in tensor.params:
                shape, sharding = flat_shapes[param].shape, flat_shapes[param].sharding
                whole = jax.make_array_from_single_device_arrays(shape, sharding, pieces.pop(param))
                loaded[param] = whole if held is None else held(param, whole)
                del whole
            pending = jax.tree.leaves([loaded[param] for param in tensor.params])  # and not what they were made from
    return unflatten_dict(loaded, sep=".")


def read_groups(directory: ModelDirectory, abstract: Any, dtype: np.dtype) -> Iterator[dict[str, np.ndarray]]:
    """Yields, for each row of the family's table, its parameters by path, all layers stacked, in host memory.

    Args:
      directory, abstract: as for `load_params`.
      dtype: the type of what is yielded.

    Raises:
      UsageError: as `load_params`.
    """
    file_of, flat = check(directory, abstract), flatten(abstract)
    with contextlib.ExitStack() as opened:
        files = {path: opened.enter_context(safe_open(path, framework="numpy")) for path in set(file_of.values())}
        for tensor in directory.tensors:
            names = names_of(tensor, directory.architecture.layers)
            whole = {param: tuple((0, size) for size in flat[param].shape) for param in tensor.params}
            yield _read_shard(files, file_of, names, blocks_of(tensor, flat), whole, dtype)


def _distinct_shards(shapes: Mapping[str, Any]) -> Iterator[tuple[dict[str, Bounds], list[jax.Device]]]:
    """Yields each distinct shard of a tensor's parameters on this process's devices, with the devices that hold it."""
    shards: dict[tuple[Bounds, ...], list[jax.Device]] = {}
    indices = {param: leaf.sharding.addressable_devices_indices_map(leaf.shape) for param, leaf in shapes.items()}
    for device in next(iter(indices.values())):
        bounds = tuple(
            # jax writes a whole axis as slice(None)
            tuple(side.indices(size)[:2] for side, size in zip(indices[param][device], leaf.shape, strict=True))
            for param, leaf in shapes.items()
        )
        shards.setdefault(bounds, []).append(device)
    for bounds, devices in shards.items():
        yield dict(zip(shapes, bounds, strict=True)), devices


def _read_shard(
    files: Mapping[Path, Any],
    file_of: Mapping[str, Path],
    names: Sequence[tuple[str, int | None]],
    blocks: Sequence[Block],
    bounds: Mapping[str, Bounds],
    dtype: np.dtype,
) -> dict[str, np.ndarray]:
    """Reads one shard of each parameter of a tensor, all layers, layer by layer."""
    buffers = {param: _aligned([stop - start for start, stop in sides], dtype) for param, sides in bounds.items()}
    for name, layer in names:
        slices = files[file_of[name]].get_slice(name)
        for block in blocks:
            wanted = block.wanted(bounds)
            for param, part in block.parts(slices[block.region(wanted)], wanted).items():
                buffer = buffers[param][... if layer is None else layer]
                with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, and is refused below
                    buffer[...] = part
                if not all(np.isfinite(buffer[start : start + ROWS]).all() for start in range(0, len(buffer), ROWS)):
                    raise UsageError(
                        f"{file_of[name]}: {name} holds numbers that are not finite in {np.dtype(dtype).name}; the "
                        "file is damaged, or training broke it: fetch it again, or choose another model.path"
                    )
    return buffers


def _report_types(directory: ModelDirectory, file_of: Mapping[str, Path], dtypes: Collection[np.dtype]) -> None:
    """Logs the types of the tensors in the files, the types that the parameters get, and those that this rounds."""
    headers = read_headers(sorted(set(file_of.values()))).values()
    types = Counter(kind for header in headers for name, (_, kind) in header.items() if name in file_of)
    narrowest = min(dtypes, key=lambda dtype: dtype.itemsize)
    rounded = [kind for kind in sorted(types) if not np.can_cast(FLOATS[kind], narrowest)]
    counts = ", ".join(f"{number} {kind}" for kind, number in sorted(types.items()))
    key = "model.param_dtype" if len(dtypes) == 1 else "model.dtype, norms in model.param_dtype"
    rounding = f" ({key}), to which {', '.join(rounded)} is rounded" if rounded else ""
    log.info(f"{directory.path}: tensors by type: {counts}; held in {narrowest.name}{rounding}")


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Allocates an array, not initialised, whose address is a multiple of ALIGNMENT_BYTES."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + ALIGNMENT_BYTES, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT_BYTES
    return memory[start : start + size].view(dtype).reshape(shape)
