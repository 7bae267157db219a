"""Runs training once for each value of a grid and chooses between the runs on held-out pairs: the paper's λ.

    sr-dpo tune CONFIG objective.lam=0.1,0.3,0.5,1 --eval-pairs 50

Each point of the grid is a run of its own in output_dir/tune/KEY=VALUE, trained by `sr-dpo train` in a process of its
own, so that none inherits memory or compiled programs from another. All share one cache, so the reference is scored
once. On several hosts each starts the same command, as for `sr-dpo train`.
tune.json beside the runs holds what is finished: the same command goes on with the rest. Imports no jax.

The last evaluation of each run decides; with `checkpoint.best_metric` that of its best step, which `--best` takes.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import math
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from sr_dpo_jax.commands import console
from sr_dpo_jax.config.load import load_config
from sr_dpo_jax.config.schema import Config
from sr_dpo_jax.durable.files import json_digest, read_lines, sampled_digest, write_json
from sr_dpo_jax.durable.selection import Selection
from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.train.objective import OBJECTIVES

log = logging.getLogger(__name__)

EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED = 0, 1, 75
METRIC = "eval/rewards/accuracies"
MEASURES = ("rewards/accuracies", "augmented/accuracies", "margin", "augmented/margin", "loss")
"""The measures that may decide: the lowest `loss` is best, the highest of the others."""
KINDS_OF_FILES = (".json", ".safetensors", ".jinja", ".model", ".parquet", ".jsonl", ".gz", ".arrow")
"""The files of a directory of a model or of data that decide what is trained on."""
PLAIN_VALUE = re.compile(r"[\w.+-]+")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One point of the grid."""

    values: dict[str, str]
    """The values of the point by key, as written."""
    arguments: list[str]
    """The arguments of `sr-dpo train` for this point."""
    config: Config
    content: list[str | None]
    """The digests of the files of data, held-out sets and model that the configuration names."""

    @property
    def name(self) -> str:
        return Path(self.config.output_dir).name

    @property
    def digest(self) -> str:
        """The sha256 of the configuration and of the files that it names, the same on every host: a finished run counts
        for these alone. A hub name stands for its content: training compares that."""
        return json_digest([self.config.model_dump(mode="json", exclude={"distributed"}), self.content])


def _files_of(config: Config) -> list[str]:
    sets = [config.data.path, *(held_out.path for _, held_out in config.data.held_out)]
    return [source.path for sources in sets for source in sources] + [config.model.path]


def _content(path: str) -> str | None:
    """Digests a file, or samples of the files of a directory by name; None where there is none, as of a hub name."""
    place = Path(path)
    if place.is_dir():
        kept = sorted(file for file in place.rglob("*") if file.is_file() and file.suffix in KINDS_OF_FILES)
        return json_digest([[str(file.relative_to(place)), sampled_digest(file)] for file in kept])
    if not place.is_file():
        return None
    with place.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def candidates(path: str, overrides: Sequence[str], *, metric: str, eval_pairs: int | None) -> list[Candidate]:
    """Combines the values that overrides of the form `key=a,b,c` name; other overrides hold for every combination.

    Raises:
      UsageError: no override names several values, or one names a value twice or a key that tune decides, a combination
        is no valid configuration, or its runs would not have the metric.
    """
    grid, fixed = _grid(overrides)
    if eval_pairs is not None:
        _, _, name = set_of(metric).partition("/")
        fixed.append(f"data.{f'eval_sets.{name}.pairs' if name else 'eval_pairs'}={eval_pairs}")
    base = load_config(path, [*fixed, *(f"{key}={values[0]}" for key, values in grid.items())])
    _require_metric(base, metric)
    content = functools.cache(_content)  # the candidates share most files
    points = []
    for combination in itertools.product(*grid.values()):
        values = dict(zip(grid, combination, strict=True))
        chosen = [f"{key}={value}" for key, value in values.items()]
        output_dir = json.dumps(str(Path(base.output_dir) / "tune" / ",".join(chosen)))
        cache_dir = json.dumps(str(base.cache_path))
        arguments = [*fixed, *chosen, f"output_dir={output_dir}", f"cache_dir={cache_dir}"]
        config = load_config(path, arguments)
        points.append(Candidate(values, [path, *arguments], config, [content(file) for file in _files_of(config)]))
    return points


