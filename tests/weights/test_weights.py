"""Hugging Face directories in and out without PyTorch: bit for bit on any mesh, every fault named."""

import dataclasses
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny
from counting_reads import Counting
from flax import nnx
from runs import FAMILIES, REPOSITORY, model_directory
from safetensors.numpy import load_file, save_file

from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.weights import directory as weights
from sr_dpo_jax.weights import read
from sr_dpo_jax.weights.families import Tensor
from sr_dpo_jax.weights.layout import blocks_of, file_shape, flatten
from sr_dpo_jax.weights.read import load_params
from sr_dpo_jax.weights.write import plan_files

TYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32, "float64": np.float64}


def in_type(shapes, dtype):
    return jax.tree.map(lambda leaf: leaf.update(dtype=np.dtype(dtype)), shapes)


def written(tmp_path, family, *, shard_bytes=10**9):
    """A directory with random weights, and the model and parameters they were written from."""
    path = model_directory(tmp_path / "model", family, **FAMILIES[family])
    directory = weights.open_directory(str(path))
    model = tiny.build(directory.architecture, tiny.make_mesh())
    params = model.params()
    tiny.save_weights(params, directory, model.abstract, path, shard_bytes=shard_bytes)
    return directory, model, params


def tensors_in(path):
    """Every tensor of a directory by name, read by the safetensors library alone."""
    return {name: array for file in path.glob("*.safetensors") for name, array in load_file(file).items()}


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 8, 1), (1, 4, 2), (2, 2, 2)])
@pytest.mark.parametrize("family", FAMILIES)
def test_out_and_in_is_bit_for_bit_on_any_mesh(tmp_path, family, shape):
    directory, _, params = written(tmp_path, family, shard_bytes=20_000)
    assert len(list(directory.path.glob("model-*.safetensors"))) > 3
    model = tiny.build(directory.architecture, tiny.make_mesh(*shape))
    loaded = load_params(directory, model.abstract, model.shapes)
    assert jax.tree.structure(loaded) == jax.tree.structure(params)
    for ours, theirs, sharding in zip(
        jax.tree.leaves(loaded), jax.tree.leaves(params), jax.tree.leaves(model.shardings), strict=True
    ):
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()
        assert ours.sharding == sharding


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_in_and_out_is_bit_for_bit(tmp_path, family, dtype):
    """Files of random bits, subnormal numbers among them, through float32 parameters on a mesh and back."""
    directory, *_ = written(tmp_path, family)
    rng, file = np.random.default_rng(5), directory.path / "model.safetensors"
    given = {}
    for name, array in load_file(file).items():
        bits = rng.integers(0, 256, (*array.shape, np.dtype(TYPES[dtype]).itemsize), np.uint8)
        number = bits.view(TYPES[dtype])[..., 0]
        with np.errstate(invalid="ignore"):
            given[name] = np.where(np.isfinite(number), number, TYPES[dtype](-0.0))
    save_file(given, file)
    model = tiny.build(directory.architecture, tiny.make_mesh(1, 4, 2))
    loaded = load_params(directory, model.abstract, model.shapes)
    out = tmp_path / "out"
    out.mkdir()
    tiny.save_weights(loaded, directory, model.abstract, out, dtype=dtype, shard_bytes=30_000)
    back = tensors_in(out)
    assert back.keys() == given.keys()
    for name, array in given.items():
        assert back[name].dtype == array.dtype and back[name].tobytes() == array.tobytes(), name


def test_each_tensor_is_read_in_its_own_type(tmp_path):
    """Four types in one directory, each converted from its own: to float32, and rounded to bfloat16."""
    directory, model, _ = written(tmp_path, "llama", shard_bytes=30_000)
    given = {}
    for file in sorted(directory.path.glob("model-*.safetensors")):
        tensors = load_file(file)
        for number, name in enumerate(tensors):
            tensors[name] = tensors[name].astype(list(TYPES.values())[number % 4])
        save_file(tensors, file)
        given |= tensors
    assert len({array.dtype for array in given.values()}) == 4
    for dtype in ("float32", "bfloat16"):
        out = tmp_path / dtype
        out.mkdir()
        loaded = load_params(directory, model.abstract, in_type(model.shapes, dtype))
        assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {np.dtype(dtype)}
        tiny.save_weights(loaded, directory, model.abstract, out, dtype=dtype)
        for name, array in tensors_in(out).items():
            assert array.tobytes() == given[name].astype(TYPES[dtype]).tobytes(), name


