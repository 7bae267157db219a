"""Whole runs on a tiny model: the files they write, how they resume and refuse, and two real processes."""

import json
import math
import os
import signal
import time

import numpy as np
import pytest
import yaml
from runs import (
    make_config,
    metrics_of,
    model_directory,
    preference_file,
    raw_config,
    run_process,
    run_processes,
    state_of,
    without_times,
)

from sr_dpo_jax.cli import main
from sr_dpo_jax.commands.evaluate import evaluate_command
from sr_dpo_jax.config.checks import evaluation_metrics
from sr_dpo_jax.durable.lease import Lease
from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.train import loop
from sr_dpo_jax.train.flops import body_weights
from sr_dpo_jax.train.loop import train
from sr_dpo_jax.train.metrics import Trace
from sr_dpo_jax.train.objective import OBJECTIVES
from sr_dpo_jax.weights.directory import open_directory

pytestmark = pytest.mark.usefixtures("same_programs")

LOSS_AT_START = {"dpo": math.log(2), "sr_dpo": math.log(2), "ipo": 25.0, "sr_ipo": 25.0, "ipo_mean": 25.0}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Model directory, training file and held-out file."""
    root = tmp_path_factory.mktemp("world")
    return (
        model_directory(root / "model"),
        preference_file(root / "train.jsonl", 50, seed=1),
        preference_file(root / "held_out.jsonl", 11, seed=2),
    )


def config_of(world, root, **sections):
    """A run of the world's; the reference is scored once for all of them."""
    model, data, _ = world
    return make_config(root, model, data, cache_dir=str(model.parent / "cache"), **sections)


def write_config(path, raw):
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return path


def test_a_run_writes_everything_the_design_names(world, tmp_path):
    evaluated = {"data": {"eval_path": str(world[2])}, "train": {"eval_every_steps": 4}}
    config = config_of(world, tmp_path, **evaluated)
    assert train(config) == 0
    lines = metrics_of(config.output_dir)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    names = {"epoch", "loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"}
    names |= {"logps/chosen", "logps/rejected", "margin", "augmented/margin", "augmented/accuracies", "refinement"}
    names |= {"grad_norm", "learning_rate", "pairs_per_second", "tokens_per_second", "padding_fraction", "step_time_s"}
    assert all(names <= line.keys() for line in steps)
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert steps[-1]["loss"] < math.log(2)
    evaluations = [line for line in lines if "eval/loss" in line]
    assert [line["step"] for line in evaluations] == [4, 6]
    assert evaluations[-1]["eval/pairs"] == 11
    assert all(0 <= line["padding_fraction"] < 1 for line in steps)
    root = tmp_path / "run"
    assert (root / "checkpoints" / "6").is_dir() and any((root / "tensorboard").iterdir())
    assert yaml.safe_load((root / "config.yaml").read_text())["batch"]["pairs_per_step"] == 8
    manifest = json.loads((root / "manifest.json").read_text())
    assert set(manifest["digests"]) == {"data", "tokens", "tokenizer", "weights"}


def objective_section(name: str) -> dict[str, object]:
    """An objective with its defaults, and λ = 0.5 where it has one."""
    return {"name": name, "lam": 0.5 if OBJECTIVES[name].refined else None}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["simpo", "sr_orpo", "aot", "sppo_hard", "sr_sigmoid_norm"])
