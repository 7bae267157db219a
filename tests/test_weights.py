"""Hugging Face directories in and out without PyTorch: bit for bit on any mesh, every fault named."""

import json

import jax
import numpy as np
import pytest
import tiny
from runs import model_directory
from safetensors.numpy import load_file, save_file

from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.weights import directory as weights

FAMILIES = {
    "gpt_neox": {"rotary_pct": 0.25},
    "llama": {"num_key_value_heads": 2, "head_dim": 24, "attention_bias": True, "tie_word_embeddings": True},
}


def written(tmp_path, family, *, shard_bytes=10**9):
    """A directory with random weights, and the model and parameters they were written from."""
    path = model_directory(tmp_path / "model", family, **FAMILIES[family])
    directory = weights.open_directory(str(path))
    model = tiny.build(directory.architecture, tiny.make_mesh())
    params = model.params()
    weights.save_params(params, directory, model.abstract, path, dtype=np.dtype("float32"), shard_bytes=shard_bytes)
    return directory, model, params


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 8, 1), (1, 4, 2), (2, 2, 2)])
@pytest.mark.parametrize("family", FAMILIES)
def test_out_and_in_is_bit_for_bit_on_any_mesh(tmp_path, family, shape):
    directory, _, params = written(tmp_path, family, shard_bytes=20_000)
    assert len(list(directory.path.glob("model-*.safetensors"))) > 3
    model = tiny.build(directory.architecture, tiny.make_mesh(*shape))
    loaded = weights.load_params(directory, model.abstract, model.shardings, dtype=np.dtype("float32"))
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    for ours, theirs, sharding in zip(
        jax.tree.leaves(loaded), jax.tree.leaves(params), jax.tree.leaves(model.shardings), strict=True
    ):
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()
        assert ours.sharding == sharding


def test_a_host_keeps_only_the_box_of_its_devices():
    mesh = tiny.make_mesh(fsdp=8)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp"))
    whole = np.arange(6 * 16).reshape(6, 16)

    class TwoOfEight:  # stands for a process that holds the third and fourth device
        def addressable_devices_indices_map(self, shape):
            everything = sharding.devices_indices_map(shape)
            return {device: everything[device] for device in list(everything)[2:4]}

    box = weights._local_box(TwoOfEight(), whole.shape)
    assert box == (slice(0, 6), slice(4, 8))
    for index in TwoOfEight().addressable_devices_indices_map(whole.shape).values():
        np.testing.assert_array_equal(weights._from_box(whole[box], box, whole.shape, index), whole[index])


def test_the_files_have_the_names_and_layout_of_transformers(tmp_path):
    """The fused query-key-value of GPT-NeoX, by hand: head h holds rows of its query, its key, its value."""
    directory, _, params = written(tmp_path, "gpt_neox")
    tensors = load_file(directory.path / "model.safetensors")
    fused = tensors["gpt_neox.layers.1.attention.query_key_value.weight"].reshape(4, 3, 8, 32)
    attention = params["layers"]["attention"]
    for part, name in enumerate(("query", "key", "value")):
        np.testing.assert_array_equal(fused[:, part].transpose(2, 0, 1), np.asarray(attention[name])[1])
    down = tensors["gpt_neox.layers.0.mlp.dense_4h_to_h.weight"]
    np.testing.assert_array_equal(down.T, np.asarray(params["layers"]["mlp"]["down"])[0])


def corrupt_missing(path, tensors):
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path)


def corrupt_extra(path, tensors):
    save_file(tensors | {"model.layers.9.mlp.up_proj.weight": np.zeros((2, 2), np.float32)}, path)


def corrupt_shape(path, tensors):
    save_file(tensors | {"model.norm.weight": np.zeros(31, np.float32)}, path)


def corrupt_type(path, tensors):
    save_file(tensors | {"model.norm.weight": np.zeros(32, np.int32)}, path)


def truncate(path, tensors):
    path.write_bytes(path.read_bytes()[:-100])


def only_pickle(path, tensors):
    path.rename(path.with_name("pytorch_model.bin"))


def escape(path, tensors):
    index = {"weight_map": {name: "../../outside.safetensors" for name in tensors}}
    path.with_name("model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (corrupt_missing, ["model.layers.1.mlp.up_proj.weight", "missing"]),
        (corrupt_extra, ["model.layers.9.mlp.up_proj.weight", "not part"]),
        (corrupt_shape, ["model.norm.weight", "(31,)", "(32,)"]),
        (corrupt_type, ["model.norm.weight", "I32"]),
        (truncate, ["model.safetensors", "damaged"]),
        (only_pickle, ["model.safetensors", "missing", "no .bin"]),
        (escape, ["../../outside.safetensors", "nothing was read"]),
    ],
)
def test_faults_are_named_before_anything_is_loaded(tmp_path, damage, words):
    directory, model, _ = written(tmp_path, "llama")
    file = directory.path / "model.safetensors"
    damage(file, load_file(file))
    with pytest.raises(UsageError) as error:
        weights.check(directory, model.abstract)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "mamba"}, ["mamba", "not supported"]),
        ({"auto_map": {"AutoConfig": "evil.Config"}}, ["auto_map", "never run"]),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, ["yarn", "not supported"]),
        ({"hidden_act": "relu6"}, ["hidden_act", "relu6"]),
        ({"num_attention_heads": 0}, ["config.json"]),
        ({"num_hidden_layers": "two"}, ["config.json"]),
    ],
)
def test_configs_that_are_refused(tmp_path, change, words):
    path = model_directory(tmp_path / "model", "llama")
    fields = json.loads((path / "config.json").read_text()) | change
    (path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UsageError) as error:
        weights.open_directory(str(path))
    for word in words:
        assert word in str(error.value)
