"""Reads run directories into `Run`s: configuration, metrics, evaluation and held-out pairs, and names every problem.

A run may have been killed, resumed or never evaluated: the report shows what can be read, and `Run.problems` says what
is missing, damaged or out of date. Imports no jax, so that a report can be made on any machine that has the files.

Next: `tables.py` and `figures.py`, which show what was read.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sr_dpo_jax.config.yaml_text import parse
from sr_dpo_jax.data.records import BadRow, files_of
from sr_dpo_jax.data.rows import Naming, Pair, read_rows
from sr_dpo_jax.durable.files import lines_of, pairs_file
from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.train.clock import NAME as CLOCK
from sr_dpo_jax.train.clock import life_of
from sr_dpo_jax.train.objective import OBJECTIVES, Kind

Line = Mapping[str, Any]
LISTED_LINES = 5
PAIR_NUMBERS = ("margin", "chosen_tokens", "rejected_tokens")
SAMPLE_TEXTS = ("set", "id", "prompt", "response")
UNKNOWN = Kind("", (), "unknown", scaled=False)
"""Stands for the objective of a run whose config.yaml is missing or damaged."""
SET_LOSS = re.compile(r"eval(/[a-z][a-z0-9_-]*)?/loss")
"""Matches the key that every evaluation of a held-out set has; no set may be named `loss`."""


@dataclasses.dataclass(frozen=True)
class Run:
    """The contents of a run directory."""

    number: int
    """The place of the run among those compared, from 0; it decides the run's colour, line style and marker."""
    label: str
    path: Path
    config: Line
    """`section.key` -> value; empty where config.yaml is missing or damaged."""
    steps: Sequence[Line]
    """The lines of metrics.jsonl for training steps, by step; numbers are floats, NaN and infinities among them."""
    evaluations: Sequence[Line]
    """The lines of metrics.jsonl for evaluations during training, by step."""
    evaluation: Line
    pairs: Sequence[Line]
    """eval.json, and the lines of eval_pairs.jsonl; empty where `sr-dpo eval` was not run."""
    sets: Sequence[str]
    """The held-out sets that were evaluated, `eval` and `eval/NAME`, in the order of the configuration."""
    shown_set: str
    """The set that `pairs` and the keys under `eval/` are about: data.eval_path, else the first."""
    best_step: int | None
    """The step of the best evaluation by checkpoint.best_metric; None where that is not set or was never finite."""
    samples: Sequence[Line]
    """The undamaged lines of samples.jsonl. They hold texts of the data: show them only to those who ask for texts."""
    knowledge: Line
    """What the model at the start knew of the labels, from manifest.json; empty where it was not measured."""
    life: Mapping[str, float]
    """Seconds of each phase of `train/clock.py` over all starts of the run; empty without a clock.jsonl."""
    problems: Sequence[str]
    """Sentences for the user; none holds text of the data."""

    @property
    def objective(self) -> str:
        return str(self.config.get("objective.name", "unknown"))

    @property
    def kind(self) -> Kind:
        """The objective's row in the table of objectives."""
        return OBJECTIVES.get(self.objective, UNKNOWN)

    @property
    def beta(self) -> float:
        """β; NaN where the objective has none or the configuration is missing."""
        return _number(self.config.get("objective.beta"))

    @property
    def lam(self) -> float:
        """λ, or the one that `auto` settled; NaN where the objective has none."""
        lam = self.config.get("objective.lam")
        return _number(self.knowledge.get("lam") if lam == "auto" else lam)

    @property
    def scale(self) -> float:
        """The factor of m where λΔ is subtracted from it: β, or 1 in the IPO family."""
        return self.beta if self.kind.scaled else 1.0

    @property
    def loss_at_zero(self) -> float | None:
        """The loss where policy and reference are the same and Δ = 0; None where the weights decide.

        So they do where the reference is another model from the start.
        """
        if self.config.get("reference.path"):
            return None
        names = [key for key in self.config if key.startswith("objective.")]
        numbers = {key.removeprefix("objective."): _number(self.config[key]) for key in names}
        try:
            return self.kind.loss_at_zero(numbers) if self.beta > 0 else None
        except (KeyError, ValueError):  # config.yaml is damaged
            return None

    @property
    def last_step(self) -> int:
        return max((int(line["step"]) for line in (*self.steps, *self.evaluations)), default=0)

    def final(self) -> Line:
        """Gives the newest evaluation under its names in metrics.jsonl, with `step`; empty where there is none."""
        last = self.evaluations[-1] if self.evaluations else {}
        return self.evaluation if self.evaluation.get("step", -1) >= last.get("step", -1) else last

    def column(self, name: str) -> np.ndarray:
        """Gives one number of each held-out pair, `[N]`, NaN where a pair has none."""
        return np.array([_number(pair.get(name)) for pair in self.pairs], np.float64)

    def refinement(self) -> np.ndarray:
        """Gives Δ of each held-out pair, `[N]`; NaN where it is not known."""
        written = self.column("refinement")
        if np.isnan(written).all() and self.config.get("refinement.form", "margin") == "margin":
            return self.beta * self.column("augmented_margin")  # earlier versions did not write it
        return written


