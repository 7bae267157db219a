"""Two commands that write to one output: the second is told of the first, and what is stale stops nobody."""

import json
import signal
import subprocess
import sys
import time

import pytest
from runs import model_directory, preference_file, raw_config, run_process, run_processes, written

from sr_dpo_jax.cli import main
from sr_dpo_jax.durable import lease as leases

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("same_programs")]

START_S = 400


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    return model_directory(root / "model"), preference_file(root / "train.jsonl", 12, seed=1)


def command(kind, root, world):
    """The arguments of a command, and the file that it writes (of eval and demo the directory's)."""
    raw = raw_config(root, *world, generation={"slots": 8, "max_new_tokens": 6, "temperature": 0.7})
    raw["data"]["eval_path"] = str(world[1])
    path, output = written(root, raw), root / "out.jsonl"
    (root / "q.jsonl").write_text('{"id": 1, "text": "question"}\n', encoding="utf-8")
    (root / "a.jsonl").write_text('{"id": 1, "response": "answer"}\n', encoding="utf-8")
    files = [str(root / name) for name in ("a.jsonl", "a.jsonl")]
    judged = ["judge", *files, "--questions", str(root / "q.jsonl"), "--model", "m", "--base-url", "http://127.0.0.1:9"]
    return {
        "generate": (["generate", path, "--prompts", str(world[1]), "--output", str(output)], output),
        "score": (["score", path, "--output", str(output)], output),
        "judge": ([*judged, "--output", str(output)], output),
        "eval": (["eval", path], root / "run" / "eval.json"),
        "demo": (["demo", "--output", str(root / "run")], root / "run" / "lease.json"),
    }[kind]


def lease_of(output):
    return output if output.name == "lease.json" else output.with_name(f".{output.name}.lease")


@pytest.mark.parametrize("kind", ["generate", "score", "judge", "eval", "demo"])
def test_p2_the_second_command_at_one_output_is_refused(world, tmp_path, capsys, monkeypatch, kind):
    if kind == "judge":
        pytest.importorskip("openai")
        monkeypatch.setenv("OPENAI_API_KEY", "sk-none")
    arguments, output = command(kind, tmp_path, world)
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    try:
        (tmp_path / "run").mkdir()
        holder = {**leases._this_process(), "pid": other.pid, "started": leases._started(other.pid), "token": "its"}
        lease_of(output).write_text(json.dumps(holder), encoding="utf-8")
        before = sorted(tmp_path.rglob("*"))
        assert main(arguments) == 2
        said = capsys.readouterr().err
        assert f"{output}: process {other.pid} on " in said, said
        assert "wait for it, stop it, or " in said and "another " in said.rpartition("or ")[2]
        after = [path for path in sorted(tmp_path.rglob("*")) if not path.is_relative_to(tmp_path / "cache")]
        assert after == before and json.loads(lease_of(output).read_text()) == holder
    finally:
        other.kill()
        other.wait()
    if kind in ("generate", "score", "eval"):
        assert main(arguments) == 0, "its process is gone, so the lease is stale at once"
        assert output.exists() and not lease_of(output).exists()


def wait_for(there, processes):
    deadline = time.monotonic() + START_S
    while not there():
        if time.monotonic() > deadline or any(process.poll() is not None for process in processes):
            for process in processes:
                process.kill()
            ended(*processes)
            pytest.fail("a process ended, or the place was not reached in time")
        time.sleep(0.05)


def ended(*processes):
    said = [process.communicate(timeout=START_S)[0] for process in processes]
    print(*said, sep="\n--- the other process\n")
    return [process.returncode for process in processes], said


def test_p2_two_generations_at_once_the_second_is_told_and_a_killed_one_goes_on(world, tmp_path):
    arguments, output = command("generate", tmp_path, world)
    partial = output.with_name("out.jsonl.partial")
    first = run_process(arguments, fault={"response_s": 6})
    wait_for(lambda: partial.exists() and partial.read_text().count("\n") >= 2, [first])
    (code,), (said,) = ended(run_process(arguments))
    assert code == 2 and f"{output}: process {first.pid} on " in said
    assert first.poll() is None
    first.kill()
    ended(first)
    assert lease_of(output).exists(), "a killed process leaves its lease"
    (code,), (said,) = ended(run_process(arguments))
    assert code == 0 and "going on after" in said
    assert [path.name for path in tmp_path.iterdir() if "out.jsonl" in path.name] == ["out.jsonl"]


def test_p1_generation_of_two_processes_with_outputs_of_their_own_goes_on(world, tmp_path):
    """Each host has its own disk: what process 0 finds there counts, whatever lies on the other's."""
    arguments, golden = command("generate", tmp_path, world)
    assert main(arguments) == 0
    disks = [tmp_path / "disk0", tmp_path / "disk1"]
    for disk in disks:
        disk.mkdir()
    own = [["--prompts", str(world[1]), "--output", str(disk / "out.jsonl")] for disk in disks]
    arguments = arguments[:2]
    partial = disks[0] / "out.jsonl.partial"
    started = run_processes(arguments, own=own, faults=({"response_s": 0.5}, {"response_s": 0.5}))
    wait_for(lambda: partial.exists() and partial.read_text().count("\n") >= 4, started)
    started[1].kill()
    codes, _ = ended(*started)
    assert codes[1] == -signal.SIGKILL and codes[0] not in (0, 75)
    kept = partial.read_text().splitlines()[1:]
    # What lies on process 1's disk is another one's, and begun with other settings: it plays no part.
    (disks[1] / "out.jsonl.partial").write_text('{"settings": "other"}\n', encoding="utf-8")
    codes, said = ended(*run_processes(arguments, own=own))
    assert codes == [0, 0] and f"going on after {len(kept)} responses" in said[0]
    assert (disks[0] / "out.jsonl").read_text() == golden.read_text()
    assert not (disks[1] / "out.jsonl").exists() and not partial.exists()
