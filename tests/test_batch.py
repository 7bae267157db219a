"""Packed rows: a worked example by hand, and the proof that packing changes no log-prob and no gradient."""

import dataclasses
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sr_dpo_jax.batch import Batch, Placed, Rows, build_row
from sr_dpo_jax.data.pipeline import HostStep, StepSource
from sr_dpo_jax.data.plan import Plan, Shape
from sr_dpo_jax.model import logprobs
from sr_dpo_jax.model.attention import DENSE
from sr_dpo_jax.model.kernels import tiled
from sr_dpo_jax.model.kernels.tiled import TILED
from sr_dpo_jax.parallel.mesh import jit_on
from sr_dpo_jax.train.objective import Objective
from sr_dpo_jax.train.train_step import make_train_step, score

BETA, LAM = 0.1, 0.3


def ids(*tokens: int) -> np.ndarray:
    return np.array(tokens, np.int32)


FIRST = Placed(0, ids(5, 6, 7), ids(11, 12), ids(21, 22, 23))
SECOND = Placed(2, ids(5, 8), ids(13), ids(24))
NONE = ids()


def test_worked_example_plain():
    row = build_row([FIRST, SECOND], row_length=14, scored=9, unused_slot=4, head_tokens=0, prefix=NONE)
    # index                 0   1   2  3  4  5   6   7   8  9 10  11  12  13
    expected = {
        "tokens": [23, 22, 21, 5, 6, 7, 11, 12, 24, 5, 8, 13, 0, 0],
        "positions": [5, 4, 3, 0, 1, 2, 3, 4, 2, 0, 1, 2, 0, 0],
        "key_start": [0, 1, 2, 3, 3, 3, 3, 3, 8, 9, 9, 9, 12, 13],
        "key_end": [6, 6, 6, 4, 5, 6, 7, 8, 11, 10, 11, 12, 13, 14],
        "source": [5, 6, 5, 2, 1, 10, 10, 0, 0],
        "target": [11, 12, 21, 22, 23, 13, 24, 0, 0],
        "slot": [0, 0, 1, 1, 1, 2, 3, 4, 4],
    }
    assert {name: array.tolist() for name, array in row.items()} == expected
    assert {array.dtype for array in row.values()} == {np.dtype(np.int32)}


def test_worked_example_with_prefix():
    """Head [5] and p [91, 92] stand once in front; the second pair's prompt, [5], is all head and leaves nothing."""
    second = dataclasses.replace(SECOND, prompt=ids(5))
    row = build_row([FIRST, second], row_length=14, scored=8, unused_slot=4, head_tokens=1, prefix=ids(5, 91, 92))
    # index          0  1   2   3   4   5  6  7   8   9  10  11  12  13
    expected = {
        "tokens": [5, 91, 92, 23, 22, 21, 6, 7, 11, 12, 24, 13, 0, 0],
        "positions": [0, 1, 2, 7, 6, 5, 3, 4, 5, 6, 3, 3, 0, 0],
        "key_start": [0, 0, 0, 3, 4, 5, 6, 6, 6, 6, 10, 11, 12, 13],
        "key_end": [1, 2, 3, 8, 8, 8, 7, 8, 9, 10, 11, 12, 13, 14],
        "source": [7, 8, 7, 5, 4, 2, 2, 0],
        "target": [11, 12, 21, 22, 23, 13, 24, 0],
        "slot": [0, 0, 1, 1, 1, 2, 3, 4],
    }
    assert {name: array.tolist() for name, array in row.items()} == expected


def test_worked_example_of_one_side():
    """SFT: no rejected response, and no slot for one."""
    pair = dataclasses.replace(FIRST, rejected=None)
    row = build_row([pair], row_length=6, scored=3, unused_slot=2, head_tokens=0, prefix=NONE)
    expected = {
        "tokens": [5, 6, 7, 11, 12, 0],
        "positions": [0, 1, 2, 3, 4, 0],
        "key_start": [0, 0, 0, 0, 0, 5],
        "key_end": [1, 2, 3, 4, 5, 6],
        "source": [2, 3, 0],
        "target": [11, 12, 0],
        "slot": [0, 0, 2],
    }
    assert {name: array.tolist() for name, array in row.items()} == expected


