"""`sr-dpo export`: the files of the directory, its numbers against the checkpoint's; it is whole or not there."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref

import ml_dtypes
import numpy as np
import pytest
import yaml
from runs import REPOSITORY, make_config, metrics_of, model_directory, preference_file, state_of
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from sr_dpo_jax import __version__
from sr_dpo_jax.cli import main
from sr_dpo_jax.commands.export import Origin, _new_directory, export, model_card
from sr_dpo_jax.durable.checkpoint import Checkpoints
from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.train.loop import train

pytestmark = pytest.mark.usefixtures("same_programs")

KILLED = """
import os, pathlib, signal, sys
from sr_dpo_jax.commands.export import _new_directory
with _new_directory(pathlib.Path(sys.argv[1])) as partial:
    (partial / "leftover.safetensors").write_text("half of the weights")
    os.kill(os.getpid(), signal.SIGKILL)
"""
"""A process that is killed while it exports."""
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run of three steps on eight devices, saved after each, from a model with files that are not to be copied."""
    root = tmp_path_factory.mktemp("export")
    model = model_directory(root / "base", "llama", num_key_value_heads=2, tie_word_embeddings=True)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"torch_dtype": "float16", "_name_or_path": "/home/me/x"}))
    (model / "generation_config.json").write_text('{"temperature": 0.25, "do_sample": true}')
    (model / "chat_template.jinja").write_text(TEMPLATE)
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool.jinja").write_text(TEMPLATE)
    for name in ("trainer_state.json", "secrets.json", "notes.txt", "additional_chat_templates/notes.txt"):
        (model / name).write_text('"private"')
    data = preference_file(root / "pairs.jsonl", 24)
    assert train(make_config(root, model, data, checkpoint={"every_steps": 1, "keep": 3})) == 0
    return root / "run"


def exported(path):
    return {name: array for file in path.glob("*.safetensors") for name, array in load_file(file).items()}


def test_the_directory_holds_what_a_model_needs_and_nothing_else(run_dir, tmp_path):
    out = tmp_path / "deep" / "out"
    assert main(["export", str(run_dir), str(out), "--shard-bytes", "20000", "--dtype", "bfloat16"]) == 0
    names = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}
    shards = {name for name in names if name.startswith("model-")}
    expected = {"README.md", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    expected |= {"chat_template.jinja", "additional_chat_templates/tool.jinja", "model.safetensors.index.json"}
    assert names == expected | shards
    assert shards == {f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))}
    assert [entry.name for entry in out.parent.iterdir()] == ["out"], "no temporary directory is left"
    fields = json.loads((out / "config.json").read_text())
    assert fields["dtype"] == "bfloat16" and not {"torch_dtype", "_name_or_path"} & fields.keys()
    assert {array.dtype for array in exported(out).values()} == {np.dtype(ml_dtypes.bfloat16)}
    assert AutoConfig.from_pretrained(out).num_key_value_heads == 2
    assert AutoTokenizer.from_pretrained(out).chat_template["default"] == TEMPLATE
    assert GenerationConfig.from_pretrained(out).temperature == 0.25


def test_the_weights_are_those_of_the_step(run_dir, tmp_path):
    """Checked with Orbax alone against the safetensors library alone, for the latest step and for an earlier one."""
    export(run_dir, tmp_path / "latest")
    export(run_dir, tmp_path / "first", step=1)
    latest, first, state = exported(tmp_path / "latest"), exported(tmp_path / "first"), state_of(run_dir)
    name = "model.layers.1.mlp.down_proj.weight"
    np.testing.assert_array_equal(latest[name].T, state["['params']['layers']['mlp']['down']"][1])
    np.testing.assert_array_equal(latest["model.embed_tokens.weight"], state["['params']['embedding']"])
    key = state["['params']['layers']['attention']['key']"][0]  # [d, K, D]
    np.testing.assert_array_equal(latest["model.layers.0.self_attn.k_proj.weight"], key.reshape(32, -1).T)
    assert "lm_head.weight" not in latest
    assert first.keys() == latest.keys() and not np.array_equal(first[name], latest[name])


