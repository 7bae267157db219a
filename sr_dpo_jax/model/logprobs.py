"""Hidden states -> log-prob of each response. Only scored positions reach the vocabulary matrix.

The vocabulary is taken in blocks: the logits of one block exist at a time, in float32, and the gradient makes them
again instead of keeping them. Peak memory is scored positions × VOCABULARY_BLOCK, whatever the vocabulary, and a
sharded vocabulary matrix is gathered block by block.

Next: `train/objective.py`, which says what each objective makes of them.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from sr_dpo_jax.batch import CHOSEN, SIDES, Rows
from sr_dpo_jax.model.attention import at_least_float32, soft_cap
from sr_dpo_jax.parallel.mesh import constrain

Array = jax.Array

VOCABULARY_BLOCK = 4096


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ResponseSums:
    """Sums over the tokens of both responses of every pair, `[B, 2]`; axis 1 is the side, 0 chosen and 1 rejected."""

    logprobs: Array
    """Float32, nats; what stands beyond the shorter response's length counts with `ld_alpha`."""
    tokens: Array
    """Int32, how many tokens a response has."""
    whole: Array | None
    """The log-probs with every token counted in full; None where `logprobs` are these."""
    log_squares: Array | None
    """Float32, Σ_t log Σ_v π(v)² with v the whole vocabulary; None if not asked for. It has no gradient."""


def response_logprobs(
    hidden: Array,
    vocabulary_matrix: Array,
    rows: Rows,
    *,
    pairs: int,
    cap: float | None,
    ld_alpha: float | None = None,
    squares: bool = False,
) -> ResponseSums:
    """`log π(y|x) = Σ_t w_t · log softmax(h_t · Wᵀ)[y_t]` of both responses of every pair.

    Args:
      hidden: `[R, T, d]` after the final norm.
      vocabulary_matrix: W, `[V, d]`.
      rows: where responses are scored, fields `[R, ...]`.
      pairs: B; pairs that stand in other rows get zeros.
      cap: logits z become `cap · tanh(z / cap)`; None leaves them.
      ld_alpha: w of the tokens beyond the length of the pair's shorter response; None, as 1, counts all alike.
      squares: asks for `log_squares`.

    Source: arXiv:2405.21040, section 2: sums over response tokens, end-of-sequence included; w of arXiv:2409.06411.
    """
    per_token, log_squares = token_scores(_scored(hidden, rows), vocabulary_matrix, rows.target, cap, squares)
    tokens = _sums_by_response(jnp.ones(rows.slot.shape, jnp.int32), rows, pairs)
    whole = _sums_by_response(per_token, rows, pairs)
    log_squares = None if log_squares is None else _sums_by_response(log_squares, rows, pairs)
    if ld_alpha is None:
        return ResponseSums(whole, tokens, None, log_squares)
    counted = jnp.where(_beyond_the_shorter(rows, tokens), ld_alpha, 1.0)
    return ResponseSums(_sums_by_response(counted * per_token, rows, pairs), tokens, whole, log_squares)


def _beyond_the_shorter(rows: Rows, tokens: Array) -> Array:
    """Tells the scored positions, `[R, M]`, that stand beyond the length of their pair's shorter response.

    The positions of a response stand side by side in one row, its first token first.
    """
    slots, place = SIDES * len(tokens) + 1, jnp.arange(rows.slot.shape[-1])
    first = jax.vmap(lambda slot: jax.ops.segment_min(place, slot, slots)[slot])(rows.slot)
    shorter = jnp.append(jnp.repeat(tokens.min(axis=1), SIDES), 0)
    return place - first >= shorter[rows.slot]


def continuation_logprobs(
    hidden: Array, vocabulary_matrix: Array, rows: Rows, *, pairs: int, cap: float | None
) -> tuple[Array, Array]:
    """Scores the chosen side alone, and tells whether greedy decoding would have written it; has no gradient.

    Arguments as of `response_logprobs`.

    Returns:
      Log-probabilities `[B]` float32 in nats, and how many tokens were not the likeliest, `[B]` int32: 0 where the
      whole of the response is greedy. A token that ties with another one counts as likeliest.
    """
    largest, normaliser, at_target, _ = _scan(_scored(hidden, rows), vocabulary_matrix, rows.target, cap)
    sums = _sums_by_response(at_target - normaliser, rows, pairs)
    misses = _sums_by_response((at_target < largest).astype(jnp.int32), rows, pairs)
    return sums[:, CHOSEN], misses[:, CHOSEN]


def _scored(hidden: Array, rows: Rows) -> Array:
    """Picks the hidden states that predict the targets, `[R, M, d]`."""
    scored = jnp.take_along_axis(hidden, rows.source[..., None], axis=1)
    return constrain(scored, ("rows", "scored", None))


def _sums_by_response(values: Array, rows: Rows, pairs: int) -> Array:
    """Adds up the values `[R, M]` of each response's positions, `[B, 2]`."""
    slots = SIDES * pairs + 1  # the last one collects unused positions
    return jax.ops.segment_sum(values.reshape(-1), rows.slot.reshape(-1), slots)[:-1].reshape(pairs, SIDES)


