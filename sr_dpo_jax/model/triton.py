"""Fused attention on NVIDIA GPUs, Ampere and newer: tokamax's Triton kernels, fed with the rows' masks.

tokamax (https://github.com/openxla/tokamax) streams keys past each block of queries with a running softmax, forward and
backward, so no [T, T] of scores is in memory; the mask is, as bool `[R, T, T]` once a step for all heads and layers.
Its public function takes no ranges, so blocks in which nothing is seen are computed all the same.

Three traps: the gradient knows no cap on the scores, so those models stay dense; tokamax parses `sys.argv` as absl
flags the first time it reads an option, and ends the process at the first flag of ours; and it warns of every shape
that it has no tuned block sizes for.
"""

import logging

import jax
import jax.numpy as jnp
import tokamax
from absl import flags
from jax.sharding import Mesh, PartitionSpec

from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.model.attention import AttentionPath, Visible, pad_rows, visible_mask

Array = jax.Array

BLOCK = 128
"""Rows are filled up to whole blocks: the kernels' own are 32 to 128 tokens, and their backward reads whole ones."""


def triton_path(mesh: Mesh, *, row_axes: tuple[str, ...], head_axes: tuple[str, ...]) -> AttentionPath:
    """Attention by the kernels on each device's own rows and heads.

    Args:
      mesh: the device mesh.
      row_axes, head_axes: mesh axes that rows and heads are sharded over.
    """
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    logging.getLogger("absl").addFilter(_is_no_miss)
    rows, heads = PartitionSpec(row_axes), PartitionSpec(row_axes, None, head_axes, None)

    def attend(query: Array, key: Array, value: Array, mask: Array, *, scale: float, cap: float | None) -> Array:
        if cap is not None:
            raise UsageError(
                f"model.attention=triton: the kernel has no gradient for scores capped at {cap:g}, which this model "
                "asks for; set it to auto or dense"
            )

        def local(query: Array, key: Array, value: Array, mask: Array) -> Array:
            return _attend_rows(query, key, value, mask, scale=scale)

        specs = (heads, heads, heads, rows)
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)(
            query, key, value, mask
        )

    return AttentionPath("triton", _mask, attend)


def _is_no_miss(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Autotuning cache miss")


def _mask(visible: Visible) -> Array:
    """`[R, T, T]` bool, T in whole blocks; the tokens filled in see themselves, for a query that sees nothing has no
    softmax."""
    return visible_mask(pad_rows(visible, BLOCK))


def _attend_rows(query: Array, key: Array, value: Array, mask: Array, *, scale: float) -> Array:
    """`[R, T, H, D]` as of `attention.dense_attend`, of one device's rows and heads."""
    length = query.shape[1]
    fill = ((0, 0), (0, mask.shape[1] - length), (0, 0), (0, 0))
    query, key, value = (jnp.pad(array, fill) for array in (query, key, value))
    mixed = tokamax.dot_product_attention(
        query,
        key,
        value,
        mask=mask[:, None],
        scale=scale,
        # Of float32 the tensor cores would read 10 bits of mantissa.
        precision=jax.lax.Precision.HIGHEST if query.dtype == jnp.float32 else None,
        implementation="triton",
    )
    return mixed[:, :length]
