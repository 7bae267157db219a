"""Held-out sets, sample responses, the best checkpoint and early stopping, in whole runs that are cut off and go on."""

import json
import logging
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from runs import (
    make_config,
    make_pairs,
    metrics_of,
    model_directory,
    preference_file,
    raw_config,
    run_processes,
    state_of,
    verified_steps,
    without_times,
)

from sr_dpo_jax.cli import main
from sr_dpo_jax.config.checks import RESERVED, evaluation_metrics
from sr_dpo_jax.config.load import config_from_dict
from sr_dpo_jax.durable import checkpoint, integrity
from sr_dpo_jax.durable.belonging import stored_position
from sr_dpo_jax.errors import RunError, UsageError
from sr_dpo_jax.train import loop
from sr_dpo_jax.train.loop import EXIT_PREEMPTED, train

pytestmark = pytest.mark.usefixtures("same_programs")

METRIC = "eval/other/loss"
BETA, LAM = 0.1, 0.5
PATIENCE = 2


def hh_file(path, pairs, seed):
    """The same kind of pairs as HH-RLHF writes them: whole transcripts. As `preference` they are refused."""
    rows = [
        {
            "prompt": 0,
            **{side: f"\n\nHuman: {row['prompt']}\n\nAssistant:{row[side]}" for side in ("chosen", "rejected")},
        }
        for row in make_pairs(pairs, seed)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    model_directory(root / "model")
    preference_file(root / "train.jsonl", 50, seed=1)
    preference_file(root / "held_out.jsonl", 11, seed=2)
    preference_file(root / "other.jsonl", 9, seed=3)
    hh_file(root / "hh.jsonl", 6, seed=4)
    return root


def raw_of(world, root, **sections):
    """Evaluates three sets every two steps, keeps the best by the loss of one, and ends when that rises."""
    sets = {
        "other": {"path": str(world / "other.jsonl"), "pairs": 7},
        "as_hh": {"path": str(world / "hh.jsonl"), "format": "hh_rlhf"},
    }
    merged = {
        "data": {"eval_path": str(world / "held_out.jsonl"), "eval_sets": sets},
        "train": {"epochs": 8, "eval_every_steps": 2, "samples": 2, "early_stopping_patience": PATIENCE},
        "checkpoint": {"every_steps": 3, "keep": 1, "best_metric": METRIC, "best_mode": "min"},
        "optimizer": {"learning_rate": 1e-2},
        "generation": {"max_new_tokens": 20},
        "cache_dir": str(world / "cache"),
    }
    for name, value in sections.items():
        merged[name] = {**merged.get(name, {}), **value} if isinstance(value, dict) else value
    return raw_config(root, world / "model", world / "train.jsonl", **merged)


def written(world, root, **sections):
    root.mkdir(exist_ok=True)
    (root / "config.yaml").write_text(
        yaml.safe_dump(raw_of(world, root, **sections), sort_keys=False), encoding="utf-8"
    )
    return root / "config.yaml"


def config_of(world, root, **sections):
    return make_config(root, world / "model", world / "train.jsonl", **raw_of(world, root, **sections))


@pytest.fixture(scope="module")
def golden(world, tmp_path_factory):
    """A run that nobody disturbs, and what it says on the way."""
    root = tmp_path_factory.mktemp("golden")
    path, heard, save = written(world, root), Heard(), checkpoint.Checkpoints.save

    def noted(self, step, *rest, **named):
        heard.saved.append(step)
        save(self, step, *rest, **named)

    logging.getLogger("sr_dpo_jax").addHandler(heard)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(checkpoint.Checkpoints, "save", noted)
        assert main(["train", str(path)]) == 0
    logging.getLogger("sr_dpo_jax").removeHandler(heard)
    return root / "run", heard


class Heard(logging.Handler):
    def __init__(self):
        super().__init__()
        self.said, self.saved = [], []

    def emit(self, record):
        self.said.append(record.getMessage())


def lines_of(run, name):
    return [json.loads(line) for line in (Path(run) / name).read_text(encoding="utf-8").splitlines()]


def evaluations(run):
    return [line for line in metrics_of(run) if METRIC in line]


def first_best(run):
    values = [line[METRIC] for line in evaluations(run)]
    return evaluations(run)[values.index(min(values))]["step"]


def assert_equals(run, golden):
    ours, theirs = state_of(run), state_of(golden)
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in theirs)
    assert without_times(metrics_of(run)) == without_times(metrics_of(golden))
    assert lines_of(run, "samples.jsonl") == lines_of(golden, "samples.jsonl")
    assert verified_steps(run) == verified_steps(golden)


