"""The arithmetic of a table row: where the numbers of a parameter stand in a file's tensor, for reading and writing.

A tensor of a file is a run of blocks along its first dimension. A block holds one parameter (of one layer), or several
of one shape that its layout interleaves as `part`. `Block.region` says which slice of the file a shard needs, and
`Block.parts` gives views of that slice in the parameters' own axes: read them to import, write into them to export.

Next: `read.py` and `write.py`, which use it.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from sr_dpo_jax.weights.families import Tensor

Bounds = tuple[tuple[int, int], ...]
"""The start and stop of a shard on each axis of a parameter, `layers` included."""


@dataclasses.dataclass(frozen=True)
class Block:
    """Rows `start` to `stop` of a file's tensor."""

    start: int
    stop: int
    dimensions: tuple[tuple[str, ...], ...]
    """The axes that each dimension of the file's tensor runs over, in memory order."""
    sizes: Mapping[str, int]
    """The length of each axis, and of `part`."""
    own_axes: Mapping[str, tuple[str, ...]]
    """The axes of each parameter except `layers`, by the names that the layout gives them, in the order of `part`."""

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(math.prod(self.sizes[axis] for axis in dimension) for dimension in self.dimensions)

    def wanted(self, bounds: Mapping[str, Bounds]) -> dict[str, tuple[int, int]]:
        """Turns the bounds of a shard of each parameter into start and stop on each axis of the layout."""
        wanted = {axis: (0, size) for axis, size in self.sizes.items()}
        seen: dict[str, tuple[int, int]] = {}
        for param, axes in self.own_axes.items():
            for axis, sides in zip(axes, bounds[param][-len(axes) :], strict=True):
                if seen.setdefault(axis, sides) != sides:
                    raise ValueError(f"{param}: is not sharded as the parameters that share its tensor")
        return wanted | seen

    def region(self, wanted: Mapping[str, tuple[int, int]]) -> tuple[slice, ...]:
        """Gives the slice of the file's tensor that holds `wanted`; of a dimension's axes only the first may be cut."""
        slices = []
        for number, (first, *inner) in enumerate(self.dimensions):
            step = math.prod(self.sizes[axis] for axis in inner)
            offset = self.start if number == 0 else 0
            start, stop = wanted[first]
            slices.append(slice(offset + start * step, offset + stop * step))
        return tuple(slices)

    def parts(self, array: np.ndarray, wanted: Mapping[str, tuple[int, int]]) -> dict[str, np.ndarray]:
        """Gives a view of each parameter in its own axes; `array` is the file's tensor at `region(wanted)`."""
        axes = [axis for dimension in self.dimensions for axis in dimension]
        array = array.reshape([wanted[axis][1] - wanted[axis][0] for axis in axes])
        if "part" in axes:
            stacked = np.moveaxis(array, axes.index("part"), 0)
            axes.remove("part")
        else:
            stacked = array[np.newaxis]
        return {
            param: part.transpose([axes.index(axis) for axis in own])
            for (param, own), part in zip(self.own_axes.items(), stacked, strict=True)
        }


def blocks_of(tensor: Tensor, abstract: Mapping[str, Any]) -> tuple[Block, ...]:
    """Cuts a tensor into blocks: one for all its parameters where the layout has `part`, else one for each.

    Args:
      tensor: a row of a family's table.
      abstract: abstract nnx parameters by path; metadata `axes` names each one's axes.

    Raises:
      ValueError: the layout does not fit the parameters.
    """
    dimensions = tuple(
        tuple((group or single).split()) for group, single in re.findall(r"\(([^)]*)\)|(\w+)", tensor.layout)
    )
    axes = {axis for dimension in dimensions for axis in dimension}
    runs = [tensor.params] if "part" in axes else [(param,) for param in tensor.params]
    blocks, start = [], 0
    for params in runs:
        sizes, own_axes = {"part": len(params)} if "part" in axes else {}, {}
        for param in params:
            named = zip(abstract[param].get_metadata()["axes"], abstract[param].shape, strict=True)
            # In a layout `heads` may stand for `kv_heads`.
            own = {axis if axis in axes else axis.removeprefix("kv_"): size for axis, size in named if axis != "layers"}
            own_axes[param] = tuple(own)
            if own.keys() != axes - {"part"} or any(sizes.setdefault(axis, size) != size for axis, size in own.items()):
                raise ValueError(f"{tensor.name}: layout {tensor.layout!r} does not fit {param} with axes {own}")
        rows = math.prod(sizes[axis] for axis in dimensions[0])
        blocks.append(Block(start, start + rows, dimensions, sizes, own_axes))
        start += rows
    return tuple(blocks)


def file_shape(blocks: tuple[Block, ...]) -> tuple[int, ...]:
    """Gives the shape of a tensor as the file has it."""
    return (blocks[-1].stop, *blocks[0].shape[1:])


def names_of(tensor: Tensor, layers: int) -> list[tuple[str, int | None]]:
    """Lists every name that a row stands for, with the number of its layer, or None where it is in no layer."""
    if "{layer}" not in tensor.name:
        return [(tensor.name, None)]
    return [(tensor.name.format(layer=layer), layer) for layer in range(layers)]


def flatten(tree: Any) -> dict[str, Any]:
    """Gives the leaves of a tree of parameters by path, as the tables name them: `layers.mlp.up`."""
    leaves = jax.tree.leaves_with_path(tree, is_leaf=lambda node: not isinstance(node, Mapping))
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
