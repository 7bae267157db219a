"""A matrix in int8 multiplies as its dequantised values do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax import nnx

from sr_dpo_jax.model.linear import Int8, linear
from sr_dpo_jax.weights.placement import quantised

LAYERS, EMBED, HEADS, DIM = 2, 24, 4, 8
SHAPES = {"query": (LAYERS, EMBED, HEADS, DIM), "output": (LAYERS, HEADS, DIM, EMBED), "down": (LAYERS, 40, EMBED)}


def drawn(name, scale=3.0):
    return scale * jax.random.normal(jax.random.key(len(name)), SHAPES[name], jnp.float32)


@pytest.mark.parametrize("name", SHAPES)
def test_every_output_has_a_scale_of_its_own(name):
    weight, inputs = np.asarray(drawn(name), np.float64), (1, 2) if name == "output" else (1,)
    weight[0] *= 1e-3  # a scale that layers had in common would round this one away
    held = quantised(name, jnp.asarray(weight, jnp.float32))
    largest = np.abs(weight).max(axis=inputs)
    assert held.values.dtype == jnp.int8 and held.scale.dtype == jnp.float32
    np.testing.assert_allclose(held.scale, largest / 127.5, rtol=5e-3)
    scale = np.expand_dims(np.asarray(held.scale, np.float64), inputs)
    assert (np.abs(np.asarray(held.values) * scale - weight) <= 0.51 * scale).all()


def test_a_matrix_in_bfloat16_is_rounded_once():
    """Its quotients by the scale are no bfloat16 numbers: rounded to those first, they were 3/4 of a step away."""
    weight = drawn("down").astype(jnp.bfloat16)
    held = quantised("down", weight)
    scale = np.asarray(held.scale, np.float64)[:, None]
    assert (np.abs(np.asarray(held.values) * scale - np.asarray(weight, np.float64)) <= 0.51 * scale).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SHAPES)
def test_it_multiplies_as_its_dequantised_values(name, dtype):
    """Values and the gradient with respect to x; qwix's own dequantisation and a float64 product are the oracle."""
    weight, axes = drawn(name), 2 if name == "output" else 1
    inputs = SHAPES[name][1 : 1 + axes]
    outputs = [axis for axis in range(weight.ndim) if not 1 <= axis <= axes]
    array = qwix.quantize(weight, jnp.int8, channelwise_axes=outputs, scale_dtype=jnp.float32)
    matrix = np.asarray(qwix.dequantize(array), np.float64)[1]
    held = jax.tree.map(lambda stacked: stacked[1], quantised(name, weight))
    assert isinstance(held, Int8)
    x = jax.random.normal(jax.random.key(1), (3, 5, *inputs), dtype)
    along = jax.random.normal(jax.random.key(2), (3, 5, *SHAPES[name][1 + axes :]), dtype)

    @jax.jit  # one program, where each operation would be compiled for itself
    def both(x, along):
        product, pull = jax.vjp(lambda x: linear(name, x, nnx.Param(held), axes=axes), x)
        return product, *pull(along)

    product, pulled = both(x, along)
    wide = np.asarray(x, np.float64)
    expected = np.tensordot(wide, matrix, axes=axes)
    back = np.tensordot(
        np.asarray(along, np.float64), matrix, axes=(tuple(range(2, along.ndim)), range(axes, matrix.ndim))
    )
    tolerance = {"float32": 1e-5, "bfloat16": 3e-2}[dtype]
    for ours, theirs in ((product, expected), (pulled, back)):
        assert ours.dtype == dtype and ours.shape == theirs.shape
        np.testing.assert_allclose(np.asarray(ours, np.float64), theirs, atol=tolerance * np.abs(theirs).max())
