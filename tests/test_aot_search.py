"""What is tried where a program does not fit, and how the result is told; the compiler itself takes no part."""

import dataclasses
import json
import os
import subprocess
import sys
import time

import pytest
import runs

from sr_dpo_jax import aot, aot_print, aot_search
from sr_dpo_jax import config as configuration
from sr_dpo_jax.aot import GIB, Compiled, Program, hosts_of
from sr_dpo_jax.aot_search import Attempt, Report, changes, override_arguments
from sr_dpo_jax.data.plan import Shape
from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.weights.directory import open_directory

MODEL = {"path": "unread"}
RAW = {"output_dir": "run", "model": MODEL, "data": {"path": "unread"}, "objective": {"name": "sr_dpo", "lam": 0.5}}
FITS = Program("train step", True, 16 * GIB, 8 * GIB, None, 60.0, estimated_cycles=3e8, traced_flops=1e15)
TOO_LARGE = Program("train step", False, 16 * GIB, 20 * GIB, "Ran out of memory", 9.0)
STATE_TOO_LARGE = Program("train step", False, 16 * GIB, 90 * GIB, "the arguments alone need more than a chip has")


def compiled_of(program, **mesh):
    sizes = {"replica": 1, "fsdp": 8, "tensor": 1} | mesh
    return Compiled(
        chips=8,
        hosts=2,
        device_kind="TPU v5 lite",
        mesh=sizes,
        parameters=10**9,
        attention="splash",
        shape=Shape(64, 8, 1024, 512),
        augmented_length=1152,
        padding=0.05,
        blocks_visited=0.6,
        model_flops_a_pair=1e12,
        programs=(program,),
        step_s=None if program.refusal else 0.2,
        mfu=None if program.refusal else 0.4,
    )


def report_of(compiled, attempts=()):
    return Report("v5e:2x4", 1, False, "typical", 1, compiled, tuple(attempts), GIB)


def config_of(**sections):
    return configuration.from_dict({**RAW, **sections}, where="test")


def tried(config, compiled, slices=1):
    return [" ".join(override_arguments(overrides)) for overrides in changes(config, compiled, slices)]


def test_the_cheapest_changes_come_first():
    kept = "model.remat=full batch.accumulation_steps=4"
    assert tried(config_of(), compiled_of(TOO_LARGE)) == [
        "model.remat=dots",
        "model.remat=full",
        "model.remat=full batch.accumulation_steps=2",
        "model.remat=full batch.accumulation_steps=4",
        f"{kept} batch.row_length=512",
        f"{kept} mesh.tensor=2 mesh.fsdp=-1",
        f"{kept} mesh.tensor=4 mesh.fsdp=-1",
        f"{kept} mesh.tensor=8 mesh.fsdp=-1",
    ]


def test_what_is_done_already_is_not_tried():
    config = config_of(model={**MODEL, "remat": "full"}, batch={"accumulation_steps": 2})
    first = tried(config, compiled_of(TOO_LARGE))
    assert first[:2] == ["batch.accumulation_steps=4", "batch.accumulation_steps=8"]
    assert not any("remat" in change for change in first)


def test_where_the_state_is_too_large_only_the_mesh_can_help():
    changes = tried(config_of(), compiled_of(STATE_TOO_LARGE, replica=4, fsdp=2), slices=2)
    assert changes == [
        "mesh.replica=2 mesh.fsdp=-1",
        "mesh.replica=2 mesh.fsdp=-1 mesh.tensor=2",
        "mesh.replica=2 mesh.fsdp=-1 mesh.tensor=4",
    ]


def test_every_change_is_a_configuration():
    for overrides in changes(config_of(), compiled_of(TOO_LARGE, replica=2), 1):
        raw = config_of().model_dump(mode="json")
        for path, value in overrides.items():
            section, key = path.split(".")
            assert key in raw[section]
            raw[section][key] = value
        configuration.from_dict(raw, where="changed")


def test_p_is_counted_where_there_is_a_tokenizer(tmp_path):
    directory = open_directory(str(runs.model_directory(tmp_path / "model")))
    pairs, eval_sets, said = aot_search._typical(config_of(refinement={"prompt": runs.P}), directory)
    assert eval_sets == []
    assert 2 < len(pairs.augmentation) < 30
    assert f"p has {len(pairs.augmentation)} tokens" in said
    (tmp_path / "model" / "tokenizer.json").unlink()
    pairs, _, said = aot_search._typical(config_of(), directory)
    assert len(pairs.augmentation) == aot_search.TYPICAL_P_TOKENS
    assert "no tokenizer.json" in said
    sft = config_of(objective={"name": "sft"}, data={"path": "unread", "eval_path": "unread"})
    pairs, (eval_pairs,), said = aot_search._typical(sft, directory)
    assert eval_pairs is pairs
    assert len(pairs.augmentation) == 0


