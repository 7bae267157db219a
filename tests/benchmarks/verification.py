"""What verifying checkpoints costs a run on the HH-RLHF pairs, as a share of the time between two saves, in one run.

    python tests/benchmarks/verification.py [--hidden 256] [--layers 6] [--steps 6]

The model and job of hh_run.py, saving at every other step. Everything that verification adds is timed where it happens:
on the training thread (taking hold of the host copies), and in the background (digests, reading back, writing them
down), both by the clock and in CPU time of its thread. The share is that time over `checkpoint.every_steps` (default)
steps of the same run, as if the background took every second from training. Prints JSON; also how long the check before
a resume takes.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests"), str(REPOSITORY / "tests" / "benchmarks")]
os.environ["JAX_PLATFORMS"] = "cpu"

from hh_run import make_model  # noqa: E402
from runs import HH_FILE, metrics_of  # noqa: E402

from sr_dpo_jax.config.load import config_from_dict  # noqa: E402
from sr_dpo_jax.config.schema import Checkpoint  # noqa: E402
from sr_dpo_jax.durable import integrity  # noqa: E402
from sr_dpo_jax.train.loop import train  # noqa: E402


def timed(name: str, into: dict[str, list[tuple[float, float]]]) -> None:
    """Replaces a function of integrity.py by itself and two clocks."""
    function = getattr(integrity, name)

    def measured(*arguments, **keywords):
        wall, cpu = time.monotonic(), time.thread_time()
        try:
            return function(*arguments, **keywords)
        finally:
            into.setdefault(name, []).append((time.monotonic() - wall, time.thread_time() - cpu))

    setattr(integrity, name, measured)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="sr_dpo_jax_verification_"))
    raw = {
        "output_dir": str(root / "run"),
        "model": {"path": str(make_model(root / "model", hidden=options.hidden, layers=options.layers))},
        "data": {"path": str(HH_FILE), "format": "hh_rlhf", "max_bad_rows": 9},
        "objective": {"name": "sr_dpo", "lam": 0.5},
        "reference": {"mode": "online"},
        "batch": {"pairs_per_step": 64, "row_length": 2048, "row_multiple": 8},
        "train": {"max_steps": options.steps},
        "checkpoint": {"every_steps": 2},
    }
    raw["model"] |= {"init": "random", "dtype": "float32"}
    times: dict[str, list[tuple[float, float]]] = {}
    for name in ("host_shards", "digest_shards", "check_shards", "write"):
        timed(name, times)
    code = train(config_from_dict(raw, where="benchmark"))
    lines = metrics_of(root / "run")[1:]  # the first step waits for what the others find ready
    step_s = sorted(line["step_time_s"] for line in lines)[len(lines) // 2]
    per_save = {name: max(wall for wall, _ in found) for name, found in times.items()}
    step = max((root / "run" / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    size = sum(file.stat().st_size for file in step.rglob("*") if file.is_file())
    started = time.monotonic()
    integrity.check(step)
    every = Checkpoint().every_steps
    report = {
        "exit_code": code,
        "step_time_s": round(step_s, 3),
        "checkpoint_bytes": size,
        "seconds_per_save": {name: round(seconds, 4) for name, seconds in per_save.items()},
        "cpu_seconds_per_save": round(sum(max(cpu for _, cpu in found) for found in times.values()), 4),
        "share_of_step_time": sum(per_save.values()) / (every * step_s),
        "share_on_training_thread": per_save["host_shards"] / (every * step_s),
        "check_before_resume_s": round(time.monotonic() - started, 3),
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