@pytest.mark.parametrize(("row_length", "scored"), [(11, 7), (12, 6)])
def test_too_short_a_row_raises(row_length, scored):
    sizes = {"unused_slot": 4, "head_tokens": 0, "prefix": NONE}
    build_row([FIRST, SECOND], row_length=12, scored=7, **sizes)
    with pytest.raises(ValueError, match=f"{row_length} tokens and {scored} scored"):
        build_row([FIRST, SECOND], row_length=row_length, scored=scored, **sizes)


# The property: 4 pairs in 2 micro-batches of 2 rows. Every example has these shapes, so everything compiles once.

PAIRS, MICRO_BATCHES, ROWS, PREFIX = 4, 2, 2, 5
LONGEST = (5, 4, 4)  # prompt, chosen, rejected
ROW_LENGTH, SCORED = PAIRS * sum(LONGEST) + 2, PAIRS * sum(LONGEST[1:]) + 1
ALONE_LENGTH = PREFIX + LONGEST[0] + LONGEST[1]


@dataclasses.dataclass(frozen=True)
class Example:
    pairs: list[tiny.Pair]
    row_of: list[int]
    head: np.ndarray
    p: np.ndarray
    reference: np.ndarray
    """`[B, 2 sides, 2 (plain, augmented)]`"""

    def plain(self) -> Rows:
        return self._pack(ROW_LENGTH, 0, NONE)

    def augmented(self) -> Rows:
        return self._pack(ROW_LENGTH + PREFIX, len(self.head), np.concatenate([self.head, self.p]))

    def _pack(self, row_length: int, head_tokens: int, prefix: np.ndarray) -> Rows:
        sizes = {"micro_batches": MICRO_BATCHES, "rows": ROWS, "row_length": row_length, "scored": SCORED}
        return tiny.pack(self.pairs, self.row_of, head_tokens=head_tokens, prefix=prefix, **sizes)

    def prompts(self, *, augmented: bool) -> list[np.ndarray]:
        """x, or p ⊕ x: the head, p, the rest of x."""
        if not augmented:
            return [prompt for prompt, _, _ in self.pairs]
        return [np.concatenate([self.head, self.p, prompt[len(self.head) :]]) for prompt, _, _ in self.pairs]


@st.composite
def examples(draw: st.DrawFn) -> Example:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    head = rng.integers(0, tiny.VOCABULARY, draw(st.sampled_from([0, 2]))).astype(np.int32)
    shortest = max(1, len(head))  # a prompt that is all head leaves nothing behind the prefix
    sides = (st.integers(shortest, LONGEST[0]), st.integers(1, LONGEST[1]), st.integers(1, LONGEST[2]))
    lengths = draw(st.lists(st.tuples(*sides), min_size=PAIRS, max_size=PAIRS))
    row_of = draw(st.lists(st.integers(0, MICRO_BATCHES * ROWS - 1), min_size=PAIRS, max_size=PAIRS))
    p = rng.integers(0, tiny.VOCABULARY, PREFIX - len(head)).astype(np.int32)
    reference = rng.normal(-20, 10, (PAIRS, 2, 2))
    return Example(tiny.random_pairs(rng, lengths, head=head), row_of, head, p, reference)


def alone(prompts: list[np.ndarray], pairs: list[tiny.Pair]) -> tuple[Rows, np.ndarray]:
    """One causal row for each of the 2·B sequences, and a mask `[2·B, L]` of its scored predictions.

    Rows are filled up on the right, where no causal query of the sequence looks.
    """
    shape = (2 * len(pairs), ALONE_LENGTH)
    tokens, scored = np.zeros(shape, np.int32), np.zeros(shape, bool)
    for index, (prompt, pair) in enumerate(zip(prompts, pairs, strict=True)):
        for side in range(2):
            row, sequence = 2 * index + side, np.concatenate([prompt, pair[1 + side]])
            tokens[row, : len(sequence)] = sequence
            scored[row, len(prompt) - 1 : len(sequence) - 1] = True
    every = np.broadcast_to(np.arange(ALONE_LENGTH, dtype=np.int32), shape)
    unused = np.zeros((shape[0], 1), np.int32)
    return Rows(tokens, every, np.zeros_like(every), every + 1, unused, unused, unused), scored


