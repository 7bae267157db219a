"""jax.distributed, the device mesh, and the one table of logical axis -> mesh axis.

The table is loud: an axis that is not in it, or a size that its mesh axes do not divide, raises and names the array.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from sr_dpo_jax.errors import UsageError

log = logging.getLogger(__name__)

TABLE: Mapping[str, tuple[str, ...]] = {
    # data
    "steps": (),  # accumulation: one micro-batch after the other
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
    "table": ("fsdp", "tensor"),
}


COUNTED_BY = {
    "SLURM_STEP_NUM_TASKS": int,
    "OMPI_COMM_WORLD_SIZE": int,
    "TPU_WORKER_HOSTNAMES": lambda names: len(names.split(",")),
}
"""What Slurm, Open MPI and GKE set in every process that they start, and how it tells how many there are. Not
SLURM_NTASKS, which an interactive allocation and a batch script have too, where one process runs."""


def start_distributed(
    *,
    processes: int,
    coordinator_address: str | None,
    process_id: int | None,
    join_timeout_s: int,
    heartbeat_timeout_s: int,
) -> None:
    """Joins the run's processes; a run of one process needs nothing.

    One process among several that the environment tells of is warned of and not refused: they may be runs of their own,
    one a task, as in a sweep of seeds. Where they are not, the lease of `output_dir` refuses all but one.

    A process that has sent no heartbeat for `heartbeat_timeout_s` is taken for dead, and jax ends all others. Before
    all have joined, one that died cannot be told from one that is still to come: jax ends a process that has waited for
    `join_timeout_s`, and raises nothing.

    Raises:
      UsageError: jax.distributed finds no cluster, or another number of processes than `distributed.processes`.
    """
    if processes > 1:
        log.info(
            "joining %d processes; all must have come within distributed.join_timeout_s=%d", processes, join_timeout_s
        )
        try:
            jax.distributed.initialize(
                coordinator_address,
                None if coordinator_address is None else processes,
                process_id,
                initialization_timeout=join_timeout_s,
                heartbeat_timeout_seconds=heartbeat_timeout_s,
            )
        except ValueError as error:
            raise UsageError(
                f"distributed.processes={processes}: jax found no cluster to join ({error}); set "
                "distributed.coordinator_address and distributed.process_id"
            ) from error
    else:
        _warn_of_others()
    if jax.process_count() != processes:
        raise UsageError(
            f"distributed.processes={processes}, but jax.distributed sees {jax.process_count()}; set the number of "
            "processes that were started"
        )


def _warn_of_others() -> None:
    """Before jax is asked for devices: on a TPU that may wait for the other hosts for ever."""
    for variable, count in COUNTED_BY.items():
        try:
            started = count(os.environ.get(variable, "1"))
        except ValueError:  # no number: it is not what it is taken for
            continue
        if started > 1:
            log.warning(
                "distributed.processes=1, but %s tells of %d processes; if they make up one run, set "
                "distributed.processes=%d",
                variable,
                started,
                started,
            )


def largest(value: int) -> int:
    """The largest of all processes' values, on all of them: how they agree. Every process must ask."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.process_allgather(np.int32(value)).max())


def from_leader(value: float) -> float:
    """Process 0's value on all processes, to the bit. Every process must ask."""
    if jax.process_count() == 1:
        return value
    bits = np.array([value], np.float64).view(np.uint32)  # jax would round a float64
    return float(np.asarray(multihost_utils.broadcast_one_to_all(bits)).view(np.float64)[0])


def on_leader(work: Callable[[], None]) -> None:
    """Runs `work` on process 0 while the others wait; what it refuses with a UsageError, all refuse."""
    refusal = None
    if jax.process_index() == 0:
        try:
            work()
        except UsageError as error:
            refusal = error
    if largest(int(refusal is not None)):
        raise refusal or UsageError("process 0 has refused to go on; its own message says why")


def make_mesh(*, replica: int, fsdp: int, tensor: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """All devices as replica × fsdp × tensor; a size of −1 takes what the others leave.

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
    """The mesh of so many devices without the devices: it gives shardings, and holds no arrays."""
    sizes = {"replica": replica, "fsdp": fsdp, "tensor": tensor}
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def row_shards(mesh: Mesh) -> int:
    """How many devices share the rows of a micro-batch."""
    return int(np.prod([mesh.shape[name] for name in TABLE["rows"]]))


def sharding(
    mesh: Mesh | AbstractMesh, axes: tuple[str | None, ...], shape: tuple[int, ...], name: str
) -> NamedSharding:
    """The sharding of an array with these logical axes; None is an axis that is whole on every device.

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


def constrain(mesh: Mesh) -> Callable[[jax.Array, tuple[str | None, ...]], jax.Array]:
    """A function that pins an activation to the mesh by its logical axes, for use inside jit."""

    def pin(array: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
        return jax.lax.with_sharding_constraint(array, sharding(mesh, axes, array.shape, "activation"))

    return pin


def param_shardings(mesh: Mesh, abstract: Any) -> Any:
    """Shardings of a tree of abstract nnx parameters, whose metadata name their logical axes."""
    return jax.tree.map_with_path(
        lambda path, param: sharding(mesh, param.get_metadata()["axes"], param.shape, jax.tree_util.keystr(path)),
        abstract,
        is_leaf=lambda node: hasattr(node, "get_metadata"),
    )
