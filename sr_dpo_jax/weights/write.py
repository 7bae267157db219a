"""Parameters -> sharded safetensors under their Hugging Face names, one group at a time, never the whole model."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.weights.directory import ModelDirectory
from sr_dpo_jax.weights.files import INDEX, SINGLE
from sr_dpo_jax.weights.layout import Block, blocks_of, file_shape, flatten, names_of


def save_params(
    groups: Iterable[Mapping[str, np.ndarray]],
    directory: ModelDirectory,
    abstract: Any,
    out: Path,
    *,
    dtype: np.dtype,
    shard_bytes: int,
) -> None:
    """Writes `model.safetensors`, or numbered files and an index where that would be larger than `shard_bytes`.

    Host memory holds one group and the tensors of one file.

    Args:
      groups: for each row of the family's table, in its order, the row's parameters by path, all layers stacked.
      directory: the base model, whose architecture and names are used.
      abstract: tree of abstract nnx parameters; metadata `axes` names each one's axes.
      out: an existing directory.
      dtype: the type of the tensors in the files.
      shard_bytes: the most bytes of tensors in a file; a single tensor that is larger gets a file of its own.

    Raises:
      UsageError: a number is not finite in `dtype`.
    """
    flat, layers = flatten(abstract), directory.architecture.layers
    blocks = {tensor: blocks_of(tensor, flat) for tensor in directory.tensors}
    sizes = {
        name: math.prod(file_shape(of_tensor)) * np.dtype(dtype).itemsize
        for tensor, of_tensor in blocks.items()
        for name, _ in names_of(tensor, layers)
    }
    weight_map = plan_files(sizes, shard_bytes)
    filling: dict[str, np.ndarray] = {}
    stream = iter(groups)
    for tensor, of_tensor in blocks.items():
        group = next(stream)  # a trap: zip would keep the last group alive until it has the next one
        for name, layer in names_of(tensor, layers):
            if filling and weight_map[name] != weight_map[next(iter(filling))]:
                _save(filling, out, weight_map)
            parts = {param: stack if layer is None else stack[layer] for param, stack in group.items()}
            filling[name] = _file_tensor(name, parts, of_tensor, dtype)
        del group, parts  # frees them before the next group is made
    _save(filling, out, weight_map)
    if len(set(weight_map.values())) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (out / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def plan_files(sizes: Mapping[str, int], shard_bytes: int) -> dict[str, str]:
    """Assigns a file to each tensor, in order, each file as full as `shard_bytes` allows.

    Args:
      sizes: the bytes of each tensor, in the order in which they are written.
      shard_bytes: as for `save_params`.
    """
    numbers, number, held = {}, 1, 0
    for name, size in sizes.items():
        if held and held + size > shard_bytes:
            number, held = number + 1, 0
        numbers[name] = number
        held += size
    if number == 1:
        return dict.fromkeys(sizes, SINGLE)
    return {name: f"model-{mine:05d}-of-{number:05d}.safetensors" for name, mine in numbers.items()}


def _file_tensor(name: str, parts: Mapping[str, np.ndarray], blocks: tuple[Block, ...], dtype: np.dtype) -> np.ndarray:
    """Builds one tensor of the file from the parameters of one layer, which are in their own axes."""
    array = np.empty(file_shape(blocks), dtype)
    for block in blocks:
        whole = block.wanted({param: tuple((0, size) for size in parts[param].shape) for param in block.own_axes})
        for param, view in block.parts(array[block.start : block.stop], whole).items():
            with np.errstate(over="ignore"):  # infinite numbers are refused below, by the tensor's name
                view[...] = parts[param]
    if not np.isfinite(array).all():
        raise UsageError(
            f"{name}: holds numbers that are not finite in {np.dtype(dtype).name}; choose another --dtype, or another "
            "--step if training diverged"
        )
    return array


def _save(filling: dict[str, np.ndarray], out: Path, weight_map: Mapping[str, str]) -> None:
    save_file(filling, out / weight_map[next(iter(filling))], metadata={"format": "pt"})
    filling.clear()
