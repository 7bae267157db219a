"""The clock of a run: every second has one phase, and a step that is taken again counts once."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
from runs import make_config, metrics_of, model_directory, preference_file

from sr_dpo_jax.commands.report.page import report
from sr_dpo_jax.train import clock as clocks
from sr_dpo_jax.train import loop
from sr_dpo_jax.train.clock import Clock, goodput, life_of, sentence
from sr_dpo_jax.train.loop import train

pytestmark = pytest.mark.usefixtures("same_programs")


@pytest.fixture
def time(monkeypatch):
    """The clock of the system, which moves as it is told."""
    fake = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(clocks, "time", SimpleNamespace(time=lambda: fake.now, monotonic=lambda: fake.now))
    return fake


def lines_of(root):
    return [json.loads(line) for line in (root / "clock.jsonl").read_text().splitlines()]


def test_every_second_has_one_phase(tmp_path, time):
    clock = Clock()
    time.now += 5  # load
    with clock("reference"):
        time.now += 7
        assert clock.timed("compile", lambda extra: extra + 1)(3) == 4
        with clock("compile"):
            time.now += 2
        time.now += 1
    time.now += 3  # load again
    clock.begin(tmp_path, first_step=0)
    time.now += 20
    clock.timed("data", setattr)(time, "now", time.now + 4)
    with pytest.raises(ValueError, match="x"), clock("save"):
        time.now += 8
        raise ValueError("x")
    life = clock.life
    expected = {"load": 8, "reference": 8, "compile": 2, "steps": 20, "data": 4, "save": 8}
    assert life == {phase: expected.get(phase, 0) for phase in clocks.PHASES}
    assert goodput(life) == 20 / 50
    assert sentence(life).startswith("goodput 40.0 % of 50.0 s: steps 20.0, ")


def test_lines_are_few_and_tell_what_a_kill_left(tmp_path, time):
    clock = Clock()
    clock.begin(tmp_path, first_step=0)
    for step in range(1, 31):
        time.now += 1
        clock.mark(step)
    clock.mark(30, now=True)
    assert [line["step"] for line in lines_of(tmp_path)] == [0, 10, 20, 30, 30]
    assert life_of(lines_of(tmp_path))["steps"] == 30


def started(root, time, *, first, steps, marks=(), load=10, step_s=2):
    """One start: `load` seconds, then `steps` steps, marked at those of `marks` and, by a kill, no more."""
    clock = Clock()
    time.now += load
    clock.begin(root, first_step=first)
    for step in range(first + 1, first + steps + 1):
        time.now += step_s
        clock.mark(step, now=step in marks)
    return clock


def test_steps_that_are_taken_again_count_once(tmp_path, time):
    """By hand: steps 1 to 9, marked at 4 and 9; again from 4 to 7; again from 4 to 10."""
    started(tmp_path, time, first=0, steps=9, marks=(4, 9))
    time.now += 30
    started(tmp_path, time, first=4, steps=3, marks=(7,))
    time.now += 50
    clock = started(tmp_path, time, first=4, steps=6, marks=(10,))
    life = clock.life
    assert life["load"] == 30 and life["between"] == 80
    assert life["steps"] == 2 * (4 + 6) and life["redone"] == 2 * (5 + 3)
    assert sum(life.values()) == time.now - 1000
    assert life_of(lines_of(tmp_path)) == life, "the report sees what the run saw"


def test_a_run_begun_again_from_nothing_has_lost_all_steps(tmp_path, time):
    started(tmp_path, time, first=0, steps=9, marks=(4, 9))
    life = started(tmp_path, time, first=0, steps=2, marks=(2,)).life
    assert life["steps"] == 4 and life["redone"] == 18


@pytest.mark.parametrize(
    "bad",
    [
        "[1]",
        "{",
        '{"began": "x", "first": 0, "step": 1}',
        '{"began": 1, "first": 0, "step": 1, "load": "2"}',
        "7",
        "null",
    ],
)
def test_a_damaged_line_stops_no_start(tmp_path, time, bad, caplog):
    started(tmp_path, time, first=0, steps=4, marks=(4,))
    good = (tmp_path / "clock.jsonl").read_text()
    (tmp_path / "clock.jsonl").write_text(f"{bad}\n{good}")
    life = started(tmp_path, time, first=4, steps=1, marks=(5,)).life
    assert life["steps"] == 10 and "damaged" in caplog.text
    assert len(list(tmp_path.glob("clock.jsonl.damaged-*"))) == 1


def test_a_file_that_cannot_be_written_stops_no_run(tmp_path, time, caplog):
    (tmp_path / "gone").mkdir()
    clock = started(tmp_path / "gone", time, first=0, steps=0)
    shutil.rmtree(tmp_path / "gone")
    for step in (1, 2):
        time.now += 3
        clock.mark(step, now=True)
    assert clock.life["steps"] == 6 and caplog.text.count("cannot be written (No such file or directory)") == 1


def test_a_run_that_is_killed_tells_its_life(tmp_path, monkeypatch, caplog):
    """Killed behind its save; what the run, its lines and its report tell are one."""
    held_out = preference_file(tmp_path / "held_out.jsonl", 6, seed=3)
    config = make_config(
        tmp_path,
        model_directory(tmp_path / "model"),
        preference_file(tmp_path / "train.jsonl", 40),
        objective={"name": "dpo", "lam": None},
        data={"eval_path": str(held_out)},
        train={"max_steps": 4},
        checkpoint={"every_steps": 2},
    )
    add = loop.StepLog.add

    def killed(self, step, *rest):
        if step == 4:
            raise KeyboardInterrupt
        add(self, step, *rest)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(loop.StepLog, "add", killed)
        train(config)
    monkeypatch.setattr(clocks, "MARK_S", 0.0)
    with caplog.at_level("INFO"):
        assert train(config) == 0
    root = tmp_path / "run"
    lines = lines_of(root)
    life = life_of(lines)
    assert len({line["began"] for line in lines}) == 2 and [line["first"] for line in lines][-1] == 2
    assert all(life[phase] > 0 for phase in ("load", "compile", "reference", "steps", "evaluation", "save", "between"))
    # The sentence is of a moment later than the last line, which has three decimals.
    (told,) = re.findall(r"goodput (\S+) % of (\S+) s: ", caplog.text)
    expected = [100 * goodput(life), sum(life.values())]
    assert list(map(float, told)) == pytest.approx(expected, abs=0.2)
    goodputs = [line["goodput"] for line in metrics_of(root) if "loss" in line]
    assert len(goodputs) == 4 and all(0 < share < 1 for share in goodputs)
    length = (root / "clock.jsonl").stat().st_size
    assert train(config) == 0 and (root / "clock.jsonl").stat().st_size == length, "a finished run lives no longer"
    assert report([root], tmp_path / "report.html", with_texts=False) == 1
    page = (tmp_path / "report.html").read_text()
    assert "Where the time went" in page and f"{100 * goodput(life):.1f} %" in page
