"""Parts of the decoder that the whole-model comparisons cannot see: bfloat16 sums, and what remat must not change."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from sr_dpo_jax.batch import Batch
from sr_dpo_jax.model.decoder import look_up
from sr_dpo_jax.train.train_step import score


def test_a_frequent_token_keeps_its_whole_gradient():
    """4,096 contributions of 1 to one row: summed in bfloat16 they would stop at 256."""
    table = jnp.zeros((5, 8), jnp.float32)
    tokens = jnp.full((1, 4096), 3, jnp.int32)
    gradient = jax.grad(lambda t: look_up(t, tokens, jnp.bfloat16).astype(jnp.float32).sum())(table)
    expected = np.zeros((5, 8))
    expected[3] = 4096
    np.testing.assert_array_equal(gradient, expected)


def test_look_up_is_indexing():
    table = jnp.asarray(np.random.default_rng(0).normal(size=(7, 4)), jnp.float32)
    tokens = jnp.asarray([[0, 6, 6], [2, 0, 1]])
    weights = jnp.arange(24.0).reshape(2, 3, 4)

    def ours(t):
        return (weights * look_up(t, tokens, jnp.float32)).sum()

    np.testing.assert_array_equal(ours(table), (weights * table[tokens]).sum())
    np.testing.assert_allclose(jax.grad(ours)(table), jax.grad(lambda t: (weights * t[tokens]).sum())(table), rtol=1e-6)


@pytest.mark.parametrize(
    "family", ["gemma", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt_neox", "llama"))]
)
def test_remat_changes_no_gradient(family):
    mesh = tiny.make_mesh()
    pairs = tiny.random_pairs(np.random.default_rng(1), [(3, 4, 2), (5, 1, 6)])
    rows = tiny.pack(pairs, [0, 0], micro_batches=1, rows=1, row_length=24, scored=16)
    rows = jax.tree.map(lambda array: array[0], rows)
    gradients = {}
    for remat in ("none", "dots", "full"):
        architecture = dataclasses.replace(tiny.ARCHITECTURES[family])
        model = tiny.build(architecture, mesh, remat=remat)

        @jax.jit
        @jax.grad
        def gradient(params, graph=model.graph):
            return score(graph, params, Batch(rows, None), 2).plain[0].sum()

        gradients[remat] = gradient(model.params())
    for remat in ("dots", "full"):
        jax.tree.map(
            lambda ours, plain: np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-5),
            gradients[remat],
            gradients["none"],
        )
