"""The device mesh, and the one table of logical axis -> mesh axis.

An axis that is not in the table, or a size that its mesh axes do not divide, raises and names the array.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from sr_dpo_jax.errors import UsageError

TABLE: Mapping[str, tuple[str, ...]] = {
    # data
    "micro_batches": (),  # one after the other
    "rows": ("replica", "fsdp"),
    "scored": ("tensor",),  # every tensor shard scores its share of the positions against the whole vocabulary
    # parameters
    "layers": (),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "vocabulary": (),
    "rank": (),  # of an adapter, which is thin; its other side lies as that of its matrix
    "table": ("fsdp", "tensor"),  # hidden units of embedding and unembedding; separate from `embed` because a look-up
    # reads whole rows, while each device sums only its own columns of the gradient
}


def make_mesh(*, replica: int, fsdp: int, tensor: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arranges all devices as replica × fsdp × tensor; a size of −1 takes what the others leave.

    TPU slices are joined by a network far slower than the one within a slice. Only replicas may span it: they exchange
    gradients once a step, while fsdp and tensor exchange weights and activations in every layer.

    Args:
      replica, fsdp, tensor: sizes.
      devices: all devices of the run; None: those that jax sees. Others serve to compile for a pod that is not there.

    Raises:
      UsageError: the sizes do not make up the devices, or a slice would not hold whole replicas.
    """
    devices = list(jax.devices()) if devices is None else list(devices)
    sizes = {"replica": replica, "fsdp": fsdp, "tensor": tensor}
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    free = [name for name, size in sizes.items() if size == -1]
    if len(devices) % fixed or (not free and fixed != len(devices)):
        raise UsageError(
            f"mesh={sizes}: does not make up {len(devices)} devices; set one size to -1, or fix the product"
        )
    shape = tuple(len(devices) // fixed if size == -1 else size for size in sizes.values())
    slices = len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"}) or 1
    if shape[0] % slices:
        raise UsageError(
            f"mesh.replica={shape[0]}: the devices form {slices} slices, and each must hold whole replicas; set "
            f"mesh.replica to a multiple of {slices}"
        )
    # Auto: the compiler propagates shardings. make_mesh's own default asks for a type on every reshape.
    types = (AxisType.Auto,) * len(shape)
    try:
        if slices == 1:
            return jax.make_mesh(shape, tuple(sizes), axis_types=types, devices=devices)
        within = (shape[0] // slices, *shape[1:])
        grid = mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1), devices)
        return Mesh(grid, tuple(sizes), axis_types=types)
    except (ValueError, NotImplementedError, AssertionError) as error:
        raise UsageError(f"mesh={sizes}: jax cannot lay it over these devices ({error}); choose other sizes") from error


def abstract_mesh(*, replica: int, fsdp: int, tensor: int) -> AbstractMesh:
    """Makes a mesh of these sizes without devices: it gives shardings, and holds no arrays."""
    sizes = {"replica": replica, "fsdp": fsdp, "tensor": tensor}
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def row_shards(mesh: Mesh) -> int:
    """Counts the devices that share the rows of a micro-batch."""
    return int(np.prod([mesh.shape[name] for name in TABLE["rows"]]))


def sharding(
    mesh: Mesh | AbstractMesh, axes: tuple[str | None, ...], shape: tuple[int, ...], name: str
) -> NamedSharding:
    """Gives the sharding of an array with these logical axes; None is an axis that is whole on every device.

    Raises:
      UsageError: an axis is not in TABLE, or does not divide by its mesh axes.
    """
    if len(axes) != len(shape):
        raise ValueError(f"{name}: {len(axes)} logical axes for shape {shape}")
    parts = []
    for axis, size in zip(axes, shape, strict=True):
        if axis is not None and axis not in TABLE:
            raise UsageError(f"{name}: logical axis {axis!r} is not in the sharding table; known: {', '.join(TABLE)}")
        mesh_axes = TABLE[axis] if axis is not None else ()
        shards = int(np.prod([mesh.shape[mesh_axis] for mesh_axis in mesh_axes]))
        if size % shards:
            raise UsageError(
                f"{name}: axis {axis!r} of size {size} does not divide over {' × '.join(mesh_axes)} = {shards} shards; "
                "change mesh.fsdp or mesh.tensor"
            )
        parts.append(mesh_axes or None)
    return NamedSharding(mesh, PartitionSpec(*parts))


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def jit_on(mesh: Mesh, function: Callable[..., Any], **options: Any) -> Any:
    """Jits a function with the mesh installed: `constrain` and `jax.shard_map` inside it find the mesh by themselves.

    Every program of the package is made here, so that the functions called inside need no mesh argument. `options` are
    those of `jax.jit`.
    """

    @functools.wraps(function)
    def traced(*arguments: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*arguments)

    return jax.jit(traced, **options)


def constrain(array: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """Pins an activation to the mesh that `jit_on` has installed, by its logical axes.

    Without a mesh, as where a single device computes a model for a test, the array stays as it is.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return array
    return jax.lax.with_sharding_constraint(array, sharding(mesh, axes, array.shape, "activation"))


def partition_spec(*axes: str | None) -> PartitionSpec:
    """Gives the mesh axes of each logical axis, for `jax.shard_map`; None is an axis that is whole on every device."""
    return PartitionSpec(*(TABLE[axis] or None if axis is not None else None for axis in axes))


def initialise(mesh: Mesh, make: Callable[[], Any], shardings: Any) -> Any:
    """Runs `make()` compiled, with its results born sharded: nothing is ever whole on one device."""
    return jit_on(mesh, make, out_shardings=shardings)()


def param_shardings(mesh: Mesh, abstract: Any) -> Any:
    """Gives the shardings of a tree of abstract nnx parameters, whose metadata name their logical axes."""
    return jax.tree.map_with_path(
        lambda path, param: sharding(mesh, param.get_metadata()["axes"], param.shape, jax.tree_util.keystr(path)),
        abstract,
        is_leaf=lambda node: hasattr(node, "get_metadata"),
    )


def bytes_a_chip(shapes: Any) -> int:
    """Counts the bytes that a tree of arrays, or of shapes with shardings, takes on one device."""
    leaves = jax.tree.leaves(shapes)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
