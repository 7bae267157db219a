"""Faults that end processes, with real processes and real signals: the promises P1, P3, P4 and P5 of the README.

Two processes join through jax.distributed over gloo, one device each. Golden is the same run, never disturbed.
"""

import json
import shutil
import signal
import time

import numpy as np
import pytest
import yaml
from runs import (
    metrics_of,
    model_directory,
    preference_file,
    raw_config,
    run_process,
    run_processes,
    state_of,
    verified_steps,
    without_times,
)

from sr_dpo_jax.durable.preemption import EXIT_KILLED
from sr_dpo_jax.train.loop import EXIT_PREEMPTED

pytestmark = pytest.mark.faults

STEPS, EVERY = 24, 4
START_S = 400
"""Time for a start on a busy machine; promises are measured from the fault on."""
NOTICED_S = 60
"""Time in which a process must have noticed that another is dead: the README promises 30 s; a busy machine adds."""


def write_config(root, world, *, own_cache=False, **sections):
    """A run's file. The reference is scored once for all runs, but for those with a cache of their own."""
    train = {"epochs": 4, **sections.pop("train", {})}
    raw = raw_config(root, *world, train=train, checkpoint={"every_steps": EVERY}, **sections)
    raw["cache_dir"] = str((root if own_cache else world[0].parent) / "cache")
    root.mkdir(exist_ok=True)
    path = root / "config.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    return model_directory(root / "model"), preference_file(root / "train.jsonl", 48, seed=1)


@pytest.fixture(scope="module")
def golden(world, tmp_path_factory):
    """Run directory and pairs of two processes that nobody disturbs."""
    root = tmp_path_factory.mktemp("golden")
    faults = ({"pairs": str(root / "pairs")}, {})
    assert ends(run_processes(["train", write_config(root, world)], faults=faults)) == [0, 0]
    return root / "run", (root / "pairs").read_text().splitlines()


def ends(processes, timeout=START_S):
    """Exit codes of all processes; kills what is left after the time and fails with everything they said."""
    deadline = time.monotonic() + timeout
    try:
        for process in processes:
            process.said = process.communicate(timeout=max(deadline - time.monotonic(), 0.1))[0]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.said = "(killed by the test)\n" + process.communicate()[0]
        print(*(process.said for process in processes), sep="\n--- the other process\n")
    return [process.returncode for process in processes]


def wait_for(there, processes):
    deadline = time.monotonic() + START_S
    while not there():
        dead = [process for process in processes if process.poll() is not None]
        if dead or time.monotonic() > deadline:
            ends(processes, 5)
            pytest.fail("a process ended, or the place was not reached in time")
        time.sleep(0.02)


def lines(root):
    file = root / "run" / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def assert_equals_golden(run, golden):
    ours, theirs = state_of(run), state_of(golden)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].tobytes() == theirs[name].tobytes(), name
    assert without_times(metrics_of(run)) == without_times(metrics_of(golden))


def test_p1_sigterm_and_sigkill_of_one_of_two_and_p3_resumes_bitwise(world, golden, tmp_path):
    """SIGTERM saves one step on both, SIGKILL of either ends the other; each start goes on, to the golden end."""
    path = write_config(tmp_path, world, train={"max_steps": STEPS})
    processes = run_processes(["train", path], faults=({"step_s": 0.2}, {"step_s": 0.2}))
    wait_for(lambda: lines(tmp_path) >= 2, processes)
    processes[1].send_signal(signal.SIGTERM)
    assert ends(processes, 60) == [EXIT_PREEMPTED] * 2
    stopped = verified_steps(tmp_path / "run")[-1]
    assert 2 <= stopped < STEPS and metrics_of(tmp_path / "run")[-1]["step"] == stopped
    for victim in (0, 1):
        pairs, before = tmp_path / f"pairs-{victim}", verified_steps(tmp_path / "run")[-1]
        processes = run_processes(["train", path], faults=({"step_s": 0.1, "pairs": str(pairs)}, {"step_s": 0.1}))
        wait_for(lambda pairs=pairs: pairs.exists() and pairs.read_text().count("\n") >= EVERY + 3, processes)
        processes[victim].kill()
        codes = ends(processes, NOTICED_S)
        assert codes[victim] == -signal.SIGKILL and codes[1 - victim] not in (0, EXIT_PREEMPTED)
        steps = [json.loads(line)[0] for line in pairs.read_text().splitlines()]
        assert steps[0] == before + 1, "it goes on behind the newest verified step"
        reached, saved = steps[-1], verified_steps(tmp_path / "run")[-1]
        assert reached - saved <= 2 * EVERY, "one save interval, and one more where a save was under way"
    assert ends(run_processes(["train", path])) == [0, 0]
    assert_equals_golden(tmp_path / "run", golden[0])


