"""The compiled programs of generation: read prompts into free slots, and continue all slots by some tokens.

    slot      one of S sequences that are continued side by side; a finished one is given the next prompt
    state     what the programs pass on: the cache, and where each slot stands

Shapes never change, so nothing is compiled after the first calls. A sequence's tokens depend on its prompt, its seed
and nothing else: not on its slot, nor on what the others hold.

Next: `generator.py`, which fills the slots.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from sr_dpo_jax.generation.cache import CACHE_AXES, Cache, advance, cache_shape
from sr_dpo_jax.model.attention import at_least_float32, soft_cap
from sr_dpo_jax.model.decoder import Decoder
from sr_dpo_jax.parallel.mesh import jit_on, replicated, sharding

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The rule for drawing a token: temperature, then the k likeliest, then the likeliest of total probability p."""

    temperature: float
    """0 takes the likeliest token."""
    top_k: int | None
    top_p: float | None
    end_tokens: tuple[int, ...]
    """A sequence is finished after any of these ids."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """S slots; every field but the cache is `[S]`."""

    cache: Cache
    token: Array
    """int32, the last token of each sequence, not yet in the cache."""
    position: Array
    """int32, its position."""
    limit: Array
    """int32, the position at which a sequence ends at the latest."""
    seed: Array
    """uint32."""
    finished: Array
    """bool; free slots are finished too."""


def make_state(graph: nnx.GraphDef, params: Any, *, slots: int, positions: int, mesh: Mesh) -> State:
    """Makes the state in which all slots are free."""
    decoder = nnx.merge(graph, params)
    shape = cache_shape(decoder.architecture, slots=slots, positions=positions)
    where = sharding(mesh, CACHE_AXES, shape, "generation cache (generation.slots over rows)")
    zeros = [jnp.zeros(shape, decoder.dtype, device=where) for _ in range(2)]
    of_slots = {name: jnp.zeros(slots, jnp.int32, device=replicated(mesh)) for name in ("token", "position", "limit")}
    seed = jnp.zeros(slots, jnp.uint32, device=replicated(mesh))
    return State(Cache(*zeros), **of_slots, seed=seed, finished=jnp.ones(slots, bool, device=replicated(mesh)))


def make_programs(
    graph: nnx.GraphDef, sampling: Sampling, state: State, *, tokens_a_call: int, mesh: Mesh
) -> tuple[Callable, Callable]:
    """Makes `read` and `proceed`, both jitted, for states laid out as this one; each consumes the state that it gets.

    read(params, state, prompts `[B, P]`, lengths `[B]`, slots `[B]`, limits `[B]`, seeds `[B]`) -> (state, tokens)
        puts B prompts into slots, filled up on the right, and draws the first token of each, `[B]`. A slot number of S
        leaves a prompt out.
    proceed(params, state) -> (state, tokens)
        continues all slots by `tokens_a_call` tokens, `[tokens_a_call, S]`; finished ones repeat their last token.
    """

    def read(
        params: Any, state: State, prompts: Array, lengths: Array, slots: Array, limits: Array, seeds: Array
    ) -> tuple[State, Array]:
        decoder = nnx.merge(graph, params)
        shape = list(state.cache.key.shape)
        shape[1] = prompts.shape[0]
        fresh = Cache(*[jnp.zeros(shape, state.cache.key.dtype) for _ in range(2)])
        hidden, filled = advance(decoder, fresh, prompts, jnp.zeros_like(lengths))
        last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
        token = draw(_logits(decoder, last), seeds, lengths, sampling)
        cache = jax.tree.map(lambda whole, part: whole.at[:, slots].set(part, mode="drop"), state.cache, filled)
        finished = _ends(token, sampling) | (lengths >= limits)
        new = {"token": token, "position": lengths, "limit": limits, "seed": seeds, "finished": finished}
        of_slots = {name: getattr(state, name).at[slots].set(value, mode="drop") for name, value in new.items()}
        return State(cache, **of_slots), token

    def step(params: Any, state: State) -> tuple[State, Array]:
        decoder = nnx.merge(graph, params)
        hidden, cache = advance(decoder, state.cache, state.token[:, None], state.position)
        drawn = draw(_logits(decoder, hidden[:, 0]), state.seed, state.position + 1, sampling)
        token = jnp.where(state.finished, state.token, drawn)
        position = jnp.where(state.finished, state.position, state.position + 1)
        finished = state.finished | _ends(token, sampling) | (position >= state.limit)
        return dataclasses.replace(state, cache=cache, token=token, position=position, finished=finished), token

    def proceed(params: Any, state: State) -> tuple[State, Array]:
        return jax.lax.scan(lambda state, _: step(params, state), state, length=tokens_a_call)

    shardings = jax.tree.map(lambda leaf: leaf.sharding, state), replicated(mesh)
    return (
        jit_on(mesh, read, donate_argnums=1, out_shardings=shardings),
        jit_on(mesh, proceed, donate_argnums=1, out_shardings=shardings),
    )


def draw(logits: Array, seeds: Array, positions: Array, sampling: Sampling) -> Array:
    """Draws tokens `[S]` int32 from logits `[S, V]`; the noise is a function of each sequence's seed and position."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_k is not None:
        lowest = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < lowest, -jnp.inf, logits)
    if sampling.top_p is not None:
        descending = jnp.sort(logits, axis=-1, descending=True)
        share = jax.nn.softmax(descending, axis=-1)
        kept = jnp.cumsum(share, axis=-1) - share < sampling.top_p  # the token that reaches top_p is the last one kept
        lowest = jnp.where(kept, descending, jnp.inf).min(axis=-1, keepdims=True)
        logits = jnp.where(logits < lowest, -jnp.inf, logits)

    def one(seed: Array, position: Array, of_slot: Array) -> Array:
        return jax.random.categorical(jax.random.fold_in(jax.random.key(seed), position), of_slot)

    return jax.vmap(one)(seeds, positions, logits).astype(jnp.int32)


def _logits(decoder: Decoder, hidden: Array) -> Array:
    """Computes logits `[S, V]` float32 of hidden states `[S, d]`."""
    matrix = decoder.vocabulary_matrix.astype(hidden.dtype)
    raw = jnp.einsum("sd,vd->sv", hidden, matrix, preferred_element_type=at_least_float32(hidden.dtype))
    return soft_cap(raw, decoder.architecture.logit_cap)


def _ends(token: Array, sampling: Sampling) -> Array:
    return (token[:, None] == jnp.asarray(sampling.end_tokens, jnp.int32)).any(axis=-1)
