"""LoRA adapters beside the decoder's matrices: the same numbers as merged weights, and what training changes."""

from typing import get_args

import jax
import numpy as np
import pytest
import tiny
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from zoo import logits

from sr_dpo_jax.config.schema import Target
from sr_dpo_jax.model.adapter import TARGETS, Lora, adapter_weights, join, split

TOKENS = np.random.default_rng(0).integers(0, tiny.VOCABULARY, (2, 12)).astype(np.int32)


def merged(params, lora):
    """The parameters without adapters, each matrix with s·A·B added; float64 NumPy."""
    flat = {path: np.array(leaf, np.float64) for path, leaf in flatten_dict(params, sep=".").items()}
    for path in [path for path in flat if path.endswith(".a")]:
        part, name = path.removesuffix(".a").split(".adapters.")
        a, b = flat.pop(path), flat.pop(f"{part}.adapters.{name}.b")
        a, thin = a.reshape(len(a), -1, lora.rank), b.reshape(len(b), lora.rank, -1)
        scale = lora.alpha / (lora.rank**0.5 if lora.rslora else lora.rank)
        flat[f"{part}.{name}"] += scale * np.einsum("lir,lro->lio", a, thin).reshape(flat[f"{part}.{name}"].shape)
    return unflatten_dict(flat, sep=".")


@pytest.mark.parametrize("family", tiny.ARCHITECTURES)
@pytest.mark.parametrize(
    "lora", [Lora(3, 6.0), Lora(4, 2.0, rslora=True, targets=("value", "output", "down"))], ids=["all", "some"]
)
def test_logits_are_those_of_merged_weights(float64, family, lora):
    architecture, mesh = tiny.ARCHITECTURES[family], tiny.make_mesh()
    adapted = tiny.build(architecture, mesh, dtype="float64", lora=lora)
    plain = tiny.build(architecture, mesh, dtype="float64")
    params = adapted.params()
    names = {path.split(".")[3] for path in flatten_dict(split(params)[0], sep=".")}
    gated = () if architecture.gated else ("gate",)
    assert names == set(lora.targets) - set(gated)
    expected = logits(plain, merged(params, lora), TOKENS)
    np.testing.assert_allclose(logits(adapted, params, TOKENS), expected, rtol=1e-9, atol=1e-9)
    assert np.abs(expected - logits(plain, split(params)[1], TOKENS)).max() > 0.1


@pytest.mark.parametrize("init", ["zero_a", "zero_b"])
def test_a_new_adapter_changes_no_bit(init):
    """One factor is 0 and the other within ±1/√inputs of it, by the family's own shapes."""
    lora, mesh = Lora(4, 8.0, init=init), tiny.make_mesh()
    adapted, plain = (tiny.build(tiny.LLAMA, mesh, lora=form) for form in (lora, None))
    drawn = jax.jit(lambda: split(nnx.to_pure_dict(nnx.state(adapted.make())))[0])()
    base = plain.params()
    assert np.array_equal(logits(adapted, join(drawn, base), TOKENS), logits(plain, base, TOKENS))
    zero, other = init[-1], {"a": "b", "b": "a"}[init[-1]]
    for path, leaf in flatten_dict(drawn, sep=".").items():
        values = np.asarray(leaf)
        if path.endswith(f".{zero}"):
            assert not values.any()
        else:
            inputs = 2 if ".output." in path else 1
            fan_in = lora.rank if other == "b" else np.prod(values.shape[1 : 1 + inputs])
            assert 0.8 / fan_in**0.5 < np.abs(values).max() <= 1 / fan_in**0.5 and len(np.unique(values)) > 10


def test_the_targets_of_a_configuration_are_those_of_the_decoder():
    assert get_args(Target) == TARGETS


def test_split_and_join():
    model = tiny.build(tiny.NEOX, tiny.make_mesh(), lora=Lora(2, 2.0))
    shapes = model.shapes
    adapters, base = split(shapes)
    assert split(base) == (base, None) and join(base, None) is base
    assert jax.tree.structure(join(adapters, base)) == jax.tree.structure(shapes)
    a = tiny.NEOX
    sides = {"query": (a.hidden, a.heads * a.head_dim), "up": (a.hidden, a.mlp)}
    by_hand = a.layers * 2 * sum(2 * sum(sides[name]) for name in ("query", "up"))  # q, k, v, output; up, down
    by_hand += a.layers * 2 * 2 * sum(sides["query"])
    assert adapter_weights(shapes) == by_hand and adapter_weights(base) == 0


def test_adapters_are_sharded_as_their_matrices():
    model = tiny.build(tiny.LLAMA, tiny.make_mesh(replica=1, fsdp=4, tensor=2), lora=Lora(2, 2.0))
    specs = {path: tuple(leaf.sharding.spec) for path, leaf in flatten_dict(model.shapes, sep=".").items()}
    for name in TARGETS:
        part = "attention" if name in ("query", "key", "value", "output") else "mlp"
        layers, *sides = specs[f"layers.{part}.{name}"]
        a, b = (specs[f"layers.{part}.adapters.{name}.{factor}"] for factor in "ab")
        inputs = 2 if name == "output" else 1
        assert a == (layers, *sides[:inputs], None) and b == (layers, None, *sides[inputs:])