def token_logprobs(hidden: Array, vocabulary_matrix: Array, target: Array, cap: float | None) -> Array:
    """`log softmax(h · Wᵀ)[target]`, keeping no logits for the backward pass.

    Args:
      hidden: h, `[R, M, d]`.
      vocabulary_matrix: W, `[V, d]`, of any type; its product is taken in the type of `hidden`, summed in float32.
      target: `[R, M]` int32, in [0, V).
      cap: logits z become `cap · tanh(z / cap)`; None leaves them.

    Returns:
      `[R, M]` float32, nats (float64 for float64 hidden states).
    """
    return token_scores(hidden, vocabulary_matrix, target, cap, False)[0]


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def token_scores(
    hidden: Array, vocabulary_matrix: Array, target: Array, cap: float | None, squares: bool
) -> tuple[Array, Array | None]:
    """Gives `token_logprobs` and, with `squares`, log Σ_v π(v)² at each position too, `[R, M]`, without a gradient."""
    return _forward(hidden, vocabulary_matrix, target, cap, squares)[0]


def _forward(
    hidden: Array, matrix: Array, target: Array, cap: float | None, squares: bool
) -> tuple[tuple[Array, Array | None], tuple[Array, ...]]:
    _, normaliser, at_target, log_squares = _scan(hidden, matrix, target, cap, squares=squares)
    return (at_target - normaliser, log_squares), (hidden, matrix, target, normaliser)


def _scan(
    hidden: Array, matrix: Array, target: Array, cap: float | None, *, squares: bool = False
) -> tuple[Array, Array, Array, Array | None]:
    """Finds the largest logit of the vocabulary, log Σ exp of all, and the target's logit for each scored position.

    With `squares` also log Σ_v π(v)², else None in its place.
    """
    dtype = at_least_float32(hidden.dtype)

    def block(carry: tuple[Array, ...], part: tuple[Array, Array]) -> tuple[tuple[Array, ...], None]:
        largest, total, at_target, *squared = carry
        logits, hit = _logits(hidden, part, target, matrix.shape[0], cap)
        larger = jnp.maximum(largest, logits.max(axis=-1))
        scaled, shrunk = jnp.exp(logits - larger[..., None]), jnp.exp(largest - larger)
        total = total * shrunk + scaled.sum(axis=-1)
        at_target += jnp.where(hit, logits, 0).sum(axis=-1)
        squared = [sums * jnp.square(shrunk) + jnp.square(scaled).sum(axis=-1) for sums in squared]
        return (larger, total, at_target, *squared), None

    zeros = jnp.zeros(target.shape, dtype)
    start = (jnp.full(target.shape, -jnp.inf, dtype), zeros, zeros, *[zeros] * squares)
    (largest, total, at_target, *squared), _ = jax.lax.scan(block, start, _blocks(matrix))
    log_squares = jnp.log(squared[0]) - 2 * jnp.log(total) if squares else None
    return largest, largest + jnp.log(total), at_target, log_squares


def _backward(
    cap: float | None, squares: bool, kept: tuple[Array, ...], cotangents: tuple[Array, Array | None]
) -> tuple[Array, Array, np.ndarray]:
    """∂logp/∂logits = onehot(target) − softmax, made block by block from h, W and the kept normaliser.

    A capped logit passes 1 − (z / cap)² of that on.
    """
    (hidden, matrix, target, normaliser), (cotangent, _) = kept, cotangents

    def block(hidden_gradient: Array, part: tuple[Array, Array]) -> tuple[Array, Array]:
        logits, hit = _logits(hidden, part, target, matrix.shape[0], cap)
        gradient = cotangent[..., None] * (hit - jnp.exp(logits - normaliser[..., None]))
        if cap is not None:
            gradient *= 1 - jnp.square(jnp.where(logits == -jnp.inf, 0, logits) / cap)
        gradient = gradient.astype(hidden.dtype)
        wide = partial(jnp.einsum, preferred_element_type=hidden_gradient.dtype)
        hidden_gradient += wide("rmv,vd->rmd", gradient, part[0].astype(hidden.dtype))
        part_gradient = wide("rmv,rmd->vd", gradient, hidden).astype(matrix.dtype)
        return hidden_gradient, constrain(part_gradient, ("vocabulary", "table"))

    start = jnp.zeros(hidden.shape, at_least_float32(hidden.dtype))
    hidden_gradient, parts = jax.lax.scan(block, start, _blocks(matrix))
    matrix_gradient = parts.reshape(-1, matrix.shape[1])[: matrix.shape[0]]
    return hidden_gradient.astype(hidden.dtype), matrix_gradient, np.zeros(target.shape, jax.dtypes.float0)


token_scores.defvjp(_forward, _backward)


def _blocks(matrix: Array) -> tuple[Array, Array]:
    """Cuts W into `[blocks, block, d]`, filled up with zero rows, and gives each block's first token id."""
    count = -(-matrix.shape[0] // VOCABULARY_BLOCK)
    size = -(-matrix.shape[0] // count)
    padded = jnp.pad(matrix, ((0, count * size - matrix.shape[0]), (0, 0)))
    return padded.reshape(count, size, -1), size * jnp.arange(count)


def _logits(
    hidden: Array,
    part: tuple[Array, Array],
    target: Array,
    vocabulary_tokens: int,
    cap: float | None,
) -> tuple[Array, Array]:
    """Computes the logits of one block, `[R, M, block]`, −inf in filled-up rows, and marks the targets in it."""
    matrix, first = part
    matrix = constrain(matrix.astype(hidden.dtype), (None, None))
    logits = jnp.einsum("rmd,vd->rmv", hidden, matrix, preferred_element_type=at_least_float32(hidden.dtype))
    token = first + jnp.arange(matrix.shape[0])
    logits = jnp.where(token < vocabulary_tokens, soft_cap(logits, cap), -jnp.inf)
    return logits, token == target[..., None]