def test_every_set_is_evaluated_under_its_name(golden):
    run, _ = golden
    for line in evaluations(run):
        assert (line["eval/pairs"], line["eval/other/pairs"], line["eval/as_hh/pairs"]) == (11, 7, 6)
        names = {name.removeprefix("eval/other/") for name in line if name.startswith("eval/other/")}
        assert all(f"eval/{name}" in line and f"eval/as_hh/{name}" in line for name in names)
    assert [line["step"] for line in evaluations(run)] == list(range(2, metrics_of(run)[-1]["step"] + 1, 2))


def test_means_are_over_pairs_whatever_the_batch(world, golden, tmp_path):
    """Two other batch sizes give the values of training, and so do the lines of pairs, by hand."""
    run = tmp_path / "run"
    shutil.copytree(golden[0], run)
    trained, path = evaluations(run)[-1], written(world, tmp_path)
    found = []
    for size in (3, 5):
        assert main(["eval", str(path), f"batch.pairs_per_step={size}"]) == 0
        found.append(json.loads((run / "eval.json").read_text()))
    for name, value in found[0].items():
        assert value == pytest.approx(found[1][name], rel=1e-5, abs=1e-6), name
        assert value == pytest.approx(trained[name], rel=1e-4, abs=1e-5), name
    for prefix, file in (
        ("eval", "eval_pairs"),
        ("eval/other", "eval_pairs_other"),
        ("eval/as_hh", "eval_pairs_as_hh"),
    ):
        pairs = lines_of(run, f"{file}.jsonl")
        m, augmented = (np.array([pair[name] for pair in pairs]) for name in ("margin", "augmented_margin"))
        assert len(pairs) == trained[f"{prefix}/pairs"]
        assert trained[f"{prefix}/margin"] == pytest.approx(m.mean(), abs=1e-4)
        assert trained[f"{prefix}/rewards/accuracies"] == pytest.approx((m > 0).mean())
        losses = np.logaddexp(0, -(BETA * m - LAM * BETA * augmented))
        assert trained[f"{prefix}/loss"] == pytest.approx(losses.mean(), abs=1e-4)


@pytest.mark.parametrize("objective", ["sr_dpo", pytest.param("dpo", marks=pytest.mark.slow), "sft"])
def test_the_names_of_metrics_are_known_before_a_run(world, golden, tmp_path, objective):
    """What checkpoint.best_metric may be is what an evaluation gives, and no set can be called as a metric begins."""
    lam = {"lam": LAM if objective == "sr_dpo" else None}
    sections = {"objective": {"name": objective, **lam}, "checkpoint": {"best_metric": None, "best_mode": "max"}}
    sections["train"] = {"max_steps": 1, "eval_every_steps": None, "samples": 0, "early_stopping_patience": None}
    config = config_of(world, tmp_path, **sections)
    run = golden[0]
    if objective != "sr_dpo":
        assert train(config) == 0
        run = tmp_path / "run"
    (given,) = [line for line in metrics_of(run) if METRIC in line][-1:]
    given = {name for name in given if name != "step" and not name.endswith("/pairs")}
    assert given == set(evaluation_metrics(config))
    assert {name.split("/")[1] for name in given} - {"other", "as_hh"} <= set(RESERVED)


