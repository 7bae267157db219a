"""Parameters -> sharded safetensors under their Hugging Face names, as a stream: never the whole model in memory."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.weights.directory import ModelDirectory
from sr_dpo_jax.weights.families import tensors_of
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

    Host memory holds one group (the parameters of one row of the table, in most rows one, all layers stacked) and the
    tensors of one file.

    Args:
      groups: for each row of the family's table, in its order, the row's parameters by path.
      directory: the base model, whose architecture and names are used.
      abstract: tree of abstract nnx parameters; metadata `axes` gives each one's layout.
      out: an existing directory.
      dtype: what the files hold.
      shard_bytes: most bytes of tensors in a file, but for a single tensor that is larger.

    Raises:
      UsageError: a number is not finite in `dtype`.
    """
    flat, layers = flatten(abstract), directory.architecture.layers
    tensors = tensors_of(directory.architecture, directory.model_type)
    blocks = [blocks_of(tensor, flat) for tensor in tensors]
    sizes = {
        name: math.prod(file_shape(of_tensor)) * np.dtype(dtype).itemsize
        for tensor, of_tensor in zip(tensors, blocks, strict=True)
        for name, _ in names_of(tensor, layers)
    }
    weight_map = plan_files(sizes, shard_bytes)
    filling: dict[str, np.ndarray] = {}
    stream = iter(groups)
    for tensor, of_tensor in zip(tensors, blocks, strict=True):
        group = next(stream)  # not by zip, which keeps its last items until it has the next ones
        for name, layer in names_of(tensor, layers):
            if filling and weight_map[name] != weight_map[next(iter(filling))]:
                _save(filling, out, weight_map)
            parts = {param: stack if layer is None else stack[layer] for param, stack in group.items()}
            filling[name] = _file_tensor(name, parts, of_tensor, dtype)
        del group, parts  # before the next one is made
    _save(filling, out, weight_map)
    if len(set(weight_map.values())) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (out / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def plan_files(sizes: Mapping[str, int], shard_bytes: int) -> dict[str, str]:
    """The file of each tensor: in order, each file as full as `shard_bytes` allows.

    Args:
      sizes: bytes of each tensor, in the order in which they are written.
      shard_bytes: most bytes in a file, but for a single tensor that is larger.
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
    """One tensor as the file has it, of the parameters of one layer in their own layout."""
    array = np.empty(file_shape(blocks), dtype)
    for block in blocks:
        whole = block.wanted({param: tuple((0, size) for size in parts[param].shape) for param in block.own_axes})
        for param, view in block.parts(array[block.start : block.stop], whole).items():
            with np.errstate(over="ignore"):  # said below, with the tensor's name
                view[...] = parts[param]
    if not np.isfinite(array).all():
        raise UsageError(
            f"{name}: holds numbers that are not finite in {np.dtype(dtype).name}; choose another --dtype, or another "
            "--step if training diverged"
        )
    return array


def _save(filling: dict[str, np.ndarray], out: Path, weight_map: Mapping[str, str]) -> None:
    """Writes the tensors of one file and forgets them."""
    save_file(filling, out / weight_map[next(iter(filling))], metadata={"format": "pt"})
    filling.clear()