@pytest.mark.parametrize(
    ("kind", "dtype", "rounded"),
    [
        ("float64", "float32", "F64"),
        ("float32", "bfloat16", "F32"),
        ("float16", "bfloat16", "F16"),
        ("bfloat16", "float32", None),
        ("float16", "float32", None),
        ("float32", "float32", None),
    ],
)
def test_types_are_said_and_those_that_are_rounded(tmp_path, caplog, kind, dtype, rounded):
    directory, model, _ = written(tmp_path, "llama")
    file = directory.path / "model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor.astype(TYPES[kind]) for name, tensor in tensors.items()}, file)
    with caplog.at_level("INFO"):
        load_params(directory, model.abstract, in_type(model.shapes, dtype))
    (line,) = [record.message for record in caplog.records if "tensors by type" in record.message]
    assert f"held in {dtype}" in line and f": {len(tensors)} " in line
    assert (f"to which {rounded} is rounded" in line) if rounded else ("rounded" not in line)


@pytest.mark.parametrize(("value", "kind"), [(np.nan, "float32"), (-np.inf, "bfloat16"), (1e300, "float64")])
def test_numbers_that_are_not_finite_are_refused_by_tensor(tmp_path, value, kind):
    """One such number would make all log-probs NaN; 1e300 is infinite in float32."""
    directory, model, _ = written(tmp_path, "llama", shard_bytes=30_000)
    name = "model.layers.1.mlp.down_proj.weight"
    file = next(file for file in directory.path.glob("model-*") if name in load_file(file))
    tensors = load_file(file)
    tensors[name] = tensors[name].astype(TYPES[kind])
    tensors[name][-1, 3] = value
    save_file(tensors, file)
    with pytest.raises(UsageError, match=rf"{file.name}: {name} holds numbers that are not finite in float32"):
        load_params(directory, model.abstract, model.shapes)


def abstract_of(**shapes):
    """Abstract parameters by path: a path's axes with their sizes."""
    make = {
        path: nnx.Param(jax.ShapeDtypeStruct(tuple(axes.values()), np.float32), axes=tuple(axes))
        for path, axes in shapes.items()
    }
    return make


def test_parameters_one_after_the_other_in_one_tensor():
    """A row of the kind that phi3 has: query, key and value along the first dimension, the last two of fewer heads."""
    abstract = abstract_of(
        query={"layers": 2, "embed": 6, "heads": 4, "head_dim": 3},
        key={"layers": 2, "embed": 6, "kv_heads": 2, "head_dim": 3},
        value={"layers": 2, "embed": 6, "kv_heads": 2, "head_dim": 3},
    )
    row = Tensor("fused.{layer}", "(heads head_dim) embed", ("query", "key", "value"))
    blocks = blocks_of(row, abstract)
    assert file_shape(blocks) == (12 + 6 + 6, 6)
    file = np.arange(24 * 6).reshape(24, 6)
    expected = {
        "query": file[:12].reshape(4, 3, 6).transpose(2, 0, 1),
        "key": file[12:18].reshape(2, 3, 6).transpose(2, 0, 1),
        "value": file[18:].reshape(2, 3, 6).transpose(2, 0, 1),
    }
    # The second half of the heads and the middle of the residual stream, as a device of a mesh holds them.
    bounds = {
        "query": ((0, 2), (2, 5), (2, 4), (0, 3)),
        "key": ((0, 2), (2, 5), (1, 2), (0, 3)),
        "value": ((0, 2), (2, 5), (1, 2), (0, 3)),
    }
    rows = 0
    for block in blocks:
        wanted = block.wanted(bounds)
        region = file[block.region(wanted)]
        rows += len(region)
        ((param, part),) = block.parts(region, wanted).items()
        cut = tuple(slice(*sides) for sides in bounds[param][1:])
        np.testing.assert_array_equal(part, expected[param][cut])
    assert rows == 6 + 3 + 3, "nothing else of the first dimension is read"