def test_samples_are_what_generate_gives(world, golden, tmp_path):
    run, heard = golden
    samples = lines_of(run, "samples.jsonl")
    steps = [line["step"] for line in evaluations(run)]
    assert [(line["step"], line["set"], line["id"]) for line in samples] == [
        (step, name, number) for step in steps for name in ("eval", "eval/other", "eval/as_hh") for number in "01"
    ]
    last = samples[-6:]
    rows = [json.loads(line) for line in (world / "other.jsonl").read_text().splitlines()[:2]]
    assert [line["prompt"] for line in last[2:4]] == [row["prompt"] for row in rows]
    assert last[4]["prompt"].startswith("\n\nHuman: ") and last[4]["prompt"].endswith("\n\nAssistant:")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": line["prompt"]}) + "\n" for line in last), encoding="utf-8")
    path = written(world, tmp_path)
    shutil.copytree(run, tmp_path / "run")
    overridden = ["generate", str(path), "generation.slots=16"]
    assert main([*overridden, "--prompts", str(prompts), "--output", str(tmp_path / "out.jsonl")]) == 0
    assert [line["response"] for line in lines_of(tmp_path, "out.jsonl")] == [line["response"] for line in last]
    assert any(line["response"] != samples[place]["response"] for place, line in enumerate(last)), "the policy changed"
    events = b"".join(file.read_bytes() for file in (run / "tensorboard").iterdir())
    assert rows[0]["prompt"].splitlines()[0].encode() in events
    assert not any(rows[0]["prompt"].splitlines()[0] in message for message in heard.said), "never on the console"


def test_the_best_stays_and_the_run_ends_when_it_does_not_get_better(world, golden, tmp_path, capsys):
    run, heard = golden
    best, steps = first_best(run), [line["step"] for line in evaluations(run)]
    stopped = best + 2 * PATIENCE
    assert metrics_of(run)[-1]["step"] == stopped == steps[-1] < 48, "48 steps would be all"
    assert verified_steps(run) == [best, stopped], "keep=1, and the best beside it"
    assert any(f"best {METRIC}" in message and f"at step {best}" in message for message in heard.said)
    values = [line[METRIC] for line in evaluations(run)]
    better = {step for n, step in enumerate(steps) if values[n] < min([*values[:n], np.inf])}
    assert better - {step for step in better if step % 3 == 0}, "some are not saved for another reason"
    assert heard.saved == sorted(better | set(range(3, stopped, 3)) | {stopped})

    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    path, heard = written(world, tmp_path), Heard()
    before = (copy / "metrics.jsonl").read_text(), (copy / "samples.jsonl").read_text()
    logging.getLogger("sr_dpo_jax").addHandler(heard)
    assert main(["train", str(path)]) == 0
    logging.getLogger("sr_dpo_jax").removeHandler(heard)
    assert any(f"stopped early at step {stopped}" in message for message in heard.said)
    assert ((copy / "metrics.jsonl").read_text(), (copy / "samples.jsonl").read_text()) == before
    assert verified_steps(copy) == [best, stopped]

    for options, name in ((["--best"], "best"), (["--step", str(best)], "step"), ([], "latest")):
        assert main(["export", str(copy), str(tmp_path / name), *options]) == 0
    weights = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in ("best", "step", "latest")}
    assert weights["best"] == weights["step"] != weights["latest"]
    assert main(["eval", str(path), "--best"]) == 0
    found = json.loads((copy / "eval.json").read_text())
    (then,) = [line for line in evaluations(copy) if line["step"] == best]
    assert found["step"] == best and found[METRIC] == pytest.approx(then[METRIC], rel=1e-4)
    assert main(["train", str(path), "train.early_stopping_patience=3"]) == 0
    assert metrics_of(copy)[-1]["step"] > stopped, "more patience goes on"


def test_a_run_without_a_best_refuses_it(world, tmp_path, capsys):
    without = {"train": {"max_steps": 1, "early_stopping_patience": None, "eval_every_steps": None, "samples": 0}}
    without["checkpoint"] = {"best_metric": None, "best_mode": "max"}
    path = written(world, tmp_path, **without)
    assert main(["train", str(path)]) == 0
    assert main(["eval", str(path), "--best"]) == 2
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--best"]) == 2
    assert capsys.readouterr().err.count("has no best checkpoint (checkpoint.best_metric was not set)") == 2
    assert not (tmp_path / "out").exists()


class Killed(BaseException):
    pass


CUTS = ["between saves", "after an evaluation, before its save", "in the samples"]


@pytest.mark.slow
@pytest.mark.parametrize("when", CUTS)
def test_a_run_that_is_cut_off_is_the_run_that_is_not(world, golden, tmp_path, monkeypatch, when, request):
    """Cut once before the best and twice while it waits for a better one: the same state, lines, samples and end."""
    if when == CUTS[0]:
        request.getfixturevalue("programs_anew")
    config, best = config_of(world, tmp_path), first_best(golden[0])
    for step in (3, best + 1, best + 3):
        with monkeypatch.context() as patched:
            kill(patched, when, step)
            with pytest.raises(Killed):
                train(config)
    assert train(config) == 0
    assert_equals(config.output_dir, golden[0])