def test_real_data_gives_its_own_lengths(tmp_path):
    model, data = runs.model_directory(tmp_path / "model"), runs.preference_file(tmp_path / "pairs.jsonl", 20)
    held_out = runs.preference_file(tmp_path / "held_out.jsonl", 5, seed=1)
    config = runs.make_config(tmp_path, model, data, data={"eval_path": str(held_out)})
    pairs, (eval_pairs,), said = aot_search._read(config, open_directory(str(model)))
    assert (len(pairs), len(eval_pairs)) == (20, 5)
    assert pairs.prompt_tokens.min() > 0 and pairs.tokens.any()
    assert said == f"data.path, 20 pairs; p has {len(pairs.augmentation)} tokens"


def test_what_fits_is_said(capsys, tmp_path):
    report = report_of(compiled_of(FITS))
    aot_print.print_report(report)
    output = capsys.readouterr().out
    assert "fits, 50% used" in output
    assert "Fits, with 5% of the memory left to the runtime." in output
    assert "a run needs distributed.processes=2, here it is 1" in output
    assert max(map(len, output.splitlines())) <= aot_print.COLUMNS
    aot_print.write_json(tmp_path / "report.json", report)
    document = json.loads((tmp_path / "report.json").read_text())
    assert document["fits"] and document["remedy"] is None
    assert document["compiled"]["programs"][0]["peak_bytes"] == 8 * GIB


def test_what_does_not_fit_is_said_with_its_remedy(capsys, tmp_path):
    attempts = [
        Attempt({"model.remat": "dots"}, compiled_of(TOO_LARGE), None),
        Attempt({"batch.row_length": 512}, None, "a pair has 700 tokens"),
        Attempt({"model.remat": "full"}, compiled_of(FITS), None),
    ]
    report = report_of(compiled_of(TOO_LARGE), attempts)
    aot_print.print_report(report)
    output = capsys.readouterr().out
    assert "does not fit, 125%" in output
    assert "impossible: a pair has 700 tokens" in output
    assert "Does not fit. This does: model.remat=full" in output
    aot_print.write_json(tmp_path / "report.json", report)
    document = json.loads((tmp_path / "report.json").read_text())
    assert not document["fits"]
    assert [attempt["fits"] for attempt in document["attempts"]] == [False, False, True]
    assert document["remedy"] == {"model.remat": "full"}


def test_nothing_that_was_tried_fits(capsys):
    report = report_of(compiled_of(TOO_LARGE), [Attempt({"model.remat": "dots"}, compiled_of(TOO_LARGE), None)])
    aot_print.print_report(report)
    assert report.remedy is None
    assert "take more chips" in capsys.readouterr().out


def test_every_program_must_fit():
    assert dataclasses.replace(compiled_of(FITS), programs=(FITS, FITS)).fits
    assert not dataclasses.replace(compiled_of(FITS), programs=(FITS, TOO_LARGE)).fits


def test_a_file_that_cannot_be_written(tmp_path):
    with pytest.raises(UsageError, match="cannot be written"):
        aot_print.write_json(tmp_path / "no" / "report.json", report_of(compiled_of(FITS)))


def test_one_process_waits_for_the_other(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    code = "import logging; logging.basicConfig(); from sr_dpo_jax.aot import only_one\nwith only_one(): print('in')"
    environment = {**os.environ, "PYTHONPATH": str(runs.REPOSITORY), "TMPDIR": str(tmp_path)}
    with aot.only_one():
        process = subprocess.Popen(
            [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        lines = []
        while "waiting for it" not in (lines or [""])[-1]:
            lines.append(process.stderr.readline())
            assert lines[-1], "".join(lines)
        time.sleep(0.2)
        assert process.poll() is None
    assert process.communicate(timeout=60)[0] == "in\n"
    assert process.returncode == 0


@dataclasses.dataclass(frozen=True)
class Chip:
    device_kind: str
    process_index: int
    slice_index: int


@pytest.mark.parametrize(
    ("kind", "slices", "chips", "hosts"),
    [
        ("TPU v6 lite", 1, 8, 1),  # v6e-8
        ("TPU v5 lite", 1, 8, 1),  # v5litepod-8
        ("TPU v6 lite", 2, 8, 2),
        ("TPU v6 lite", 1, 4, 1),
        ("TPU v6 lite", 1, 16, 4),
        ("TPU v5 lite", 2, 16, 8),
        ("TPU v5", 1, 8, 2),  # v5p-16
        ("TPU v4", 1, 8, 2),
    ],
)
def test_slices_of_eight_chips_are_one_host_where_cloud_tpu_has_such(kind, slices, chips, hosts):
    """libtpu describes all of them as hosts of four chips."""
    devices = [Chip(kind, chip // 4, part) for part in range(slices) for chip in range(chips)]
    assert hosts_of(devices) == hosts