def test_interleaved_parameters_and_norms_over_heads():
    abstract = abstract_of(
        gate={"layers": 2, "mlp": 4},
        up={"layers": 2, "mlp": 4},
        key_norm={"layers": 2, "kv_heads": 2, "head_dim": 3},
        scale={"embed": 5},
    )
    (block,) = blocks_of(Tensor("fused.{layer}", "(mlp part)", ("gate", "up")), abstract)
    wanted = block.wanted({"gate": ((0, 2), (2, 4)), "up": ((0, 2), (2, 4))})
    parts = block.parts(np.arange(8)[block.region(wanted)], wanted)
    assert {name: part.tolist() for name, part in parts.items()} == {"gate": [4, 6], "up": [5, 7]}
    (block,) = blocks_of(Tensor("norm.{layer}", "(heads head_dim)", ("key_norm",)), abstract)
    wanted = block.wanted({"key_norm": ((0, 2), (1, 2), (0, 3))})
    assert block.parts(np.arange(6)[block.region(wanted)], wanted)["key_norm"].tolist() == [[3, 4, 5]]
    (block,) = blocks_of(Tensor("norm", "embed", ("scale",)), abstract)
    assert file_shape((block,)) == (5,)
    with pytest.raises(ValueError, match="does not fit"):
        blocks_of(Tensor("norm", "mlp", ("scale",)), abstract)
    with pytest.raises(ValueError, match="not sharded as"):
        block = blocks_of(Tensor("fused.{layer}", "(mlp part)", ("gate", "up")), abstract)[0]
        block.wanted({"gate": ((0, 2), (2, 4)), "up": ((0, 2), (0, 2))})


@dataclasses.dataclass(frozen=True)
class OfProcess:
    """The sharding of a mesh as a process with some of its devices sees it."""

    sharding: jax.sharding.Sharding
    first: int
    last: int

    def addressable_devices_indices_map(self, shape):
        everything = self.sharding.devices_indices_map(shape)
        return {device: everything[device] for device in list(everything)[self.first : self.last]}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("shape", "first", "share"), [((1, 8, 1), 2, 1 / 4), ((1, 4, 2), 4, 1 / 4), ((2, 4, 1), 0, 1 / 2)]
)
def test_a_host_reads_what_its_devices_hold(tmp_path, monkeypatch, family, shape, first, share):
    """Two of eight devices: a quarter of the bytes, or half where the mesh keeps two copies; biases are small."""
    directory, _, params = written(tmp_path, family, shard_bytes=20_000)
    model = tiny.build(directory.architecture, tiny.make_mesh(*shape))
    mine = jax.tree.map(
        lambda leaf: SimpleNamespace(
            shape=leaf.shape, dtype=leaf.dtype, sharding=OfProcess(leaf.sharding, first, first + 2)
        ),
        model.shapes,
    )
    monkeypatch.setattr(read, "safe_open", Counting)
    monkeypatch.setattr(Counting, "bytes_read", 0)
    monkeypatch.setattr(jax, "make_array_from_single_device_arrays", lambda shape, sharding, pieces: pieces)
    loaded = flatten(load_params(directory, model.abstract, mine))
    total = sum(array.nbytes for array in tensors_in(directory.path).values())
    assert share * total <= Counting.bytes_read < (share + 0.02) * total
    whole, shardings = flatten(jax.device_get(params)), flatten(model.shardings)
    for name, pieces in loaded.items():
        indices = shardings[name].devices_indices_map(whole[name].shape)
        assert len(pieces) == 2
        for piece in pieces:
            np.testing.assert_array_equal(piece, whole[name][indices[next(iter(piece.devices()))]], err_msg=name)


def test_replicas_are_read_once(tmp_path, monkeypatch):
    directory, *_ = written(tmp_path, "llama")
    model = tiny.build(directory.architecture, tiny.make_mesh(8, 1, 1))
    monkeypatch.setattr(read, "safe_open", Counting)
    monkeypatch.setattr(Counting, "bytes_read", 0)
    load_params(directory, model.abstract, model.shapes)
    assert Counting.bytes_read == sum(array.nbytes for array in tensors_in(directory.path).values())