def test_p1_a_process_that_fails_ends_the_other(world, tmp_path):
    path = write_config(tmp_path, world)
    processes = run_processes(["train", path], faults=({}, {"raise_at": 3}))
    wait_for(lambda: lines(tmp_path) >= 2, processes)
    codes = ends(processes, NOTICED_S)
    assert codes[1] == 1 and "the fault that was asked for" in processes[1].said
    assert codes[0] not in (0, EXIT_PREEMPTED)


def test_p1_a_peer_that_never_comes_ends_the_wait_for_it(world, tmp_path):
    """The coordinator may have died before this process joined: nobody is there to say so."""
    path = write_config(tmp_path, world)
    alone = ["distributed.processes=2", "distributed.coordinator_address=127.0.0.1:1", "distributed.process_id=1"]
    process = run_process(["train", path, *alone, "distributed.join_timeout_s=3"])
    said, _ = process.communicate(timeout=60)
    assert process.returncode not in (0, EXIT_PREEMPTED)
    assert "joining 2 processes; all must have come within distributed.join_timeout_s=3" in said
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_p1_a_hanging_step_dumps_stacks_and_ends_both(world, tmp_path):
    # Long enough for the first step on a busy machine, which counts as a hang no less than the one that is injected.
    path = write_config(tmp_path, world, train={"hang_timeout_s": 20})
    mark = tmp_path / "mark"
    processes = run_processes(["train", path], faults=({}, {"hang_at": 5, "mark": str(mark)}))
    wait_for(mark.exists, processes)
    codes = ends(processes, NOTICED_S)
    assert all(code not in (0, EXIT_PREEMPTED) for code in codes)
    assert "Timeout" in processes[1].said and "slow_add" in processes[1].said, "the stack says where it hung"


def test_p1_sigterm_while_scoring_stops_both_and_the_scores_stay(world, tmp_path):
    path = write_config(tmp_path, world, own_cache=True)
    mark = tmp_path / "mark"
    faults = ({"scoring_s": 0.7, "mark": str(mark)}, {"scoring_s": 0.7})
    processes = run_processes(["train", path], faults=faults)
    wait_for(mark.exists, processes)
    processes[1].send_signal(signal.SIGTERM)
    assert ends(processes, 60) == [EXIT_PREEMPTED] * 2
    assert not (tmp_path / "run" / "metrics.jsonl").exists() and list((tmp_path / "cache").glob("reference-*"))


def test_p1_a_second_sigterm_ends_one_of_two_at_once(world, tmp_path):
    path = write_config(tmp_path, world, own_cache=True)
    mark = tmp_path / "mark"
    faults = ({"scoring_s": 30}, {"scoring_s": 30, "mark": str(mark)})
    processes = run_processes(["train", path], faults=faults)
    wait_for(mark.exists, processes)
    for _ in range(2):
        processes[1].send_signal(signal.SIGTERM)
        time.sleep(0.3)
    assert processes[1].wait(timeout=20) == EXIT_KILLED, "the step of scoring that it was in takes 30 s"
    assert ends(processes, 60)[0] not in (0, EXIT_PREEMPTED)


@pytest.mark.parametrize("place", ["scoring_s", "verify_s"])
def test_p1_a_second_sigterm_ends_a_single_process_at_once(world, tmp_path, place):
    """While the reference is scored, and while the last checkpoint is verified; then it goes on from what there is."""
    path = write_config(tmp_path, world, own_cache=place == "scoring_s", train={"max_steps": 2})
    mark = tmp_path / "mark"
    process = run_process(["train", path], fault={place: 30, "mark": str(mark)})
    wait_for(mark.exists, [process])
    if place == "scoring_s":  # one signal is enough to stop before the first step, so the wait must not see it
        process.send_signal(signal.SIGTERM)
        assert ends([process], 20) == [EXIT_PREEMPTED]
    else:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert process.poll() is None, "the first one waits for the checkpoint"
        process.send_signal(signal.SIGTERM)
        assert ends([process], 5) == [EXIT_KILLED]
        assert verified_steps(tmp_path / "run") == []
    assert ends([run_process(["train", path])]) == [0]
    assert verified_steps(tmp_path / "run") == [2]


def test_p1_sigkill_between_commit_and_verification(world, tmp_path):
    """The half-made step is ignored, kept, and saved again under its own name."""
    path = write_config(tmp_path, world, train={"max_steps": EVERY})
    mark = tmp_path / "mark"
    process = run_process(["train", path], fault={"verify_s": 30, "mark": str(mark)})
    wait_for(mark.exists, [process])
    process.kill()
    ends([process], 5)
    assert (tmp_path / "run" / "checkpoints" / str(EVERY)).is_dir() and verified_steps(tmp_path / "run") == []
    again = run_process(["train", path])
    assert ends([again]) == [0]
    assert "never verified" in again.said and f"kept as {EVERY}.unverified" in again.said
    assert verified_steps(tmp_path / "run") == [EVERY]
    assert (tmp_path / "run" / "checkpoints" / f"{EVERY}.unverified").is_dir()


