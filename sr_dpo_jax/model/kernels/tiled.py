"""Exact attention in tiles, in plain JAX: a tile of a row in which no query sees a key is skipped.

The pairs of a row do not see each other, so most of its T² (query, key) products are masked, and the dense path
computes them all. Here a loop runs over tiles of queries and keys with a running softmax (arXiv:1805.02867). The
backward pass computes the weights again from the normaliser that the forward pass kept. Tiles run one after the other,
which suits the few cores of a CPU; on a TPU `splash.py` does the same.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from sr_dpo_jax.model.attention import AttentionPath, Visible, at_least_float32, blocks_that_run, pad_rows
from sr_dpo_jax.parallel.mesh import partition_spec

Array = jax.Array

TILE = 64
"""Queries and keys of a tile. Of 64 to 256, 64 is fastest on HH-RLHF's pairs: small tiles hold few masked products."""

Tiles = tuple[Visible, Array]
"""The rows padded to whole tiles, and `[R, T / TILE, T / TILE]` bool, queries by keys: whether a tile is computed."""


@dataclasses.dataclass(frozen=True)
class TiledAttention:
    """Attention in tiles, on each device's own rows and heads: the loop over rows must not run across devices."""

    tiles: Tiles
    scale: float
    cap: float | None

    def attend(self, query: Array, key: Array, value: Array) -> Array:
        rows, heads = partition_spec("rows"), partition_spec("rows", None, "heads", None)
        local = partial(_attend_rows, scale=self.scale, cap=self.cap)
        sharded = jax.shard_map(local, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False)
        return sharded(query, key, value, self.tiles)


def _on_rows(visible: Visible, *, scale: float, cap: float | None) -> TiledAttention:
    whole = pad_rows(visible, TILE)
    return TiledAttention((whole, blocks_that_run(whole, TILE)), scale, cap)


TILED = AttentionPath("tiled", _on_rows)


