"""Log-probabilities in vocabulary blocks against a dense log-softmax: values, gradients, types and memory."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import pack, random_pairs

from sr_dpo_jax.batch import CHOSEN, REJECTED, Rows
from sr_dpo_jax.model import logprobs
from sr_dpo_jax.model.logprobs import continuation_logprobs, response_logprobs, token_logprobs

BLOCK = 8


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(logprobs, "VOCABULARY_BLOCK", BLOCK)


def numpy_logprobs(hidden, matrix, target, cap=None) -> np.ndarray:
    logits = np.asarray(hidden, np.float64) @ np.asarray(matrix, np.float64).T
    logits = logits if cap is None else cap * np.tanh(logits / cap)
    largest = logits.max(axis=-1, keepdims=True)
    normaliser = np.log(np.exp(logits - largest).sum(axis=-1, keepdims=True)) + largest
    return np.take_along_axis(logits - normaliser, np.asarray(target)[..., None], axis=-1)[..., 0]


def dense_logprobs(hidden: jax.Array, matrix: jax.Array, target: jax.Array, cap: float | None = None) -> jax.Array:
    logits = jnp.einsum("rmd,vd->rmv", hidden, matrix)
    every = jax.nn.log_softmax(logits if cap is None else cap * jnp.tanh(logits / cap), axis=-1)
    return jnp.take_along_axis(every, target[..., None], axis=-1)[..., 0]


def random_case(vocabulary: int, dtype, *, seed: int = 0, scale: float = 1.0):
    rng = np.random.default_rng(seed)
    hidden, matrix = rng.normal(size=(2, 7, 5)), scale * rng.normal(size=(vocabulary, 5))
    target = rng.integers(0, vocabulary, (2, 7))
    target.flat[:2] = 0, vocabulary - 1
    return jnp.asarray(hidden, dtype), jnp.asarray(matrix, dtype), jnp.asarray(target, jnp.int32)


@partial(jax.jit, static_argnums=3)
def summed(hidden: jax.Array, matrix: jax.Array, rows: Rows, pairs: int) -> tuple[jax.Array, jax.Array]:
    sums = response_logprobs(hidden, matrix, rows, pairs=pairs, cap=None)
    return sums.logprobs, sums.tokens


SIZES = [BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK - 1, 3 * BLOCK, 3 * BLOCK + 1]


@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("vocabulary", SIZES)
def test_values_and_gradients_against_dense(float64, vocabulary, cap):
    hidden, matrix, target = random_case(vocabulary, jnp.float64, seed=vocabulary)
    weight = jnp.asarray(np.random.default_rng(1).normal(size=target.shape))

    @jax.jit
    def both(*given):
        value, pull_back = jax.vjp(lambda h, w: token_logprobs(h, w, target, cap), *given)
        dense_gradients = jax.vjp(lambda h, w: dense_logprobs(h, w, target, cap), *given)[1](weight)
        return value, pull_back(weight), dense_gradients

    value, gradients, dense_gradients = both(hidden, matrix)
    assert value.dtype == jnp.float64 and value.shape == target.shape
    np.testing.assert_allclose(value, numpy_logprobs(hidden, matrix, target, cap), rtol=1e-12, atol=1e-12)
    for gradient, expected in zip(gradients, dense_gradients, strict=True):
        np.testing.assert_allclose(gradient, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("vocabulary", [4096, 4097, 8194])
def test_vocabularies_of_real_size(float64, monkeypatch, vocabulary):
    """At the block size of real runs, where the last block is filled up by none, one or two columns."""
    monkeypatch.undo()
    assert logprobs.VOCABULARY_BLOCK == 4096
    hidden, matrix, target = random_case(vocabulary, jnp.float64, seed=vocabulary)

    @jax.jit
    def both(*given):
        value, pull_back = jax.vjp(lambda h, w: token_logprobs(h, w, target, None), *given)
        ones = jnp.ones_like(value)
        return value, pull_back(ones), jax.vjp(lambda h, w: dense_logprobs(h, w, target), *given)[1](ones)

    value, gradients, exact = both(hidden, matrix)
    np.testing.assert_allclose(value, numpy_logprobs(hidden, matrix, target), rtol=1e-12, atol=1e-12)
    for gradient, expected in zip(gradients, exact, strict=True):
        assert gradient.shape == expected.shape
        np.testing.assert_allclose(gradient, expected, rtol=1e-11, atol=1e-12)


def test_more_than_one_block_is_used():
    """The sizes above would prove nothing if one block held them all."""
    shape = jax.eval_shape(logprobs._blocks, jnp.zeros((3 * BLOCK + 1, 5)))[0].shape
    assert shape == (4, 7, 5)


@pytest.mark.parametrize("vocabulary", [BLOCK, 3 * BLOCK + 1])
def test_float32(vocabulary):
    hidden, matrix, target = random_case(vocabulary, jnp.float32)
    value = token_logprobs(hidden, matrix, target, None)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, numpy_logprobs(hidden, matrix, target), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("matrix_dtype", [jnp.float32, jnp.bfloat16])
def test_bfloat16_inputs_are_summed_in_float32(matrix_dtype):
    """Against exact arithmetic on the rounded inputs: no bfloat16 rounding (4e-3) happens after them."""
    hidden, matrix, target = random_case(3 * BLOCK + 1, jnp.bfloat16, scale=3.0)
    matrix = matrix.astype(matrix_dtype)

    @jax.jit
    def both(*given):
        value, pull_back = jax.vjp(lambda h, w: token_logprobs(h, w, target, None), *given)
        wide = [array.astype(jnp.float32) for array in given]
        exact, pull_back_exact = jax.vjp(lambda h, w: dense_logprobs(h, w, target), *wide)
        return value, pull_back(jnp.ones_like(value)), pull_back_exact(jnp.ones_like(exact))

    value, gradients, exact_gradients = both(hidden, matrix)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, numpy_logprobs(hidden, matrix, target), rtol=1e-5, atol=1e-5)
    assert [gradient.dtype for gradient in gradients] == [jnp.bfloat16, matrix_dtype]
    for gradient, expected in zip(gradients, exact_gradients, strict=True):
        error = np.abs(np.asarray(gradient, np.float32) - expected).max()
        assert error < 2**-7 * np.abs(expected).max()


def test_bfloat16_response_sums_do_not_drift():
    """2,000 tokens of about −3 nats: a bfloat16 sum would be out by tens, its spacing at −6,000 being 32."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(1, 2001, 4)), jnp.bfloat16)
    matrix = jnp.asarray(rng.normal(size=(20, 4)), jnp.bfloat16)
    target, source = rng.integers(0, 20, (1, 2000)), np.arange(2000)[None]
    rows = scored_rows(source=source, target=target, slot=np.zeros((1, 2000), np.int32))
    sums, tokens = summed(hidden, matrix, rows, 1)
    assert sums.dtype == jnp.float32 and tokens.tolist() == [[2000, 0]]
    expected = numpy_logprobs(hidden[:, :-1], matrix, target).sum()
    np.testing.assert_allclose(sums, [[expected, 0.0]], rtol=1e-5)


