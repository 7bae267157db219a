"""The decoder one token after another: keys and values of what came before are kept instead of computed again.

    cache      keys and values of every layer, `[L, S, C, K, D]`: S sequences side by side (slots), C positions each
    advance    reads T new tokens of each sequence, from a position of its own on: T = 1 continues, T > 1 reads a prompt

The blocks are those of `model/decoder.py`; only where keys come from differs. Attention is dense over the C positions:
with one query a sequence there is nothing to skip that would be worth a kernel.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from sr_dpo_jax.model.architecture import Architecture
from sr_dpo_jax.model.attention import at_least_float32, soft_cap
from sr_dpo_jax.model.decoder import Decoder, rotate, rotation_of
from sr_dpo_jax.parallel.mesh import constrain

Array = jax.Array

NO_WINDOW = 2**30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys, rotated, and values, each `[L, S, C, K, D]`; a position that was never written is never read."""

    key: Array
    value: Array


def cache_shape(architecture: Architecture, *, slots: int, positions: int) -> tuple[int, ...]:
    """`(L, S, C, K, D)`."""
    a = architecture
    return a.layers, slots, positions, a.kv_heads, a.head_dim


CACHE_AXES = ("layers", "rows", None, "kv_heads", "head_dim")
"""Logical axes of a cache: sequences lie as rows do, heads as their weights."""


def advance(decoder: Decoder, cache: Cache, tokens: Array, start: Array) -> tuple[Array, Cache]:
    """Computes hidden states of new tokens, given all that each sequence's cache holds before them.

    Args:
      decoder: the model.
      cache: holds positions 0 to start − 1 of each sequence.
      tokens: `[S, T]` int32.
      start: `[S]` int32, position of each sequence's first new token. start + T must not exceed C.

    Returns:
      What meets the vocabulary matrix, `[S, T, d]`, and the cache with the T new positions of each sequence.
    """
    a = decoder.architecture
    positions = start[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)
    wide = at_least_float32(decoder.dtype)
    rotations = [rotation_of(positions, kind.rope, wide) for kind in a.kinds]
    windows = jnp.asarray([NO_WINDOW if kind.window is None else kind.window for kind in a.kinds], jnp.int32)
    block, stacked = nnx.split(decoder.layers)

    def layer(x: Array, of_layer: tuple[nnx.State, Array, Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        params, kind, keys, values = of_layer
        attention = CachedAttention(a, rotations, kind, windows[kind], positions, start, keys, values)
        x = nnx.merge(block, params)(x, attention)
        return constrain(x, ("rows", None, None)), (attention.keys, attention.values)

    kinds = jnp.asarray(a.kind_of_layer, jnp.int32)
    x, (keys, values) = jax.lax.scan(layer, decoder.embed(tokens), (stacked, kinds, cache.key, cache.value))
    return decoder.leave(x), Cache(keys, values)


@dataclasses.dataclass
class CachedAttention:
    """Attention of new tokens over one layer's cache; `attend` puts their own keys and values into it first."""

    architecture: Architecture
    rotations: list[tuple[Array, Array]]
    """Cosine and sine of the new positions, for each kind of layers."""
    kind: Array
    """The index of this layer's kind."""
    window: Array
    positions: Array
    """`[S, T]` int32, of the new tokens."""
    start: Array
    keys: Array
    values: Array
    """Keys and values are `[S, C, K, D]`; after `attend` the new ones are among them, from `start`, `[S]`, on."""

    def attend(self, query: Array, key: Array, value: Array) -> Array:
        """Computes softmax attention of `[S, T, H, D]` over the positions up to each query's own, in its window."""
        a = self.architecture
        rotated = [(rotate(query, rotation), rotate(key, rotation)) for rotation in self.rotations]
        query, key = rotated[0]
        for number, (other_query, other_key) in enumerate(rotated[1:], 1):
            query = jnp.where(self.kind == number, other_query, query)
            key = jnp.where(self.kind == number, other_key, key)
        self.keys, self.values = _written(self.keys, key, self.start), _written(self.values, value, self.start)
        slots, length, heads, head_dim = query.shape
        query = query.reshape(slots, length, self.keys.shape[2], -1, head_dim)
        wide = at_least_float32(query.dtype)
        scores = jnp.einsum("stkgd,sckd->skgtc", query, self.keys, preferred_element_type=wide)
        scores = soft_cap(scores * a.query_scale, a.attention_cap)
        distance = self.positions[..., None] - jnp.arange(self.keys.shape[1])
        seen = (distance >= 0) & (distance < self.window)
        weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -jnp.inf), axis=-1).astype(value.dtype)
        return jnp.einsum("skgtc,sckd->stkgd", weights, self.values).reshape(slots, length, heads, head_dim)


def _written(cache: Array, new: Array, start: Array) -> Array:
    """Puts `[S, T, K, D]` into `[S, C, K, D]` from each sequence's start on."""
    write = jax.vmap(lambda of_slot, part, at: jax.lax.dynamic_update_slice(of_slot, part, (at, 0, 0)))
    return write(cache, new.astype(cache.dtype), start)