def test_an_objective_of_every_shape_trains(world, tmp_path, name):
    """Two steps and an evaluation with every metric that the configuration promises; the first loss is the known one.

    At the start m̂ = 0 with a reference, so a twin begins where its plain loss does.
    """
    data = {"eval_path": str(world[2])}
    # A rate at which one update shows in the loss: float32 near ln 2 does not hold a change of 6e-8.
    optimizer = {"name": "adamw", "learning_rate": 1e-2, "warmup_steps": 0}
    sections = {"objective": objective_section(name), "data": data, "train": {"max_steps": 2}, "optimizer": optimizer}
    config = config_of(world, tmp_path, **sections)
    assert train(config) == 0
    *steps, evaluation = metrics_of(config.output_dir)
    assert [line["step"] for line in steps] == [1, 2] and all(line["skipped"] == 0 for line in steps)
    expected = OBJECTIVES[name].loss_at_zero(config.objective.model_dump())
    assert expected is None or steps[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert steps[0]["grad_norm"] > 0 and steps[1]["loss"] != steps[0]["loss"]
    assert evaluation.keys() >= {*evaluation_metrics(config)}
    assert all(math.isfinite(evaluation[metric]) for metric in evaluation_metrics(config))


@pytest.mark.slow
def test_a_contrast_by_the_reference_without_one_in_the_loss(world, tmp_path):
    """Sr-SimPO needs the model at the start for Δ alone: evaluated and reported as any other run of pairs is."""
    config = config_of(
        world,
        tmp_path,
        objective={"name": "sr_simpo", "lam": 0.5},
        refinement={"form": "contrast", "judge": "reference"},
        data={"eval_path": str(world[2])},
        train={"max_steps": 2},
    )
    assert train(config) == 0
    found = evaluate_command(config)
    trained = metrics_of(config.output_dir)[-1]["eval/loss"]
    assert found["eval/refinement"] != 0 and found["eval/loss"] == pytest.approx(trained, rel=1e-6)
    root = tmp_path / "run"
    pairs = [json.loads(line) for line in (root / "eval_pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    for pair in pairs:
        mean = [pair[f"logp_{side}"] / pair[f"{side}_tokens"] for side in ("chosen", "rejected")]
        assert pair["margin"] == pytest.approx(mean[0] - mean[1], abs=1e-6)
    assert np.mean([pair["margin"] for pair in pairs]) == pytest.approx(found["eval/margin"], abs=1e-6)
    assert main(["report", str(root), "--output", str(tmp_path / "report.html")]) == 0


@pytest.mark.slow
def test_sft_learns_and_its_export_starts_dpo(world, tmp_path):
    model, data, _ = world
    config = make_config(
        tmp_path,
        model,
        data,
        objective={"name": "sft", "lam": None},
        optimizer={"learning_rate": 5e-3},
        train={"epochs": 4},
    )
    assert train(config) == 0
    lines = metrics_of(config.output_dir)
    assert lines[-1]["loss_per_token"] < 0.8 * lines[0]["loss_per_token"]
    assert main(["export", config.output_dir, str(tmp_path / "exported")]) == 0
    dpo = make_config(
        tmp_path / "dpo",
        tmp_path / "exported",
        data,
        model={"init": "pretrained"},
        objective={"name": "dpo", "lam": None},
        train={"max_steps": 1},
    )
    assert train(dpo) == 0
    # The exported model scores the chosen responses as the SFT run's last steps did, far from the random start.
    assert metrics_of(dpo.output_dir)[0]["logps/chosen"] > 0.8 * -lines[0]["loss"]


@pytest.mark.usefixtures("programs_anew")
def test_resuming_is_bitwise(world, tmp_path):
    """A run stopped after 1 and 3 steps and resumed equals one never stopped: state and metrics, to the bit."""
    sections = {"data": {"eval_path": str(world[2])}, "optimizer": {"name": "rmsprop", "learning_rate": 1e-3}}
    golden = config_of(world, tmp_path / "golden", **sections)
    assert train(golden) == 0
    for steps in (1, 3, None):
        config = config_of(world, tmp_path / "stopped", **sections, train={"max_steps": steps})
        assert train(config) == 0
    ours, theirs = state_of(config.output_dir), state_of(golden.output_dir)
    assert ours.keys() == theirs.keys() and len(ours) > 20
    for name in ours:
        assert ours[name].tobytes() == theirs[name].tobytes(), name
    steps = [line for line in without_times(metrics_of(config.output_dir)) if "loss" in line]
    assert steps == [line for line in without_times(metrics_of(golden.output_dir)) if "loss" in line]
    assert train(config) == 0, "a finished run has nothing left to do"


def test_a_profile_and_mfu(world, tmp_path, monkeypatch):
    """Two steps are traced, even where the run ends before the second; MFU is flops by the formula over peak × time."""
    monkeypatch.setattr("sr_dpo_jax.train.program.peak_flops", lambda devices: 1e9 * len(devices))
    config = config_of(world, tmp_path, train={"max_steps": 3, "profile_steps": 2}, mesh={"fsdp": 8})
    assert train(config) == 0
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    architecture = open_directory(str(world[0])).architecture
    for line in metrics_of(config.output_dir):
        flops = line["mfu"] * 8e9 * line["step_time_s"]
        tokens = line["tokens_per_second"] * line["step_time_s"]
        assert line["tokens_per_second_per_chip"] == pytest.approx(line["tokens_per_second"] / 8)
        # Four forwards over every token (a backward pass is two) in the layers alone, and at most as much again.
        assert 1 < flops / (4 * 2 * body_weights(architecture) * tokens) < 3


def test_the_last_traced_step_is_waited_for(tmp_path, monkeypatch, caplog):
    """The loop goes on while a step still runs; a trace that ended then would lack the step."""
    said: list[object] = []
    monkeypatch.setattr("jax.profiler.start_trace", lambda where: said.append("start"))
    monkeypatch.setattr("jax.profiler.stop_trace", lambda: said.append("stop"))
    monkeypatch.setattr("jax.block_until_ready", lambda metrics: said.append(metrics))

    def run_steps(count: int) -> None:
        with Trace(tmp_path, steps=2) as trace:
            for step in range(count):
                trace.before_step(step)
                said.append(step)
                trace.after_step(step + 1, f"metrics of {step}")

    run_steps(6)
    assert said == [0, 1, "start", 2, 3, "metrics of 3", "stop", 4, 5]
    assert not caplog.records
    run_steps(2)
    assert "train.profile_steps=2: nothing was traced" in caplog.text


def test_resuming_as_another_run_is_refused(world, tmp_path):
    assert train(config_of(world, tmp_path, train={"max_steps": 1})) == 0
    for change, key in (
        ({"seed": 1}, "seed"),
        ({"objective": {"beta": 0.2}}, "objective"),
        ({"refinement": {"prompt": "Another instruction: "}}, "refinement.prompt"),
    ):
        with pytest.raises(UsageError, match=key):
            train(config_of(world, tmp_path, **change))


def test_sigterm_saves_and_the_same_command_goes_on(world, tmp_path):
    model, data, _ = world
    raw = raw_config(tmp_path, model, data, train={"epochs": 300})
    path = write_config(tmp_path / "config.yaml", raw)
    process = run_process(["train", str(path)])
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 75, output
    stopped = metrics_of(tmp_path / "run")[-1]["step"]
    assert (tmp_path / "run" / "checkpoints" / str(stopped)).is_dir()
    assert main(["train", str(path), f"train.max_steps={stopped + 2}"]) == 0
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == list(range(1, stopped + 3))


@pytest.mark.parametrize("place", ["prepare", "write_run_files"])
def test_a_signal_before_the_first_step_stops_with_75(world, tmp_path, monkeypatch, place):
    """At the end of preparation, or while the manifest is written: nothing is lost, and the same call goes on."""
    config, then = config_of(world, tmp_path, train={"max_steps": 1}), getattr(loop, place)

    def signalled(*given, **named):
        result = then(*given, **named)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)
        return result

    with monkeypatch.context() as patched:
        patched.setattr(loop, place, signalled)
        assert train(config) == 75
    assert not (tmp_path / "run" / "lease.json").exists()
    assert train(config) == 0


@pytest.mark.parametrize("place", ["__enter__", "__exit__"])
def test_a_signal_at_the_ends_of_the_lease_stops_with_75(world, tmp_path, monkeypatch, place):
    """Before anything is read, or as a refusal leaves the directory."""
    config, then = config_of(world, tmp_path, model={"path": "/nowhere"}), getattr(Lease, place)

    def signalled(*given):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)
        return then(*given)

    monkeypatch.setattr(Lease, place, signalled, raising=False)
    assert train(config) == 75


def test_exit_codes_and_messages(world, tmp_path, capsys):
    model, data, _ = world
    path = write_config(tmp_path / "config.yaml", raw_config(tmp_path, model, data))
    assert main(["train", str(path), "batch.pair_per_step=3"]) == 2
    assert "did you mean pairs_per_step" in capsys.readouterr().err
    assert main(["train", str(path), "model.path=/nowhere"]) == 2
    assert main(["train", str(path), "batch.row_length=8"]) == 2
    assert "batch.row_length" in capsys.readouterr().err
    assert main(["train", str(path), "model.init=pretrained"]) == 2
    assert "model.init=random" in capsys.readouterr().err
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "secret words", "chosen": "a"}\n', encoding="utf-8")
    assert main(["train", str(path), f"data.path={bad}"]) == 2
    message = capsys.readouterr().err
    assert f"{bad}:1" in message and "secret" not in message
    assert not (tmp_path / "run").exists(), "nothing was started"
    with pytest.raises(SystemExit) as stop:
        main(["trian"])
    assert stop.value.code == 2