class Model:
    """One tiny float64 model with the compiled functions that the property compares."""

    def __init__(self, architecture: Any, *, in_tiles: bool):
        mesh = tiny.make_mesh()
        attention = TILED if in_tiles else DENSE
        self.mesh, model = mesh, tiny.build(architecture, mesh, dtype=jnp.float64, attention=attention)
        self.logit_cap = architecture.logit_cap
        # The first one's state is the gradient itself; the step asks the second how many updates there were.
        self.graph, optimizer = model.graph, optax.chain(optax.trace(decay=0.0), optax.scale_by_schedule(lambda _: 1.0))
        self.state = model.state(optimizer, seed=1)
        self.train_step = make_train_step(
            model.graph,
            optimizer,
            lambda step: jnp.zeros(()),
            Objective("sr_dpo", {"beta": BETA, "lam": LAM}),
            pairs=PAIRS,
            mesh=mesh,
            abstract=model.abstract_state(optimizer),
        )
        self.packed_prefix, self.alone = jit_on(mesh, self._packed_prefix), jit_on(mesh, self._alone)

    def packed(self, example: Example, **changed: Any) -> tuple[Any, Any]:
        """Metrics of a real train step and its gradient."""
        batch = Batch(example.plain(), example.augmented(), example.reference[..., 0], example.reference[..., 1])
        batch = dataclasses.replace(batch, **changed)
        after, metrics = self.train_step(jax.tree.map(jnp.copy, self.state), None, None, batch)
        return metrics, after.optimizer_state[0].trace

    def _packed_prefix(self, params: Any, rows: Rows, weight: jax.Array) -> tuple[jax.Array, Any]:
        """Augmented rows in the place of plain ones, where gradients do flow through them; sums and gradient."""

        def weighted(params: Any) -> tuple[jax.Array, jax.Array]:
            flat = jax.tree.map(lambda array: array.reshape(-1, array.shape[-1]), rows)
            sums = score(self.graph, params, Batch(flat, None), PAIRS).plain
            return (weight * sums).sum(), sums

        gradient, sums = jax.grad(weighted, has_aux=True)(params)
        return sums, gradient

    def _alone(self, params: Any, rows: Rows, scored: jax.Array, weight: jax.Array) -> tuple[jax.Array, Any]:
        """The oracle: plain causal rows, and a dense log-softmax over the whole vocabulary.

        Returns the sums `[B, 2]` and the gradient of their sum with these weights.
        """

        def weighted(params: Any) -> tuple[jax.Array, jax.Array]:
            decoder = nnx.merge(self.graph, params)
            logits, cap = decoder(rows)[0] @ decoder.vocabulary_matrix.T, self.logit_cap
            every = jax.nn.log_softmax(logits if cap is None else cap * jnp.tanh(logits / cap), axis=-1)
            following = jnp.roll(rows.tokens, -1, axis=1)
            of_token = jnp.take_along_axis(every, following[..., None], axis=-1)[..., 0]
            sums = jnp.where(scored, of_token, 0.0).sum(axis=1).reshape(PAIRS, 2)
            return (weight * sums).sum(), sums

        gradient, sums = jax.grad(weighted, has_aux=True)(params)
        return sums, gradient


PROPERTY_MODELS = [
    "gpt_neox",
    pytest.param("llama in tiles", marks=pytest.mark.slow),
    "gemma in tiles",
]


