"""What is tried where a program does not fit, and how the result is told; the compiler itself takes no part."""

import dataclasses
import fcntl
import json
import logging
import os
import subprocess
import sys
import threading
import time

import jax
import pytest
import runs
import tiny

from sr_dpo_jax import cli
from sr_dpo_jax.commands.compile import machine as aot_machine
from sr_dpo_jax.commands.compile import search as aot_search
from sr_dpo_jax.commands.compile import show as aot_print
from sr_dpo_jax.commands.compile.machine import hosts_of
from sr_dpo_jax.commands.compile.programs import GIB, Compiled, Program
from sr_dpo_jax.commands.compile.search import Attempt, Report, arguments_text, changes, search
from sr_dpo_jax.commands.compile.typical import typical_pairs
from sr_dpo_jax.config.load import config_from_dict
from sr_dpo_jax.data.plan import Shape
from sr_dpo_jax.errors import RunError, UsageError
from sr_dpo_jax.train.memory import refusal_of
from sr_dpo_jax.train.program import require_short_rows
from sr_dpo_jax.train.setup import set_up_on
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
        adapters=0,
        attention="splash",
        shape=Shape(64, 8, 1024, 512),
        augmented_length=1152,
        padding=0.05,
        blocks_visited={"plain": 0.6, "augmented": 0.5},
        model_flops_a_pair=1e12,
        programs=(program,),
        step_s=None if program.refusal else 0.2,
        mfu=None if program.refusal else 0.4,
    )


def report_of(compiled, attempts=()):
    return Report("v5e:2x4", 1, False, "typical", 1, compiled, tuple(attempts), GIB)


def config_of(**sections):
    return config_from_dict({**RAW, **sections}, where="test")


def tried(config, compiled, slices=1):
    return [arguments_text(overrides) for overrides in changes(config, compiled, slices)]


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


def test_where_the_state_is_too_large_fewer_replicas_come_first():
    assert tried(config_of(), compiled_of(STATE_TOO_LARGE, replica=2, fsdp=4), slices=2) == []
    first, second, *_, last = tried(config_of(), compiled_of(STATE_TOO_LARGE, replica=4, fsdp=2), slices=2)
    assert first == "mesh.replica=2 mesh.fsdp=-1"
    assert second == "mesh.replica=2 mesh.fsdp=-1 model.remat=dots"
    assert last == "mesh.replica=2 mesh.fsdp=-1 model.remat=full batch.accumulation_steps=4 mesh.tensor=4"


@pytest.mark.parametrize("mesh", [{"replica": -1, "fsdp": 4}, {"fsdp": 4, "tensor": -1}, {"replica": 2, "fsdp": 4}])
def test_no_change_of_the_mesh_leaves_two_sizes_open(mesh):
    config = config_of(mesh=mesh)
    sizes = {"replica": 2, "fsdp": 4, "tensor": 1} if "replica" in mesh else {"replica": 1, "fsdp": 4, "tensor": 2}
    found = list(changes(config, compiled_of(TOO_LARGE, **sizes), 2 if "replica" in mesh else 1))
    assert any("mesh.tensor" in overrides for overrides in found)
    for overrides in found:
        raw = config.model_dump(mode="json")
        for path, value in overrides.items():
            section, key = path.split(".")
            raw[section][key] = value
        changed = config_from_dict(raw, where="changed").mesh
        if "mesh.tensor" in overrides:
            assert (changed.replica, changed.fsdp) == (sizes["replica"], -1)


def outcomes(config, compiled, *fitting):
    """What is tried, in order, where exactly these changes fit; `too large` ends the search."""

    def attempt(overrides):
        named = arguments_text(overrides)
        return Attempt(overrides, compiled_of(FITS if named in fitting else TOO_LARGE), None)

    attempts = search(config, compiled, 1, attempt)
    report = report_of(compiled, attempts)
    return [arguments_text(attempt.overrides) for attempt in attempts], report.remedy


def test_what_turns_out_to_be_needless_is_taken_back():
    mesh = "mesh.tensor=2 mesh.fsdp=-1"
    whole = f"model.remat=full batch.accumulation_steps=4 {mesh}"
    names, remedy = outcomes(config_of(), compiled_of(TOO_LARGE), whole, f"batch.accumulation_steps=4 {mesh}", mesh)
    assert names[-3:] == [whole, f"batch.accumulation_steps=4 {mesh}", mesh]
    assert remedy.overrides == {"mesh.tensor": 2, "mesh.fsdp": -1}
    names, remedy = outcomes(config_of(), compiled_of(TOO_LARGE), whole, f"model.remat=full {mesh}")
    assert names[-2:] == [f"batch.accumulation_steps=4 {mesh}", f"model.remat=full {mesh}"]
    assert remedy.overrides == {"model.remat": "full", "mesh.tensor": 2, "mesh.fsdp": -1}
    names, remedy = outcomes(config_of(), compiled_of(TOO_LARGE), "model.remat=full")
    assert names == ["model.remat=dots", "model.remat=full"]
    assert remedy.overrides == {"model.remat": "full"}