def test_eval_measures_the_latest_checkpoint(world, tmp_path, capsys):
    model, data, held_out = world
    raw = raw_config(tmp_path, model, data, data={"eval_path": str(held_out)})
    path = write_config(tmp_path / "config.yaml", raw)
    assert main(["eval", str(path)]) == 0
    before = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert before["step"] == 0 and before["eval/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert main(["train", str(path)]) == 0
    assert main(["eval", str(path), "batch.pairs_per_step=3"]) == 0
    after = json.loads((tmp_path / "run" / "eval.json").read_text())
    trained = metrics_of(tmp_path / "run")[-1]
    assert after["step"] == 6
    for name in ("eval/loss", "eval/margin", "eval/augmented/margin", "eval/rewards/chosen"):
        assert after[name] == pytest.approx(trained[name], rel=1e-4, abs=1e-5), "another batch size, the same means"


def test_score_writes_one_line_a_pair_in_order(world, tmp_path):
    model, data, _ = world
    path = write_config(tmp_path / "config.yaml", raw_config(tmp_path, model, data))
    output = tmp_path / "scores.jsonl"
    assert main(["score", str(path), "--output", str(output)]) == 0
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["id"] for line in lines] == [str(number) for number in range(50)]
    for line in lines:
        assert line["logp_chosen"] < 0 and line["logp_rejected_augmented"] < 0
        # A model of random weights gives each token about 1 in 320.
        assert line["logp_chosen"] / line["chosen_tokens"] == pytest.approx(-math.log(320), rel=0.05)


