"""The lines of a run: one a step, written when the next is on its way, dropped after the step that is resumed."""

import dataclasses
import json
import math

import numpy as np
import pytest

from sr_dpo_jax.data.pipeline import HostStep
from sr_dpo_jax.data.plan import Plan, Shape
from sr_dpo_jax.errors import RunError
from sr_dpo_jax.train.clock import Clock
from sr_dpo_jax.train.metrics import MetricsWriter, Progress, StepLog, _accuracy
from sr_dpo_jax.train.program import Work

PLAN = Plan(Shape(2, 1, 20, 8), 4, np.array([[0, 1]] * 8), np.zeros((8, 2), int))
WORK = Work(np.array([7, 9]), np.array([100.0, 300.0]), devices=2, peak_flops=1e3)


def writer_of(root, first_step=0):
    return MetricsWriter(root, first_step=first_step, active=True)


def lines_of(root, name="metrics.jsonl"):
    return [json.loads(line) for line in (root / name).read_text().splitlines()]


@pytest.fixture
def steps(tmp_path):
    writer = writer_of(tmp_path)
    progress = Progress("test", total=4, active=False)
    log = StepLog(PLAN, WORK, ("a", "b"), writer, progress, Clock(), every_steps=2, total_steps=3, max_skipped_steps=1)
    yield log
    writer.close()


def add(steps, step, **metrics):
    steps.add(step, HostStep(np.array([0, 1]), {}, None, 0), {"loss": np.float32(0.5), "skipped": 0.0} | metrics)


def test_a_line_is_written_when_the_next_step_is_on_its_way(steps, tmp_path):
    for step in (1, 2):
        add(steps, step)
    assert lines_of(tmp_path) == []
    add(steps, 3)
    (second,) = lines_of(tmp_path)
    assert second["step"] == 2 and second["loss"] == 0.5 and second["epoch"] == 0.5
    assert second["padding_fraction"] == pytest.approx(1 - 16 / 20)
    assert second["mfu"] * second["step_time_s"] == pytest.approx(400 / 1e3)
    assert second["tokens_per_second_per_chip"] * 2 == pytest.approx(second["tokens_per_second"])
    steps.flush()
    assert [line["step"] for line in lines_of(tmp_path)] == [2, 3]  # the last one always, others every second


def test_more_skipped_steps_in_a_row_than_allowed_end_the_run(steps, tmp_path):
    bad = {"skipped": 1.0, "loss": np.float32("nan")}
    add(steps, 1, **bad)
    add(steps, 2)
    add(steps, 3, **bad)
    add(steps, 4, **bad)
    with pytest.raises(RunError, match=r"2 steps in a row, the last of them 4, .*max_skipped_steps=1 .*skipped.jsonl"):
        steps.flush()
    assert [(line["step"], line["pair_ids"]) for line in lines_of(tmp_path, "skipped.jsonl")] == [
        (step, ["a", "b"]) for step in (1, 3, 4)
    ]


def test_lines_of_steps_that_are_done_again_are_dropped(tmp_path, caplog):
    writer = writer_of(tmp_path)
    for step in (1, 2, 3):
        writer.write({"step": step, "loss": math.inf if step == 1 else 0.1})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # a kill cut it short
    writer_of(tmp_path, first_step=2).close()
    assert lines_of(tmp_path) == [{"step": 1, "loss": "inf"}, {"step": 2, "loss": 0.1}]
    assert "damaged" not in caplog.text, "a line that is cut short is no damage"


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "skipped.jsonl"])
@pytest.mark.parametrize(
    "damaged", [b'{"step": 2, "lo\xffs": 0.1}', b'{"step": "2"}', b"[1]", b'{"stop": 2}', b"{", b"[" * 100_000]
)
def test_a_damaged_line_stops_no_run(tmp_path, caplog, name, damaged):
    """The file is set aside as it is, and its good lines stay."""
    whole = b"\n".join([b'{"step": 1, "loss": 1}', damaged, b'{"step": 2, "loss": 2}', b'{"step": 3, "loss": 3}', b""])
    (tmp_path / name).write_bytes(whole)
    writer_of(tmp_path, first_step=2).close()
    assert [line["step"] for line in lines_of(tmp_path, name)] == [1, 2]
    (aside,) = tmp_path.glob(f"{name}.damaged-*")
    assert aside.read_bytes() == whole and aside.name in caplog.text


def test_the_next_line_stands_behind_one_that_lost_its_line_feed(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 1}')
    writer = writer_of(tmp_path, first_step=1)
    writer.write({"step": 2, "loss": 0.1})
    writer.close()
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2]


def test_an_evaluation_that_is_due_is_written_once(tmp_path):
    """A signal saved step 2 in the middle of its evaluation, or another start after it wrote the lines of it."""
    writer = writer_of(tmp_path)
    for line in ({"step": 2, "loss": 0.1}, {"step": 2, "eval/loss": 0.3}, {"step": 3, "loss": 0.1}):
        writer.write(line)
    writer.write_samples(2, [{"set": "eval", "id": "0", "prompt": "a", "response": "b"}])
    writer.close()
    MetricsWriter(tmp_path, first_step=2, active=True, evaluation_due=True).close()
    assert lines_of(tmp_path) == [{"step": 2, "loss": 0.1}] and lines_of(tmp_path, "samples.jsonl") == []


def test_lines_before_a_commit_are_in_a_closed_file(tmp_path):
    writer = writer_of(tmp_path)
    writer.write({"step": 1, "loss": 0.1})
    writer.commit()
    assert writer._file.closed
    writer.write({"step": 2, "loss": 0.1})
    writer.close()
    assert [line["step"] for line in lines_of(tmp_path)] == [1, 2]


def test_a_loss_far_above_the_first_is_said_once(steps, caplog):
    for step, loss in enumerate((0.7, 5.0, 2e3, 1e15), 1):
        add(steps, step, loss=np.float32(loss))
    steps.flush()
    (said,) = [record.getMessage() for record in caplog.records if "diverges" in record.getMessage()]
    assert said.startswith("step 3: the loss is 2e+03") and "optimizer.learning_rate" in said


def test_a_run_that_goes_on_diverged_is_said_too(steps, caplog):
    """The first loss of a start is no measure then; that of an untrained policy is."""
    log = dataclasses.replace(steps, usual_loss=math.log(2))
    add(log, 1, loss=np.float32(1e15))
    log.flush()
    assert [record for record in caplog.records if "diverges" in record.getMessage()]


def test_another_process_writes_nothing(tmp_path):
    writer = MetricsWriter(tmp_path, first_step=0, active=False)
    writer.write({"step": 1})
    writer.write_samples(1, [{"set": "eval"}])
    writer.write_skipped(1, ["a"], {"loss": math.nan})
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_the_start_shows_no_accuracy_of_nothing():
    """Before the first update all margins are 0, and none is above 0."""
    numbers = {"rewards/accuracies": 0.0, "margin": 0.0}
    assert _accuracy(numbers) == "all margins 0  " and _accuracy({}) == ""
    assert _accuracy({**numbers, "margin": -0.5}) == "accuracy 0.00  "
    assert _accuracy({"rewards/accuracies": 0.75, "margin": 0.0}) == "accuracy 0.75  "