def _grid(overrides: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Parts overrides into the values of each key that has several, and the overrides that have one."""
    grid: dict[str, list[str]] = {}
    fixed = []
    for override in overrides:
        key, _, value = override.partition("=")
        values = value.split(",")
        if len(values) == 1 or value.startswith(("[", "{", '"', "'")):
            fixed.append(override)
            continue
        bad = [item for item in values if not PLAIN_VALUE.fullmatch(item) or values.count(item) > 1]
        if bad:
            raise UsageError(f"{override}: {bad[0]!r} stands twice or is no plain number or name; correct the values")
        if key in ("output_dir", "cache_dir") or key in grid:
            raise UsageError(f"{override}: {key} is set by tune itself or named twice; remove it")
        grid[key] = values
    if not grid:
        raise UsageError("no key has several values; name some, as in objective.lam=0.1,0.3,0.5,1")
    return grid, fixed


def set_of(metric: str) -> str:
    """Names the held-out set of a metric, `eval` or `eval/NAME`; raises UsageError where the metric cannot decide."""
    for measure in reversed(MEASURES):  # `augmented/margin` before `margin`, which is its end
        if metric.endswith(f"/{measure}"):
            return metric.removesuffix(f"/{measure}")
    raise UsageError(
        f"--metric {metric}: cannot decide; name eval/MEASURE or eval/SET/MEASURE of {', '.join(MEASURES)}"
    )


def _require_metric(config: Config, metric: str) -> None:
    held_out, known = set_of(metric), [name for name, _ in config.data.held_out]
    if not known:
        raise UsageError("data.eval_path is not set, nor data.eval_sets: they name the held-out pairs that decide")
    if held_out not in known:
        raise UsageError(f"--metric {metric}: no held-out set has it; those of the configuration: {', '.join(known)}")
    kind = OBJECTIVES[config.objective.name]
    if not metric.endswith("/loss") and not kind.needs_rejected:
        raise UsageError(f"--metric {metric}: objective.name={config.objective.name} has only {held_out}/loss")
    if "augmented" in metric and not config.refinement.prompt:
        raise UsageError(f"--metric {metric}: refinement.prompt is empty, so no run has it; remove that key")


def tune(path: str, overrides: Sequence[str], *, metric: str, eval_pairs: int | None) -> int:
    """Trains every point that is not finished, prints a table, writes tune.json; returns the exit code.

    The metric, as in metrics.jsonl, decides on the first `eval_pairs` pairs of its held-out set; None takes all.

    Raises:
      UsageError: see `candidates`; or tune.json or a run's metrics are damaged, or no run has a finite metric.
    """
    grid = candidates(path, overrides, metric=metric, eval_pairs=eval_pairs)
    state = Path(grid[0].config.output_dir).with_name("tune.json")
    state.parent.mkdir(parents=True, exist_ok=True)
    finished = _read_finished(state)
    with _Child() as child:
        for number, candidate in enumerate(grid, 1):
            if candidate.digest in finished:
                log.info("%s: finished before", candidate.name)
                continue
            log.info("%s: %d of %d", candidate.name, number, len(grid))
            code = child.train(candidate)
            if code != EXIT_DONE:
                log.warning("%s: ended with exit code %d; the same command goes on from here", candidate.name, code)
                return code
            metrics = _evaluation(candidate.config, metric)
            finished[candidate.digest] = {"values": candidate.values, "metrics": metrics}
            write_json(state, {"metric": metric, "chosen": None, "finished": finished})
    results = {candidate.name: finished[candidate.digest]["metrics"] for candidate in grid}
    best, tied = choose(results, metric)
    chosen = next(candidate.values for candidate in grid if candidate.name == best)
    write_json(state, {"metric": metric, "chosen": chosen, "finished": finished})
    _print_table(results, metric, best)
    if tied:
        loss = f"{set_of(metric)}/loss"
        print(f"Equal in {metric}: {', '.join(tied)}; the lowest {loss}, then the first named, decides.")
    print(f"chosen: {best.replace(',', ' ')}    ({state})")
    return EXIT_DONE


def choose(metrics: dict[str, dict[str, float]], metric: str) -> tuple[str, list[str]]:
    """Gives the name with the best metric, and all names that tie for it where there are several.

    The lowest loss is best, the highest of another metric. Ties go to the lowest loss on the same pairs, then to the
    first. A value that is not finite is worse than any other.

    Raises:
      UsageError: the metric is finite in no run.
    """
    loss_name = f"{set_of(metric)}/loss"

    def key(name: str) -> tuple[float, float]:
        value, loss = (metrics[name].get(field, math.nan) for field in (metric, loss_name))
        value = value if metric == loss_name else -value
        return tuple(part if math.isfinite(part) else math.inf for part in (value, loss))

    best = min(metrics, key=key)
    if key(best)[0] == math.inf:
        raise UsageError(f"{metric} is not finite in any run; look at their losses, or lower optimizer.learning_rate")
    tied = [name for name in metrics if key(name)[0] == key(best)[0]]
    return best, tied if len(tied) > 1 else []


class _Child:
    """Runs `sr-dpo train` in a process of its own and hands SIGTERM on to it, within a `with` block.

    A signal between two runs ends tune with 75 before the next one starts.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False

    def __enter__(self) -> "_Child":
        self._before = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before)
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait()

    def train(self, candidate: Candidate) -> int:
        """Trains one point and returns the exit code."""
        if self._stopped:
            return EXIT_PREEMPTED
        self._process = subprocess.Popen([sys.executable, "-m", "sr_dpo_jax.cli", "train", *candidate.arguments])
        if self._stopped:  # the signal came while the process was being made
            self._process.send_signal(signal.SIGTERM)
        code = self._process.wait()
        if code < 0:  # killed by a signal: SIGTERM before it could listen, or another that is no preemption
            return EXIT_PREEMPTED if self._stopped else EXIT_FAILED
        return code

    def _receive(self, _number: int, _frame: FrameType | None) -> None:
        self._stopped = True
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)


