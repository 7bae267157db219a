"""Tune: the grid, what it refuses, the choice and its ties, what is run again and what is not, and a real one."""

import json
import signal
import time
from pathlib import Path

import datasets
import pytest
import yaml
from runs import metrics_of, model_directory, preference_file, raw_config, run_process

from sr_dpo_jax.cli import main
from sr_dpo_jax.commands.tune import candidates, choose
from sr_dpo_jax.errors import UsageError

pytestmark = pytest.mark.usefixtures("same_programs")

ACCURACY, LOSS = "eval/rewards/accuracies", "eval/loss"


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl", "c.jsonl"):
        preference_file(tmp_path / name, 3)
    raw = raw_config(tmp_path, tmp_path / "model", tmp_path / "a.jsonl", data={"eval_path": "b.jsonl"})
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return path


def grid_of(path, *overrides, metric=ACCURACY, eval_pairs=None):
    return candidates(str(path), overrides, metric=metric, eval_pairs=eval_pairs)


def test_the_grid_is_the_product_of_its_keys(config, tmp_path):
    grid = grid_of(config, "objective.lam=0.1,1", "seed=5", "optimizer.learning_rate=1e-6,5e-7,1e-7", eval_pairs=50)
    assert [(one.config.objective.lam, one.config.optimizer.learning_rate) for one in grid] == [
        (lam, rate) for lam in (0.1, 1.0) for rate in (1e-6, 5e-7, 1e-7)
    ]
    assert {(one.config.seed, one.config.data.eval_pairs) for one in grid} == {(5, 50)}
    assert {one.config.cache_dir for one in grid} == {str(tmp_path / "cache")}, "one reference cache"
    first = tmp_path / "run" / "tune" / "objective.lam=0.1,optimizer.learning_rate=1e-6"
    assert grid[0].config.output_dir == str(first) and len({one.config.output_dir for one in grid}) == 6


def test_a_finished_run_counts_for_the_content_of_its_files(config, tmp_path):
    """Labels that are swapped, other held-out pairs or weights under the same names make other runs."""
    model_directory(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"a" * 300_000)
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"prompt": "p", "chosen": "x", "rejected": "y"}\n', encoding="utf-8")
    options = ("objective.lam=0.1,1", f"data.eval_path={tmp_path / 'b.jsonl'}")

    def digests():
        return [one.digest for one in grid_of(config, *options)]

    found = [digests()]
    assert digests() == found[0]
    for name, text in (("a.jsonl", '{"prompt": "p", "chosen": "y", "rejected": "x"}\n'), ("b.jsonl", "{}\n")):
        (tmp_path / name).write_text(text, encoding="utf-8")
        found.append(digests())
    (tmp_path / "model" / "model.safetensors").write_bytes(b"a" * 299_999 + b"b")
    found.append(digests())
    assert len({digest for of_grid in found for digest in of_grid}) == 2 * len(found)


def test_a_finished_run_counts_for_the_content_of_a_hub_data_set(config, monkeypatch):
    """The name stays, and the cache holds other rows: of the pairs, of the held-out ones, of one split alone."""
    asked = {}

    def load_dataset(name, *, split, revision):
        asked[name, split] = revision
        return datasets.Dataset.from_list(rows[name, split])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    pair = {"prompt": "p", "chosen": "x", "rejected": "y"}
    rows = {("owner/pairs", "train"): [pair], ("owner/held-out", "test"): [pair]}
    options = ("seed=1,2", "data.path={path: owner/pairs, revision: v1}", "data.eval_path=owner/held-out")
    found = [grid_of(config, *options)[0].digest]
    assert asked == {("owner/pairs", "train"): "v1", ("owner/held-out", "test"): None}
    for place in rows:
        rows[place] = [pair | {"chosen": "y", "rejected": "x"}]
        found.append(grid_of(config, *options)[0].digest)
    assert len(set(found)) == 3 and grid_of(config, *options)[0].digest == found[-1]


def test_a_list_is_one_value(config):
    grid = grid_of(config, "objective.lam=0.1,1", "data.path=[a.jsonl, c.jsonl]")
    assert len(grid) == 2 and len(grid[0].config.data.path) == 2