def series(lines: Sequence[Line], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Gives the steps and the values of the lines that have this name, each `[N]`."""
    points = [(line["step"], line[name]) for line in lines if name in line]
    return np.array([step for step, _ in points], np.int64), np.array([value for _, value in points], np.float64)


def set_title(held_out: str) -> str:
    """Gives the title of a held-out set: `data.eval_path`, or its name in data.eval_sets."""
    return "data.eval_path" if held_out == "eval" else held_out.removeprefix("eval/")


def read_runs(directories: Sequence[Path]) -> list[Run]:
    """Reads every run, and labels each with the shortest end of its path that tells all of them apart.

    Raises:
      UsageError: a directory is not there, holds no run, or is named twice.
    """
    paths = [Path(directory).resolve() for directory in directories]
    for given, path in zip(directories, paths, strict=True):
        if not path.is_dir():
            raise UsageError(f"{given}: no such directory; name run directories, the output_dir of `sr-dpo train`")
        if not (path / "metrics.jsonl").is_file() and not (path / "config.yaml").is_file():
            raise UsageError(f"{given}: neither metrics.jsonl nor config.yaml is in it, so it is no run directory")
        if paths.count(path) > 1:
            raise UsageError(f"{given}: named twice; name each run once")
    labels = _labels(paths)
    return [_read_run(number, labels[number], path) for number, path in enumerate(paths)]


def _labels(paths: Sequence[Path]) -> list[str]:
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        labels = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(labels)) == len(labels):
            break
    return labels


def _read_run(number: int, label: str, path: Path) -> Run:
    problems: list[str] = []
    config = _flatten(_read_config(path / "config.yaml", problems))
    lines = _read_lines(path / "metrics.jsonl", problems, hint="the run took no step yet")
    lines = _last_of_each_step(lines, problems)
    evaluations = [line for line in lines if any(name.startswith("eval/") for name in line)]
    losses = [name for line in evaluations for name in line if SET_LOSS.fullmatch(name)]
    sets = list(dict.fromkeys(name.removesuffix("/loss") for name in losses))
    shown_set = "eval" if "eval" in sets or not sets else sets[0]
    steps = [line for line in lines if "loss" in line]
    infinite = [int(line["step"]) for line in steps if not math.isfinite(_number(line["loss"]))]
    if infinite:
        problems.append(
            f"the loss of {len(infinite)} step(s), the first of them {infinite[0]}, is not finite; curves have gaps"
        )
    skipped = path / "skipped.jsonl"
    count = len(lines_of(skipped.read_text(encoding="utf-8", errors="replace"))) if skipped.is_file() else 0
    if count:
        problems.append(f"{count} step(s) were skipped because loss or gradient was not finite: skipped.jsonl")
    evaluation, pairs = _read_evaluation(path, config, problems, shown_set)
    samples_file, clock = path / "samples.jsonl", path / CLOCK
    run = Run(
        number=number,
        label=label,
        path=path,
        config=config,
        steps=steps,
        evaluations=[_with_shown_set(line, shown_set) for line in evaluations],
        evaluation=_with_shown_set(evaluation, shown_set),
        pairs=pairs,
        sets=sets,
        shown_set=shown_set,
        best_step=_best_step(evaluations, config),
        samples=_read_lines(samples_file, problems, texts=SAMPLE_TEXTS) if samples_file.is_file() else [],
        knowledge=_read_knowledge(path / "manifest.json", problems),
        life=life_of(_read_lines(clock, problems, needs=("began", "first", "step"))) if clock.is_file() else {},
        problems=problems,
    )
    if evaluation and evaluation["step"] not in (run.last_step, run.best_step):
        problems.append(
            f"eval.json is of step {evaluation['step']:.0f}, metrics.jsonl ends at step {run.last_step}: "
            f"`sr-dpo eval {path}/config.yaml` brings it up to date"
        )
    return run


def _read_knowledge(path: Path, problems: list[str]) -> Line:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("knowledge") or {}
    except (ValueError, AttributeError) as error:
        problems.append(f"manifest.json is damaged ({type(error).__name__})")
        return {}


def _with_shown_set(line: Line, shown_set: str) -> Line:
    """Repeats the numbers of the shown set under `eval/`."""
    shown = {name: value for name, value in line.items() if name.startswith(f"{shown_set}/")}
    return {**line, **{f"eval{name.removeprefix(shown_set)}": value for name, value in shown.items()}}


def _best_step(evaluations: Sequence[Line], config: Line) -> int | None:
    """Finds the first of the best evaluations, as `durable/selection.py` chooses."""
    metric, sign = config.get("checkpoint.best_metric"), -1 if config.get("checkpoint.best_mode") == "min" else 1
    values = [(sign * _number(line.get(metric)), -int(line["step"])) for line in evaluations]
    finite = [value for value in values if math.isfinite(value[0])]
    return -max(finite)[1] if finite else None


def _read_evaluation(path: Path, config: Line, problems: list[str], shown_set: str) -> tuple[Line, Sequence[Line]]:
    has_margins = OBJECTIVES.get(config.get("objective.name"), UNKNOWN).needs_rejected
    was_evaluated, pairs_path = (path / "eval.json").exists(), path / pairs_file(shown_set)
    if not has_margins and not was_evaluated:
        return {}, []  # the held-out loss is in metrics.jsonl, and there are no margins to show
    if not was_evaluated and not pairs_path.exists():
        problems.append(
            f"eval.json and {pairs_path.name} are missing, so figures of single held-out pairs lack this run: "
            f"`sr-dpo eval {path}/config.yaml` writes them"
        )
        return {}, []
    lines = _read_lines(path / "eval.json", problems, hint="run `sr-dpo eval`")
    pairs = _read_lines(pairs_path, problems, needs=PAIR_NUMBERS, hint="run `sr-dpo eval`") if has_margins else []
    return (lines[0] if lines else {}), pairs


def _read_config(path: Path, problems: list[str]) -> dict[str, Any]:
    reason = "is damaged"
    try:
        raw = parse(path.read_text(encoding="utf-8"), where=str(path))
        if isinstance(raw, dict):
            return raw
    except FileNotFoundError:
        reason = "is missing"
    except (OSError, UnicodeDecodeError, UsageError) as error:
        reason = f"cannot be read ({type(error).__name__})"
    problems.append(f"config.yaml {reason}: objective, β and λ are not known")
    return {}


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, list):
        value = {str(index): item for index, item in enumerate(value)}
    if not isinstance(value, dict) or not value:
        return {prefix: value} if prefix else {}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flatten(item, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _read_lines(
    path: Path,
    problems: list[str],
    *,
    needs: Sequence[str] = ("step",),
    texts: Sequence[str] = (),
    hint: str = "",
) -> list[dict[str, Any]]:
    """Reads the JSON objects of a file, one a line, or the single one of a .json file, and names what is damaged.

    A line is damaged without the numbers that it `needs`, or the `texts`, which stay texts even where they read `nan`.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        reason = f"is missing ({hint})" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        problems.append(f"{path.name} {reason}")
        return []
    kept, damaged = [], []
    parts = [text] if path.suffix == ".json" else lines_of(text)
    for number, part in enumerate(parts, 1):
        line = _parse(part)
        if any(math.isnan(_number(line.get(name))) for name in needs) or not all(
            isinstance(line.get(name), str) for name in texts
        ):
            damaged.append(number)
        else:
            kept.append({name: value if name in texts else _plain(value) for name, value in line.items()})
    if damaged and path.suffix == ".json":
        problems.append(f"{path.name} is damaged ({hint})")
    elif damaged:
        listed = ", ".join(map(str, damaged[:LISTED_LINES])) + (", …" if len(damaged) > LISTED_LINES else "")
        cut = "; the last one was cut short, as a kill does" if damaged[-1] == len(parts) and text[-1:] != "\n" else ""
        problems.append(
            f"{path.name}: {len(damaged)} of {len(parts)} lines are damaged and left out (line {listed}){cut}"
        )
    return kept


def _parse(text: str) -> dict[str, Any]:
    """Parses a JSON object; gives an empty one for any other text."""
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float:
    """Gives NaN for what is no number; metrics.jsonl writes NaN and infinities as strings."""
    if isinstance(value, str):
        return float(value) if value in ("nan", "inf", "-inf") else math.nan
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _plain(value: Any) -> Any:
    return value if isinstance(value, str) and value not in ("nan", "inf", "-inf") else _number(value)


def _last_of_each_step(lines: Sequence[dict[str, Any]], problems: list[str]) -> list[dict[str, Any]]:
    """Sorts lines by step. Where a step was done twice the later line is kept: it is of the run that went on."""
    newest: dict[tuple[int, bool], dict[str, Any]] = {}
    repeated = set()
    for line in lines:
        key = (int(line["step"]), "loss" in line)
        repeated |= {key[0]} if key in newest else set()
        newest[key] = line
    if repeated:
        problems.append(
            f"metrics.jsonl: {len(repeated)} step(s) from {min(repeated)} to {max(repeated)} stand there more than "
            "once; the later lines are shown"
        )
    return [newest[key] for key in sorted(newest)]


def texts_of(run: Run, ids: Sequence[str]) -> dict[str, tuple[str, str, str]]:
    """Reads prompt, chosen and rejected text of pairs of the shown set by id; leaves out ids that occur twice.

    Raises:
      UsageError: the data cannot be read.
    """
    prefix = "data.eval_" if run.shown_set == "eval" else f"data.eval_sets.{set_title(run.shown_set)}."
    config, own_format = run.config, "data.format" if run.shown_set == "eval" else f"{prefix}format"
    form = {"format": config.get(own_format) or config.get("data.format"), "split": config.get(f"{prefix}split")}
    pairs: dict[str, list[Pair]] = {identity: [] for identity in ids}
    for key in (f"{prefix}path.{index}" for index in range(len(config))):
        if f"{key}.path" in config:
            for row in _rows(config, key, **form):
                if isinstance(row, Pair) and row.id in pairs:
                    pairs[row.id].append(row)
    once = {identity: rows[0] for identity, rows in pairs.items() if len(rows) == 1}
    return {identity: (_as_text(row.prompt), row.chosen, row.rejected) for identity, row in once.items()}


def _rows(config: Mapping[str, Any], key: str, *, format: str, split: str) -> Iterator[Pair | BadRow]:
    """Reads the rows of one source of a run's configuration, all of its files."""
    columns = {name.removeprefix("data.columns."): value for name, value in config.items() if "data.columns." in name}
    naming = Naming(columns, [value for name, value in config.items() if name.startswith("data.ignored_columns.")])
    source = {"split": split, "revision": config.get(f"{key}.revision")}
    for file in files_of(config[f"{key}.path"], **source):
        yield from read_rows(file, format=format, naming=naming, **source)


def _as_text(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message.role}: {message.content}" for message in prompt)
