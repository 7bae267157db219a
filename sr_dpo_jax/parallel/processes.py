"""The processes of a run: how they join through jax.distributed, and how they agree on a value or a refusal."""

import logging
import os
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from sr_dpo_jax.errors import UsageError

log = logging.getLogger(__name__)
Result = TypeVar("Result")

COUNTED_BY = {
    "SLURM_STEP_NUM_TASKS": int,
    "OMPI_COMM_WORLD_SIZE": int,
    "TPU_WORKER_HOSTNAMES": lambda names: len(names.split(",")),
}
"""Variables that Slurm, Open MPI and GKE set in every process that they start, each with a reader of the count. Not
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
    if processes > 1 and not jax.distributed.is_initialized():  # an earlier call of this program may have joined
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
    elif processes == 1:
        _warn_of_others()
    if jax.process_count() != processes:
        raise UsageError(
            f"distributed.processes={processes}, but jax.distributed sees {jax.process_count()}; set the number of "
            "processes that were started"
        )


def _warn_of_others() -> None:
    """Warns before jax is asked for devices: on a TPU that may wait for the other hosts for ever."""
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
    """Gives all processes the largest of their values, so that they agree. Every process must ask."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.process_allgather(np.int32(value)).max())


def from_leader(value: float) -> float:
    """Gives all processes the value of process 0, to the bit. Every process must ask."""
    if jax.process_count() == 1:
        return value
    bits = np.array([value], np.float64).view(np.uint32)  # jax would round a float64
    return float(np.asarray(multihost_utils.broadcast_one_to_all(bits)).view(np.float64)[0])


def on_leader(work: Callable[[], Result]) -> Result | None:
    """Runs `work` on process 0 while the others wait; what it refuses with a UsageError, all refuse.

    Process 0 gets its result, all others None.
    """
    result = refusal = None
    if jax.process_index() == 0:
        try:
            result = work()
        except UsageError as error:
            refusal = error
    if largest(int(refusal is not None)):
        raise refusal or UsageError("process 0 has refused to go on; its own message says why")
    return result
