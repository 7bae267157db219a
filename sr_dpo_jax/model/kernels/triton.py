"""Fused attention on NVIDIA GPUs, Ampere and newer: tokamax's Triton kernels, given the rows' masks.

tokamax (https://github.com/openxla/tokamax) computes each block of queries with a running softmax over the keys,
forward and backward, so the scores `[T, T]` are never in memory. The masks are: bool `[R, T, T]`, made once a step for
all heads and layers. Blocks without a visible key are computed too, because tokamax's public function takes no ranges
of keys. Its Mosaic kernels for Hopper and Blackwell are not used, because they cannot be tested without such a GPU.

Traps, each with its remedy:

* The kernels have no gradient for capped scores. Models with a cap use the dense path (`paths.py`).
* Given a `scale`, the kernels scale (and round) keys for one gradient and queries for the others. So queries are scaled
  beforehand, and the kernels' scale is 1.
* The kernels' gradient keeps its four inputs with its results, so a scan over layers would store every layer's masks,
  and recomputation would run the kernel to get them. `_forward` takes them out, and `_backward` puts them back.
* tokamax parses `sys.argv` as absl flags when it first reads an option, and would end the process at an option of ours.
  The flags are marked as parsed before.
* tokamax logs a warning for every shape that it has no tuned block sizes for. A filter drops it.
"""

import dataclasses
import logging
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokamax
from absl import flags
from jax.ad_checkpoint import checkpoint_name

from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.model.attention import AttentionPath, Visible, pad_rows, visible_mask
from sr_dpo_jax.parallel.mesh import partition_spec

Array = jax.Array

BLOCK = 128
"""Rows are padded to a multiple of it: the kernels' blocks have 32 to 128 tokens, and the backward reads whole ones."""
INPUTS = 4
"""The number of inputs (query, key, value, mask) that stand first in what the kernel's gradient keeps."""
LARGEST_MASK = 2**31
"""The most entries of one device's masks, which the kernels address by 32-bit offsets."""


@dataclasses.dataclass(frozen=True)
class TritonAttention:
    """Attention by the kernels on each device's own rows and heads."""

    mask: Array
    """`[R, T, T]` bool, T in whole blocks; the tokens filled in see themselves, as everywhere."""
    scale: float

    def attend(self, query: Array, key: Array, value: Array) -> Array:
        rows, heads = partition_spec("rows"), partition_spec("rows", None, "heads", None)
        scaled = (query.astype(jnp.float32) * self.scale).astype(query.dtype)
        sharded = jax.shard_map(_attend_rows, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False)
        return sharded(scaled, key, value, self.mask)


def triton_path() -> AttentionPath:
    """Makes the path, and keeps tokamax from reading our command line and from warning of every shape."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    logging.getLogger("absl").addFilter(_is_no_miss)
    return AttentionPath("triton", _on_rows)


def _is_no_miss(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Autotuning cache miss")


def _on_rows(visible: Visible, *, scale: float, cap: float | None) -> TritonAttention:
    if cap is not None:
        raise UsageError(
            f"model.attention=triton: the kernel has no gradient for scores capped at {cap:g}; set it to auto"
        )
    return TritonAttention(visible_mask(pad_rows(visible, BLOCK)), scale)


def _attend_rows(query: Array, key: Array, value: Array, mask: Array) -> Array:
    """Computes `[R, T, H, D]` for one device's rows and heads; `query` is scaled."""
    length = query.shape[1]
    if mask.size > LARGEST_MASK:
        raise UsageError(
            f"model.attention=triton: {mask.shape[0]} rows of {mask.shape[1]} tokens on one device at a time, and the "
            f"kernel's masks hold {LARGEST_MASK} entries; lower batch.row_length or raise batch.accumulation_steps"
        )
    fill = ((0, 0), (0, mask.shape[1] - length), (0, 0), (0, 0))
    return _fused(*(jnp.pad(array, fill) for array in (query, key, value)), mask)[:, :length]


def _kernel(query: Array, key: Array, value: Array, *, mask: Array) -> Array:
    return tokamax.dot_product_attention(
        query,
        key,
        value,
        mask=mask[:, None],
        scale=1.0,
        # A trap: the tensor cores would round float32 to 10 bits of mantissa.
        precision=jax.lax.Precision.HIGHEST if query.dtype == jnp.float32 else None,
        implementation="triton",
    )


@jax.custom_vjp
def _fused(query: Array, key: Array, value: Array, mask: Array) -> Array:
    return _kernel(query, key, value, mask=mask)


def _forward(query: Array, key: Array, value: Array, mask: Array) -> tuple[Array, Any]:
    _, pull_back = jax.vjp(partial(_kernel, mask=mask), query, key, value)
    leaves, tree = jax.tree.flatten(pull_back)
    # A trap: under remat `dots` the kernel would run again for its output and the two sums of its softmax, so they are
    # named to be kept. The output that is returned must be the kept one, or the next matmul's gradient runs the kernel.
    results = [checkpoint_name(leaf, "attention") for leaf in leaves[INPUTS:]]
    kept = jax.tree.unflatten(tree, [jnp.zeros(()) for _ in range(INPUTS)] + results)
    return results[0], (kept, (query, key, value, mask))


def _backward(residuals: tuple[Any, tuple[Array, ...]], gradient: Array) -> tuple[Any, ...]:
    kept, (query, key, value, mask) = residuals
    leaves, tree = jax.tree.flatten(kept)
    pull_back = jax.tree.unflatten(tree, [query, key, value, mask[:, None], *leaves[INPUTS:]])
    return *pull_back(gradient), np.zeros(mask.shape, jax.dtypes.float0)


_fused.defvjp(_forward, _backward)
