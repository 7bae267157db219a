"""Adapters beside a base in int8: the model is that of the rounded weights, on any mesh, and training is exact."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from flax.traverse_util import flatten_dict
from runs import make_config, metrics_of, model_directory, preference_file, state_of, without_times
from safetensors.numpy import load_file, save_file

from sr_dpo_jax.cli import main
from sr_dpo_jax.commands.export import export
from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.model.linear import Int8
from sr_dpo_jax.parallel.mesh import bytes_a_chip, make_mesh
from sr_dpo_jax.train import loop
from sr_dpo_jax.train.loop import train
from sr_dpo_jax.train.setup import read_model, set_up_on

LORA = {"rank": 4, "alpha": 8.0, "base": "int8"}
pytestmark = pytest.mark.usefixtures("same_programs")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model in a file, and one whose matrices are those weights rounded by qwix and put back into float32."""
    root = tmp_path_factory.mktemp("int8")
    model_directory(root / "drawn", "llama", num_key_value_heads=2)
    preference_file(root / "train.jsonl", 40)
    assert train(make_config(root / "first", root / "drawn", root / "train.jsonl", train={"max_steps": 1})) == 0
    export(root / "first" / "run", root / "model")
    export(root / "first" / "run", root / "rounded")
    tensors = load_file(root / "model" / "model.safetensors")
    for name, tensor in tensors.items():
        if "_proj" in name:  # [outputs, inputs]
            array = qwix.quantize(jnp.asarray(tensor), jnp.int8, channelwise_axes=[0], scale_dtype=jnp.float32)
            tensors[name] = np.asarray(qwix.dequantize(array))
            assert (tensors[name] != tensor).any()
    save_file(tensors, root / "rounded" / "model.safetensors", {"format": "pt"})
    return root


def config_of(world, root, weights="model", dtype="float32", **sections):
    section = {"path": str(world / weights), "init": "pretrained", "dtype": dtype}
    options = {"lora": LORA, "cache_dir": str(world / "cache"), **sections}
    return make_config(root, world / weights, world / "train.jsonl", model=section, **options)


def test_its_log_probs_are_those_of_the_rounded_weights(world, tmp_path):
    """And not those of the weights themselves, which a cache in common must not give out for them."""
    found = {}
    for name, model, lora in (("plain", "model", None), ("int8", "model", LORA), ("rounded", "rounded", None)):
        config, out = config_of(world, tmp_path / name, model, lora=lora), tmp_path / f"{name}.jsonl"
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "config.yaml").write_text(config.to_yaml())
        assert main(["score", str(tmp_path / name / "config.yaml"), "--output", str(out)]) == 0
        lines = [json.loads(line) for line in out.read_text().splitlines()]
        found[name] = np.array([[line[key] for key in sorted(line) if "logp" in key] for line in lines])
    np.testing.assert_allclose(found["int8"], found["rounded"], rtol=1e-5)
    assert np.abs(found["int8"] - found["plain"]).max() > 1e-3


@pytest.mark.parametrize(("mode", "dtype"), [("cached", "bfloat16"), ("online", "float32")])
def test_margins_begin_at_zero_and_the_base_stays(world, tmp_path, monkeypatch, mode, dtype):
    seen, prepare = {}, loop.prepare

    def watched(*arguments, **options):
        job, state = prepare(*arguments, **options)
        seen.update(job=job, base=jax.tree.map(np.array, job.base))
        return job, state

    monkeypatch.setattr(loop, "prepare", watched)
    config = config_of(world, tmp_path, reference={"mode": mode}, dtype=dtype)
    assert train(config) == 0
    first, *_, last = metrics_of(config.output_dir)
    assert first["margin"] == first["augmented/margin"] == 0.0 and last["margin"] != 0.0
    jax.tree.map(np.testing.assert_array_equal, seen["job"].base, seen["base"])
    held = {path for path, leaf in flatten_dict(seen["base"], sep=".").items() if isinstance(leaf, Int8)}
    names = {
        "attention.query",
        "attention.key",
        "attention.value",
        "attention.output",
        "mlp.gate",
        "mlp.up",
        "mlp.down",
    }
    assert held == {f"layers.{name}" for name in names}


def test_a_run_in_two_parts_is_the_run_in_one(world, tmp_path):
    whole, parts = (config_of(world, tmp_path / name, train={"max_steps": 4}) for name in ("whole", "parts"))
    assert train(whole) == 0
    assert train(parts.model_copy(update={"train": parts.train.model_copy(update={"max_steps": 2})})) == 0
    assert train(parts) == 0
    ours, theirs = state_of(parts.output_dir), state_of(whole.output_dir)
    assert ours.keys() == theirs.keys() and all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)
    assert without_times(metrics_of(parts.output_dir)) == without_times(metrics_of(whole.output_dir))
    with pytest.raises(UsageError, match=r"lora\.base: int8 -> "):
        train(config_of(world, tmp_path / "parts", lora={**LORA, "base": None}))


@pytest.mark.parametrize(("replica", "fsdp", "tensor"), [(1, 8, 1), (2, 2, 2)])
def test_it_is_the_same_on_any_mesh(world, tmp_path, replica, fsdp, tensor):
    config = config_of(world, tmp_path)
    directory, _ = read_model(config)
    held = []
    for mesh in (
        make_mesh(replica=1, fsdp=1, tensor=1, devices=jax.devices()[:1]),
        make_mesh(replica=replica, fsdp=fsdp, tensor=tensor),
    ):
        model = set_up_on(mesh, config, directory).model
        params = model.base_params()
        jax.tree.map(lambda array, shape: np.testing.assert_equal(array.sharding, shape.sharding), params, model.shapes)
        held.append((jax.device_get(params), bytes_a_chip(params), bytes_a_chip(model.shapes)))
    jax.tree.map(np.testing.assert_array_equal, held[0][0], held[1][0])
    for _, taken, described in held:
        assert taken == described
    assert held[1][1] < held[0][1]


def test_without_the_library_it_is_refused(world, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(UsageError, match=r"lora\.base=int8 needs qwix: pip install"):
        train(config_of(world, tmp_path))
