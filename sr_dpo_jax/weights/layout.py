"""The geometry of a table row: where the numbers of a parameter stand in a file's tensor, for reading and for writing.

A tensor of a file is a run of blocks along its first dimension. A block holds one parameter (of one layer), or several
of one shape that its layout interleaves as `part`. `Block.region` says which slice of the file a shard needs, and
`Block.parts` gives views of that slice in the parameters' own axes: read them to import, write into them to export.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from sr_dpo_jax.weights.families import Tensor

Bounds = tuple[tuple[int, int], ...]
"""Start and stop on each axis of a parameter, `layers` included."""
Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Block:
    """Rows `start` to `stop` of a file's tensor."""

    start: int
    stop: int
    dimensions: tuple[tuple[str, ...], ...]
    """The axes of each dimension of the file, in memory order."""
    sizes: Mapping[str, int]
    """Of each axis, and of `part`."""
    own_axes: Mapping[str, tuple[str, ...]]
    """The axes of each parameter but `layers`, under the names that the layout has for them, in the order of `part`."""

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(math.prod(self.sizes[axis] for axis in dimension) for dimension in self.dimensions)

    def wanted(self, bounds: Mapping[str, Bounds]) -> dict[str, tuple[int, int]]:
        """Start and stop on each axis of the layout, of the shard that `bounds` gives for each parameter."""
        wanted = {axis: (0, size) for axis, size in self.sizes.items()}
        seen: dict[str, tuple[int, int]] = {}
        for param, axes in self.own_axes.items():
            for axis, sides in zip(axes, bounds[param][-len(axes) :], strict=True):
                if seen.setdefault(axis, sides) != sides:
                    raise ValueError(f"{param}: is not sharded as the parameters that share its tensor")
        return wanted | seen

    def region(self, wanted: Mapping[str, tuple[int, int]]) -> tuple[slice, ...]:
        """The slice of the file's tensor around `wanted`: exact where only the first axis of a dimension is cut."""
        slices = []
        for number, (first, *inner) in enumerate(self.dimensions):
            step = math.prod(self.sizes[axis] for axis in inner)
            offset = self.start if number == 0 else 0
            start, stop = wanted[first]
            slices.append(slice(offset + start * step, offset + stop * step))
        return tuple(slices)

    def parts(self, array: np.ndarray, wanted: Mapping[str, tuple[int, int]]) -> dict[str, np.ndarray]:
        """Views of `array`, which is the file's tensor at `region(wanted)`: each parameter, in its own axes."""
        axes = [axis for dimension in self.dimensions for axis in dimension]
        leading = {first for first, *_ in self.dimensions}
        held = {axis: wanted[axis] if axis in leading else (0, self.sizes[axis]) for axis in axes}
        array = array.reshape([stop - start for start, stop in held.values()])
        inner = tuple(slice(None) if axis in leading else slice(*wanted[axis]) for axis in axes)
        parts = {}
        for number, (param, own) in enumerate(self.own_axes.items()):
            index = tuple(number if axis == "part" else side for axis, side in zip(axes, inner, strict=True))
            kept = [axis for axis in axes if axis != "part"]
            parts[param] = array[index].transpose([kept.index(axis) for axis in own])
        return parts


def blocks_of(tensor: Tensor, abstract: Mapping[str, Any]) -> tuple[Block, ...]:
    """The blocks of a tensor: one of all parameters where its layout has `part`, else one of each.

    Args:
      tensor: a row of a family's table.
      abstract: abstract nnx parameters by path; metadata `axes` gives each one's layout.
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
            own = {_in_layout(axis, axes): size for axis, size in named if axis != "layers"}
            own_axes[param] = tuple(own)
            if own.keys() != axes - {"part"} or any(sizes.setdefault(axis, size) != size for axis, size in own.items()):
                raise ValueError(f"{tensor.name}: layout {tensor.layout!r} does not fit {param} with axes {own}")
        rows = math.prod(sizes[axis] for axis in dimensions[0])
        blocks.append(Block(start, start + rows, dimensions, sizes, own_axes))
        start += rows
    return tuple(blocks)


def file_shape(blocks: tuple[Block, ...]) -> tuple[int, ...]:
    """Shape of a tensor as the file has it."""
    return (blocks[-1].stop, *blocks[0].shape[1:])


def names_of(tensor: Tensor, layers: int) -> list[tuple[str, int | None]]:
    """Every name that a row stands for, with the number of its layer; None for one that is in no layer."""
    if "{layer}" not in tensor.name:
        return [(tensor.name, None)]
    return [(tensor.name.format(layer=layer), layer) for layer in range(layers)]


def flatten(tree: Any, prefix: str = "") -> Params:
    """A tree of parameters by path, as the tables name them: `layers.mlp.up`."""
    if not isinstance(tree, Mapping) and not hasattr(tree, "flat_state"):
        return {prefix: tree}
    flat: Params = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def unflatten(flat: Mapping[str, Any]) -> Params:
    """The inverse of `flatten`."""
    tree: Params = {}
    for path, value in flat.items():
        *parents, leaf = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def _in_layout(axis: str, axes: set[str]) -> str:
    """In a fused tensor `heads` stands for `kv_heads` too."""
    return axis if axis in axes else axis.replace("kv_heads", "heads")
