"""Attention over packed rows, behind the one function that kernels plug into.

Each query sees one contiguous range of keys (its pair's prompt and its own response, see `batch.py`) and, in augmented
rows, the prefix. The dense path here runs anywhere and is the oracle of the kernels in `splash.py` and `triton.py`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Visible:
    """Which keys each query of a row may see."""

    key_start: Array
    """`[R, T]` int32."""
    key_end: Array
    """`[R, T]` int32."""
    positions: Array
    """`[R, T]` int32, what a window is measured on: in a row, neighbours of a pair can lie far apart."""
    prefix_tokens: int = dataclasses.field(metadata={"static": True})
    window: int | None = dataclasses.field(metadata={"static": True})
    """A query sees keys less than this many positions before it; None: all."""


@dataclasses.dataclass(frozen=True)
class AttentionPath:
    """One way to compute attention; all give the same numbers up to float order."""

    name: str
    prepare: Callable[[Visible], Any]
    """Run once a step for each kind of layers, outside the loop over them; its result is `attend`'s fourth argument."""
    attend: Callable[..., Array]
    """`(query, key, value, prepared, *, scale, cap) -> [R, T, H, D]`, as `dense_attend`."""


def dense_attend(query: Array, key: Array, value: Array, visible: Visible, *, scale: float, cap: float | None) -> Array:
    """Softmax attention over each query's visible keys, `softmax(s)·v` with `s = scale · q·k`, capped if asked for.

    Args:
      query: `[R, T, H, D]`, rotated.
      key: `[R, T, K, D]`, rotated; H is a multiple of K, and H / K neighbouring query heads share a key head.
      value: `[R, T, K, D]`.
      visible: key ranges; every query sees at least itself.
      scale: factor on the scores.
      cap: scores become `cap · tanh(s / cap)`; None leaves them.

    Returns:
      `[R, T, H, D]` in the type of `value`; scores and softmax are float32.
    """
    rows, length, heads, head_dim = query.shape
    query = query.reshape(rows, length, key.shape[2], -1, head_dim)
    scores = jnp.einsum("rqkgd,rskd->rkgqs", query, key, preferred_element_type=at_least_float32(query.dtype))
    scores = soft_cap(scores * scale, cap)
    scores = jnp.where(visible_mask(visible)[:, None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    mixed = jnp.einsum("rkgqs,rskd->rqkgd", weights, value)
    return mixed.reshape(rows, length, heads, head_dim)


def at_least_float32(dtype: jnp.dtype) -> jnp.dtype:
    """The type for sums over many terms: float32, or float64 where everything else is float64 too."""
    return jnp.promote_types(dtype, jnp.float32)


def soft_cap(x: Array, cap: float | None) -> Array:
    """`cap · tanh(x / cap)`, which keeps x within ±cap; x itself without a cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def visible_mask(visible: Visible) -> Array:
    """`[R, T, T]` bool, query by key; on the dense path the compiler fuses it into the comparison that uses it."""
    index = jnp.arange(visible.key_start.shape[-1])
    seen = (visible.key_start[..., None] <= index) & (index < visible.key_end[..., None])
    seen |= (index < visible.prefix_tokens) & (index <= index[:, None])
    if visible.window is not None:
        seen &= visible.positions[..., None] - visible.positions[..., None, :] < visible.window
    return seen


def pad_rows(visible: Visible, block: int) -> Visible:
    """Rows filled up to whole blocks; the tokens added see themselves alone, since one that sees nothing gives NaN."""
    length = visible.key_start.shape[1]
    padded = -(-length // block) * block
    index = jnp.arange(padded, dtype=jnp.int32)

    def fill(array: Array, unused: Array) -> Array:
        return jnp.where(index < length, jnp.pad(array, ((0, 0), (0, padded - length))), unused)

    return dataclasses.replace(
        visible,
        key_start=fill(visible.key_start, index),
        key_end=fill(visible.key_end, index + 1),
        positions=fill(visible.positions, 0 * index),
    )


def blocks_that_run(visible: Visible, block: int) -> Array:
    """`[R, T / block, T / block]` bool: whether any query of a block sees any key of a block, windows aside."""
    rows, length = visible.key_start.shape
    first = jnp.arange(0, length, block)
    start, end = (array.reshape(rows, -1, block, 1) for array in (visible.key_start, visible.key_end))
    reached = (start < first + block) | (first < visible.prefix_tokens)
    return (reached & (end > first)).any(axis=2)


DENSE = AttentionPath("dense", lambda visible: visible, dense_attend)