@pytest.fixture(scope="module", params=PROPERTY_MODELS)
def model(request):
    family, _, in_tiles = request.param.partition(" ")
    with jax.enable_x64(True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(logprobs, "VOCABULARY_BLOCK", 10)  # three blocks
        patch.setattr(tiled, "TILE", 16)  # four or five
        yield Model(tiny.ARCHITECTURES[family], in_tiles=bool(in_tiles))


def assert_same_gradient(ours: Any, expected: Any, tolerance: float) -> None:
    """Leaf by leaf, relative to the leaf; some biases have a gradient of nothing but rounding, hence the floor."""
    leaves = jax.tree.leaves_with_path(expected)
    floor = 1e-3 * max(np.abs(leaf).max() for _, leaf in leaves)
    for (path, leaf), mine in zip(leaves, jax.tree.leaves(ours), strict=True):
        scale = max(np.abs(leaf).max(), floor)
        np.testing.assert_allclose(mine, leaf, rtol=0, atol=tolerance * scale, err_msg=jax.tree_util.keystr(path))


def check(model: Model, example: Example, tolerance: float = 1e-12, **changed: Any) -> None:
    """A packed, accumulated Sr-DPO step equals every sequence run alone; so do rows with p under gradients."""
    plain = alone(example.prompts(augmented=False), example.pairs)
    augmented = alone(example.prompts(augmented=True), example.pairs)
    random = np.random.default_rng(0).normal(size=(PAIRS, 2))

    judged, judged_gradient = model.alone(model.state.params, *augmented, random)
    rows = changed.get("augmented", example.augmented())
    packed_sums, packed_gradient = model.packed_prefix(model.state.params, rows, random)
    np.testing.assert_allclose(packed_sums, judged, rtol=tolerance)
    assert_same_gradient(packed_gradient, judged_gradient, tolerance)

    sums, _ = model.alone(model.state.params, *plain, random)
    margin, augmented_margin = (
        (ratio[:, 0] - ratio[:, 1]) for ratio in (sums - example.reference[..., 0], judged - example.reference[..., 1])
    )
    logit = BETA * margin - LAM * BETA * augmented_margin
    weight = -BETA / (1 + np.exp(logit)) / PAIRS  # of the mean Sr-DPO loss, for log π(y⁺); its opposite for log π(y⁻)
    _, gradient = model.alone(model.state.params, *plain, np.stack([weight, -weight], axis=1))
    metrics, packed_gradient = model.packed(example, **changed)
    for name, expected in (
        ("loss", np.logaddexp(0, -logit)),
        ("logps/chosen", sums[:, 0]),
        ("logps/rejected", sums[:, 1]),
        ("margin", margin),
        ("augmented/margin", augmented_margin),
        ("refinement", BETA * augmented_margin),
    ):
        scale = np.abs(expected).max()
        np.testing.assert_allclose(metrics[name], expected.mean(), rtol=0, atol=10 * tolerance * scale, err_msg=name)
    assert_same_gradient(packed_gradient, gradient, tolerance)


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(example=examples())
def test_packing_changes_nothing(model, example):
    with jax.enable_x64(True):
        check(model, example)


@dataclasses.dataclass(frozen=True)
class OwnHeads(Example):
    """Prompts that start with heads of their own, in rows that the pipeline itself lays out; `head` is empty."""

    head_tokens: np.ndarray

    def plain(self) -> Rows:
        return Rows(**self._step.plain)

    def augmented(self) -> Rows:
        return Rows(**self._step.augmented, prefix_tokens=self._step.prefix_tokens)

    @property
    def _step(self) -> HostStep:
        ends = np.cumsum([sum(map(len, pair)) for pair in self.pairs])
        pairs = types.SimpleNamespace(
            head=NONE,
            augmentation=self.p,
            against=NONE,
            head_tokens=self.head_tokens,
            offsets=np.stack([np.concatenate([[0], ends[:-1]]), ends, ends, ends], axis=1),
            pair=self.pairs.__getitem__,
        )
        shape = Shape(PAIRS, MICRO_BATCHES * ROWS, ROW_LENGTH, SCORED)
        plan = Plan(shape, 1, np.arange(PAIRS)[None], np.array([self.row_of]))
        # One length for all examples: 54 tokens, and at most 12 of p in one row, or fewer where it is not full.
        source = StepSource(pairs, plan, np.arange(ROWS), MICRO_BATCHES, 66, with_rejected=True, augmented=True)
        return source[0]

    def prompts(self, *, augmented: bool) -> list[np.ndarray]:
        p = self.p if augmented else NONE
        places = zip(self.pairs, self.head_tokens, strict=True)
        return [np.concatenate([prompt[:tokens], p, prompt[tokens:]]) for (prompt, _, _), tokens in places]


@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(example=examples(), seed=st.integers(0, 2**32 - 1))
def test_heads_that_differ_change_nothing(model, example, seed):
    """p follows the head of each prompt, be it empty or the whole prompt."""
    rng = np.random.default_rng(seed)
    heads = np.array([rng.integers(0, len(prompt) + 1) for prompt, _, _ in example.pairs])
    with jax.enable_x64(True):
        check(model, OwnHeads(example.pairs, example.row_of, NONE, example.p[:3], example.reference, heads))


def test_a_p_after_another_head_is_found(model):
    with jax.enable_x64(True):
        example = worked()
        right = OwnHeads(example.pairs, [0] * 4, NONE, example.p, example.reference, np.array([2, 1, 0, 3]))
        check(model, right)
        wrong = dataclasses.replace(right, head_tokens=np.array([2, 1, 1, 3]))
        with pytest.raises(AssertionError):
            check(model, right, 1e-6, augmented=wrong.augmented())


def worked() -> Example:
    """All four pairs in one row, of several tokens each, one with a prompt that is all head."""
    rng = np.random.default_rng(11)
    head, p = rng.integers(0, tiny.VOCABULARY, 2), rng.integers(0, tiny.VOCABULARY, 3)
    pairs = tiny.random_pairs(rng, [(5, 4, 3), (2, 2, 4), (4, 1, 2), (3, 3, 1)], head=head)
    return Example(pairs, [0, 0, 0, 0], head, p, rng.normal(-20, 10, (PAIRS, 2, 2)))


BREAKS = {
    "reversed positions off by one": lambda rows, reverse: {"positions": rows.positions + reverse},
    "reversed side sees no prompt": lambda rows, reverse: {
        "key_end": np.where(reverse, rows.key_start + 1, rows.key_end)
    },
    "reversed side sees one key less": lambda rows, reverse: {"key_start": rows.key_start + reverse},
    "sees the pair before": lambda rows, reverse: {"key_start": np.maximum(rows.key_start - 1, 0)},
    "not causal": lambda rows, reverse: {"key_end": np.where(reverse, rows.key_end, rows.key_end + 1)},
    "scored one position late": lambda rows, reverse: {"source": rows.source + 1},
    "sides swapped": lambda rows, reverse: {"slot": np.where(rows.slot < 2 * PAIRS, rows.slot ^ 1, rows.slot)},
}


@pytest.mark.parametrize("side", ["plain", "augmented"])
@pytest.mark.parametrize("name", BREAKS)
def test_the_property_fails_where_the_layout_is_broken(model, name, side):
    """Even at a tolerance a million times wider."""
    with jax.enable_x64(True):
        example = worked()
        check(model, example)
        rows = getattr(example, side)()
        reverse = (rows.key_end > np.arange(rows.tokens.shape[-1]) + 1) & (rows.key_end > rows.key_start + 1)
        broken = dataclasses.replace(rows, **BREAKS[name](rows, reverse.astype(np.int32)))
        with pytest.raises(AssertionError):
            check(model, example, 1e-6, **{side: broken})


def test_a_pair_against_rows_of_exact_length():
    """No filling up on either side: prompt + response as a row of its own length, with a length of its own."""
    with jax.enable_x64(True):
        model = tiny.build(tiny.LLAMA, tiny.make_mesh(), dtype=jnp.float64)
        rng = np.random.default_rng(2)
        (pair,) = tiny.random_pairs(rng, [(4, 3, 2)])
        prefix = ids(9, 3, 7)
        sizes = {"micro_batches": 1, "rows": 1, "row_length": 9 + len(prefix), "scored": 5}
        packed = jax.tree.map(lambda array: array[0], tiny.pack([pair], [0], prefix=prefix, **sizes))
        params = model.params(3)
        sums = jit_on(model.mesh, lambda rows: score(model.graph, params, Batch(rows, None), 1).plain)(packed)
        decoder = nnx.merge(model.graph, params)
        for side in range(2):
            sequence = np.concatenate([prefix, pair[0], pair[1 + side]])
            every = np.arange(len(sequence), dtype=np.int32)[None]
            rows = Rows(sequence[None], every, 0 * every, every + 1, every, every, every)
            hidden = np.asarray(jax.jit(lambda rows: decoder(rows)[0])(rows))
            logits = hidden[0] @ np.asarray(decoder.vocabulary_matrix).T
            table = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
            response = len(pair[1 + side])
            predictions = np.arange(len(sequence) - response - 1, len(sequence) - 1)
            expected = table[predictions, sequence[-response:]].sum()
            np.testing.assert_allclose(sums[0, side], expected, rtol=1e-12)