def test_an_export_starts_another_run(run_dir, tmp_path):
    """The first loss from the exported weights is ln 2, as policy and reference are equal."""
    export(run_dir, tmp_path / "out")
    data = preference_file(tmp_path / "pairs.jsonl", 8)
    sections = {"model": {"init": "pretrained"}, "train": {"max_steps": 1}}
    config = make_config(tmp_path, tmp_path / "out", data, **sections)
    assert train(config) == 0
    assert metrics_of(config.output_dir)[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)


def test_the_card_says_what_was_done(run_dir, tmp_path):
    export(run_dir, tmp_path / "my-model")
    manifest = json.loads((run_dir / "manifest.json").read_text())
    _, front, text = (tmp_path / "my-model" / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["sr_dpo_jax", "sr_dpo"],
    }
    rows = dict(line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("| ") and line != "| | |")
    assert text.strip().startswith("# my-model")
    assert rows["objective"] == "sr_dpo" and rows["beta (β)"] == "0.1" and rows["lam (λ)"] == "0.5"
    assert rows["base model"] == "`base`, weights drawn anew", "of a local path only the last name shows"
    assert rows["data, digest"] == f"`{manifest['digests']['data']}`"
    assert rows["base weights, digest"] == f"`{manifest['digests']['weights']}`"
    assert rows["optimizer updates"] == "3" and rows["weights"] == "float32"
    assert f"sr_dpo_jax {__version__}" in rows["made with"]
    assert str(run_dir.parent) not in text


@pytest.mark.parametrize(
    ("objective", "named"), [({"name": "sft"}, set()), ({"name": "ipo"}, {"beta"}), ({"name": "dpo"}, {"beta"})]
)
def test_the_card_names_no_number_that_took_no_part(tmp_path, objective, named):
    config = make_config(tmp_path, tmp_path, tmp_path, objective={"lam": None} | objective)
    origin = Origin(revision="c" * 40, weights_digest="w", data_digest="d", version="0")
    card = model_card(config, origin, name="model", step=1, dtype="float32")
    words = {"beta": ("beta", "β"), "lam": ("lam", "λ")}
    assert named == {name for name, spellings in words.items() if any(word in card for word in spellings)}


def test_a_generation_config_is_made_where_the_base_model_has_none(run_dir, tmp_path):
    given = run_dir.parent / "base" / "generation_config.json"
    text = given.read_text()
    given.unlink()
    try:
        export(run_dir, tmp_path / "out")
    finally:
        given.write_text(text)
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (generation.bos_token_id, generation.eos_token_id, generation.temperature) == (1, 0, None)


def test_of_two_exports_to_one_name_the_second_is_told(run_dir, tmp_path):
    """While the first is under way; and where the name is taken just before the first is done."""
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="another export has taken the name meanwhile"), _new_directory(out) as partial:
        (partial / "half").write_text("a")
        with pytest.raises(UsageError, match="another export to this name is under way"):
            export(run_dir, out)
        assert (partial / "half").read_text() == "a"
        shutil.copytree(partial, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    shutil.rmtree(out)
    leftover = tmp_path / f".out.{'a' * 16}.partial"
    leftover.mkdir()
    (leftover / ".owner.json").write_text(json.dumps({"host": "elsewhere b p", "pid": 1, "started": "1"}))
    with pytest.raises(UsageError, match="is under way"):
        export(run_dir, out)
    for path in (leftover / ".owner.json", leftover):
        os.utime(path, (1, 1))
    export(run_dir, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"] and not (out / ".owner.json").exists()


@pytest.mark.parametrize("call", ["read_params", "check_params"])
def test_a_step_that_is_deleted_while_it_is_read_is_one_error(run_dir, tmp_path, monkeypatch, call):
    copy, then = tmp_path / "run", getattr(Checkpoints, call)
    shutil.copytree(run_dir, copy)

    def deleted(self, *given, step):
        shutil.rmtree(self.directory / str(step), ignore_errors=True)
        return then(self, *given, step=step)

    monkeypatch.setattr(Checkpoints, call, deleted)
    with pytest.raises(UsageError, match=r"checkpoints/3: was deleted while it was read, .*run this again"):
        export(copy, tmp_path / "out")
    assert not list(tmp_path.glob("*out*")) and not list(tmp_path.glob(".out*"))


def test_an_export_is_whole_or_not_there(run_dir, tmp_path, monkeypatch):
    """The next export removes the leftover of a killed one of its name, and nothing else that stands beside it."""
    out = tmp_path / "out"
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(out)], cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    ((leftover,), neighbour) = tmp_path.iterdir(), tmp_path / "out.partial"
    assert (leftover / "leftover.safetensors").is_file()
    neighbour.mkdir()
    (neighbour / "mine").write_text("keep")
    under_way = tmp_path / f".out.v2.{'0' * 16}.partial"
    under_way.mkdir()

    def fail(*_, **__):
        (partial,) = set(tmp_path.iterdir()) - {neighbour, under_way}
        assert partial != leftover and (partial / "config.json").exists()
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr("sr_dpo_jax.weights.write.save_file", fail)
        with pytest.raises(OSError, match="disk full"):
            export(run_dir, out)
    assert set(tmp_path.iterdir()) == {neighbour, under_way}
    export(run_dir, out)
    assert (out / "model.safetensors").is_file() and (neighbour / "mine").read_text() == "keep"
    before = (out / "README.md").read_text()
    with pytest.raises(UsageError, match="exists already"):
        export(run_dir, out, step=1)
    assert (out / "README.md").read_text() == before
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="exists already"):
        export(run_dir, tmp_path / "dangling")
    with pytest.raises(UsageError, match="cannot be made"):
        export(run_dir, neighbour / "mine" / "out")