def test_what_is_held_in_another_form_is_not_kept_beside_it(tmp_path, monkeypatch):
    """While a tensor is read, those before it are there in the form in which they are held alone."""
    directory, model, _ = written(tmp_path, "llama")
    shapes, there, read_shard = in_type(model.shapes, "float16"), [], read._read_shard

    def watched(*arguments):
        there.extend(live.shape for live in jax.live_arrays() if live.dtype == np.float16)
        return read_shard(*arguments)

    monkeypatch.setattr(read, "_read_shard", watched)
    load_params(directory, model.abstract, shapes, held=lambda _, array: array.astype(np.int8))
    assert there == []


def test_files_are_planned_before_they_are_written():
    sizes = {"a": 4, "b": 6, "c": 11, "d": 1, "e": 9, "f": 1}
    names = ["model-00001-of-00004", "model-00002-of-00004", "model-00003-of-00004", "model-00004-of-00004"]
    plan = plan_files(sizes, 10)
    assert list(plan.values()) == [f"{names[number]}.safetensors" for number in (0, 0, 1, 2, 2, 3)]
    assert set(plan_files(sizes, 32).values()) == {"model.safetensors"}


def test_the_index_is_right(tmp_path):
    directory, *_ = written(tmp_path, "llama", shard_bytes=20_000)
    index = json.loads((directory.path / "model.safetensors.index.json").read_text())
    arrays = tensors_in(directory.path)
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in arrays.values())
    assert index["weight_map"].keys() == arrays.keys()
    for name, file in index["weight_map"].items():
        assert name in load_file(directory.path / file)
    for file in directory.path.glob("*.safetensors"):
        held = load_file(file)
        assert len(held) == 1 or sum(array.nbytes for array in held.values()) <= 20_000


def test_numbers_that_a_type_cannot_hold_are_refused(tmp_path):
    directory, model, params = written(tmp_path, "llama")
    params["final_norm"]["scale"] = params["final_norm"]["scale"].at[3].set(1e6)
    with pytest.raises(UsageError, match=r"model\.norm\.weight.*not finite in float16"):
        tiny.save_weights(params, directory, model.abstract, tmp_path, dtype="float16")


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


def corrupt_fp8(path, tensors):
    save_file(tensors | {"model.norm.weight": np.zeros(32, ml_dtypes.float8_e4m3fn)}, path)


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
        (corrupt_fp8, ["model.norm.weight", "F8_E4M3", "F16, BF16, F32, F64"]),
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


INDEX = "model.safetensors.index.json"


def sharded(tmp_path):
    """A directory of several files, its abstract parameters, its files and its index."""
    directory, model, _ = written(tmp_path, "llama", shard_bytes=30_000)
    files = sorted(directory.path.glob("model-*.safetensors"))
    return directory, model.abstract, files, json.loads((directory.path / INDEX).read_text())


def test_all_faults_are_in_one_error(tmp_path):
    directory, abstract, files, index = sharded(tmp_path)
    assert len(files) > 5
    norms, names = "model.layers.{}.input_layernorm.weight", [list(load_file(file)) for file in files]
    first, second = load_file(files[0]), load_file(files[1])
    missing, misshaped, twice = names[1][0], names[1][1], names[1][2]
    (untyped,), (moved, unnamed), lost = names[0][:1], names[2][:2], names[3]
    first = {untyped: first[untyped].astype(np.int16), twice: second[twice]}
    del second[missing]
    second |= {misshaped: np.zeros(31, np.float32), norms.format(7): np.zeros(32, np.float32)}
    save_file(first, files[0])
    save_file(second, files[1])
    index["weight_map"] |= {moved: files[0].name, norms.format(8): files[2].name}
    del index["weight_map"][unnamed]
    (directory.path / INDEX).write_text(json.dumps(index))
    files[3].unlink()
    files[4].write_bytes(files[4].read_bytes()[:100])
    with pytest.raises(UsageError) as error:
        weights.check(directory, abstract)
    lines = str(error.value).split("\n  ")[1:]
    expected = [
        (missing, f"missing from {files[1].name}"),
        (misshaped, "shape (31,)"),
        (norms.format(7), "not part"),
        (norms.format(8), "not part"),
        (twice, f"held by {files[0].name} and by {files[1].name}"),
        (untyped, "type I16"),
        (moved, f"held by {files[2].name}, but {INDEX} says {files[0].name}"),
        (unnamed, "says nothing of it"),
        (files[3].name, "missing"),
        (files[4].name, "damaged"),
    ]
    for name, words in expected:
        assert [line for line in lines if name in line and words in line], (name, words, lines)
    assert len(lines) == len(expected), "tensors of a lost file are not listed one by one"
    assert not [name for name in lost if name in str(error.value)]