@pytest.mark.slow
def test_the_reference_cache_is_keyed_and_checked(world, tmp_path):
    """Shared by runs that differ in β, missed on another type of parameters, never believed when a byte is flipped."""
    model, data, _ = world

    def first_loss(name, **sections):
        config = make_config(tmp_path, model, data, output_dir=str(tmp_path / name), train={"max_steps": 1}, **sections)
        assert train(config) == 0
        return metrics_of(config.output_dir)[0]["loss"]

    def files():
        return sorted((tmp_path / "cache").glob("reference-*"))

    assert first_loss("a") == pytest.approx(math.log(2), abs=1e-6)
    scored = {file: file.stat().st_mtime_ns for file in files()}
    assert len(scored) == 2, "one of the plain scores, one of the augmented"
    assert first_loss("b", objective={"beta": 0.3}) == pytest.approx(math.log(2), abs=1e-6)
    assert {file: file.stat().st_mtime_ns for file in files()} == scored, "nothing was scored again"
    for file in scored:
        content = bytearray(file.read_bytes())
        content[-3] ^= 0x40
        file.write_bytes(content)
    assert first_loss("c") == pytest.approx(math.log(2), abs=1e-6)
    first_loss("d", model={"param_dtype": "bfloat16"})
    assert len(files()) == 4


def test_score_with_an_sft_config_measures_p_too(world, tmp_path):
    model, data, _ = world
    scores = []
    for objective in ({"name": "sft", "lam": None}, {"name": "sr_dpo"}):
        path = write_config(tmp_path / "config.yaml", raw_config(tmp_path, model, data, objective=objective))
        assert main(["score", str(path), "--output", str(tmp_path / "scores.jsonl")]) == 0
        scores.append((tmp_path / "scores.jsonl").read_text())
    assert scores[0] == scores[1]
    line = json.loads(scores[0].splitlines()[0])
    assert line["logp_chosen_augmented"] != line["logp_chosen"]


def test_an_evaluation_cut_short_is_done_again(world, tmp_path, monkeypatch):
    """A run that dies in its last evaluation has not saved the last step, so the same command evaluates."""
    config = config_of(world, tmp_path, data={"eval_path": str(world[2])}, checkpoint={"every_steps": 4})
    with monkeypatch.context() as patched:
        patched.setattr(
            "sr_dpo_jax.train.scored_set.ScoredSet.metrics", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert train(config) == 0
    lines = metrics_of(config.output_dir)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "eval/loss" in line] == [6]


@pytest.mark.slow
def test_two_processes_equal_one(world, tmp_path):
    """Two processes joined by jax.distributed, with different rows, give the metrics and parameters of one process."""
    model, data, held_out = world
    sections = {"data": {"eval_path": str(held_out)}, "batch": {"accumulation_steps": 2}}
    path = write_config(tmp_path / "config.yaml", raw_config(tmp_path, model, data, **sections))
    processes = run_processes(["train", str(path)], devices=2)
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    alone = make_config(tmp_path / "alone", model, data, mesh={"fsdp": 8}, **sections)
    assert train(alone) == 0
    for ours, theirs in zip(metrics_of(tmp_path / "run"), metrics_of(alone.output_dir), strict=True):
        for name in without_times([ours])[0]:
            if name != "padding_fraction":  # another number of row shards may ask for more rows
                assert ours[name] == pytest.approx(theirs[name], rel=2e-4, abs=2e-5), name
        if "loss" in ours:
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    ours, theirs = state_of(tmp_path / "run"), state_of(alone.output_dir)
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-3, atol=2e-5, err_msg=name)


def test_longer_than_the_rope_scaling_is_exact_for(tmp_path):
    """Dynamic NTK gives texts beyond max_position_embeddings other frequencies, each its own."""
    data = preference_file(tmp_path / "pairs.jsonl", 8)
    rope = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}
    directory = model_directory(tmp_path / "model", max_position_embeddings=40, **rope)
    with pytest.raises(UsageError, match=r"longest sequence has \d+ tokens, \d+ of them p; beyond 40"):
        train(make_config(tmp_path, directory, data))
    assert not (tmp_path / "run" / "checkpoints").exists()
