"""Whether a change to the code leaves every number of a run as it was, to the last bit.

    python tests/benchmarks/same_numbers.py record BEFORE     with the code as it was
    python tests/benchmarks/same_numbers.py record AFTER      with the code as it is
    python tests/benchmarks/same_numbers.py compare BEFORE AFTER
    python tests/benchmarks/same_numbers.py resume BEFORE     the code as it is goes on from the old code's checkpoints

`record` trains a small Pythia-shaped model on real HH-RLHF pairs, on 8 forced CPU devices (fsdp 4 × tensor 2) with two
micro-batches a step: sft, then dpo, ipo, sr_dpo and sr_ipo with a cached and with an online reference. `compare` reads
both sets of `metrics.jsonl` without their times. `resume` takes away every checkpoint after the first from a copy of a
recorded run and starts the same command again. About 8 minutes on two cores for each but `compare`.
"""

import argparse
import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

from benchmarks.hh_run import make_model  # noqa: E402
from runs import HH_FILE, metrics_of, without_times  # noqa: E402

STEPS, FIRST_SAVE, PAIRS = 12, 4, 160
RUNS = {
    "sft": {"objective": {"name": "sft"}},
    **{
        f"{name}-{mode}": {"objective": {"name": name} | lam, "reference": {"mode": mode}}
        for name, lam in (("dpo", {}), ("ipo", {}), ("sr_dpo", {"lam": 0.5}), ("sr_ipo", {"lam": 0.5}))
        for mode in ("cached", "online")
    },
}


def make_inputs(root: Path) -> dict[str, object]:
    """Writes model and data files and returns what every run's configuration shares."""
    with gzip.open(HH_FILE, "rt", encoding="utf-8") as file:
        rows = file.readlines()
    (root / "train.jsonl").write_text("".join(rows[:PAIRS]), encoding="utf-8")
    (root / "held_out.jsonl").write_text("".join(rows[PAIRS : PAIRS + 48]), encoding="utf-8")
    model = make_model(root / "model", hidden=128, layers=2, vocabulary_tokens=2048)
    return {
        "model": {"path": str(model), "init": "random", "dtype": "float32", "remat": "dots"},
        "data": {"path": str(root / "train.jsonl"), "eval_path": str(root / "held_out.jsonl"), "max_bad_rows": 9},
        "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2},
        "batch": {"pairs_per_step": 16, "row_length": 1024, "row_multiple": 8, "accumulation_steps": 2},
        "mesh": {"fsdp": 4, "tensor": 2},
        "train": {"epochs": 2, "max_steps": STEPS, "eval_every_steps": 6},
        "checkpoint": {"every_steps": FIRST_SAVE, "keep": 9},
    }


def train(directory: Path) -> None:
    """Runs `sr-dpo train` on the configuration in `directory`; raises where it does not end with exit code 0."""
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    environment["PYTHONPATH"] = os.environ.get("PYTHONPATH", str(REPOSITORY))
    command = [sys.executable, "-m", "sr_dpo_jax.cli", "train", "config.yaml"]
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    (directory / "log").write_text(done.stderr, encoding="utf-8")
    if done.returncode:
        sys.exit(f"{directory}: exit code {done.returncode}\n{done.stderr[-3000:]}")


def record(root: Path) -> None:
    root.mkdir(parents=True)
    shared = make_inputs(root.absolute())
    for name, changed in RUNS.items():
        directory = root / name
        directory.mkdir()
        (directory / "config.yaml").write_text(json.dumps({"output_dir": "run"} | shared | changed), encoding="utf-8")
        train(directory)
        print(f"{name}: loss {metrics_of(directory / 'run')[-1].get('loss')}", flush=True)


def resume(before: Path) -> None:
    for name in RUNS:
        copy = before / f"{name}-resumed"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(before / name, copy)
        for step in (copy / "run" / "checkpoints").iterdir():
            if step.name.isdigit() and int(step.name) > FIRST_SAVE:
                shutil.rmtree(step)
        train(copy)
        same = numbers(copy) == numbers(before / name)
        print(f"{name}: resumed from step {FIRST_SAVE}, {'the same numbers' if same else 'OTHER NUMBERS'}", flush=True)


def numbers(directory: Path) -> list[str]:
    """The lines of metrics.jsonl without times."""
    return [json.dumps(line, sort_keys=True) for line in without_times(metrics_of(directory / "run"))]


def compare(before: Path, after: Path) -> int:
    moved = 0
    for name in RUNS:
        old, new = numbers(before / name), numbers(after / name)
        differing = [number for number, (one, other) in enumerate(zip(old, new, strict=False), 1) if one != other]
        moved += bool(differing) or len(old) != len(new)
        print(f"{name}: {len(old)} and {len(new)} lines, {len(differing)} of them differ {differing or ''}")
        for number in differing[:1]:
            print(f"  {old[number - 1]}\n  {new[number - 1]}")
    return 1 if moved else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("record", "resume", "compare"))
    parser.add_argument("directories", nargs="+", type=Path)
    options = parser.parse_args()
    return {"record": record, "resume": resume, "compare": compare}[options.verb](*options.directories) or 0


if __name__ == "__main__":
    sys.exit(main())