def test_a_state_that_stays_too_large_ends_the_search():
    attempts = search(
        config_of(),
        compiled_of(STATE_TOO_LARGE, replica=2, fsdp=4),
        1,
        lambda overrides: Attempt(overrides, compiled_of(STATE_TOO_LARGE), None),
    )
    lora = [{"lora.rank": 16}, {"lora.rank": 16, "model.remat": "full"}]
    lora.append({**lora[-1], "lora.base": "int8"})
    assert [attempt.overrides for attempt in attempts] == [{"mesh.fsdp": -1}, *lora]


def test_adapters_are_the_last_resort():
    whole, lora = compiled_of(STATE_TOO_LARGE), "lora.rank=16"
    tried = [lora, f"{lora} model.remat=full", f"{lora} model.remat=full lora.base=int8"]
    for number, fitting in enumerate(tried, 1):
        names, remedy = outcomes(config_of(), whole, fitting)
        assert names == tried[:number] and arguments_text(remedy.overrides) == fitting
    names, remedy = outcomes(config_of(), compiled_of(TOO_LARGE), lora)
    assert names[-1] == lora and "mesh.tensor=8" in names[-2] and remedy.overrides == {"lora.rank": 16}
    report = dataclasses.replace(report_of(whole), attempts=(Attempt(remedy.overrides, compiled_of(FITS), None),))
    assert aot_print._verdict(report).endswith("lora.rank=16; it trains LoRA adapters in place of all weights")
    names, remedy = outcomes(config_of(lora={"rank": 4}), whole, "model.remat=full lora.base=int8")
    assert len(names) == 1 and remedy.overrides == {"model.remat": "full", "lora.base": "int8"}
    names, remedy = outcomes(config_of(lora={"rank": 4, "base": "int8"}), whole)
    assert (names, remedy) == ([], None)


def test_every_change_is_a_configuration():
    for overrides in changes(config_of(), compiled_of(TOO_LARGE, replica=2), 1):
        raw = config_of().model_dump(mode="json")
        for path, value in overrides.items():
            section, key = path.split(".")
            assert key in raw[section]
            raw[section][key] = value
        config_from_dict(raw, where="changed")


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


def test_p_that_cannot_stand_is_refused_only_where_it_is_used(tmp_path):
    directory = open_directory(str(runs.model_directory(tmp_path / "model")))
    blank = {"refinement": {"prompt": " "}}
    with pytest.raises(UsageError, match=r"refinement\.prompt is blank"):
        aot_search._typical(config_of(**blank), directory)
    pairs, _, _ = aot_search._typical(config_of(**blank, objective={"name": "dpo", "lam": None}), directory)
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
    assert "splash; blocks visited: 60% in plain rows, 50% in augmented rows" in output
    assert "Fits, with 5% of the memory left to the runtime." in output
    assert "a run needs distributed.processes=2, here it is 1" in output
    assert max(map(len, output.splitlines())) <= aot_print.console.COLUMNS
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


def test_a_report_that_could_not_be_written_is_refused_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(aot_search, "compile_command", lambda *_, **__: pytest.fail("compiled"))
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(RAW), encoding="utf-8")
    for place in (tmp_path / "no" / "report.json", tmp_path):
        assert cli.main(["compile", str(config), "--topology", "v5e:2x2", "--json", str(place)]) == 2
        assert f"--json {place}: cannot be written" in capsys.readouterr().err


def test_other_refusals_of_the_compiler():
    """A full vector memory can be helped; what is internal is no fault of the command."""
    vmem = refusal_of("train step", "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 9M\nmore")
    assert isinstance(vmem, UsageError)
    assert "model.attention=dense or lower batch.row_length" in str(vmem) and "more" not in str(vmem)
    internal = refusal_of("train step", "INTERNAL: Mosaic failed to compile TPU kernel\nmore")
    assert isinstance(internal, RunError)
    assert "INTERNAL: Mosaic failed" in str(internal) and "more" not in str(internal)


def test_rows_too_long_for_the_kernel_are_refused_by_name(tmp_path):
    lengths = {"max_length": 20_000, "max_prompt_length": 10_000}
    config = config_of(data={"path": "unread", **lengths}, batch={"row_length": 65_536, "row_multiple": 128})
    setup = set_up_on(tiny.make_mesh(), config, open_directory(str(runs.model_directory(tmp_path / "model"))))
    setup = dataclasses.replace(setup, model=dataclasses.replace(setup.model, attention="splash"))
    pairs = typical_pairs("ultrafeedback", least_pairs=0, head_tokens=0, augmentation_tokens=50, **lengths)
    with pytest.raises(UsageError, match=r"batch.row_length=65536: rows .* at most 32768; set .* to 32640 or less"):
        setup.plan(pairs, ())
    for row_length, p_tokens in ((32_768, 0), (32_640, 50)):
        require_short_rows(setup.packing.limits, row_length, p_tokens)
    with pytest.raises(UsageError, match="rows would have 32896 tokens"):
        require_short_rows(setup.packing.limits, 32_768, 50)