@pytest.mark.parametrize("logit", [-50.0, 50.0])
def test_columns_that_only_fill_up_never_count(logit):
    """V = 9 in blocks of 5: one column is filled up with a zero row, whose logit 0 would drown nine of −50."""
    hidden, matrix = jnp.ones((1, 1, 1)), jnp.full((BLOCK + 1, 1), logit)
    of_token = jax.jit(jax.value_and_grad(lambda h, target: token_logprobs(h, matrix, target, None)[0, 0]))
    for token in (0, BLOCK):
        value, by_hidden = of_token(hidden, jnp.full((1, 1), token, jnp.int32))
        np.testing.assert_allclose(value, -np.log(BLOCK + 1), rtol=1e-6)
        np.testing.assert_allclose(by_hidden, 0.0, atol=1e-4)


def test_finite_for_huge_logits():
    hidden, matrix, target = random_case(3 * BLOCK + 1, jnp.float32, scale=1e4)
    total = lambda h, w: token_logprobs(h, w, target, None).sum()  # noqa: E731
    value, gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(hidden, matrix)
    assert np.isfinite(value)
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    np.testing.assert_allclose(value, numpy_logprobs(hidden, matrix, target).sum(), rtol=1e-5)


def scored_rows(*, source, target, slot) -> Rows:
    unused = np.zeros((source.shape[0], 1), np.int32)
    fields = {name: np.asarray(array, np.int32) for name, array in (("source", source), ("target", target))}
    return Rows(tokens=unused, positions=unused, key_start=unused, key_end=unused, slot=np.asarray(slot), **fields)