@pytest.mark.parametrize(
    "name",
    [
        "../escaped.safetensors",
        "/etc/escaped.safetensors",
        "..\\escaped.safetensors",
        "C:\\escaped.safetensors",
        "sub/escaped.safetensors",
        "..",
        "",
        ".",
        "escaped.bin",
        "esca\0ped.safetensors",
        "esca\ud800ped.safetensors",
        "e" * 300 + ".safetensors",
        7,
        None,
        ["model.safetensors"],
    ],
)
def test_names_that_are_no_file_of_the_directory(tmp_path, name):
    directory, abstract, _, index = sharded(tmp_path)
    (tmp_path / "escaped.safetensors").write_bytes(b"canary")
    index["weight_map"]["model.norm.weight"] = name
    (directory.path / INDEX).write_text(json.dumps(index))
    for check in (lambda: weights.check(directory, abstract), lambda: weights.weights_digest(directory)):
        with pytest.raises(UsageError, match=r"weight_map names .*nothing was read"):
            check()


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"weight_map": []}', '{"weight_map": {}}', "[" * 100_000, "\xff", '{"weight_map": 1}'],
)
def test_damaged_indices(tmp_path, text):
    directory, abstract, *_ = sharded(tmp_path)
    (directory.path / INDEX).write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match=r"index\.json: damaged"):
        weights.check(directory, abstract)


@pytest.mark.parametrize("name", [INDEX, "model-00002-of-00009.safetensors", "tokenizer.json", "config.json"])
def test_links_that_leave_the_directory_are_refused(tmp_path, name):
    """Also towards a neighbour whose name begins alike; a link that stays inside is fine."""
    directory, abstract, files, _ = sharded(tmp_path)
    name = files[1].name if name.startswith("model-") else name
    inside, outside = directory.path / "copy", tmp_path / "model-outside"
    (directory.path / name).rename(inside)
    (directory.path / name).symlink_to("copy")
    weights.check(weights.open_directory(str(directory.path)), abstract)
    (directory.path / name).unlink()
    inside.rename(outside)
    (directory.path / name).symlink_to(outside)
    with pytest.raises(UsageError, match=f"{name}: is a link that leaves the directory"):
        weights.check(weights.open_directory(str(directory.path)), abstract)


@pytest.mark.parametrize("place", [".", ".cache/huggingface/download"])
def test_a_download_that_was_cut_short_is_named(tmp_path, place):
    """The hub's client writes to `*.incomplete`; beside files that are all there such a leaving does no harm."""
    directory, abstract, files, _ = sharded(tmp_path)
    leaving = directory.path / place / "x3_model-00002.4f2a.incomplete"
    leaving.parent.mkdir(parents=True, exist_ok=True)
    leaving.write_bytes(files[1].read_bytes()[:100])
    assert weights.check(directory, abstract)
    files[1].unlink()
    with pytest.raises(
        UsageError, match=rf"{files[1].name}: missing; .*{leaving.name} is a download that was cut short"
    ):
        weights.check(directory, abstract)


def test_files_without_their_index_are_not_taken_for_none(tmp_path):
    directory, abstract, *_ = sharded(tmp_path)
    (directory.path / INDEX).unlink()
    with pytest.raises(UsageError, match="other files of the weights stand beside it, so they are not whole"):
        weights.check(directory, abstract)