def test_one_host_of_several_does_not_tell_a_value_from_another(config):
    one, other = (
        grid_of(
            config,
            "objective.lam=0.1,1",
            "distributed.processes=2",
            f"distributed.process_id={host}",
            "distributed.coordinator_address=a:1",
        )
        for host in (0, 1)
    )
    assert [a.digest for a in one] == [b.digest for b in other] and one[0].digest != one[1].digest


@pytest.mark.parametrize(
    ("overrides", "metric", "reason"),
    [
        (["objective.lam=0.1"], ACCURACY, "no key has several values"),
        (["objective.lam=0.1,0.1"], ACCURACY, "stands twice"),
        (["objective.lam=0.1,"], ACCURACY, "no plain number"),
        (["objective.lam=0.1,-3"], ACCURACY, "objective.lam"),
        (["objective.lamb=0.1,1"], ACCURACY, "did you mean lam"),
        (["output_dir=a,b"], ACCURACY, "set by tune itself"),
        (["model.path=../a,../b"], ACCURACY, "no plain number or name"),
        (["seed=1,2", "data.eval_path=null"], ACCURACY, "data.eval_path is not set"),
        (["seed=1,2", "objective={name: sft}"], ACCURACY, "has only eval/loss"),
        (["seed=1,2", "objective={name: dpo}", "refinement.prompt=null"], "eval/augmented/margin", "prompt is empty"),
    ],
)
def test_what_cannot_be_tuned_is_refused_before_anything_runs(config, tmp_path, overrides, metric, reason, capsys):
    assert main(["tune", str(config), *overrides, "--metric", metric]) == 2
    assert reason in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_the_choice():
    metrics = {
        "a": {ACCURACY: 0.6, LOSS: 0.5},
        "b": {ACCURACY: 0.7, LOSS: 0.9},
        "c": {ACCURACY: 0.7, LOSS: 0.8},
        "d": {ACCURACY: float("nan"), LOSS: 0.1},
    }
    assert choose(metrics, ACCURACY) == ("c", ["b", "c"])
    assert choose(metrics, LOSS) == ("d", [])
    assert choose({"x": {ACCURACY: 1, LOSS: 1}, "y": {ACCURACY: 1, LOSS: 1}}, ACCURACY)[0] == "x"
    with pytest.raises(UsageError, match="not finite in any run"):
        choose({"d": metrics["d"]}, ACCURACY)


def finish(candidate, lines, since=0):
    """Leaves what a finished run leaves: its metrics, and a checkpoint that says since when its held-out pairs are."""
    output = Path(candidate.config.output_dir)
    position = output / "checkpoints" / "9" / "position"
    position.mkdir(parents=True, exist_ok=True)
    (position / "metadata").write_text(json.dumps({"next_step": 9, "measured": {"eval": {"since": since}}}))
    (output / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"step": 9}]))


@pytest.fixture
def trained(monkeypatch):
    """Takes the place of training: λ = 0.5 is best. Holds the runs made, and the exit codes of those to come."""
    made, codes = [], {}

    def train(_child, candidate):
        made.append(candidate.name)
        if codes.get(candidate.name):
            return codes.pop(candidate.name)
        lam = candidate.config.objective.lam
        finish(
            candidate,
            [{"step": 5, ACCURACY: 1.0, LOSS: 0.0}, {"step": 9, ACCURACY: 0.9 - abs(lam - 0.5), LOSS: 0.6}],
        )
        return 0

    monkeypatch.setattr("sr_dpo_jax.commands.tune.Child.train", train)
    return made, codes


def test_finished_values_are_not_run_again(config, tmp_path, trained, capsys):
    made, codes = trained
    codes["objective.lam=0.5"] = 75
    command = ["tune", str(config), "objective.lam=0.1,0.5,1"]
    assert main(command) == 75 and made == ["objective.lam=0.1", "objective.lam=0.5"]
    state = tmp_path / "run" / "tune" / "tune.json"
    assert json.loads(state.read_text())["chosen"] is None
    assert main(command) == 0 and made[2:] == ["objective.lam=0.5", "objective.lam=1"]
    found = json.loads(state.read_text())
    assert found["chosen"] == {"objective.lam": "0.5"} and found["metric"] == ACCURACY and len(found["finished"]) == 3
    assert "chosen: objective.lam=0.5" in capsys.readouterr().out
    assert main(command) == 0 and len(made) == 4, "nothing was left to run"
    assert main([*command, "optimizer.learning_rate=1e-2"]) == 0 and len(made) == 7, "another configuration"