IN_USE = "ABORTED: The TPU is already in use by another process. Run lsof"
UNREADABLE = "ABORTED: Internal error when accessing libtpu multi-process lockfile. Run sudo rm /tmp/libtpu_lockfile."


def libtpu_says(monkeypatch, *texts):
    """libtpu refuses with these texts, one after the other, and then describes no chips; sleeping takes no time."""
    left, slept = list(texts), []

    def describe(**_):
        if left:
            raise jax.errors.JaxRuntimeError(left.pop(0))
        return dataclasses.make_dataclass("Topology", ["devices"])([])

    monkeypatch.setattr(aot_machine, "LIBTPU_IN_USE", threading.Event())
    monkeypatch.setattr(aot_machine, "_kept", [])
    monkeypatch.setattr(aot_machine.topologies, "get_topology_desc", describe)
    monkeypatch.setattr(aot_machine.time, "sleep", slept.append)
    monkeypatch.setattr(aot_machine.time, "monotonic", lambda: sum(slept))
    return slept


def test_libtpu_in_use_is_waited_for_in_its_own_words(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(aot_machine, "LIBTPU_LOCK", tmp_path / "lock")
    slept = libtpu_says(monkeypatch, IN_USE, UNREADABLE, IN_USE)
    with caplog.at_level(logging.WARNING):
        assert aot_machine.devices_of("v5e:2x2", 1) == []
    assert len(slept) == 3
    assert caplog.text.count(IN_USE) == 1


def test_waiting_for_libtpu_has_an_end(tmp_path, monkeypatch):
    monkeypatch.setattr(aot_machine, "LIBTPU_LOCK", tmp_path / "lock")
    slept = libtpu_says(monkeypatch, *[IN_USE] * 10_000)
    with pytest.raises(UsageError, match=r"for 60 minutes.*already in use"):
        aot_machine.devices_of("v5e:2x2", 1)
    assert 3600 < sum(slept) < 3700


def test_a_lock_that_libtpu_cannot_open_is_not_waited_for(tmp_path, monkeypatch):
    """Whether libtpu says so itself or only that it is in use."""
    monkeypatch.setattr(aot_machine, "LIBTPU_LOCK", tmp_path / "lock")
    (tmp_path / "lock").mkdir()  # cannot be opened for writing, by root neither
    for said in (UNREADABLE, IN_USE):
        slept = libtpu_says(monkeypatch, said)
        with pytest.raises(UsageError, match="remove the file") as refused:
            aot_machine.devices_of("v5e:2x2", 1)
        assert said in str(refused.value) and not slept


def test_another_users_lock_is_opened_without_making_it(tmp_path, monkeypatch):
    """As Linux does in /tmp: O_CREAT on another user's file is refused, though the file may be read."""
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    with aot_machine.only_one():
        pass
    (lock,) = tmp_path.iterdir()
    assert lock.stat().st_mode & 0o777 == 0o644
    really_open = os.open

    def protected(path, flags, *rest):
        if flags & os.O_CREAT:
            raise PermissionError(13, "Permission denied")
        return really_open(path, flags, *rest)

    monkeypatch.setattr(os, "open", protected)
    with aot_machine.only_one():
        pass
    lock.unlink()
    with pytest.raises(UsageError, match="cannot be opened"), aot_machine.only_one():
        pass


def test_one_process_waits_for_the_other(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    code = "import logging; logging.basicConfig(); from sr_dpo_jax.commands.compile.machine import only_one\n"
    code += "with only_one(): print('in')"
    environment = {**os.environ, "PYTHONPATH": str(runs.REPOSITORY), "TMPDIR": str(tmp_path)}
    with aot_machine.only_one():
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


def test_a_process_that_has_libtpu_keeps_the_lock(tmp_path, monkeypatch):
    """Else it and one that waits for libtpu with the lock in its hands would wait for each other."""
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    libtpu_says(monkeypatch)
    with aot_machine.only_one():
        aot_machine.devices_of("v5e:2x2", 1)
    with aot_machine.only_one(), pytest.raises(BlockingIOError), (tmp_path / "sr_dpo_jax_compile.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(*aot_machine._kept)


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


def test_lengths_of_data_with_one_response_are_typical_too(tmp_path):
    directory = open_directory(str(runs.model_directory(tmp_path / "model")))
    sft = config_of(objective={"name": "sft"}, data={"path": "unread", "format": "sft"})
    pairs, _, said = aot_search._typical(sft, directory)
    assert len(pairs) > 1000 and "typical of sft" in said