def test_what_cannot_be_exported_is_refused(run_dir, tmp_path, capsys):
    out = tmp_path / "out"
    for arguments, words in (
        ([str(tmp_path), str(out)], "has no checkpoints"),
        ([str(run_dir), str(out), "--step", "7"], "no checkpoint of step 7; there are [1, 2, 3]"),
        ([str(run_dir), str(out), "--shard-bytes", "0"], "must be positive"),
    ):
        assert main(["export", *arguments]) == 2
        assert words in capsys.readouterr().err
        assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit):
        main(["export", str(run_dir), str(out), "--dtype", "int8"])


def test_a_checkpoint_of_another_model_is_refused(run_dir, tmp_path):
    """The base model's config was changed since: every parameter that differs is named, nothing is written."""
    base = run_dir.parent / "base" / "config.json"
    before = base.read_text()
    try:
        base.write_text(json.dumps(json.loads(before) | {"intermediate_size": 48, "tie_word_embeddings": False}))
        with pytest.raises(UsageError) as error:
            export(run_dir, tmp_path / "out")
    finally:
        base.write_text(before)
    for words in ("layers.mlp.up: (2, 32, 64), the model has (2, 32, 48)", "unembedding: missing, the model has"):
        assert words in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_damaged_manifest_is_said(run_dir, tmp_path):
    manifest = run_dir / "manifest.json"
    before = manifest.read_text()
    try:
        for text in ("", "[]", "{}", json.dumps(json.loads(before) | {"model": None})):
            manifest.write_text(text)
            with pytest.raises(UsageError, match=r"manifest\.json: missing or damaged"):
                export(run_dir, tmp_path / "out")
    finally:
        manifest.write_text(before)


def test_parameters_come_from_the_checkpoint_a_few_at_a_time(run_dir, tmp_path, monkeypatch):
    """Each tensor's parameters are read once, alone, when those before are no longer alive."""
    read, alive = Checkpoints.read_params, []

    def watched(self, names, *, step):
        deadline = time.monotonic() + 10
        while [ref for ref in alive if ref() is not None]:  # Orbax's threads let go a moment later
            assert time.monotonic() < deadline
            time.sleep(0.01)
        arrays = read(self, names, step=step)
        assert list(arrays) == list(names)
        alive.extend(weakref.ref(array) for array in arrays.values())
        return arrays

    monkeypatch.setattr(Checkpoints, "read_params", watched)
    export(run_dir, tmp_path / "out")
    leaves = [name for name in state_of(run_dir) if name.startswith("['params']")]
    assert len(alive) == len(leaves)


def test_a_run_that_was_moved_exports(run_dir, tmp_path):
    moved = shutil.copytree(run_dir, tmp_path / "moved")
    path = moved / "config.yaml"
    path.write_text(path.read_text().replace(f"output_dir: {run_dir}", f"output_dir: {tmp_path / 'gone'}"))
    export(moved, tmp_path / "out")
    assert exported(tmp_path / "out") and not (tmp_path / "gone").exists()