@pytest.mark.parametrize(
    ("best", "accuracies", "expected"),
    [
        ([], (0.6, 0.9, 0.9, 0.7), 9),
        (["checkpoint.best_metric=eval/margin"], (0.6, 0.9, 0.9, 0.7), 5),  # of equal ones the first
        (["checkpoint.best_metric=eval/loss", "checkpoint.best_mode=min"], (0.6, 0.9, 0.9, 0.7), 3),
    ],
)
def test_a_run_that_keeps_its_best_step_is_judged_by_it(config, tmp_path, monkeypatch, best, accuracies, expected):
    def train(_child, candidate):
        losses, steps = ("nan", 0.2, 0.5, 0.4), (1, 3, 5, 9)
        margins = (0.1, 0.2, 0.3, 0.3)
        lines = [
            {"step": step, ACCURACY: accuracy, LOSS: loss, "eval/margin": margin}
            for step, accuracy, loss, margin in zip(steps, accuracies, losses, margins, strict=True)
        ]
        finish(candidate, lines)
        return 0

    monkeypatch.setattr("sr_dpo_jax.commands.tune.Child.train", train)
    assert main(["tune", str(config), "objective.lam=1,2", *best, *(["train.eval_every_steps=1"] if best else [])]) == 0
    found = json.loads((tmp_path / "run" / "tune" / "tune.json").read_text())["finished"].values()
    assert {run["metrics"]["step"] for run in found} == {expected}


@pytest.mark.parametrize("code", [1, 2, 75])
def test_the_exit_code_of_a_run_is_passed_on(config, trained, code):
    trained[1]["objective.lam=1"] = code
    assert main(["tune", str(config), "objective.lam=1,2"]) == code and trained[0] == ["objective.lam=1"]


@pytest.mark.parametrize("damage", ["cut short", "a number", "no UTF-8"])
def test_a_damaged_tune_json_is_set_aside(config, tmp_path, trained, caplog, damage):
    """A flipped bit may leave JSON that says another number; the runs that are there are asked again."""
    state = tmp_path / "run" / "tune" / "tune.json"
    command = ["tune", str(config), "objective.lam=0.5,0.7"]
    assert main(command) == 0
    sound = state.read_bytes()
    number = sound.replace(b"0.9", b"0.1", 1)
    broken = {"cut short": sound[:-30], "a number": number, "no UTF-8": sound.replace(b"0.9", b"\xb0.9", 1)}[damage]
    assert broken != sound
    state.write_bytes(broken)
    assert main(command) == 0 and len(trained[0]) == 4 and state.read_bytes() == sound
    assert "tune.json: damaged" in caplog.text
    (aside,) = state.parent.glob("tune.json.damaged-*")
    assert aside.read_bytes() == broken


@pytest.mark.parametrize(
    ("since", "best", "step"),
    [
        (9, [], 9),
        (5, ["checkpoint.best_metric=eval/rewards/accuracies", "train.eval_every_steps=1"], 5),
        (10, [], None),
    ],
)
def test_evaluations_of_other_held_out_pairs_do_not_decide(config, tmp_path, monkeypatch, capsys, since, best, step):
    """Those from before they were exchanged stay in metrics.jsonl, and may be better; where no other is, say so."""

    def train(_child, candidate):
        finish(candidate, [{"step": at, ACCURACY: 1 - at / 10, LOSS: at} for at in (3, 5, 9)], since)
        return 0

    monkeypatch.setattr("sr_dpo_jax.commands.tune.Child.train", train)
    assert main(["tune", str(config), "objective.lam=1,2", *best]) == (2 if step is None else 0)
    if step is None:
        said = capsys.readouterr().err
        assert "no evaluation with eval/rewards/accuracies on the held-out pairs that are there now" in said
        assert "delete" in said and "objective.lam=1 to run it again" in said
    else:
        found = json.loads((tmp_path / "run" / "tune" / "tune.json").read_text())["finished"].values()
        assert {run["metrics"]["step"] for run in found} == {step}


