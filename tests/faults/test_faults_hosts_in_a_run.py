"""What befalls one of two processes in mid-run: it stands still, its disk fills, a signal comes, files go away."""

import shutil
import signal
import time

import numpy as np
import pytest
from runs import model_directory, preference_file, raw_config, run_processes, state_of, verified_steps, written
from safetensors.numpy import load_file, save_file

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("same_programs")]

START_S, STEPS, EVERY = 400, 12, 4


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    return model_directory(root / "model"), preference_file(root / "train.jsonl", 48, seed=1)


def command(world, root, **sections):
    cache = str(world[0].parent / "cache")  # the reference is scored once for all runs
    raw = raw_config(root, *world, train={"epochs": 2}, checkpoint={"every_steps": EVERY}, cache_dir=cache, **sections)
    return ["train", written(root, raw)]


@pytest.fixture(scope="module")
def golden(world, tmp_path_factory):
    """The end of the run that nobody disturbs."""
    root = tmp_path_factory.mktemp("golden")
    assert ended(run_processes(command(world, root)))[0] == [0, 0]
    return state_of(root / "run")


def ended(processes, timeout=START_S):
    """Exit codes and output of all processes; what is left after the time is killed, and the test fails."""
    deadline, said = time.monotonic() + timeout, []
    try:
        for process in processes:
            said.append(process.communicate(timeout=max(deadline - time.monotonic(), 0.1))[0])
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                said.append("(killed by the test)\n" + process.communicate()[0])
        print(*said, sep="\n--- the other process\n")
    return [process.returncode for process in processes], said


def wait_for(there, processes):
    deadline = time.monotonic() + START_S
    while not there():
        if time.monotonic() > deadline or any(process.poll() is not None for process in processes):
            ended(processes, 5)
            pytest.fail("a process ended, or the place was not reached in time")
        time.sleep(0.02)


def lines(root):
    file = root / "run" / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def assert_goes_on_to(golden, world, root):
    codes, said = ended(run_processes(command(world, root)))
    assert codes == [0, 0] and not any("Traceback" in text for text in said)
    ours = state_of(root / "run")
    assert all(ours[name].tobytes() == golden[name].tobytes() for name in golden)


def test_p1_a_process_that_is_stopped_for_40_s_ends_both_and_nothing_is_lost(world, golden, tmp_path):
    """SIGSTOP longer than heartbeats may be missed: the other ends; woken up, the first writes nothing and ends too."""
    processes = run_processes(command(world, tmp_path), faults=({"step_s": 0.3}, {"step_s": 0.3}))
    wait_for(lambda: lines(tmp_path) >= EVERY + 2, processes)
    processes[1].send_signal(signal.SIGSTOP)
    time.sleep(40)
    assert processes[0].poll() not in (None, 0, 75), "30 seconds are promised"
    processes[1].send_signal(signal.SIGCONT)
    codes, _ = ended(processes, 60)
    assert all(code not in (0, 75) for code in codes)
    assert_goes_on_to(golden, world, tmp_path)


@pytest.mark.parametrize("place", ["compile_s", "verify_s"])
def test_p1_sigterm_while_compiling_or_saving_gives_75(world, tmp_path, place):
    mark = tmp_path / "mark"
    faults = ({place: 6}, {place: 6, "mark": str(mark)})
    processes = run_processes(command(world, tmp_path), faults=faults)
    wait_for(mark.exists, processes)
    processes[1].send_signal(signal.SIGTERM)
    codes, said = ended(processes, 120)
    assert codes == [75, 75] and not any("Traceback" in text for text in said)
    newest = verified_steps(tmp_path / "run")[-1]
    assert newest == 1 if place == "compile_s" else newest >= EVERY, "processes stop together after a step"


def test_p5_a_disk_that_is_full_on_one_host_alone_ends_both(world, golden, tmp_path):
    processes = run_processes(command(world, tmp_path), faults=({"step_s": 0.2}, {"fsize": 20_000, "step_s": 0.2}))
    codes, said = ended(processes)
    assert all(code not in (0, 75) for code in codes)
    assert codes[1] == 1 and "File too large" in said[1].strip().splitlines()[-1]
    assert verified_steps(tmp_path / "run") == []
    assert_goes_on_to(golden, world, tmp_path)


def test_p5_a_directory_that_is_removed_in_mid_run_is_one_error(world, tmp_path):
    processes = run_processes(command(world, tmp_path), faults=({"step_s": 6}, {"step_s": 6}))
    wait_for(lambda: lines(tmp_path) >= 2, processes)
    shutil.rmtree(tmp_path / "run")
    codes, said = ended(processes)
    assert all(code not in (0, 75) for code in codes)
    last = said[0].strip().splitlines()[-1]
    assert last.startswith("sr-dpo train: ") and f"{tmp_path / 'run' / 'lease.json'}: was removed" in last


def test_p1_other_weights_on_one_host_are_refused(world, tmp_path):
    """The same model with other numbers, as one host would fetch another commit."""
    from sr_dpo_jax.cli import main

    first = preference_file(tmp_path / "few.jsonl", 8)
    made = command((world[0], first), tmp_path)
    assert main([*made, "train.max_steps=1"]) == 0
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "one")]) == 0
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    tensors = load_file(tmp_path / "other" / "model.safetensors")
    name = max(tensors, key=lambda name: tensors[name].size)
    tensors[name] = np.roll(tensors[name], 1)
    save_file(tensors, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    start = [*made, f"output_dir={tmp_path / 'second'}", "model.init=pretrained"]
    own = [[f"model.path={tmp_path / name}"] for name in ("one", "other")]
    codes, said = ended(run_processes(start, own=own))
    assert codes == [2, 2] and all("model.path: not on process 1 as on process 0" in text for text in said)
    assert not (tmp_path / "second").exists()