def _attend_rows(query: Array, key: Array, value: Array, tiles: Tiles, *, scale: float, cap: float | None) -> Array:
    """Computes `[R, T, H, D]` as `DenseAttention.attend` does, row by row."""
    length = query.shape[1]

    def heads_first(heads: Array) -> Array:
        """Turns `[R, T, H, D]` into `[R, K, H / K, T, D]`, T padded to whole tiles."""
        rows, _, count, head_dim = heads.shape
        padded = jnp.pad(heads, ((0, 0), (0, -length % TILE), (0, 0), (0, 0)))
        return padded.reshape(rows, -1, key.shape[2], count // key.shape[2], head_dim).transpose(0, 2, 3, 1, 4)

    arguments = heads_first(query), heads_first(key)[:, :, 0], heads_first(value)[:, :, 0], *tiles
    mixed = jax.lax.map(lambda of_row: _attend_row(*of_row, scale, cap), arguments)
    rows, _, _, padded, head_dim = mixed.shape
    return mixed.transpose(0, 3, 1, 2, 4).reshape(rows, padded, -1, head_dim)[:, :length]


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend_row(
    query: Array, key: Array, value: Array, visible: Visible, runs: Array, scale: float, cap: float | None
) -> Array:
    """Computes one row: query `[K, G, T, D]`, key and value `[K, T, D]`, runs `[T / TILE, T / TILE]` bool."""
    return _forward(query, key, value, visible, runs, scale, cap)[0]


def _tile(array: Array, number: Array) -> Array:
    """Cuts the tile of that number out along the axis before the last."""
    return jax.lax.dynamic_slice_in_dim(array, number * TILE, TILE, axis=-2)


def _scores(
    query: Array, key: Array, visible: Visible, tile: tuple[Array, Array], scale: float, cap: float | None
) -> tuple[Array, Array]:
    """Computes the scores of a tile `[K, G, TILE, TILE]`, −inf where masked, and the derivative of the cap there."""
    raw = scale * jnp.einsum("kgqd,ksd->kgqs", query, key, preferred_element_type=at_least_float32(query.dtype))
    capped, slope = raw, jnp.ones((), raw.dtype)
    if cap is not None:
        squashed = jnp.tanh(raw / cap)
        capped, slope = cap * squashed, 1 - jnp.square(squashed)
    of_query = [jax.lax.dynamic_slice_in_dim(array, tile[0] * TILE, TILE) for array in dataclasses.astuple(visible)[:3]]
    start, end, position = (array[:, None] for array in of_query)
    index = tile[1] * TILE + jnp.arange(TILE)
    seen = (index < end) & ((index >= start) | (index < visible.prefix_tokens))
    if visible.window is not None:
        of_key = jax.lax.dynamic_slice_in_dim(visible.positions, tile[1] * TILE, TILE)
        seen &= position - of_key < visible.window
    return jnp.where(seen, capped, -jnp.inf), slope


def _forward(
    query: Array, key: Array, value: Array, visible: Visible, runs: Array, scale: float, cap: float | None
) -> tuple[Array, tuple[Array, ...]]:
    wide = at_least_float32(query.dtype)

    def queries(_: None, i: Array) -> tuple[None, tuple[Array, Array]]:
        of_tile = _tile(query, i)

        def keys(carry: tuple[Array, Array, Array], j: Array) -> tuple[tuple[Array, Array, Array], None]:
            def run(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
                largest, total, mixed = carry
                scores, _ = _scores(of_tile, _tile(key, j), visible, (i, j), scale, cap)
                larger = jnp.maximum(largest, scores.max(axis=-1))
                # A trap: a query that has seen no key yet has −inf on both sides, and −inf − −inf is NaN.
                safe = jnp.where(larger == -jnp.inf, 0, larger)
                weights, shrunk = jnp.exp(scores - safe[..., None]), jnp.exp(largest - safe)
                more = jnp.einsum("kgqs,ksd->kgqd", weights.astype(value.dtype), _tile(value, j))
                return larger, total * shrunk + weights.sum(axis=-1), mixed * shrunk[..., None] + more.astype(wide)

            return jax.lax.cond(runs[i, j], run, lambda unchanged: unchanged, carry), None

        shape = of_tile.shape[:-1]
        start = jnp.full(shape, -jnp.inf, wide), jnp.zeros(shape, wide), jnp.zeros(of_tile.shape, wide)
        (largest, total, mixed), _ = jax.lax.scan(keys, start, jnp.arange(runs.shape[1]))
        return None, (mixed / total[..., None], largest + jnp.log(total))

    _, (mixed, normaliser) = jax.lax.scan(queries, None, jnp.arange(runs.shape[0]))
    mixed = _joined(mixed).astype(value.dtype)
    normaliser = _joined(normaliser[..., None])[..., 0]
    return mixed, (query, key, value, visible, runs, mixed, normaliser)


def _joined(tiles: Array) -> Array:
    """Joins tiles, `[tiles, ..., TILE, D]` -> `[..., T, D]`."""
    joined = jnp.moveaxis(tiles, 0, -3)
    return joined.reshape(*joined.shape[:-3], -1, joined.shape[-1])


def _backward(
    scale: float, cap: float | None, kept: tuple[Array, ...], cotangent: Array
) -> tuple[Array, Array, Array, Visible, np.ndarray]:
    query, key, value, visible, runs, mixed, normaliser = kept
    wide = at_least_float32(query.dtype)
    along = (mixed.astype(wide) * cotangent.astype(wide)).sum(axis=-1, keepdims=True)

    def queries(carry: tuple[Array, Array], i: Array) -> tuple[tuple[Array, Array], Array]:
        of_tile, of_cotangent, of_along = _tile(query, i), _tile(cotangent, i), _tile(along, i)
        of_normaliser = _tile(normaliser[..., None], i)

        def keys(carry: tuple[Array, Array, Array], j: Array) -> tuple[tuple[Array, Array, Array], None]:
            def run(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
                query_gradient, key_gradient, value_gradient = carry
                key_tile, value_tile = _tile(key, j), _tile(value, j)
                scores, slope = _scores(of_tile, key_tile, visible, (i, j), scale, cap)
                weights = jnp.exp(scores - of_normaliser)
                of_weights = jnp.einsum("kgqd,ksd->kgqs", of_cotangent, value_tile, preferred_element_type=wide)
                of_scores = (scale * slope * weights * (of_weights - of_along)).astype(query.dtype)
                at = (0, j * TILE, 0)
                more_value = jnp.einsum("kgqs,kgqd->ksd", weights.astype(value.dtype), of_cotangent)
                more_key = jnp.einsum("kgqs,kgqd->ksd", of_scores, of_tile)
                return (
                    query_gradient + jnp.einsum("kgqs,ksd->kgqd", of_scores, key_tile).astype(wide),
                    _added(key_gradient, more_key, at),
                    _added(value_gradient, more_value, at),
                )

            return jax.lax.cond(runs[i, j], run, lambda unchanged: unchanged, carry), None

        start = (jnp.zeros(of_tile.shape, wide), *carry)
        (query_gradient, *carry), _ = jax.lax.scan(keys, start, jnp.arange(runs.shape[1]))
        return tuple(carry), query_gradient

    zeros = jnp.zeros(key.shape, wide), jnp.zeros(value.shape, wide)
    (key_gradient, value_gradient), query_gradient = jax.lax.scan(queries, zeros, jnp.arange(runs.shape[0]))
    nothing = jax.tree.map(lambda array: np.zeros(array.shape, jax.dtypes.float0), (visible, runs))
    return (
        _joined(query_gradient).astype(query.dtype),
        key_gradient.astype(key.dtype),
        value_gradient.astype(value.dtype),
        *nothing,
    )


def _added(total: Array, more: Array, at: tuple[int, Array, int]) -> Array:
    """Adds `more` to the part of `total` that starts at `at`."""
    part = jax.lax.dynamic_slice(total, at, more.shape)
    return jax.lax.dynamic_update_slice(total, part + more.astype(total.dtype), at)


_attend_row.defvjp(_forward, _backward)
