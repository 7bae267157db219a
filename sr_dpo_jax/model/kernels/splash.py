"""Splash attention on TPU for packed rows: JAX's own Pallas kernel, given the range of keys that each token sees.

The kernel takes the mask as a function of one int32 for each query and of the key's index, and tables of the key blocks
that each block of queries needs. Both are made here from `key_start` and `key_end`, once a step, so no mask is in
memory, and blocks without a visible key are skipped. A sliding window is measured on positions, which one range of
indices cannot express (see `batch.py`), so layers with a window get the mask itself, bool `[T, T]` for each row.

The other exact way, segment ids on a view in which each response has its own copy of the prompt, needs 1.5 to 2.3 times
the cycles by the TPU compiler, and the memory of the copies (`tests/benchmarks/attention_layouts.py`).

A trap: the tables are fields of `MaskInfo`, which JAX does not promise to keep; a test compares with the dense path.
"""

import dataclasses
from collections.abc import Callable
from functools import cache, partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.model.attention import AttentionPath, Visible, blocks_that_run, pad_rows, visible_mask
from sr_dpo_jax.parallel.mesh import partition_spec

Array = jax.Array

LANES = 128
LARGEST_BLOCK = 512
LONGEST_ROW = 2**15
"""The most tokens of a row, because start and end of a range share one int32."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tables:
    """The tables that the kernel reads in place of masks; T is a whole number of blocks, Q of queries and K of keys."""

    ranges: Array | None
    """`[R, T]` int32, `key_start << 16 | key_end`; None where a window needs the whole mask."""
    mask: Array | None
    """`[R, Q·K, block, block]` bool, queries by keys; None where ranges are enough."""
    runs: Array
    """`[R, 1, Q, K]` int32, 1 where a block holds a visible key."""
    next_key_block: Array
    """`[R, 1, Q, K]` int32, the key block to hold in fast memory: the last one needed, so that a skip moves nothing."""
    next_query_block: Array
    """`[R, 1, Q, K]` int32, the query block to hold, for the gradients of keys and values, which loop over queries."""
    prefix_tokens: int = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class SplashAttention:
    """Attention by the kernel on each device's own rows and heads."""

    tables: Tables
    scale: float
    cap: float | None
    interpret: bool

    def attend(self, query: Array, key: Array, value: Array) -> Array:
        rows, heads = partition_spec("rows"), partition_spec("rows", None, "heads", None)
        local = partial(_attend_rows, cap=self.cap, interpret=self.interpret)
        # The kernel has no partitioning rule of its own: without shard_map every device would compute all rows.
        sharded = jax.shard_map(local, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False)
        scaled = (query.astype(jnp.float32) * self.scale).astype(query.dtype)
        return sharded(scaled, key, value, self.tables)


def splash_path(*, interpret: bool) -> AttentionPath:
    """Makes the path; `interpret` runs the kernel as plain JAX operations, on any device: for tests."""

    def on_rows(visible: Visible, *, scale: float, cap: float | None) -> SplashAttention:
        return SplashAttention(tables_of(visible), scale, cap, interpret)

    return AttentionPath("splash", on_rows)


def _block(length: int) -> int:
    return min(LARGEST_BLOCK, -(-length // LANES) * LANES)


def padded_length(length: int) -> int:
    """Rounds the tokens of a row up to whole blocks, as the kernel takes them."""
    return -(-length // _block(length)) * _block(length)


def tables_of(visible: Visible) -> Tables:
    length = visible.key_start.shape[1]
    block, padded = _block(length), padded_length(length)
    if padded > LONGEST_ROW:
        raise UsageError(
            f"batch.row_length: rows of {length} tokens, and splash attention takes at most {LONGEST_ROW}; lower it"
        )
    whole = pad_rows(visible, block)
    if visible.window is None:
        ranges, mask, runs = whole.key_start << 16 | whole.key_end, None, blocks_that_run(whole, block)
    else:
        blocks = visible_mask(whole).reshape(-1, padded // block, block, padded // block, block).swapaxes(2, 3)
        ranges, mask, runs = None, blocks.reshape(len(blocks), -1, block, block), blocks.any(axis=(-1, -2))
    return Tables(
        ranges=ranges,
        mask=mask,
        runs=runs.astype(jnp.int32)[:, None],
        next_key_block=_last_needed(runs, axis=2)[:, None],
        next_query_block=_last_needed(runs, axis=1)[:, None],
        prefix_tokens=visible.prefix_tokens,
    )


def _last_needed(runs: Array, axis: int) -> Array:
    """Gives `[R, Q, K]` int32: along an axis, the last block so far that runs, or the first one where none has."""
    number = jax.lax.broadcasted_iota(jnp.int32, runs.shape, axis)
    so_far = jax.lax.cummax(jnp.where(runs, number, -1), axis=axis)
    return jnp.where(so_far < 0, jnp.argmax(runs, axis=axis, keepdims=True).astype(jnp.int32), so_far)


@cache
def _sees(prefix_tokens: int) -> Callable[[Array, Array], Array]:
    """Gives the mask as a function of a query's range and a key's index.

    A trap: jit compares functions by identity, and would compile again for a new one; so they are cached.
    """

    def sees(query_range: Array, key: Array) -> Array:
        start, end = query_range >> 16, query_range & 0xFFFF
        return (key < end) & ((key >= start) | (key < prefix_tokens))

    return sees


def _attend_rows(
    query: Array, key: Array, value: Array, tables: Tables, *, cap: float | None, interpret: bool
) -> Array:
    """Computes `[R, T, H, D]` for one device's rows and heads, row by row."""
    length, block = query.shape[1], _block(query.shape[1])

    def heads_first(array: Array) -> Array:
        return jnp.pad(array, ((0, 0), (0, -length % block), (0, 0), (0, 0))).swapaxes(1, 2)

    row = partial(_attend_row, block=block, cap=cap, interpret=interpret)
    mixed = jax.vmap(row)(heads_first(query), heads_first(key), heads_first(value), tables)
    return mixed.swapaxes(1, 2)[:, :length]


def _attend_row(
    query: Array, key: Array, value: Array, tables: Tables, *, block: int, cap: float | None, interpret: bool
) -> Array:
    """Computes `[H, T, D]` for one row; the fields of `tables` have no axis R here."""
    _, query_blocks, key_blocks = tables.runs.shape
    by_query_mask, by_key_mask, next_by_query, next_by_key = None, None, None, None
    if tables.mask is not None:
        by_query_mask, by_key_mask = tables.mask, tables.mask.swapaxes(-1, -2)
        next_by_query = jnp.arange(query_blocks, dtype=jnp.int32)[:, None] * key_blocks + tables.next_key_block
        next_by_key = tables.next_query_block * key_blocks + jnp.arange(key_blocks, dtype=jnp.int32)
    by_query = MaskInfo(tables.next_key_block, next_by_query, tables.runs, by_query_mask, tables.ranges)
    by_key = MaskInfo(tables.next_query_block, next_by_key, tables.runs, by_key_mask, tables.ranges)
    attend = kernel.SplashAttentionKernel(
        by_query,
        by_query,
        by_key,
        block_sizes=kernel.BlockSizes(*[block] * 8),
        is_mqa=False,
        save_residuals=False,
        mask_value=kernel.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=cap,
        residual_checkpoint_name="attention",
        mask_function=None if tables.mask is not None else _sees(tables.prefix_tokens),
        interpret=interpret,
    )
    return attend(query, key, value)
