"""Directories damaged at random: always one UsageError, exit code 2, and no run directory."""

import json
import shutil

import numpy as np
import pytest
import tiny
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from runs import model_directory, preference_file, raw_config
from safetensors.numpy import load_file, save_file

from sr_dpo_jax.cli import main
from sr_dpo_jax.config.load import load_config
from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.train.setup import read_model
from sr_dpo_jax.weights import directory as weights

pytestmark = pytest.mark.usefixtures("same_programs")

INDEX = "model.safetensors.index.json"
CANARY = b"canary"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A sound directory of several files, a place to damage copies of it in, and a configuration that trains it."""
    root = tmp_path_factory.mktemp("corruption")
    path = model_directory(root / "sound", "llama", num_key_value_heads=2)
    directory = weights.open_directory(str(path))
    model = tiny.build(directory.architecture, tiny.make_mesh())
    tiny.save_weights(model.params(), directory, model.abstract, path, shard_bytes=45_000)
    data = preference_file(root / "pairs.jsonl", 8)
    raw = raw_config(root, root / "damaged", data, model={"init": "pretrained"}, train={"max_steps": 1})
    (root / "config.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    (root / "outside.safetensors").write_bytes(CANARY)
    return root


@pytest.fixture(scope="module")
def abstract(world):
    directory = weights.open_directory(str(world / "sound"))
    return tiny.build(directory.architecture, tiny.make_mesh()).abstract


def shards(path):
    return sorted(path.glob("model-*.safetensors"))


def header_end(content):
    return 8 + int.from_bytes(content[:8], "little")


def meaning(content):
    """Parses the tensors of a header without the safetensors library; None where it has none."""
    try:
        header = json.loads(content[8 : header_end(content)])
        return {"length": header_end(content)} | {name: header[name] for name in header if name != "__metadata__"}
    except (ValueError, TypeError):
        return None


def truncate(path, data):
    file = data.draw(st.sampled_from(shards(path)))
    content = file.read_bytes()
    ends = st.one_of(st.integers(0, len(content) - 1), st.integers(0, header_end(content)))
    file.write_bytes(content[: data.draw(ends)])


def lengthen(path, data):
    file = data.draw(st.sampled_from(shards(path)))
    file.write_bytes(file.read_bytes() + data.draw(st.binary(min_size=1, max_size=20)))


def drop(path, data):
    file = data.draw(st.sampled_from(shards(path)))
    if data.draw(st.booleans()):
        file.rename(file.with_suffix(".bin"))
    else:
        file.unlink()


def make_something_else_of(path, data):
    file = data.draw(st.sampled_from(shards(path)))
    file.unlink()
    data.draw(st.sampled_from([file.mkdir, lambda: file.symlink_to(file.name), lambda: file.symlink_to("nowhere")]))()


def exchange(path, data):
    first, second = data.draw(st.lists(st.sampled_from(shards(path)), min_size=2, max_size=2, unique=True))
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(kept)


def rewrite(path, data):
    """One tensor of another type, name or shape, left out, or held twice."""
    file = data.draw(st.sampled_from(shards(path)))
    tensors = load_file(file)
    name = data.draw(st.sampled_from(sorted(tensors)))
    tensor = tensors.pop(name)
    kind = data.draw(st.sampled_from(["type", "name", "shape", "left out", "twice"]))
    if kind == "type":
        types = [np.int32, np.uint32, np.int8, np.int64, np.bool_, np.uint16]
        tensors[name] = tensor.astype(data.draw(st.sampled_from(types)))
    if kind == "name":
        position = data.draw(st.integers(0, len(name) - 1))
        other = name[:position] + data.draw(st.characters(codec="utf-8")) + name[position + 1 :]
        assume(other != name)
        tensors[other] = tensor
    if kind == "shape":
        other = data.draw(
            st.sampled_from([tensor[:-1], tensor[None], tensor.reshape(-1, 2), tensor.T.copy(), tensor.ravel()])
        )
        assume(other.shape != tensor.shape)
        tensors[name] = np.ascontiguousarray(other)
    if kind == "twice":
        other = next(another for another in shards(path) if another != file)
        save_file(load_file(other) | {name: tensor}, other)
        tensors[name] = tensor
    save_file(tensors, file)


def flip(path, data):
    """Bits of a header, its length included, that change what it says."""
    file = data.draw(st.sampled_from(shards(path)))
    content = bytearray(file.read_bytes())
    before = meaning(content)
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, header_end(file.read_bytes()) - 1))] ^= data.draw(st.integers(1, 255))
    assume(meaning(content) != before)
    file.write_bytes(content)


def escape(path, data):
    index = json.loads((path / INDEX).read_text())
    names = ["../outside.safetensors", str(path.parent / "outside.safetensors"), "..\\outside.safetensors", "link"]
    name = data.draw(st.sampled_from(names))
    if name == "link":
        name = "link.safetensors"
        (path / name).symlink_to("../outside.safetensors")
    changed = data.draw(st.lists(st.sampled_from(sorted(index["weight_map"])), min_size=1, unique=True))
    index["weight_map"] |= dict.fromkeys(changed, name)
    (path / INDEX).write_text(json.dumps(index))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def garbage_index(path, data):
    value = data.draw(
        st.one_of(st.binary(max_size=40), JSON, st.fixed_dictionaries({"weight_map": JSON}), st.just(b"[" * 10_000))
    )
    (path / INDEX).write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())


def wrong_index(path, data):
    index = json.loads((path / INDEX).read_text())
    name = data.draw(st.sampled_from(sorted(index["weight_map"])))
    file = index["weight_map"].pop(name)
    others = [other.name for other in shards(path) if other.name != file]
    replacement = data.draw(st.none() | st.sampled_from(others) | JSON)
    assume(replacement != file)
    if replacement is not None:
        index["weight_map"][name] = replacement
    (path / INDEX).write_text(json.dumps(index))


def garbage_config(path, data):
    fields = json.loads((path / "config.json").read_text())
    name = data.draw(st.sampled_from(["hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads"]))
    odd = st.one_of(st.integers(-3, 0), st.integers(10**7), st.floats(), st.text(max_size=3), st.none(), st.just([]))
    value = data.draw(
        st.one_of(st.just(fields | {name: data.draw(odd)}), st.just({}), st.just([]), st.text(max_size=9))
    )
    (path / "config.json").write_text(value if isinstance(value, str) else json.dumps(value))


DAMAGES = [
    truncate,
    lengthen,
    drop,
    make_something_else_of,
    exchange,
    rewrite,
    flip,
    escape,
    garbage_index,
    wrong_index,
    garbage_config,
]


def damaged(world, damage, data):
    shutil.rmtree(world / "damaged", ignore_errors=True)
    shutil.copytree(world / "sound", world / "damaged")
    damage(world / "damaged", data)


def test_the_sound_directory_is_taken(world):
    shutil.rmtree(world / "damaged", ignore_errors=True)
    shutil.copytree(world / "sound", world / "damaged")
    read_model(load_config(world / "config.yaml"))


@pytest.mark.parametrize("damage", DAMAGES)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_every_damage_is_one_usage_error(world, abstract, damage, data):
    damaged(world, damage, data)
    with pytest.raises(UsageError) as error:
        weights.check(weights.open_directory(str(world / "damaged")), abstract)
    assert CANARY.decode() not in str(error.value)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(damage=st.sampled_from(DAMAGES), data=st.data())
def test_train_ends_with_2_and_leaves_nothing(world, capsys, damage, data):
    damaged(world, damage, data)
    before = sorted(world.iterdir())
    assert main(["train", str(world / "config.yaml")]) == 2
    message = capsys.readouterr().err
    assert message.count("sr-dpo train: ") == 1 and "Traceback" not in message
    assert sorted(world.iterdir()) == before, "no run directory, no cache"
