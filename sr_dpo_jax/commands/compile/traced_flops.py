"""Matmul flops of a program as it was traced, before the compiler splits or changes it, loops multiplied out.

XLA's own count takes a loop's body once, and has none for a device that is not there.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from jax.extend import core

SPLASH_MATMULS = {"fwd": 2, "dkv": 4, "dq": 3}
"""Matmuls over queries × keys in each kernel of splash attention: scores and mix, and for the gradients the scores
again."""


def splash_flops(kind: str, queries: tuple[int, ...]) -> float:
    """Flops of one kernel for queries `[..., heads, T, D]` that see T keys, no block of them skipped."""
    *heads, length, head_dim = queries
    return 2.0 * SPLASH_MATMULS[kind] * math.prod(heads) * length * length * head_dim


@dataclasses.dataclass(frozen=True)
class TracedFlops:
    matmuls: float
    kernels: float
    """Matmuls inside attention kernels, as if they skipped no block."""

    def __add__(self, other: "TracedFlops") -> "TracedFlops":
        return TracedFlops(self.matmuls + other.matmuls, self.kernels + other.kernels)

    def __rmul__(self, times: int) -> "TracedFlops":
        return TracedFlops(times * self.matmuls, times * self.kernels)


def traced_flops(jaxpr: core.Jaxpr) -> TracedFlops:
    """Flops of all devices together; of branches, the costliest."""
    total = TracedFlops(0.0, 0.0)
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            total += TracedFlops(_dot_flops(equation), 0.0)
        elif name == "pallas_call":
            total += TracedFlops(0.0, _kernel_flops(equation))
        elif name == "cond":
            branches = [traced_flops(branch.jaxpr) for branch in params["branches"]]
            total += max(branches, key=lambda flops: flops.matmuls + flops.kernels)
        else:
            times = params["length"] if name == "scan" else params["mesh"].size if name == "shard_map" else 1
            for inner in _jaxprs(params.values()):
                total += times * traced_flops(inner)
    return total


def _jaxprs(values: Any) -> Iterator[core.Jaxpr]:
    for value in values:
        if isinstance(value, core.ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, core.Jaxpr):
            yield value


def _dot_flops(equation: Any) -> float:
    left, right = (variable.aval.shape for variable in equation.invars)
    (left_contracted, right_contracted), (_, right_batch) = equation.params["dimension_numbers"]
    free = [size for axis, size in enumerate(right) if axis not in (*right_contracted, *right_batch)]
    del left_contracted
    return 2.0 * math.prod(left) * math.prod(free)


def _kernel_flops(equation: Any) -> float:
    name = str(equation.params["name"])
    kinds = [kind for kind in SPLASH_MATMULS if f"_{kind}_" in name]
    floats = [variable.aval for variable in equation.invars if jnp.issubdtype(variable.aval.dtype, jnp.floating)]
    if len(kinds) != 1 or not floats:
        raise ValueError(f"kernel {name}: nothing is known of its flops")
    return splash_flops(kinds[0], floats[0].shape)