def kill(patched, when, step):
    if when == "between saves":
        add = loop.StepLog.add

        def killed(self, at, *rest):
            if at > step:
                raise Killed
            add(self, at, *rest)

        patched.setattr(loop.StepLog, "add", killed)
    elif when == "in the samples":
        write = loop.MetricsWriter.write_samples

        def half(self, at, samples):
            write(self, at, samples[:1] if at >= step else samples)
            if at >= step:
                raise Killed

        patched.setattr(loop.MetricsWriter, "write_samples", half)
    else:
        save = checkpoint.Checkpoints.save

        def unsaved(self, at, *rest, **named):
            if at >= step:
                raise Killed
            save(self, at, *rest, **named)

        patched.setattr(checkpoint.Checkpoints, "save", unsaved)


@pytest.mark.parametrize("place", ["scores", pytest.param("samples", marks=pytest.mark.slow)])
def test_a_signal_saves_before_an_evaluation_and_the_next_start_makes_up_for_it(
    world, golden, tmp_path, monkeypatch, place
):
    """Two evaluations are interrupted, that of the best step among them: the end is that of the undisturbed run."""
    config, best, evaluate = config_of(world, tmp_path), first_best(golden[0]), loop._evaluate
    for at in sorted({2, best}):

        def signalled(job, step, params, selection, writer, beat, at=at):
            def then(*given):
                beat(*given)
                if step == at and (place == "scores" or not given):  # samples call it without a count
                    os.kill(os.getpid(), signal.SIGTERM)
                    time.sleep(0.3)
                    beat()

            return evaluate(job, step, params, selection, writer, then)

        with monkeypatch.context() as patched:
            patched.setattr(loop, "_evaluate", signalled)
            assert train(config) == EXIT_PREEMPTED
        assert verified_steps(config.output_dir)[-1] == at
        assert not [line for line in evaluations(config.output_dir) if line["step"] == at]
    assert train(config) == 0
    assert_equals(config.output_dir, golden[0])
    assert train(config) == 0, "nothing is made up for twice"
    assert_equals(config.output_dir, golden[0])


@pytest.mark.slow
def test_a_signal_in_the_last_evaluation_is_not_the_end(world, tmp_path, monkeypatch):
    config, evaluate = config_of(world, tmp_path, train={"max_steps": 2}), loop._evaluate

    def signalled(*given):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)
        return evaluate(*given)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "_evaluate", signalled)
        assert train(config) == EXIT_PREEMPTED
    assert evaluations(config.output_dir) == []
    assert train(config) == 0
    assert [line["step"] for line in evaluations(config.output_dir)] == [2]
    assert main(["export", config.output_dir, str(tmp_path / "best"), "--best"]) == 0


def test_the_best_of_other_held_out_pairs_does_not_count(world, golden, tmp_path, caplog):
    shutil.copytree(golden[0], tmp_path / "run")
    config = raw_of(world, tmp_path, train={"max_steps": metrics_of(golden[0])[-1]["step"] + 2})
    config["data"]["eval_sets"]["other"]["pairs"] = 6
    assert train(config_from_dict(config, where="test")) == 0
    assert "its held-out pairs are others: the evaluations so far do not count" in caplog.text
    (last,) = [line for line in evaluations(tmp_path / "run") if line["step"] > metrics_of(golden[0])[-1]["step"]][-1:]
    assert last["step"] in verified_steps(tmp_path / "run")
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "best"), "--best"]) == 0
    assert f"| optimizer updates | {last['step']} |" in (tmp_path / "best" / "README.md").read_text()