@pytest.mark.parametrize("name", ["../tokenizer.9.json", "/etc/tokenizer.9.json", "..\\tokenizer.9.json", "..", "", 7])
def test_other_tokenizer_files_stay_within_the_directory(tmp_path, name):
    """transformers would read a name of this form in place of tokenizer.json, from wherever it leads."""
    path = model_directory(tmp_path / "model", "llama")
    config = json.loads((path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer.9.json").write_text((path / "tokenizer.json").read_text())
    for names in (["tokenizer.json", name], name):
        (path / "tokenizer_config.json").write_text(json.dumps(config | {"fast_tokenizer_files": names}))
        with pytest.raises(UsageError, match=r"tokenizer_config.json: fast_tokenizer_files names .* no bare file name"):
            weights.open_directory(str(path))
    (path / "tokenizer_config.json").write_text(json.dumps(config | {"fast_tokenizer_files": ["tokenizer.9.json"]}))
    (path / "tokenizer.9.json").symlink_to(tmp_path / "tokenizer.9.json")
    with pytest.raises(UsageError, match=r"tokenizer.9.json: is a link that leaves"):
        weights.open_directory(str(path))


def test_an_index_beside_a_single_file_is_refused(tmp_path):
    directory, abstract, files, _ = sharded(tmp_path)
    files[0].with_name("model.safetensors").write_bytes(files[0].read_bytes())
    with pytest.raises(UsageError, match="only one can be meant"):
        weights.check(directory, abstract)


def test_weights_are_checked_before_any_device_is_touched(tmp_path):
    """A process of its own checks sound and damaged weights, and initialises no backend of jax."""
    directory, *_ = written(tmp_path, "gpt_neox")
    program = """
import sys
from types import SimpleNamespace
from jax._src import xla_bridge
from sr_dpo_jax.config.load import config_from_dict
from sr_dpo_jax.train.setup import read_model
from sr_dpo_jax.errors import UsageError
path = sys.argv[1]
raw = {"output_dir": path, "model": {"path": path}, "data": {"path": path}, "objective": {"name": "dpo"}}
config = config_from_dict(raw, where="test")
read_model(config)
assert not xla_bridge.backends_are_initialized()
file = path + "/model.safetensors"
content = open(file, "rb").read()
open(file, "wb").write(content[:-1])
try:
    read_model(config)
except UsageError as error:
    assert not xla_bridge.backends_are_initialized()
    print(error)
"""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", program, str(directory.path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "model.safetensors: damaged" in done.stdout


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "original_max_position_embeddings": 64}
LONGROPE = YARN | {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.5], "long_factor": [1.5]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "mamba"}, ["config.json: model_type='mamba' is not supported", "known: gpt_neox, llama"]),
        ({"model_type": "evil_net"}, ["config.json: model_type='evil_net' is not supported", "known: gpt_neox, llama"]),
        ({"model_type": ["llama"]}, ["model_type=['llama'] is not supported"]),
        ({"model_type": None}, ["config.json: has no model_type", "gpt_neox, llama"]),
        ({"model_type": "gemma3"}, ["model_type='gemma3' is not supported; its text-only form, gemma3_text, is"]),
        ({"auto_map": {"AutoConfig": "evil.Config"}}, ["auto_map", "never run"]),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, ["quantization_config", "not supported"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor=0.5", "1.0 for llama"]),
        ({"model_type": "mistral", "sliding_window": 0}, ["sliding_window=0", "positive"]),
        ({"model_type": "mistral", "sliding_window": -1}, ["sliding_window=-1", "positive"]),
        ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 2}, ["sliding_window=None", "layer_types"]),
        ({"model_type": "granite", "logits_scaling": 0}, ["logits_scaling=0", "other than 0"]),
        (
            {"model_type": "smollm3", "layer_types": ["full_attention"] * 2, "no_rope_layers": [1]},
            ["no_rope_layers=[1]", "each of the 2 layers"],
        ),
        ({"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}}, ["proportional", "not supported"]),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 0.0}}, ["rope_parameters", "'rope_theta': 0.0"]),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": -1.0}}, ["rope_parameters", "finite"]),
        ({"rope_parameters": {**YARN, "factor": 0}}, ["rope_parameters", "'factor': 0", "finite"]),
        ({"rope_parameters": LONGROPE}, ["short_factor has 1 numbers", "4 frequencies"]),
        ({"hidden_act": "relu6"}, ["hidden_act", "relu6"]),
        ({"num_hidden_layers": 10**20}, ["num_hidden_layers", "from 1 to 10,000"]),
        ({"num_attention_heads": 0}, ["config.json"]),
        ({"num_hidden_layers": -1}, ["config.json"]),
        ({"intermediate_size": 0}, ["config.json", "mlp=0"]),
        ({"hidden_size": 10**30}, ["config.json", "hidden=1000"]),
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
    assert "transformers" not in str(error.value), "its remedies are not ours"


