"""Every family against what PyTorch's models gave for the same weights (`golden/make.py`), on any mesh."""

import numpy as np
import pytest
import tiny
import zoo

from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.weights import directory as weights
from sr_dpo_jax.weights.rope import rope_of

MESHES = {"fsdp 8": (1, 8, 1), "fsdp 4 x tensor 2": (1, 4, 2), "tensor 8": (1, 1, 8)}
DIVIDES_BY_8 = {"num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 32}


@pytest.mark.parametrize(("family", "case"), zoo.ALL, ids=[f"{family}: {case}" for family, case in zoo.ALL])
def test_logits_are_those_of_pytorch(tmp_path, family, case):
    expected, shapes = zoo.golden(family, case)
    zoo.write(tmp_path, family, case, shapes)
    model, params = zoo.load(weights.open_directory(str(tmp_path)), tiny.make_mesh())
    ours = zoo.logits(model, params, zoo.token_ids(expected.shape[-1]))
    assert np.abs(ours - expected).max() < 1e-4
    assert np.abs(expected).max() > 1.5


@pytest.mark.parametrize("mesh", list(MESHES))
@pytest.mark.parametrize("family", list(zoo.CASES))
def test_logits_do_not_depend_on_the_mesh(tmp_path, monkeypatch, family, mesh):
    case = next(iter(zoo.CASES[family]))
    _, shapes = zoo.golden(family, case)
    if mesh == "tensor 8":
        if family != "llama":
            with pytest.raises(UsageError, match=r"\['layers'\].* does not divide over tensor = 8"):
                zoo.write(tmp_path, family, case, shapes)
                tiny.build(weights.open_directory(str(tmp_path)).architecture, tiny.make_mesh(*MESHES[mesh]))
            return
        monkeypatch.setitem(zoo.CASES["llama"], case, zoo.CASES["llama"][case] | DIVIDES_BY_8)
        wide = {"q_proj": [80, 24], "k_proj": [80, 24], "v_proj": [80, 24], "o_proj": [24, 80]}
        wide |= {"gate_proj": [32, 24], "up_proj": [32, 24], "down_proj": [24, 32]}
        shapes = {name: wide.get(name.split(".")[-2], shape) for name, shape in shapes.items()}
    zoo.write(tmp_path, family, case, shapes)
    directory, tokens = weights.open_directory(str(tmp_path)), zoo.token_ids(37, rows=8)
    one = zoo.logits(*zoo.load(directory, tiny.make_mesh()), tokens)
    many = zoo.logits(*zoo.load(directory, tiny.make_mesh(*MESHES[mesh])), tokens)
    np.testing.assert_allclose(many, one, atol=1e-4)


@pytest.mark.parametrize("name", zoo.ROPES)
def test_frequencies_are_those_of_transformers(name):
    """To float32, in which transformers computes them; ours are float64."""
    with np.load(zoo.GOLDEN / "rope.npz", allow_pickle=False) as kept:
        *frequencies, scale = kept[name]
    parameters = zoo.ROPES[name]["rope_parameters"]
    ours = rope_of(parameters, head_dim=128, context_tokens=131_072, where="test")
    assert len(ours.frequencies) == (32 if "half" in name else 64)
    np.testing.assert_allclose(ours.frequencies, frequencies, rtol=3e-6)
    assert ours.scale == pytest.approx(scale, rel=1e-12)
