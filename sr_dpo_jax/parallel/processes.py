"""The processes of a run: how they join through jax.distributed, and how they agree on a value or a refusal."""

import hashlib
import logging
import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from sr_dpo_jax.errors import RunError, UsageError
from sr_dpo_jax.redaction import redact

log = logging.getLogger(__name__)
Result = TypeVar("Result")

COUNTED_BY = {
    "SLURM_STEP_NUM_TASKS": int,
    "OMPI_COMM_WORLD_SIZE": int,
    "TPU_WORKER_HOSTNAMES": lambda names: len(names.split(",")),
}
"""Variables that Slurm, Open MPI and GKE set in every process that they start, each with a reader of the count. Not
SLURM_NTASKS, which an interactive allocation and a batch script have too, where one process runs."""

MOST_FACTS = 1024
"""The most facts that processes compare; a collective has a fixed size."""
DIGEST_BYTES = 16


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


def keep_compiled(cache_dir: Path) -> None:
    """Lets jax keep compiled programs under `cache_dir`, unless the user has set another place or none.

    jax knows a program by its content, versions, flags and devices; of several processes the first alone writes, and
    what cannot be read or written is a warning. CPUs that differ do not share: their programs hold other instructions.
    """
    if jax.config.jax_compilation_cache_dir is None and jax.config.jax_enable_compilation_cache:
        instructions = next((line for line in _cpu_lines() if line.startswith(("flags", "Features"))), "")
        name = hashlib.blake2b(f"{platform.machine()} {instructions}".encode(), digest_size=4).hexdigest()
        jax.config.update("jax_compilation_cache_dir", str(cache_dir / f"compiled-{name}"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def _cpu_lines() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # another system than Linux
        return []


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


def text_from_leader(text: str) -> str:
    """Gives all processes the text of process 0; what the others hand in plays no part. Every process must ask."""
    if jax.process_count() == 1:
        return text
    content = text.encode() if jax.process_index() == 0 else b""
    size = largest(len(content))
    if size == 0:
        return ""
    padded = np.frombuffer(content.ljust(size, b"\0"), np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes().decode()


def require_same(facts: Mapping[str, Any]) -> None:
    """Refuses to go on where processes hold different facts. Every process must ask, at the same place of the program.

    It costs one collective, of the digests of names and values.

    Args:
      facts: the values that must be the same everywhere, by the key or file that a user would look at.

    Raises:
      UsageError: on all processes; names the facts that differ, the processes, and the value that this process has.
    """
    if jax.process_count() == 1:
        return
    own = {_digest(name): name for name in facts}
    table = np.zeros((MOST_FACTS, 2, DIGEST_BYTES), np.uint8)
    for row, (name, value) in zip(table[: len(facts)], facts.items(), strict=True):
        row[0], row[1] = (np.frombuffer(_digest(part), np.uint8) for part in (name, value))
    everyone = [
        {name.tobytes(): value.tobytes() for name, value in rows if name.any()}
        for rows in np.asarray(multihost_utils.process_allgather(table))
    ]
    names = set().union(*everyone)
    lines = []
    for digest in sorted(names, key=lambda digest: own.get(digest, "")):
        others = [number for number, held in enumerate(everyone) if held.get(digest) != everyone[0].get(digest)]
        if others and digest in own:
            name = own[digest]
            lines.append(f"  {name}: not on {_processes(others)} as on process 0; here {_shown(facts[name])}")
        elif others:
            holders = [number for number, held in enumerate(everyone) if digest in held]
            lines.append(f"  a key that {_processes(holders)} has and this one has not: its own message names it")
    if lines:
        raise UsageError(
            "\n".join([f"the processes of this run differ; this is process {jax.process_index()}:", *lines])
            + "\nStart all processes with the same configuration, files and versions"
        )


def _digest(value: Any) -> bytes:
    return hashlib.blake2b(str(value).encode(), digest_size=DIGEST_BYTES).digest()


def _processes(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
    return f"process {shown}" if len(numbers) == 1 else f"processes {shown}"


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def everywhere(work: Callable[[], None]) -> None:
    """Runs `work` on every process; where it fails on one, none goes on.

    Raises:
      UsageError: as `work` does; on the other processes, the first process that it failed on.
    """
    error = None
    try:
        work()
    except UsageError as failure:
        error = failure
    last = jax.process_count()
    first_failed = last - largest(0 if error is None else last - jax.process_index())
    if error is not None:
        raise error
    if first_failed < last:
        raise UsageError(f"process {first_failed} has stopped, and its own message says why")


def on_leader(work: Callable[[], Result]) -> Result | None:
    """Runs `work` on process 0 while the others wait; what stops it stops all, with its message.

    Process 0 gets its result, all others None.

    Raises:
      UsageError, RunError: as `work` does; on the other processes too.
      Exception: as `work` does, on process 0; a RunError with its message on the others.
    """
    result, error = None, None
    if jax.process_index() == 0:
        try:
            result = work()
        except Exception as failure:  # noqa: BLE001 (raised below, once the others know)
            error = failure
    if jax.process_count() > 1:
        said = "" if error is None else f"{type(error).__name__}: {redact(str(error))}"
        said = text_from_leader(said)
        if said and error is None:
            kind = UsageError if said.startswith(UsageError.__name__) else RunError
            raise kind(f"process 0 has stopped with {said}")
    if error is not None:
        raise error
    return result
