"""Attention over packed rows, behind `AttentionPath`, which every kernel implements.

Each query sees one contiguous range of keys (its pair's prompt and its own response, see `batch.py`) and, in augmented
rows, the prefix. The dense path here runs anywhere and is the oracle of those in `kernels/`.
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Visible:
    """The keys that each query of a row may see."""

    key_start: Array
    """`[R, T]` int32, the first key that a query sees, besides the prefix."""
    key_end: Array
    """`[R, T]` int32, one past the last."""
    positions: Array
    """`[R, T]` int32. A window is measured on positions: neighbours of a pair can lie far apart in a row."""
    prefix_tokens: int = dataclasses.field(metadata={"static": True})
    window: int | None = dataclasses.field(metadata={"static": True})
    """A query sees keys less than this many positions before it; None: all."""


class Attention(Protocol):
    """Attention over the rows of one micro-batch, for the layers of one kind."""

    def attend(self, query: Array, key: Array, value: Array) -> Array:
        """Computes softmax attention over each query's visible keys, as `DenseAttention.attend` does."""


@dataclasses.dataclass(frozen=True)
class AttentionPath:
    """One way to compute attention; all give the same numbers up to float order."""

    name: str
    on_rows: Callable[..., Attention]
    """`(visible, *, scale, cap) -> Attention`, called once for each kind of layers, before the scan over layers."""


@dataclasses.dataclass(frozen=True)
class DenseAttention:
    """All scores of a row at once: runs anywhere, and is the oracle of the kernels."""

    visible: Visible
    """Every query sees at least itself."""
    scale: float
    """The factor on the scores."""
    cap: float | None
    """Scores s become `cap · tanh(s / cap)`; None leaves them."""

    def attend(self, query: Array, key: Array, value: Array) -> Array:
        """Computes `softmax(s) · v` with `s = scale · q·k`, capped if asked for, over each query's visible keys.

        Args:
          query: `[R, T, H, D]`, rotated.
          key: `[R, T, K, D]`, rotated; H is a multiple of K, and H / K neighbouring query heads share a key head.
          value: `[R, T, K, D]`.

        Returns:
          `[R, T, H, D]` in the type of `value`; scores and softmax are float32.
        """
        rows, length, heads, head_dim = query.shape
        query = query.reshape(rows, length, key.shape[2], -1, head_dim)
        scores = jnp.einsum("rqkgd,rskd->rkgqs", query, key, preferred_element_type=at_least_float32(query.dtype))
        scores = soft_cap(scores * self.scale, self.cap)
        scores = jnp.where(visible_mask(self.visible)[:, None, None], scores, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
        mixed = jnp.einsum("rkgqs,rskd->rqkgd", weights, value)
        return mixed.reshape(rows, length, heads, head_dim)


def at_least_float32(dtype: jnp.dtype) -> jnp.dtype:
    """Gives the type for sums over many terms: float32, or float64 where everything else is float64 too."""
    return jnp.promote_types(dtype, jnp.float32)


def soft_cap(x: Array, cap: float | None) -> Array:
    """Computes `cap · tanh(x / cap)`, which keeps x within ±cap; x itself without a cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def visible_mask(visible: Visible) -> Array:
    """Gives the mask, `[R, T, T]` bool, query by key; on the dense path the compiler fuses it into its use."""
    index = jnp.arange(visible.key_start.shape[-1])
    seen = (visible.key_start[..., None] <= index) & (index < visible.key_end[..., None])
    seen |= (index < visible.prefix_tokens) & (index <= index[:, None])
    if visible.window is not None:
        seen &= visible.positions[..., None] - visible.positions[..., None, :] < visible.window
    return seen


def pad_rows(visible: Visible, block: int) -> Visible:
    """Fills rows up to whole blocks; the tokens added see themselves alone, since one that sees nothing gives NaN."""
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
    """Tells which blocks hold a visible key, `[R, T / block, T / block]` bool, queries by keys; windows are ignored."""
    rows, length = visible.key_start.shape
    first = jnp.arange(0, length, block)
    start, end = (array.reshape(rows, -1, block, 1) for array in (visible.key_start, visible.key_end))
    reached = (start < first + block) | (first < visible.prefix_tokens)
    return (reached & (end > first)).any(axis=2)


DENSE = AttentionPath("dense", DenseAttention)