def test_a_finished_run_is_measured_anew_on_other_held_out_pairs(world, tmp_path, caplog):
    """The content of a file changes, not its name; a second start finds nothing left to do."""
    caplog.set_level(logging.INFO)
    data = {"eval_path": str(tmp_path / "held_out.jsonl")}

    def config_with(**more):
        sections = {"data": data | more, "train": {"max_steps": 3}}
        return make_config(tmp_path, world / "model", world / "train.jsonl", **sections)

    config = config_with()
    preference_file(tmp_path / "held_out.jsonl", 11, seed=2)
    assert train(config) == 0
    before = metrics_of(tmp_path / "run")
    preference_file(tmp_path / "held_out.jsonl", 9, seed=3)
    assert train(config) == 0
    assert "held-out set eval: evaluated anew at step 3" in caplog.text
    after = metrics_of(tmp_path / "run")
    assert after[:-1] == before[:-1] and (before[-1]["eval/pairs"], after[-1]["eval/pairs"]) == (11, 9)
    assert after[-1]["eval/loss"] != before[-1]["eval/loss"]
    newest = stored_position(tmp_path / "run" / "checkpoints" / "3")
    assert newest["measured"]["eval"]["since"] == 3
    caplog.clear()
    assert train(config) == 0
    assert "anew" not in caplog.text and metrics_of(tmp_path / "run") == after
    assert train(config_with(eval_pairs=4)) == 0 and metrics_of(tmp_path / "run")[-1]["eval/pairs"] == 4