def test_responses_of_packed_rows(float64):
    """Two rows of three pairs, a fourth pair that stands elsewhere, and positions left over."""
    rng = np.random.default_rng(5)
    pairs = random_pairs(rng, [(3, 2, 4), (1, 1, 1), (2, 3, 1), (2, 2, 2)])
    packed = pack(pairs, [0, 0, 1, 2], micro_batches=1, rows=3, row_length=20, scored=12)
    rows = jax.tree.map(lambda array: jnp.asarray(array[0, :2]), packed)
    hidden, matrix = jnp.asarray(rng.normal(size=(2, 20, 5))), jnp.asarray(rng.normal(size=(24, 5)))
    sums, tokens = summed(hidden, matrix, rows, 4)
    assert tokens.tolist() == [[2, 4], [1, 1], [3, 1], [0, 0]]
    # Where each response's predictions stand, by hand: rejected, reversed | prompt | chosen.
    places = {
        (0, CHOSEN): (0, [6, 7]),
        (0, REJECTED): (0, [6, 3, 2, 1]),
        (1, CHOSEN): (0, [10]),
        (1, REJECTED): (0, [10]),
        (2, CHOSEN): (1, [2, 3, 4]),
        (2, REJECTED): (1, [2]),
    }
    expected = np.zeros((4, 2))
    for (pair, side), (row, sources) in places.items():
        expected[pair, side] = numpy_logprobs(hidden[row, np.array(sources)], matrix, pairs[pair][1 + side]).sum()
    np.testing.assert_allclose(sums, expected, rtol=1e-12)


def test_unused_positions_get_no_gradient_and_add_nothing(float64):
    """They point at index 0; with weights on every real slot, hidden state 0 still gets exactly nothing."""
    rng = np.random.default_rng(6)
    (pair,) = random_pairs(rng, [(2, 1, 2)])
    packed = pack([pair], [0], micro_batches=1, rows=1, row_length=9, scored=8)
    rows = jax.tree.map(lambda array: jnp.asarray(array[0]), packed)
    hidden, matrix = jnp.asarray(rng.normal(size=(1, 9, 5))), jnp.asarray(rng.normal(size=(24, 5)))

    @jax.jit
    @partial(jax.value_and_grad, argnums=(0, 1))
    def total(h, w, r):
        return response_logprobs(h, w, r, pairs=1, cap=None).logprobs.sum()

    value, (by_hidden, by_matrix) = total(hidden, matrix, rows)
    touched = np.flatnonzero(np.abs(by_hidden[0]).max(axis=-1))
    assert touched.tolist() == [1, 3]  # the first rejected token (reversed, index 1) and the last of the prompt
    used = {name: getattr(rows, name)[:, :3] for name in ("source", "target", "slot")}
    expected_value, (_, expected) = total(hidden, matrix, dataclasses.replace(rows, **used))
    np.testing.assert_allclose(value, expected_value, rtol=1e-14)
    np.testing.assert_allclose(by_matrix, expected, rtol=1e-12, atol=1e-14)


