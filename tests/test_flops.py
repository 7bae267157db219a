"""The step does the passes it must and no others: XLA's own count of its flops against a formula.

One forward over T tokens, A (query, key) pairs and S scored positions costs

    f = 2·N_b·T + 4·L·a·A + 2·N_h·S

flops (N_b matmul weights of the layers, N_h of the unembedding, a = heads × head_dim), and training 3·f without
rematerialisation. Best DPO is 3 f of the plain rows (the reference is cached, prompts are shared), best Sr-DPO adds one
f of the augmented rows, in which p stands once a row. The dense path computes all T² pairs of a row, so A is that; and
the vocabulary's backward pass makes its logits again instead of keeping them, 4/3 of the 3 f of that term.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import NEOX, Batch, LayerKind, build, make_mesh, rope

from sr_dpo_jax.batch import Rows
from sr_dpo_jax.train_step import Objective, make_train_step, state_shapes

ROWS, LENGTH, SCORED, PAIRS, P_TOKENS = 2, 256, 96, 8, 64


def architecture():
    sizes = {"vocabulary_tokens": 512, "hidden": 1024, "heads": 8, "kv_heads": 8, "head_dim": 128, "mlp": 4096}
    kinds = (LayerKind(rope(16), window=None),)
    return dataclasses.replace(NEOX, **sizes, layers=2, kinds=kinds, kind_of_layer=(0,) * 2)


def rows(length, prefix_tokens):
    whole = jax.ShapeDtypeStruct((1, ROWS, length), jnp.int32)
    scored = jax.ShapeDtypeStruct((1, ROWS, SCORED), jnp.int32)
    return Rows(whole, whole, whole, whole, scored, scored, scored, prefix_tokens=prefix_tokens)


def forward(length):
    """Flops of the layers and of the unembedding, one forward over rows of this length."""
    a = architecture()
    body = a.layers * (4 * a.hidden * a.hidden + 2 * a.hidden * a.mlp)
    return (
        2 * body * ROWS * length + 4 * a.layers * a.hidden * ROWS * length**2,
        2 * a.vocabulary_tokens * a.hidden * ROWS * SCORED,
    )


def repeated(remat, length):
    """Flops of the layers' forward that the backward pass does again.

    Results that no gradient needs are not made again: the attention's output projection and the MLP's down projection.
    "dots" keeps every matmul of a weight, so only the products of queries, keys and values are repeated.
    """
    a, body = architecture(), forward(length)[0]
    products = 4 * a.layers * a.hidden * ROWS * length**2
    unneeded = 2 * a.layers * (a.hidden * a.hidden + a.hidden * a.mlp) * ROWS * length
    return {"none": 0, "dots": products, "full": body - unneeded}[remat]


def counted(name, remat="none"):
    """XLA's flops of the lowered train step, with every loop unrolled because XLA counts a loop's body once."""
    model = build(architecture(), make_mesh(), remat=remat)
    optimizer = optax.sgd(lambda _: 1.0)
    step = make_train_step(
        model.graph,
        optimizer,
        lambda step: jnp.float32(1.0),
        Objective(name, 0.1, 0.5, 0.0),
        pairs=PAIRS,
        mesh=model.mesh,
        state_shardings=model.state_shardings(optimizer),
    )
    scores = jax.ShapeDtypeStruct((PAIRS, 2), jnp.float32)
    refined = name == "sr_dpo"
    augmented = rows(LENGTH + P_TOKENS, P_TOKENS) if refined else None
    batch = Batch(rows(LENGTH, 0), augmented, scores, scores if refined else None)
    return step.lower(state_shapes(model.shapes, optimizer), None, batch).cost_analysis()["flops"]


@pytest.fixture
def unrolled(monkeypatch):
    monkeypatch.setattr(jax.lax, "scan", functools.partial(jax.lax.scan, unroll=True))


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize(("name", "augmented_passes"), [("dpo", 0), ("sr_dpo", 1)])
def test_flops_of_the_step(unrolled, name, augmented_passes, remat):
    """Within 2 % at every remat setting; the vocabulary's logits are made twice, 4 times their forward instead of 3."""
    body, head = forward(LENGTH)
    augmented_body, augmented_head = forward(LENGTH + P_TOKENS)
    formula = 3 * body + 4 * head + repeated(remat, LENGTH) + augmented_passes * (augmented_body + augmented_head)
    assert counted(name, remat) == pytest.approx(formula, rel=0.02)


def test_the_refinement_costs_one_forward(unrolled):
    extra = counted("sr_dpo") - counted("dpo")
    assert extra == pytest.approx(np.sum(forward(LENGTH + P_TOKENS)), rel=0.05)
