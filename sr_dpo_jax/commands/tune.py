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
import itertools
import json
import logging
import math
import re
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from sr_dpo_jax.commands import console
from sr_dpo_jax.config.load import load_config
from sr_dpo_jax.config.schema import Config
from sr_dpo_jax.durable.belonging import newest_position
from sr_dpo_jax.durable.files import json_digest, read_lines, sampled_digest, write_json
from sr_dpo_jax.durable.selection import Selection
from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.train.objective import OBJECTIVES

log = logging.getLogger(__name__)

EXIT_DONE, EXIT_FAILED, EXIT_PREEMPTED = 0, 1, 75
METRIC = "eval/rewards/accuracies"
MEASURES = ("rewards/accuracies", "augmented/accuracies", "margin", "augmented/margin", "loss")
"""The measures that may decide: the lowest `loss` is best, the highest of the others."""
KINDS_OF_FILES = (".json", ".safetensors", ".jinja", ".model")
"""The files of a directory of a model that decide what is trained on."""
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
    """The digests of the data, held-out sets and model that the configuration names."""

    @property
    def name(self) -> str:
        return Path(self.config.output_dir).name

    @property
    def digest(self) -> str:
        """The sha256 of the configuration and of the files that it names, the same on every host: a finished run counts
        for these alone. A model's hub name stands for its content: training compares that."""
        return json_digest([self.config.model_dump(mode="json", exclude={"distributed"}), self.content])


def _sources(config: Config) -> list[tuple[str, str, str | None]]:
    """Lists path or hub name, split and revision of all data."""
    held_out = [(one.path, one.split) for _, one in config.data.held_out]
    sets = [(config.data.path, config.data.split), *held_out]
    return [(source.path, split, source.revision) for sources, split in sets for source in sources]


def _content_of_model(path: str) -> str | None:
    """Digests samples of the files of a model's directory by name; None where there is none, as of a hub name."""
    place = Path(path)
    if not place.is_dir():
        return None
    kept = sorted(file for file in place.rglob("*") if file.is_file() and file.suffix in KINDS_OF_FILES)
    return json_digest([[str(file.relative_to(place)), sampled_digest(file)] for file in kept])


def content_reader() -> Callable[[Config], list[str | None]]:
    """Makes a function that digests the data, held-out sets and model of a configuration, and reads each file once."""
    from sr_dpo_jax.data.records import content_digest  # its import takes long, which `sr-dpo --help` is spared

    data, model = functools.cache(content_digest), functools.cache(_content_of_model)

    def content(config: Config) -> list[str | None]:
        sets = [data(name, split=split, revision=revision) for name, split, revision in _sources(config)]
        paths = (config.model.path, config.reference.path, None if config.lora is None else config.lora.start)
        return [*sets, *(model(path) for path in paths if path is not None)]

    return content