@pytest.mark.slow
def test_going_back_from_a_damaged_checkpoint_counts_as_it_counted_there(world, golden, tmp_path):
    """The newest is damaged, so the run goes on from the best, whose evaluations after it are done again."""
    shutil.copytree(golden[0], tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / str(verified_steps(golden[0])[-1])
    largest = max(
        (file for file in (newest / "state").rglob("*") if file.is_file()), key=lambda file: file.stat().st_size
    )
    largest.write_bytes(b"\0" * largest.stat().st_size)
    assert train(config_of(world, tmp_path)) == 0
    assert_equals(tmp_path / "run", golden[0])


@pytest.mark.slow
def test_a_best_checkpoint_that_cannot_be_saved_ends_the_run_and_is_made_again(world, golden, tmp_path, monkeypatch):
    """Its state is gone with the next step, so another attempt would save another one."""
    best, check = first_best(golden[0]), integrity.check_shards

    def damaged(step_directory, shards):
        if step_directory.name == str(best):
            raise integrity.Damaged("as the test asks")
        check(step_directory, shards)

    config = config_of(world, tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(integrity, "check_shards", damaged)
        with pytest.raises(RunError, match=f"saving step {best} failed"):
            train(config)
    kept = verified_steps(config.output_dir)
    assert kept and max(kept) < best, "what was best before is still there"
    assert train(config) == 0
    assert_equals(config.output_dir, golden[0])


def test_a_lost_best_checkpoint_is_said(world, golden, tmp_path, caplog, capsys):
    shutil.copytree(golden[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / str(first_best(golden[0])))
    path = written(world, tmp_path)
    assert main(["train", str(path)]) == 0
    assert "the best checkpoint cannot be used any more" in caplog.text
    assert main(["train", str(path), "checkpoint.strict=true"]) == 2
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--best"]) == 2
    assert f"no checkpoint of step {first_best(golden[0])}" in capsys.readouterr().err


def test_a_damaged_best_checkpoint_is_said(world, golden, tmp_path, caplog):
    shutil.copytree(golden[0], tmp_path / "run")
    # All of them: the optimizer's moments, which nobody needs of the best one, may fill the largest.
    arrays = list((tmp_path / "run" / "checkpoints" / str(first_best(golden[0])) / "state").rglob("d/*"))
    assert arrays
    for path in arrays:
        path.write_bytes(bytes(path.stat().st_size))
    path = written(world, tmp_path)
    assert main(["train", str(path), "checkpoint.strict=true"]) == 2
    assert main(["train", str(path)]) == 0
    assert "the best checkpoint cannot be used any more" in caplog.text


@pytest.mark.slow
def test_another_metric_counts_from_where_it_is_set(world, golden, tmp_path, caplog):
    shutil.copytree(golden[0], tmp_path / "run")
    changed = {"checkpoint": {"best_metric": "eval/margin", "best_mode": "max"}, "train": {"max_steps": 26}}
    steps = verified_steps(tmp_path / "run")
    with pytest.raises(UsageError, match=r"--allow-change checkpoint\.best_metric"):
        train(config_of(world, tmp_path, **changed))
    assert verified_steps(tmp_path / "run") == steps, "the best one too"
    assert train(config_of(world, tmp_path, **changed), allowed_changes=["checkpoint.best_metric"]) == 0
    assert "is another one than before" in caplog.text
    went_on = [line for line in evaluations(tmp_path / "run") if line["step"] > metrics_of(golden[0])[-1]["step"]]
    best = max(went_on, key=lambda line: line["eval/margin"])["step"]
    assert best in verified_steps(tmp_path / "run")


@pytest.mark.usefixtures("programs_anew")
def test_nothing_is_compiled_after_the_first_evaluation(world, tmp_path, monkeypatch, caplog):
    """jax logs what it compiles: after step 0 nothing of ours, and after the first evaluation nothing at all.

    The first checkpoint is saved before that, because Orbax compiles slices of arrays in it.
    """
    import jax

    marks, evaluate, run = [], loop._evaluate, loop.run

    def marked(place, function):
        def called(*arguments):
            result = function(*arguments)
            marks.append((place, len(compiled(caplog))))
            return result

        return called

    def started(*arguments):
        marks.append(("start", len(compiled(caplog))))
        return run(*arguments)

    monkeypatch.setattr(loop, "_evaluate", marked("evaluated", evaluate))
    monkeypatch.setattr(loop, "run", started)
    with jax.log_compiles(True), caplog.at_level(logging.WARNING, "jax"):
        assert train(config_of(world, tmp_path, train={"max_steps": 6}, checkpoint={"every_steps": 1})) == 0
    (start, first, *later), names = [count for _, count in marks], compiled(caplog)
    assert len(later) == 2 and start > 5, "jax says it"
    assert {count for count in later} == {first}, names[first:]
    assert not {"step", "read", "proceed"} & set(names[start:first])


def compiled(caplog):
    messages = (record.getMessage() for record in caplog.records if record.name.startswith("jax"))
    found = (message.partition("Compiling ")[2] for message in messages if message.startswith("Compiling "))
    return [name.split()[0].removeprefix("jit(").rstrip(")") for name in found]


def test_samples_of_any_text_survive_another_start(world, golden, tmp_path):
    """Within a JSON text stand characters that Python takes for ends of lines."""
    shutil.copytree(golden[0], tmp_path / "run")
    file = tmp_path / "run" / "samples.jsonl"
    lines = file.read_text(encoding="utf-8").split("\n")
    first = json.loads(lines[0]) | {"response": "a\u2028b\u0085c\u2029d"}
    file.write_text("\n".join([json.dumps(first, ensure_ascii=False), *lines[1:]]), encoding="utf-8")
    before = file.read_bytes()
    assert main(["train", str(written(world, tmp_path))]) == 0
    assert file.read_bytes() == before


@pytest.mark.slow
def test_two_processes_one_of_which_is_killed(world, golden, tmp_path):
    """Samples, best and end are those of two processes that nobody kills, and to float order those of one."""

    def ended(processes):
        said = [process.communicate(timeout=400)[0] for process in processes]
        return [process.returncode for process in processes], "\n".join(said)

    codes, said = ended(run_processes(["train", str(written(world, tmp_path / "whole"))]))
    assert codes == [0, 0], said
    whole = tmp_path / "whole" / "run"
    assert first_best(whole) in verified_steps(whole) and len(verified_steps(whole)) == 2
    for ours, theirs in zip(evaluations(whole)[:3], evaluations(golden[0])[:3], strict=True):
        assert ours[METRIC] == pytest.approx(theirs[METRIC], rel=1e-3)
    assert lines_of(whole, "samples.jsonl")[:6] == lines_of(golden[0], "samples.jsonl")[:6]

    path, metrics = str(written(world, tmp_path / "cut")), tmp_path / "cut" / "run" / "metrics.jsonl"
    processes = run_processes(["train", path], faults=({"step_s": 0.3}, {"step_s": 0.3}))
    while not (metrics.exists() and metrics.read_text().count("\n") >= 8):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)
    processes[0].send_signal(signal.SIGKILL)
    codes, said = ended(processes)
    assert codes[0] == -signal.SIGKILL and codes[1] not in (0, 75), said
    codes, said = ended(run_processes(["train", path]))
    assert codes == [0, 0], said
    assert_equals(tmp_path / "cut" / "run", whole)