def test_finished_runs_are_measured_on_other_held_out_pairs(tmp_path, monkeypatch):
    """The file's content changes, then the number of pairs: nothing is trained, and every number is a new one."""
    held_out = preference_file(tmp_path / "held_out.jsonl", 9, seed=2)
    sections = {
        "data": {"eval_path": str(held_out)},
        "train": {"max_steps": 2},
        "objective": {"name": "sft", "lam": None},
    }
    raw = raw_config(
        tmp_path, model_directory(tmp_path / "model"), preference_file(tmp_path / "a.jsonl", 24), **sections
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    monkeypatch.setattr(
        "sr_dpo_jax.commands.tune.Child.train", lambda _child, candidate: main(["train", *candidate.arguments])
    )

    def tuned(*more):
        grid = ["optimizer.learning_rate=1e-3,2e-3", "--metric", "eval/loss"]
        assert main(["tune", str(tmp_path / "config.yaml"), *grid, *more]) == 0
        found = json.loads((tmp_path / "run" / "tune" / "tune.json").read_text())["finished"].values()
        return [run["metrics"] for run in found]

    first = tuned()
    preference_file(held_out, 7, seed=3)
    second = tuned()
    assert second[:2] == first and [metrics["eval/pairs"] for metrics in second] == [9, 9, 7, 7]
    third = tuned("--eval-pairs", "5")
    assert [metrics["eval/pairs"] for metrics in third[4:]] == [5, 5]
    assert {metrics["step"] for metrics in third} == {2}
    trained_steps = [
        line["step"]
        for line in metrics_of(tmp_path / "run" / "tune" / "optimizer.learning_rate=2e-3")
        if "loss" in line
    ]
    assert trained_steps == [1, 2], "nothing was trained again"


@pytest.mark.slow
def test_a_real_one_is_preempted_and_goes_on(tmp_path):
    """λ of two values, training adapters: stopped in the second, gone on with; one reference; the numbers of a run on
    its own."""
    data, held_out = preference_file(tmp_path / "train.jsonl", 200), preference_file(tmp_path / "held_out.jsonl", 13)
    sections = {"data": {"eval_path": str(held_out)}, "train": {"epochs": 4}, "checkpoint": {"every_steps": 5}}
    raw = raw_config(tmp_path, model_directory(tmp_path / "model"), data, lora={"rank": 4}, **sections)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    command, root = ["tune", str(path), "objective.lam=0,0.5", "--eval-pairs", "7"], tmp_path / "run" / "tune"
    second = root / "objective.lam=0.5" / "metrics.jsonl"
    process = run_process(command)
    while process.poll() is None and not (second.exists() and second.read_text()):
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 75, output
    first = root / "objective.lam=0" / "metrics.jsonl"
    before = first.stat().st_mtime_ns
    assert json.loads((root / "tune.json").read_text())["chosen"] is None
    process = run_process(command)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert "resuming at step" in output and "objective.lam=0: finished before" in output
    assert first.stat().st_mtime_ns == before
    found = json.loads((root / "tune.json").read_text())
    assert {run["metrics"]["eval/pairs"] for run in found["finished"].values()} == {7}
    assert len(list((tmp_path / "cache").glob("reference-*"))) == 4, "plain and augmented, training and held-out"
    best = max(found["finished"].values(), key=lambda run: (run["metrics"][ACCURACY], -run["metrics"][LOSS]))
    assert found["chosen"] == best["values"]

    alone = ["train", str(path), "objective.lam=0.5", f"output_dir={tmp_path / 'alone'}", "data.eval_pairs=7"]
    process = run_process(alone)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    expected = metrics_of(tmp_path / "alone")[-1]
    (tuned,) = [run["metrics"] for run in found["finished"].values() if run["values"]["objective.lam"] == "0.5"]
    for name in (ACCURACY, LOSS, "eval/margin", "eval/augmented/margin"):
        assert tuned[name] == pytest.approx(expected[name], rel=1e-5), name