@pytest.mark.parametrize("path", ["", " "])
def test_a_blank_name_is_not_the_directory_one_stands_in(path):
    with pytest.raises(UsageError, match=f"model.path='{path}': is blank; give a Hugging Face directory or hub name"):
        weights.open_directory(path)


def test_no_other_file_is_read_in_place_of_config_json(tmp_path, monkeypatch):
    """transformers would follow the name, find code, and ask on the terminal whether to run it."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    path = model_directory(tmp_path / "model", "llama")
    fields = json.loads((path / "config.json").read_text()) | {"configuration_files": ["config.4.0.0.json"]}
    (path / "config.json").write_text(json.dumps(fields))
    other = {"model_type": "evil", "auto_map": {"AutoConfig": "configuration_evil.Evil"}}
    (path / "config.4.0.0.json").write_text(json.dumps(other))
    ran = tmp_path / "ran"
    (path / "configuration_evil.py").write_text(f"open({str(ran)!r}, 'w')\n")
    with pytest.raises(UsageError, match="configuration_files names other files"):
        weights.open_directory(str(path))
    assert not ran.exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tied_model_may_hold_its_head_where_it_is_the_embedding(tmp_path, monkeypatch, dtype):
    """Otherwise transformers unties the two, whatever config.json says."""
    monkeypatch.setattr(weights, "ROWS", 100)
    directory, model, _ = written(tmp_path, "llama")
    tensors = {name: tensor.astype(TYPES[dtype]) for name, tensor in tensors_in(directory.path).items()}
    head = tensors["model.embed_tokens.weight"].copy()
    save_file({**tensors, "lm_head.weight": head}, directory.path / "model.safetensors")
    assert "lm_head.weight" not in weights.check(directory, model.abstract)
    head[-1, -1] += 1
    for other in (head, head[:-1], head.astype(np.int8)):
        save_file({**tensors, "lm_head.weight": other}, directory.path / "model.safetensors")
        with pytest.raises(UsageError, match=r"lm_head.weight: is not model.embed_tokens.weight.*tie_word_embeddings"):
            weights.check(directory, model.abstract)


@pytest.mark.parametrize("processes", [2, 3])
def test_hosts_whose_copies_differ_in_one_byte_are_told(tmp_path, monkeypatch, processes):
    """Of two processes one has another byte, far from every sample: each of them reads each file."""
    copies = []
    for process in range(processes):
        copies.append(tmp_path / str(process))
        copies[-1].mkdir()
        (copies[-1] / "config.json").write_text("{}")
        (copies[-1] / "model.safetensors").write_bytes(bytes(3_000_000))
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_count", lambda: processes)

    def digests_of(copies):
        """What all processes hand in, and then what each makes of it."""
        tables, made = [], []
        for gather in (lambda table: tables.append(table) or table[None], lambda _: np.stack(tables)):
            monkeypatch.setattr(weights.multihost_utils, "process_allgather", gather)
            made.clear()
            for process, copy in enumerate(copies):
                monkeypatch.setattr(jax, "process_index", lambda process=process: process)
                made.append(weights.weights_digest(SimpleNamespace(path=copy)))
        return made

    assert len(set(digests_of(copies))) == 1
    changed = bytearray(3_000_000)
    changed[1_234_567] = 1
    # With three processes the second file, which is number 1, is read by the processes 0 and 1.
    (copies[1] / "model.safetensors").write_bytes(changed)
    with pytest.raises(UsageError, match=r"model\.safetensors: holds other bytes on process 1 than on process 0"):
        digests_of(copies)