def test_p4_two_processes_one_and_two_again_see_the_same_pairs(world, golden, tmp_path):
    path = write_config(tmp_path, world)
    for processes, steps in ((2, 5), (1, 13), (2, STEPS)):
        fault = {"pairs": str(tmp_path / "pairs")}
        arguments = ["train", path, f"train.max_steps={steps}"]
        if processes == 1:
            assert ends([run_process(arguments, fault=fault)]) == [0]
        else:
            assert ends(run_processes(arguments, faults=(fault, {}))) == [0, 0]
    assert (tmp_path / "pairs").read_text().splitlines() == golden[1]
    ours, theirs = state_of(tmp_path / "run"), state_of(golden[0])
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-3, atol=2e-5, err_msg=name)


def test_p5_a_disk_that_fills_is_noticed_retried_once_and_fatal(world, tmp_path):
    path = write_config(tmp_path, world)
    assert ends([run_process(["train", path, f"train.max_steps={EVERY}"])]) == [0]
    before = {file: file.read_bytes() for file in (tmp_path / "run" / "checkpoints").rglob("*") if file.is_file()}
    process = run_process(["train", path], fault={"fsize": 20_000, "step_s": 0.5})
    assert ends([process]) == [1]
    assert "trying once more" in process.said and "checkpoints before it are untouched" in process.said
    last = process.said.strip().splitlines()[-1]
    assert last.startswith("sr-dpo train: ") and "File too large" in last, "the readable word comes last"
    assert metrics_of(tmp_path / "run")[-1]["step"] < 2 * EVERY + 3, "noticed at the next step, not at the end"
    for file, content in before.items():
        assert file.read_bytes() == content, file
    assert ends([run_process(["train", path, f"train.max_steps={2 * EVERY}"])]) == [0]
    assert verified_steps(tmp_path / "run") == [EVERY, 2 * EVERY]


def test_p1_a_slow_save_is_no_hang(world, tmp_path):
    """Reading back takes twice as long as a step may; a save has a limit of its own."""
    path = write_config(tmp_path, world, train={"hang_timeout_s": 4, "max_steps": EVERY + 1})
    process = run_process(["train", path], fault={"verify_s": 8})
    assert ends([process]) == [0]
    assert verified_steps(tmp_path / "run")[-1] == EVERY + 1
    again = run_process(["train", path, "checkpoint.save_timeout_s=3", "train.max_steps=6"], fault={"verify_s": 10})
    assert ends([again]) == [1]
    assert "await_save" in again.said and "Timeout" in again.said
    assert ends([run_process(["train", path, "train.max_steps=6"])]) == [0]


def test_p2_two_runs_on_one_directory_the_second_is_refused(world, tmp_path):
    path = write_config(tmp_path, world)
    first = run_process(["train", path], fault={"step_s": 1})
    wait_for(lambda: lines(tmp_path) >= 1, [first])
    second = run_process(["train", path])
    assert ends([second], 60) == [2]
    assert "is running in this directory" in second.said and str(first.pid) in second.said
    first.kill()
    ends([first], 5)
    assert (tmp_path / "run" / "lease.json").exists(), "a killed process leaves its lease"
    third = run_process(["train", path, "train.max_steps=1"])
    assert ends([third]) == [0], "whose process is gone, so it is stale at once"
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["pairs"] == 48


def test_p1_sigkill_while_scoring_continues_where_it_stopped(world, tmp_path):
    path = write_config(tmp_path, world, own_cache=True, train={"max_steps": 1})
    mark = tmp_path / "mark"
    process = run_process(["train", path], fault={"scoring_s": 0.5, "mark": str(mark)})
    files = lambda: list((tmp_path / "cache").glob("reference-*.safetensors"))  # noqa: E731
    wait_for(lambda: mark.exists() and len(files()) == 2, [process])
    process.kill()
    ends([process], 5)
    again = run_process(["train", path])
    assert ends([again]) == [0]
    assert "is damaged" not in again.said and "reference on training pairs 1/" not in again.said, "step 1 was kept"
    assert "scored again, as they were" in again.said


def test_p2_two_processes_agree_to_pass_over_a_damaged_step(world, golden, tmp_path):
    """The damage lies in what process 1 wrote; both go back to the same step and reach the golden end."""
    path = write_config(tmp_path, world)
    shutil.copytree(golden[0], tmp_path / "run")
    files = (tmp_path / "run" / "checkpoints" / str(STEPS) / "state" / "ocdbt.process_1" / "d").iterdir()
    damaged = max(files, key=lambda file: file.stat().st_size)
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    processes = run_processes(["train", path])
    assert ends(processes) == [0, 0]
    assert all(
        "passed over" in process.said and f"resuming at step {STEPS - EVERY}" in process.said for process in processes
    )
    assert_equals_golden(tmp_path / "run", golden[0])
