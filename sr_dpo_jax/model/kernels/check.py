"""Compares an attention kernel with the dense path on the device, before a run trusts it with values and gradients.

A kernel that was compiled and interpreted elsewhere may still be wrong where it runs. One small packed row a device
with the model's own heads, scale, cap and windows shows it in one program, at the start.
"""

import logging
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sr_dpo_jax.model.architecture import Architecture
from sr_dpo_jax.model.attention import DENSE, AttentionPath, Visible
from sr_dpo_jax.model.paths import attention_path
from sr_dpo_jax.parallel.mesh import constrain, jit_on, replicated, row_shards

log = logging.getLogger(__name__)

KERNELS = ("splash", "triton")
"""The paths that are compared. `tiled` is plain JAX, whose operations XLA's own tests cover."""
PARTS = ("output", "gradient of queries", "gradient of keys", "gradient of values")
PREFIX, PAIRS = 12, ((40, 90, 60), (150, 30, 80), (3, 20, 27))
"""Tokens of p, and of the rejected response, the prompt and the chosen response of each pair in the row."""
NARROWEST = 100
"""A window is no longer than this, or the row would not notice it."""
USUAL = 4.0
"""A kernel may be this many times as far from the exact numbers as the dense path in the run's own type is."""
AXES = ("rows", None, "heads", None)
FLOOR = {"float32": 1e-5, "bfloat16": 4e-3}
"""An error that is always allowed, as a share of the largest entry: some 80 roundings of float32, one of bfloat16."""


def wrong_kernel(name: str, mesh: Mesh, architecture: Architecture, dtype: jnp.dtype) -> str | None:
    """Says by how much the attention kernel of this name is wrong on these devices; None where it is right or none."""
    if name not in KERNELS:
        return None
    started, path = time.monotonic(), attention_path(name, mesh, architecture, dtype)
    try:
        errors = kernel_errors(path, mesh, architecture, dtype)
    except Exception as error:  # noqa: BLE001 (lowering, compiler and device each have errors of their own)
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        return f"the {name} kernel does not run on these devices ({first_line[:200]})"
    numbers = ", ".join(f"{part} {error:.1e} of {allowed:.1e}" for part, (error, allowed) in errors.items())
    log.info("attention %s against dense, %.1f s: %s allowed", name, time.monotonic() - started, numbers)
    if all(error <= allowed for error, allowed in errors.values()):  # NaN is not
        return None
    return f"the {name} kernel differs from dense attention on these devices ({numbers} allowed)"


def kernel_errors(
    path: AttentionPath, mesh: Mesh, architecture: Architecture, dtype: jnp.dtype
) -> dict[str, tuple[float, float]]:
    """Measures a kernel on random queries, keys and values: output and gradients of a weighted sum, for each window.

    Args:
      path: the kernel.
      mesh: the device mesh; every process must ask, and all get the same numbers.
      architecture: gives heads, scale, cap and windows.
      dtype: the type of activations.

    Returns:
      For each part the largest error as a share of the largest entry, and the one that is allowed: dense attention in
      float32 is taken for exact, and dense attention in `dtype` for usual.
    """
    rows, windows = row_shards(mesh), sorted({kind.window for kind in architecture.kinds}, key=lambda size: size or 0)
    program = jit_on(mesh, _errors, static_argnums=(0, 1, 2, 3), out_shardings=replicated(mesh))
    seed = np.uint32(0)  # an argument, or the compiler would draw all numbers by itself, and slowly
    found = [
        jax.device_get(program(path, architecture, dtype, rows, seed, _visible(rows, window))) for window in windows
    ]
    errors, usual = np.stack(found).transpose(2, 0, 1)
    allowed = np.maximum(USUAL * usual, FLOOR[jnp.dtype(dtype).name])
    worst = np.argmax(np.where(np.isnan(errors), np.inf, errors / allowed), axis=0)
    return {
        part: (float(errors[worst[number], number]), float(allowed[worst[number], number]))
        for number, part in enumerate(PARTS)
    }


def _errors(
    path: AttentionPath, architecture: Architecture, dtype: jnp.dtype, rows: int, seed: jax.Array, visible: Visible
) -> jax.Array:
    """Computes `[4 parts, (kernel, dense in dtype)]` errors as shares of the largest entry of dense in float32."""
    a, length = architecture, visible.positions.shape[1]
    heads = (a.heads, a.kv_heads, a.kv_heads, a.heads)
    keys = jax.random.split(jax.random.key(seed), len(heads))
    query, key, value, weight = (
        constrain(jax.random.normal(one, (rows, length, count, a.head_dim)).astype(dtype), AXES)
        for one, count in zip(keys, heads, strict=True)
    )
    query *= jnp.asarray(1 / (a.query_scale * a.head_dim**0.5), dtype)  # scores of unit size, whatever the scale

    def run(path: AttentionPath, dtype: jnp.dtype) -> tuple[jax.Array, ...]:
        attend = path.on_rows(visible, scale=a.query_scale, cap=a.attention_cap).attend
        mixed, pull_back = jax.vjp(attend, *(array.astype(dtype) for array in (query, key, value)))
        return tuple(array.astype(jnp.float32) for array in (mixed, *pull_back(weight.astype(mixed.dtype))))

    with jax.default_matmul_precision("highest"):
        exact = run(DENSE, jnp.dtype("float32"))

    def shares(found: tuple[jax.Array, ...]) -> jax.Array:
        both = zip(found, exact, strict=True)
        return jnp.stack([jnp.abs(mine - theirs).max() / jnp.abs(theirs).max() for mine, theirs in both])

    return jnp.stack([shares(run(path, dtype)), shares(run(DENSE, dtype))], axis=1)


def _visible(rows: int, window: int | None) -> Visible:
    """Lays out the same packed row for every shard: p, then pairs of rejected (reversed), prompt and chosen."""
    fields = [(0, place + 1, place) for place in range(PREFIX)]
    for rejected, prompt, chosen in PAIRS:
        start = len(fields)
        first, last = start + rejected, start + rejected + prompt
        fields += [(start + n, last, PREFIX + prompt + rejected - 1 - n) for n in range(rejected)]
        fields += [(first, first + n + 1, PREFIX + n) for n in range(prompt)]
        fields += [(first, last + n + 1, PREFIX + prompt + n) for n in range(chosen)]
    columns = (np.tile(np.array(column, np.int32), (rows, 1)) for column in zip(*fields, strict=True))
    return Visible(*columns, PREFIX, None if window is None else min(window, NARROWEST))
