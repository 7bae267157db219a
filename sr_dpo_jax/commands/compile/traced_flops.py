"""Counts the matmul flops of a program as it was traced, before the compiler changes it, loops multiplied out.

A trap: XLA's own count takes a loop's body once, and there is none for a device that is not there.
"""

import dataclasses
import math
import re
from typing import Any

import jax.numpy as jnp
from jax.extend import core

SPLASH_MATMULS = {"fwd": 2, "dkv": 4, "dq": 3}
"""The number of matmuls over queries × keys in each kernel of splash attention: two for scores and mix; for the
gradients the scores once more."""
SPLASH_NAME = re.compile(rf"splash_\w*?({'|'.join(SPLASH_MATMULS)})_")


def splash_kernel(name: str) -> str | None:
    """Gives the key of `SPLASH_MATMULS` for a kernel's name or a text that holds it; None for another kernel."""
    match = SPLASH_NAME.search(name)
    return None if match is None else match[1]


def splash_flops(kernel: str, queries: tuple[int, ...]) -> float:
    """Counts the flops of one kernel for queries `[..., heads, T, D]` that see T keys, no block of them skipped."""
    *heads, length, head_dim = queries
    return 2.0 * SPLASH_MATMULS[kernel] * math.prod(heads) * length * length * head_dim


@dataclasses.dataclass
class TracedFlops:
    """The flops of a program."""

    matmuls: float = 0.0
    """The matmuls outside attention kernels."""
    kernels: float = 0.0
    """The matmuls inside attention kernels, as if they skipped no block."""

    def add(self, other: "TracedFlops", times: int = 1) -> None:
        """Adds the flops of a part that runs several times."""
        self.matmuls += times * other.matmuls
        self.kernels += times * other.kernels


def traced_flops(jaxpr: core.Jaxpr) -> TracedFlops:
    """Counts the flops of all devices together; of the branches of a condition the costliest counts.

    Raises:
      ValueError: the program holds a kernel whose flops are not known.
    """
    total = TracedFlops()
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            total.matmuls += _dot_flops(equation)
        elif name == "pallas_call":
            total.kernels += _kernel_flops(equation)
        elif name == "cond":
            branches = [traced_flops(branch.jaxpr) for branch in params["branches"]]
            total.add(max(branches, key=lambda flops: flops.matmuls + flops.kernels))
        else:
            times = params["length"] if name == "scan" else params["mesh"].size if name == "shard_map" else 1
            for inner in core.jaxprs_in_params(params):
                total.add(traced_flops(inner), times)
    return total


def _dot_flops(equation: Any) -> float:
    left, right = (variable.aval.shape for variable in equation.invars)
    (_, contracted), (_, batch) = equation.params["dimension_numbers"]
    free = [size for axis, size in enumerate(right) if axis not in (*contracted, *batch)]
    return 2.0 * math.prod(left) * math.prod(free)


def _kernel_flops(equation: Any) -> float:
    name = str(equation.params["name"])
    kernel = splash_kernel(name)
    floats = [variable.aval for variable in equation.invars if jnp.issubdtype(variable.aval.dtype, jnp.floating)]
    if kernel is None or not floats:
        raise ValueError(f"kernel {name}: nothing is known of its flops")
    return splash_flops(kernel, floats[0].shape)
