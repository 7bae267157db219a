"""Dirty data, numbers that are not finite, secrets, caches and disks: the promises P2, P5, P6 and P7."""

import contextlib
import json
import logging
import os
import shutil

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runs import (
    make_config,
    metrics_of,
    model_directory,
    preference_file,
    raw_config,
    run_process,
    state_of,
    verified_steps,
    written,
)

from sr_dpo_jax.cli import main
from sr_dpo_jax.config.load import config_from_dict, load_config
from sr_dpo_jax.config.schema import Checkpoint, Config, Train
from sr_dpo_jax.data.records import BadRow
from sr_dpo_jax.data.rows import Pair, read_rows
from sr_dpo_jax.durable import files as storage
from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.redaction import MARK, redact
from sr_dpo_jax.train import loop, reference
from sr_dpo_jax.train.loop import train
from sr_dpo_jax.train.reference import ReferenceScores

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("same_programs")]

CANARY = "hf_canaryCANARYcanary0123456789"
PRIVATE = "zqxjkv"
"""Stands in every row that must be refused, and in no message about one."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    return model_directory(root / "model"), preference_file(root / "train.jsonl", 50, seed=1)


def poison(monkeypatch, bad_pairs):
    """The reference gives these pairs a log-prob of +inf, so that their loss and gradient are not finite."""
    fill = ReferenceScores.fill

    def filled(self, *arguments):
        fill(self, *arguments)
        self.scores[bad_pairs] = np.inf

    monkeypatch.setattr(ReferenceScores, "fill", filled)


def test_p5_a_poisoned_pair_changes_nothing_and_is_named(world, tmp_path, monkeypatch):
    """Step 3 holds a poisoned pair: it leaves what two steps left, counts no update, and later steps go on."""
    seen = {}
    add = loop.StepLog.add

    def watched(self, step, host_step, metrics):
        seen[step] = [int(pair) for pair in host_step.pair]
        add(self, step, host_step, metrics)

    monkeypatch.setattr(loop.StepLog, "add", watched)
    # A cache of its own for each, as the poison is stored in it.
    clean = make_config(tmp_path / "clean", *world, train={"max_steps": 2})
    assert train(clean) == 0
    longer = make_config(tmp_path / "longer", *world)
    assert train(longer) == 0
    poison(monkeypatch, [seen[3][0]])
    poisoned = make_config(tmp_path / "poisoned", *world, train={"max_steps": 3})
    assert train(poisoned) == 0
    ours, theirs = state_of(poisoned.output_dir), state_of(clean.output_dir)
    for name in theirs:
        if name != "['step']":
            assert ours[name].tobytes() == theirs[name].tobytes(), name
    assert ours["['step']"] == 3 and theirs["['step']"] == 2, "the data goes on, the optimizer does not"
    assert [line["skipped"] for line in metrics_of(poisoned.output_dir)] == [0, 0, 1]
    (line,) = [json.loads(line) for line in (tmp_path / "poisoned" / "run" / "skipped.jsonl").read_text().splitlines()]
    assert line["step"] == 3 and line["pair_ids"] == [str(pair) for pair in seen[3]]
    assert {"loss", "grad_norm"} <= line["not_finite"].keys()
    assert train(make_config(tmp_path / "poisoned", *world)) == 0
    rates = {line["step"]: line["learning_rate"] for line in metrics_of(longer.output_dir)}
    late = {line["step"]: line["learning_rate"] for line in metrics_of(poisoned.output_dir)}
    assert late[3] == rates[3] and late[4] == rates[3], "the schedule counts updates"
    assert all(np.isfinite(array).all() for array in state_of(poisoned.output_dir).values())


def test_p5_too_many_skipped_in_a_row_end_the_run_and_nothing_bad_is_saved(world, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        poison(patched, slice(None))
        raw = raw_config(tmp_path, *world, train={"max_skipped_steps": 2}, checkpoint={"every_steps": 1})
        assert main(["train", written(tmp_path, raw)]) == 1
    said = capsys.readouterr().err
    assert "3 steps in a row" in said and "train.max_skipped_steps=2" in said and "Traceback" not in said
    assert verified_steps(tmp_path / "run")[-1] == 2
    assert all(np.isfinite(array).all() for array in state_of(tmp_path / "run").values())
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [1, 2, 3]


def malformed_rows():
    good = {"prompt": f"{PRIVATE} one", "chosen": f"{PRIVATE} two", "rejected": f"{PRIVATE} three"}
    rows = [
        "{",
        "}",
        "[",
        "null",
        "true",
        "17",
        '"text"',
        "[]",
        "{}",
        "nonsense " + PRIVATE,
        json.dumps(good)[:-1],
        json.dumps(good) + "}",
        json.dumps(good).replace(":", "=", 1),
        json.dumps(good).replace('"', "'"),
        json.dumps({**good, "chosen": good["rejected"]}).replace("chosen", "chose"),
    ]
    for key in good:
        rows += [json.dumps({**good, key: value}) for value in (3, True, {"a": PRIVATE}, ["a"], {}, 1.5)]
        if key != "prompt":  # without one, or null, it is what both responses begin with
            rows.append(json.dumps({name: value for name, value in good.items() if name != key}))
            rows.append(json.dumps({**good, key: None}))
    rows += [json.dumps({**good, key: value}) for key in ("chosen", "rejected") for value in ("", "  \n ")]
    rows.append(json.dumps({**good, "chosen": "\ud800 " + PRIVATE}))
    encoded = [row.encode("utf-8", "surrogatepass") for row in rows]
    encoded += [b"\xff\xfe" + json.dumps(good).encode(), json.dumps(good).encode()[:20] + b"\xc3\x28", b"\x00" * 9]
    encoded.append(json.dumps(good).encode().replace(b"one", b"\x00\x01"))
    return encoded


def test_p7_forty_malformed_rows_are_each_named_and_none_is_shown(world, tmp_path, capsys):
    """Refused with every one of them by file, line and reason; skipped where as many are allowed."""
    bad = malformed_rows()
    assert len(bad) >= 40
    good = world[1].read_bytes().splitlines()
    file = tmp_path / "dirty.jsonl"
    file.write_bytes(b"\n".join(row for pair in zip(bad, good, strict=False) for row in pair) + b"\n")
    path = written(tmp_path, raw_config(tmp_path, world[0], file))
    assert main(["train", path]) == 2
    said = capsys.readouterr().err
    named = {int(line.split(f"{file}:")[1].split(":")[0]) for line in said.splitlines() if f"{file}:" in line}
    assert named == set(range(1, 2 * len(bad), 2)), "each bad row by its line, and no good one"
    for line in said.splitlines():
        if f"{file}:" in line:
            assert line.split(":", 2)[2].strip(), "with a reason"
    assert PRIVATE not in said and not (tmp_path / "run").exists()
    assert main(["train", path, f"data.max_bad_rows={len(bad) - 1}"]) == 2
    assert main(["train", path, f"data.max_bad_rows={len(bad)}", "train.max_steps=1"]) == 0
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["bad_rows"] == len(bad)
    for written_file in (tmp_path / "run").rglob("*"):
        assert not written_file.is_file() or PRIVATE.encode() not in written_file.read_bytes(), written_file


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.binary(max_size=300)
    | st.lists(
        st.binary(max_size=40).map(lambda raw: b'{"prompt": "a", "chosen": "' + raw + b'", "rejected": "b"}'),
        max_size=4,
    ).map(b"\n".join),
    format=st.sampled_from(["preference", "hh_rlhf", "ultrafeedback"]),
    suffix=st.sampled_from([".jsonl", ".jsonl.gz", ".parquet"]),
)
def test_p7_any_bytes_give_pairs_bad_rows_or_one_error(tmp_path, content, format, suffix):
    file = tmp_path / f"bytes{suffix}"
    file.write_bytes(content)
    with contextlib.suppress(UsageError):
        for row in read_rows(str(file), format=format, split="train"):
            assert isinstance(row, Pair) or (isinstance(row, BadRow) and row.reason and row.line > 0)


YAML_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    section=st.sampled_from(list(Config.model_fields)),
    key=st.sampled_from([*Train.model_fields, *Checkpoint.model_fields, "token", "path"]),
    value=YAML_VALUES,
    text=st.text(max_size=60),
)
def test_p7_any_config_is_taken_or_refused_by_key(world, tmp_path, section, key, value, text):
    raw = raw_config(tmp_path, *world)
    raw[section] = {**raw[section], key: value} if isinstance(raw.get(section), dict) else {key: value}
    with contextlib.suppress(UsageError):
        config = config_from_dict(raw, where="test")
        assert config_from_dict(yaml.safe_load(config.to_yaml()), where="again") == config
    file = tmp_path / "any.yaml"
    file.write_text(text, encoding="utf-8", errors="replace")
    with contextlib.suppress(UsageError):
        load_config(file, [text])


def test_p6_no_secret_reaches_a_log_a_file_or_a_traceback(world, tmp_path):
    """A whole run that ends in a traceback whose message holds the token, with the token in the environment."""
    path = written(tmp_path, raw_config(tmp_path, *world, checkpoint={"every_steps": 2}))
    fault = {"raise_at": 4, "message": f"GET https://user:hunter2222@hub.example/x with {CANARY}"}
    process = run_process(["train", path], fault=fault, HF_TOKEN=CANARY, SERVICE_API_KEY="canary-two-canary")
    said = process.communicate(timeout=180)[0]
    assert process.returncode == 1 and "Traceback" in said and MARK in said
    found = [file for file in tmp_path.rglob("*") if file.is_file() and file.name != "config.yaml"]
    found.append(tmp_path / "run" / "config.yaml")
    assert len(found) > 10
    for secret in (CANARY, "hunter2222", "canary-two-canary"):
        assert secret not in said
        assert not [file for file in found if secret.encode() in file.read_bytes()]


def test_p6_a_secret_in_the_configuration_is_refused_and_not_shown(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SOME_SECRET", "correct-horse-battery")
    path = written(tmp_path, raw_config(tmp_path, *world))
    for override, hidden in (
        (f"model.token={CANARY}", CANARY),
        ("hub.password=swordfish9", "swordfish9"),
        (f"model.path={CANARY}", CANARY),
        ("model.path=https://me:swordfish9@hub.example/m", "swordfish9"),
        ("data.path=/data/correct-horse-battery/x.jsonl", "correct-horse"),
        ("model.path: {api_key: swordfish9", "swordfish9"),
    ):
        assert main(["train", path, override]) == 2
        said = capsys.readouterr().err
        assert hidden not in said, said
    assert "come from the environment" in redact("secrets come from the environment alone")
    assert not (tmp_path / "run").exists()
    (tmp_path / "config.yaml").write_text('model: {path: x}\npassword: "swordfish9\n', encoding="utf-8")
    assert main(["train", path]) == 2 and "swordfish9" not in capsys.readouterr().err


def test_p6_redaction_leaves_the_rest(monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "certainly")
    monkeypatch.setenv("HF_TOKEN_PATH", "/home/someone/token")
    text = "certainly 128 tokens, data.path /home/someone/token, optimizer.b1, key_start, a@b.example"
    assert redact(text) == text
    monkeypatch.setenv("HF_TOKEN", "a-long-enough-token")
    assert redact("x a-long-enough-token y") == f"x {MARK} y"


def test_p5_a_directory_that_cannot_be_written_is_found_at_the_start(world, tmp_path, capsys):
    for nowhere in ("/proc/run", str(world[1] / "run")):
        path = written(tmp_path, raw_config(tmp_path, *world, output_dir=nowhere))
        assert main(["train", path]) == 2
        assert nowhere in capsys.readouterr().err
    if os.geteuid() != 0:  # root may write anywhere
        locked = tmp_path / "locked"
        locked.mkdir(mode=0o500)
        path = written(tmp_path, raw_config(tmp_path, *world, output_dir=str(locked)))
        assert main(["train", path]) == 2


def test_p5_too_little_room_for_the_checkpoints_is_found_at_the_start(world, tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: usage._replace(free=400_000))
    assert main(["train", written(tmp_path, raw_config(tmp_path, *world))]) == 2
    said = capsys.readouterr().err
    assert "3 more checkpoints" in said and "checkpoint.keep" in said
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: usage._replace(free=10_000_000))
    assert main(["train", written(tmp_path, raw_config(tmp_path, *world)), "train.max_steps=1"]) == 0


def reference_files(root):
    return sorted((root / "cache").glob("reference-*"))


def test_p2_the_reference_cache_misses_on_any_change_of_its_inputs(world, tmp_path, monkeypatch):
    """The plain and the augmented scores each have a file; every change makes new ones."""

    def scored(name, data=world[1], **sections):
        before = set(reference_files(tmp_path))
        root = {"output_dir": str(tmp_path / name), "train": {"max_steps": 1}}
        raw = raw_config(tmp_path, world[0], data, **root, **sections)
        assert train(config_from_dict(raw, where="test")) == 0
        return len(set(reference_files(tmp_path)) - before)

    assert scored("first") == 2
    assert scored("other_beta", objective={"beta": 0.3, "lam": 0.1}) == 0
    assert scored("other_p", refinement={"prompt": "Another one: "}) == 1, "the plain scores do not depend on p"
    assert scored("other_seed", seed=7) == 2, "which draws other weights"
    bfloat16 = {"path": str(world[0]), "init": "random", "dtype": "bfloat16"}
    assert scored("other_type", model=bfloat16) == 2
    lines = world[1].read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "swapped.jsonl").write_text("".join([lines[1], lines[0], *lines[2:]]), encoding="utf-8")
    assert scored("swapped", data=tmp_path / "swapped.jsonl") == 2
    assert scored("as_first") == 0
    monkeypatch.setattr(reference, "CODE_VERSION", "of code that gives other numbers")
    assert scored("other_code") == 2


def test_p2_a_cache_that_is_not_the_models_is_scored_again(world, tmp_path, caplog):
    """Its digest holds, its numbers do not: as another version of a compiler or of this code would leave it."""
    config = make_config(tmp_path, *world, output_dir=str(tmp_path / "first"), train={"max_steps": 1})
    assert train(config) == 0
    right = [reference._load(file) for file in reference_files(tmp_path)]
    scores = np.stack([right[1], right[0]], axis=-1)  # sorted by name: augmented, plain
    plain, augmented = reference_files(tmp_path)[1], reference_files(tmp_path)[0]
    reference._save(scores + np.float32(0.5), (plain, augmented))
    with caplog.at_level(logging.INFO):
        again = make_config(tmp_path, *world, output_dir=str(tmp_path / "second"), train={"max_steps": 1})
        assert train(again) == 0
        assert "differ from the model's own by up to 0.5" in caplog.text
        for file, was in zip(reference_files(tmp_path), right, strict=True):
            np.testing.assert_allclose(reference._load(file), was, atol=1e-4)
        caplog.clear()
        third = make_config(tmp_path, *world, output_dir=str(tmp_path / "third"), train={"max_steps": 1})
        assert train(third) == 0
        assert "random pairs scored again, as they were" in caplog.text and "differ" not in caplog.text
        caplog.clear()
        assert train(make_config(tmp_path, *world, output_dir=str(tmp_path / "third"))) == 0
        assert "scored again" not in caplog.text, "a run that goes on knows its scores by their digest"
