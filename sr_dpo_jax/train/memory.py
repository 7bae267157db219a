"""Weighs the train step against the memory that is free: its traced program before it is compiled, exactly after.

A device that is a CPU kills the process that asks for too much, without a word; others say so in an error of the
compiler. Both are told here with a remedy, before the first step.
"""

import logging
import math
import re
import time
from pathlib import Path
from typing import Any

import jax
import psutil
from jax.extend import core

from sr_dpo_jax.errors import RunError, UsageError
from sr_dpo_jax.parallel.chips import GIB

log = logging.getLogger(__name__)

CGROUP = Path("/sys/fs/cgroup")
REMEDY = (
    "set model.remat=full where it is not, which keeps the least and computes the rest again; raise "
    "batch.accumulation_steps; lower data.max_length; or take more devices"
)
OUT_OF_VMEM = re.compile(r"out of memory (on|in memory space) vmem", re.IGNORECASE)


def compile_within_memory(traced: Any, *, layers: int, devices: list[jax.Device]) -> Any:
    """Compiles a traced train step; warns where it needs more memory than is free on this process's devices.

    Args:
      traced: the step, traced with its arguments, which are in memory already.
      layers: L of the model.
      devices: all devices of the mesh.

    Raises:
      UsageError: the compiler finds that a device cannot hold the step, or a TPU's fast memory its attention kernel.
    """
    mine = [device for device in devices if device.process_index == jax.process_index()]
    free = free_bytes(mine)
    _warn(kept_bytes(traced.jaxpr.jaxpr, layers) / len(devices), free, "keeps at least")
    started = time.monotonic()
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        message = str(error)
        if OUT_OF_VMEM.search(message):
            raise refusal_of("train step", message) from error
        if "RESOURCE_EXHAUSTED" not in message and "out of memory" not in message.lower():
            raise
        raise UsageError(f"the train step does not fit a device; {REMEDY}: {message.partition(chr(10))[0]}") from error
    log.info("compiled in %.1f s", time.monotonic() - started)
    analysis = compiled.memory_analysis()
    if analysis is not None:
        made = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
        _warn(analysis.temp_size_in_bytes + made, free, "needs")
    return compiled


def refusal_of(name: str, message: str) -> UsageError | RunError:
    """Makes the error for a program that the compiler refuses for another reason than the chip's main memory."""
    said = f"the TPU compiler refuses the {name}: {message.partition(chr(10))[0]}"
    if OUT_OF_VMEM.search(message):
        return UsageError(
            f"{said}. That is the fast memory beside the matrix unit, which the attention kernel takes most of; set "
            "model.attention=dense or lower batch.row_length"
        )
    return RunError(f"{said}. Nothing in the configuration explains that: it is a fault of the compiler or of sr-dpo")


def _warn(needed: float, free: float | None, verb: str) -> None:
    """Warns where one device's share is more than it has; `free` is None where a device does not tell."""
    if free is not None and needed > free:
        log.warning(
            "the train step %s %.2f GiB on each device beside what is loaded, and %.2f GiB are free: it may be killed, "
            "or fail, in the first step; %s",
            *(verb, needed / GIB, free / GIB, REMEDY),
        )


def free_bytes(devices: list[jax.Device]) -> float | None:
    """Finds the bytes that are free on the fullest of this process's devices; None where they do not tell.

    Devices that are CPUs share what the machine has, or what its container may take.
    """
    if devices[0].platform == "cpu":
        free = psutil.virtual_memory().available
        limit, used = CGROUP / "memory.max", CGROUP / "memory.current"
        if limit.is_file() and used.is_file() and (most := limit.read_text().strip()).isdigit():
            free = min(free, int(most) - int(used.read_text()))
        return free / len(devices)
    stats = [device.memory_stats() or {} for device in devices]
    if not all("bytes_limit" in of_device and "bytes_in_use" in of_device for of_device in stats):
        return None
    return min(of_device["bytes_limit"] - of_device["bytes_in_use"] for of_device in stats)


def kept_bytes(jaxpr: core.Jaxpr, layers: int) -> int:
    """Counts the bytes that scans over the layers hand on from every layer, all devices together.

    They are what the backward pass needs of the forward pass, and the gradients of the layers: the largest part of a
    step's memory, and a lower bound of it. Of programs within a program the largest counts.
    """
    here = within = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan" and equation.params["length"] == layers:
            stacked = equation.outvars[equation.params["num_carry"] :]
            here += sum(math.prod(out.aval.shape) * out.aval.dtype.itemsize for out in stacked)
        for inner in core.jaxprs_in_params(equation.params):
            within = max(within, kept_bytes(inner, layers))
    return max(here, within)