def _evaluation(config: Config, metric: str) -> dict[str, float]:
    """Reads the evaluation of a run's best step, else its last one, under its names in metrics.jsonl."""
    metrics_file, best_metric = Path(config.output_dir) / "metrics.jsonl", config.checkpoint.best_metric
    evaluations = [line for line in read_lines(metrics_file) if f"{set_of(metric)}/loss" in line]
    selection = Selection(best_metric, config.checkpoint.best_mode, min_delta=0.0, patience=None)
    for line in evaluations:
        if best_metric in line:
            selection = selection.after(line["step"], float(line[best_metric]))
    decisive = [line for line in evaluations if selection.step in (None, line["step"])]
    if not decisive or metric not in decisive[-1]:
        raise UsageError(
            f"{metrics_file}: holds no evaluation with {metric}; delete the run's directory to run it again"
        )
    return {name: float(value) for name, value in decisive[-1].items()}


def _read_finished(state: Path) -> dict[str, Any]:
    """Reads the finished runs of tune.json by the digest of their configuration."""
    if not state.exists():
        return {}
    try:
        finished = json.loads(state.read_text(encoding="utf-8"))["finished"]
        return {digest: {"values": run["values"], "metrics": run["metrics"]} for digest, run in finished.items()}
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{state}: damaged ({type(error).__name__}); delete it, and finished runs are read anew"
        ) from error


def _print_table(results: dict[str, dict[str, float]], metric: str, best: str) -> None:
    held_out = set_of(metric)
    columns = dict.fromkeys([metric, *(f"{held_out}/{measure}" for measure in MEASURES)])
    columns = [name for name in columns if any(name in metrics for metrics in results.values())]
    table = console.table("value", *(f">{name.removeprefix(f'{held_out}/')}" for name in columns), "")
    for name, metrics in results.items():
        cells = [f"{metrics[key]:.4g}" if key in metrics else "–" for key in columns]
        console.row(table, name, *cells, "chosen" if name == best else "")
    console.section(f"Held-out pairs, {results[best].get(f'{held_out}/pairs', 0):.0f} of them", table)
