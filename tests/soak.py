"""Kills a training job of two processes at random moments, again and again; its end equals that of a run never killed.

    python tests/soak.py --kills 50 --minutes 30

Bounded in time and in count: it ends when the job has ended after at least so many kills, or fails when the time is up
before. Each round starts the same command and, at a random moment, sends SIGKILL or SIGTERM to one process or to both.
It prints a JSON report: kills by signal, rounds that went back past a step that was not verified, steps lost (reached
and done again) in all and at most, and whether state, metrics and pairs equal the golden run's to the bit.
"""

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

import conftest  # noqa: E402, F401 (CPU devices, no network, compiled programs kept: before jax is imported)
import yaml  # noqa: E402
from runs import (  # noqa: E402
    metrics_of,
    model_directory,
    preference_file,
    raw_config,
    run_processes,
    state_of,
    verified_steps,
    without_times,
)

EVERY, STEP_S, HEARTBEAT_S, JOIN_S = 5, 0.05, 8, 40
END_S = 120.0
"""No round may take longer to end after its signal, nor the job to reach its end once it is left alone."""


def write_config(root: Path, model: Path, data: Path, steps: int) -> str:
    root.mkdir()
    raw = raw_config(root, model, data, train={"epochs": 10_000, "max_steps": steps}, checkpoint={"every_steps": EVERY})
    raw["distributed"] = {"heartbeat_timeout_s": HEARTBEAT_S, "join_timeout_s": JOIN_S}
    (root / "config.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    return str(root / "config.yaml")


def steps_reached(pairs: Path) -> list[list]:
    """Whole lines of the file of steps and their pairs; a kill may cut the last one short."""
    found = []
    for line in pairs.read_text().splitlines() if pairs.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def end(processes: list, timeout_s: float) -> list[int]:
    deadline = time.monotonic() + timeout_s
    for process in processes:
        process.said = process.communicate(timeout=max(deadline - time.monotonic(), 1))[0]
    return [process.returncode for process in processes]


def undisturbed(path: str, pairs: Path, minutes: float) -> list[int]:
    return end(run_processes(["train", path], faults=({"pairs": str(pairs)}, {})), 60 * minutes)


def one_round(path: str, pairs: Path, rng: random.Random, report: dict) -> bool:
    """Starts the job and disturbs it; returns whether it has ended by itself."""
    before = steps_reached(pairs)
    processes = run_processes(["train", path], faults=({"pairs": str(pairs), "step_s": STEP_S}, {"step_s": STEP_S}))
    # Most rounds are cut after some steps of their own, some before the first.
    wanted = len(before) + rng.choice([0, 1, rng.randrange(2 * EVERY), rng.randrange(6 * EVERY)])
    deadline, disturbed = time.monotonic() + END_S, False
    try:
        while len(steps_reached(pairs)) < wanted and time.monotonic() < deadline:
            if any(process.poll() is not None for process in processes):
                break
            time.sleep(0.02)
        time.sleep(rng.random() * (4.0 if wanted == len(before) else 0.3))
        if all(process.poll() is None for process in processes):
            kind = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
            for process in rng.choice([processes[:1], processes[1:], processes]):
                process.send_signal(kind)
            report["kills"][kind.name] += 1
            disturbed = True
        codes = end(processes, END_S)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                print(process.communicate()[0], file=sys.stderr)
    if 2 in codes or (1 in codes and not disturbed):  # a survivor may end with 1: its save has failed with its peer
        raise SystemExit(f"a process failed by itself, {codes}:\n{processes[0].said}\n{processes[1].said}")
    said = "".join(process.said for process in processes)
    report["walk_backs"] += "passed over" in said
    # What this round did again: steps at or below the highest of earlier rounds.
    highest = max((step for step, _ in before), default=0)
    new = [step for step, _ in steps_reached(pairs)[len(before) :]]
    lost = highest - (new[0] - 1) if new and highest else 0
    report["lost_steps"] += max(lost, 0)
    report["most_lost_steps"] = max(report["most_lost_steps"], lost)
    return codes == [0, 0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--steps", type=int, help="of the job; default: ten for each kill")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, started = random.Random(options.seed), time.monotonic()
    steps = options.steps or 10 * options.kills
    root = Path(tempfile.mkdtemp(prefix="sr_dpo_jax_soak_"))
    model, data = model_directory(root / "model"), preference_file(root / "train.jsonl", 48, seed=1)
    golden, job = write_config(root / "golden", model, data, steps), write_config(root / "job", model, data, steps)
    codes = undisturbed(golden, root / "golden" / "pairs", options.minutes)
    if codes != [0, 0]:
        raise SystemExit(f"the golden run failed: {codes}")
    report = {
        "kills": {"SIGKILL": 0, "SIGTERM": 0},
        "rounds": 0,
        "walk_backs": 0,
        "lost_steps": 0,
        "most_lost_steps": 0,
    }
    done = False
    while not done and sum(report["kills"].values()) < options.kills:
        if time.monotonic() - started > 60 * options.minutes:
            break
        done = one_round(job, root / "job" / "pairs", rng, report)
        report["rounds"] += 1
        print(json.dumps(report), file=sys.stderr, flush=True)
    if not done:  # left alone, it must end
        done = undisturbed(job, root / "job" / "pairs", options.minutes) == [0, 0]
    ours, theirs = state_of(root / "job" / "run"), state_of(root / "golden" / "run")
    report["steps"], report["minutes"] = steps, round((time.monotonic() - started) / 60, 1)
    report["state_bitwise"] = all(ours[name].tobytes() == theirs[name].tobytes() for name in theirs)
    report["metrics_bitwise"] = without_times(metrics_of(root / "job" / "run")) == without_times(
        metrics_of(root / "golden" / "run")
    )
    last = {step: pairs for step, pairs in steps_reached(root / "job" / "pairs")}
    report["pairs_equal"] = last == {step: pairs for step, pairs in steps_reached(root / "golden" / "pairs")}
    report["last_verified"] = verified_steps(root / "job" / "run")[-1]
    print(json.dumps(report, indent=2))
    enough = sum(report["kills"].values()) >= options.kills
    bitwise = report["state_bitwise"] and report["metrics_bitwise"] and report["pairs_equal"]
    return 0 if done and enough and bitwise and report["most_lost_steps"] <= 2 * EVERY else 1


if __name__ == "__main__":
    sys.exit(main())