def test_memory_does_not_hold_the_logits(monkeypatch):
    """Eight times the vocabulary at the same block: temporary memory grows by under a tenth of the logits."""
    monkeypatch.setattr(logprobs, "VOCABULARY_BLOCK", 512)
    positions, width, small, large = 1024, 8, 2048, 16384

    def temporary_bytes(vocabulary: int) -> int:
        def total(hidden, matrix, target):
            return token_logprobs(hidden, matrix, target, None).sum()

        shapes = (
            jax.ShapeDtypeStruct((2, positions // 2, width), jnp.float32),
            jax.ShapeDtypeStruct((vocabulary, width), jnp.float32),
            jax.ShapeDtypeStruct((2, positions // 2), jnp.int32),
        )
        compiled = jax.jit(jax.value_and_grad(total, argnums=(0, 1))).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    at_small, at_large = temporary_bytes(small), temporary_bytes(large)
    assert at_large - at_small < 0.1 * 4 * positions * (large - small)
    assert at_small < 3.5 * 4 * positions * 512  # a few blocks, all told


def responses(vocabulary: int, seed: int):
    """Pairs with responses of other lengths in two rows, their packed rows, states and vocabulary matrix."""
    rng = np.random.default_rng(seed)
    sizes = [(3, 4, 2), (2, 1, 5), (1, 3, 3), (2, 1, 1)]
    pairs = [tuple(rng.integers(0, vocabulary, n).astype(np.int32) for n in of_pair) for of_pair in sizes]
    packed = pack(pairs, [0, 1, 0, 1], micro_batches=1, rows=2, row_length=18, scored=14)
    rows = jax.tree.map(lambda array: array[0], packed)
    return pairs, rows, rng.normal(size=(2, 18, 5)), rng.normal(size=(vocabulary, 5))


@pytest.mark.parametrize("ld_alpha", [0.0, 0.3])
def test_tokens_beyond_the_shorter_response_count_with_a_weight(float64, ld_alpha):
    """Against a sum over each response's tokens, first token first, in NumPy; and the gradient likewise."""
    pairs, rows, hidden, matrix = responses(13, seed=1)
    per_token = numpy_logprobs(np.take_along_axis(hidden, rows.source[..., None], axis=1), matrix, rows.target)
    expected, whole = np.zeros((4, 2)), np.zeros((4, 2))
    for number, (_, chosen, rejected) in enumerate(pairs):
        for side, response in enumerate((chosen, rejected)):
            values = per_token[rows.slot == 2 * number + side]
            assert len(values) == len(response)
            weights = np.where(np.arange(len(values)) < min(len(chosen), len(rejected)), 1, ld_alpha)
            expected[number, side], whole[number, side] = (weights * values).sum(), values.sum()
    given = jnp.asarray(hidden), jnp.asarray(matrix), jax.tree.map(jnp.asarray, rows)
    sums = jax.jit(partial(response_logprobs, pairs=4, cap=None, ld_alpha=ld_alpha))(*given)
    np.testing.assert_allclose(sums.logprobs, expected, rtol=1e-12)
    np.testing.assert_allclose(sums.whole, whole, rtol=1e-12)
    assert sums.tokens.tolist() == [[4, 2], [1, 5], [3, 3], [1, 1]] and sums.log_squares is None


@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("vocabulary", SIZES[1:4])
def test_squares_of_the_probabilities(float64, vocabulary, cap):
    """Σ_t log Σ_v π(v)² over blocks of the vocabulary; log-probs and gradients are those without it."""
    _, rows, hidden, matrix = responses(vocabulary, seed=2)
    hidden = 4 * hidden  # so that the largest logit moves from block to block
    every = np.stack([np.full(rows.target.shape, token) for token in range(vocabulary)], axis=-1)
    scored = np.repeat(np.take_along_axis(hidden, rows.source[..., None], axis=1), vocabulary, axis=1)
    probabilities = np.exp(numpy_logprobs(scored, matrix, every.reshape(2, -1), cap)).reshape(2, -1, vocabulary)
    log_squares = np.log(np.square(probabilities).sum(axis=-1))
    expected = [[log_squares[rows.slot == 2 * pair + side].sum() for side in (0, 1)] for pair in range(4)]

    @partial(jax.jit, static_argnums=2)
    def total(h, w, squares):
        sums = response_logprobs(h, w, jax.tree.map(jnp.asarray, rows), pairs=4, cap=cap, squares=squares)
        return sums.logprobs.sum() + (sums.log_squares.sum() if squares else 0), sums

    given = jnp.asarray(hidden), jnp.asarray(matrix)
    np.testing.assert_allclose(total(*given, True)[1].log_squares, expected, rtol=1e-12, atol=1e-13)
    with_squares, without = (
        jax.grad(lambda h, w: total(h, w, squares)[0], argnums=(0, 1))(*given)  # noqa: B023
        for squares in (True, False)
    )
    for mine, other in zip(with_squares, without, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("vocabulary", SIZES[::2])
def test_continuations_and_whether_they_are_greedy(float64, vocabulary, cap):
    """Sums as the responses' own; a token that is not the likeliest is counted, in whichever block the likeliest is."""
    rng = np.random.default_rng(vocabulary)
    pairs = [(*(rng.integers(0, vocabulary, n).astype(np.int32) for n in (3, length)), None) for length in (4, 1, 5, 3)]
    rows = pack(pairs, [0, 1, 1, 0], micro_batches=1, rows=2, row_length=16, scored=9)
    rows = jax.tree.map(lambda array: array[0].copy(), rows)
    hidden, matrix = rng.normal(size=(2, 16, 5)), rng.normal(size=(vocabulary, 5))
    logits = np.take_along_axis(hidden, rows.source[..., None], axis=1) @ matrix.T
    likeliest = logits.argmax(axis=-1)
    second = np.argsort(logits, axis=-1)[..., -2]
    rows.target[:] = np.where(rows.slot == 2 * 1, second, np.where(rows.slot == 2 * 3, rows.target, likeliest))
    arguments = jnp.asarray(hidden), jnp.asarray(matrix), jax.tree.map(jnp.asarray, rows)
    options = {"pairs": 4, "cap": cap}

    @jax.jit
    def both(*given):
        return *continuation_logprobs(*given, **options), response_logprobs(*given, **options).logprobs

    sums, misses, expected = both(*arguments)
    np.testing.assert_allclose(sums, expected[:, CHOSEN], rtol=1e-12)
    of_last = (rows.slot == 6) & (rows.target != likeliest)
    assert misses.tolist() == [0, 1, 0, of_last.sum()]