def candidates(path: str, overrides: Sequence[str], *, metric: str, eval_pairs: int | None) -> list[Candidate]:
    """Combines the values that overrides of the form `key=a,b,c` name; other overrides hold for every combination.

    Raises:
      UsageError: no override names several values, or one names a value twice or a key that tune decides, a combination
        is no valid configuration, its runs would not have the metric, or data cannot be read.
    """
    grid, fixed = _grid(overrides)
    if eval_pairs is not None:
        _, _, name = set_of(metric).partition("/")
        fixed.append(f"data.{f'eval_sets.{name}.pairs' if name else 'eval_pairs'}={eval_pairs}")
    base = load_config(path, [*fixed, *(f"{key}={values[0]}" for key, values in grid.items())])
    _require_metric(base, metric)
    content, points = content_reader(), []
    for combination in itertools.product(*grid.values()):
        values = dict(zip(grid, combination, strict=True))
        chosen = [f"{key}={value}" for key, value in values.items()]
        output_dir = json.dumps(str(Path(base.output_dir) / "tune" / ",".join(chosen)))
        cache_dir = json.dumps(str(base.cache_path))
        arguments = [*fixed, *chosen, f"output_dir={output_dir}", f"cache_dir={cache_dir}"]
        config = load_config(path, arguments)
        points.append(Candidate(values, [path, *arguments], config, content(config)))
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
      UsageError: see `candidates`; or a run was not measured on the held-out pairs that are there now, or no run has a
        finite metric.
    """
    grid = candidates(path, overrides, metric=metric, eval_pairs=eval_pairs)
    state = Path(grid[0].config.output_dir).with_name("tune.json")
    state.parent.mkdir(parents=True, exist_ok=True)
    finished = _read_finished(state)
    with Child() as child:
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
            _write_state(state, metric, None, finished)
    results = {candidate.name: finished[candidate.digest]["metrics"] for candidate in grid}
    best, tied = choose(results, metric)
    chosen = next(candidate.values for candidate in grid if candidate.name == best)
    _write_state(state, metric, chosen, finished)
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


class Child:
    """Runs commands, each in a process of its own, and hands SIGTERM on to them, within a `with` block.

    A signal between two of them gives 75 before the next one starts.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False

    def __enter__(self) -> "Child":
        self._before = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before)
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait()

    def train(self, candidate: Candidate) -> int:
        """Trains one point and returns the exit code."""
        return self.run(["train", *candidate.arguments])

    def run(self, arguments: Sequence[str]) -> int:
        """Runs `sr-dpo ARGUMENTS` and returns the exit code."""
        return self.call([sys.executable, "-m", "sr_dpo_jax.cli", *arguments])

    def call(self, command: Sequence[str], **streams: Any) -> int:
        """Runs any command and returns the exit code; `streams` are `stdin` and `stdout`, as of a process."""
        if self._stopped:
            return EXIT_PREEMPTED
        self._process = subprocess.Popen(command, **streams)
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
    """Reads the evaluation of a run's best step, else its last one, under its names in metrics.jsonl.

    Evaluations of other held-out pairs, from before they were exchanged, count for nothing.
    """
    root, best_metric, held_out = Path(config.output_dir), config.checkpoint.best_metric, set_of(metric)
    measured = newest_position(root).get("measured", {})
    names = [name for name, _ in config.data.held_out if (best_metric or "").startswith(f"{name}/")]
    best_set = max(names, key=len, default="")

    def counts(line: dict[str, Any], name: str) -> bool:
        return f"{name}/loss" in line and line["step"] >= measured.get(name, {}).get("since", math.inf)

    lines = read_lines(root / "metrics.jsonl")
    selection = Selection(best_metric, config.checkpoint.best_mode, min_delta=0.0, patience=None)
    for line in lines:
        if best_metric in line and counts(line, best_set):
            selection = selection.after(line["step"], float(line[best_metric]))
    evaluations = [line for line in lines if counts(line, held_out)]
    decisive = [line for line in evaluations if selection.step in (None, line["step"])]
    if not decisive or metric not in decisive[-1]:
        at = "" if selection.step is None else f" at step {selection.step}, the best by {best_metric},"
        raise UsageError(
            f"{root / 'metrics.jsonl'}: holds no evaluation with {metric}{at} on the held-out pairs that are there "
            f"now; delete {root} to run it again"
        )
    return {name: float(value) for name, value in decisive[-1].items()}


def _write_state(state: Path, metric: str, chosen: dict[str, str] | None, finished: dict[str, Any]) -> None:
    """Writes tune.json, with a digest by which a flipped bit in a number is found."""
    write_json(
        state, {"metric": metric, "chosen": chosen, "finished_digest": json_digest(finished), "finished": finished}
    )


def _read_finished(state: Path) -> dict[str, Any]:
    """Reads the finished runs of tune.json by the digest of their configuration.

    A damaged file is set aside with a warning: training finds the runs finished, and their metrics are read again.
    """
    try:
        content = json.loads(state.read_bytes())
        finished = {
            key: {name: run[name] for name in ("values", "metrics")} for key, run in content["finished"].items()
        }
        if content["finished_digest"] == json_digest(finished):
            return finished
        reason = "its digest is another one"
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = type(error).__name__
    aside = state.with_name(f"{state.name}.damaged-{secrets.token_hex(4)}")
    state.rename(aside)
    log.warning("%s: damaged (%s), so finished runs are read anew; the file is kept as %s", state, reason, aside.name)
    return {}


def _print_table(results: dict[str, dict[str, float]], metric: str, best: str) -> None:
    held_out = set_of(metric)
    columns = dict.fromkeys([metric, *(f"{held_out}/{measure}" for measure in MEASURES)])
    columns = [name for name in columns if any(name in metrics for metrics in results.values())]
    table = console.table("value", *(f">{name.removeprefix(f'{held_out}/')}" for name in columns), "")
    for name, metrics in results.items():
        cells = [f"{metrics[key]:.4g}" if key in metrics else "–" for key in columns]
        console.row(table, name, *cells, "chosen" if name == best else "")
    console.section(f"Held-out pairs, {results[best].get(f'{held_out}/pairs', 0):.0f} of them", table)
