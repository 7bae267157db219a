"""Run directories -> `Run`: metrics, configuration, evaluation and held-out pairs, with all that is amiss named.

A run may have been killed, resumed or never evaluated: what can be read is shown, and what is missing, damaged or out
of date stands in `Run.problems`. Imports no jax: a report is made where the runs are, not where they were trained.
"""

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from sr_dpo_jax.data.rows import Pair, read_rows
from sr_dpo_jax.durable.files import lines_of, pairs_file
from sr_dpo_jax.errors import UsageError

Line = Mapping[str, Any]
LISTED_LINES = 5
PAIR_NUMBERS = ("margin", "chosen_tokens", "rejected_tokens")
REFINED = ("sr_dpo", "sr_ipo")
SET_LOSS = re.compile(r"eval(/[a-z][a-z0-9_-]*)?/loss")
"""Every evaluation of a set has it; `loss` is the name of no set."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run directory holds."""

    label: str
    path: Path
    config: Line
    """`section.key` -> value; empty where config.yaml is missing or damaged."""
    steps: Sequence[Line]
    """Lines of metrics.jsonl of training steps, by step; numbers as floats, NaN and infinities among them."""
    evaluations: Sequence[Line]
    """Lines of metrics.jsonl of evaluations while training, by step."""
    evaluation: Line
    """eval.json; empty where `sr-dpo eval` was not run."""
    pairs: Sequence[Line]
    """eval_pairs.jsonl; empty where `sr-dpo eval` was not run."""
    sets: Sequence[str]
    """Held-out sets that were evaluated, `eval` and `eval/NAME`, in the order of the configuration."""
    shown_set: str
    """The one whose numbers stand under `eval/` here, and whose pairs these are: data.eval_path, else the first."""
    best_step: int | None
    """Of the best evaluation by checkpoint.best_metric; None where that is not set or was never finite."""
    samples: Sequence[Line]
    """Whole lines of samples.jsonl: texts of the data, to be shown only to those who ask for them."""
    problems: Sequence[str]
    """Sentences for the user, none of them with text of the data."""

    @property
    def objective(self) -> str:
        return str(self.config.get("objective.name", "unknown"))

    @property
    def beta(self) -> float:
        """β; NaN where the configuration is missing."""
        return _number(self.config.get("objective.beta"))

    @property
    def lam(self) -> float:
        """λ; NaN where the objective has none."""
        return _number(self.config.get("objective.lam"))

    @property
    def scale(self) -> float:
        """What m is multiplied with where λΔ is taken from it: β in the DPO family, 1 in the IPO family."""
        return self.beta if self.objective in ("dpo", "sr_dpo") else 1.0

    @property
    def last_step(self) -> int:
        return max((int(line["step"]) for line in (*self.steps, *self.evaluations)), default=0)

    def final(self) -> Line:
        """The newest evaluation under its names in metrics.jsonl, with `step`; empty where there is none."""
        last = self.evaluations[-1] if self.evaluations else {}
        return self.evaluation if self.evaluation.get("step", -1) >= last.get("step", -1) else last

    def column(self, name: str) -> np.ndarray:
        """One number of each held-out pair, `[N]`, NaN where a pair has none."""
        return np.array([_number(pair.get(name)) for pair in self.pairs], np.float64)


def series(lines: Sequence[Line], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the lines that have this name."""
    found = [(line["step"], line[name]) for line in lines if name in line]
    return np.array([step for step, _ in found], np.int64), np.array([value for _, value in found], np.float64)


def read_runs(directories: Sequence[Path]) -> list[Run]:
    """Reads every run, each under the shortest end of its path that no other has.

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
    return [_read_run(path, label) for path, label in zip(paths, _labels(paths), strict=True)]


def _labels(paths: Sequence[Path]) -> list[str]:
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        labels = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(labels)) == len(labels):
            break
    return labels


def _read_run(path: Path, label: str) -> Run:
    problems: list[str] = []
    config = _flatten(_read_config(path / "config.yaml", problems))
    lines = _read_lines(path / "metrics.jsonl", problems, needs=("step",), hint="the run took no step yet")
    lines = _last_of_each(lines, problems)
    evaluations = [line for line in lines if any(name.startswith("eval/") for name in line)]
    best_step = _best_step(evaluations, config)
    sets = list(dict.fromkeys(name for line in evaluations for name in _sets_of(line)))
    shown_set = "eval" if "eval" in sets or not sets else sets[0]
    evaluations = [_shown(line, shown_set) for line in evaluations]
    steps = [line for line in lines if "loss" in line]
    _name_not_finite(steps, problems)
    skipped = path / "skipped.jsonl"
    if skipped.is_file():
        count = len(lines_of(skipped.read_text(encoding="utf-8", errors="replace")))
        problems += [f"{count} step(s) were skipped because loss or gradient was not finite: skipped.jsonl"] * (
            count > 0
        )
    evaluation, pairs = _read_evaluation(path, config, problems, shown_set)
    samples = _read_samples(path / "samples.jsonl", problems)
    numbers = (config, steps, evaluations, _shown(evaluation, shown_set), pairs)
    run = Run(label, path, *numbers, sets, shown_set, best_step, samples, problems)
    if evaluation and evaluation["step"] not in (run.last_step, best_step):
        problems.append(
            f"eval.json is of step {evaluation['step']:.0f}, metrics.jsonl ends at step {run.last_step}: "
            f"`sr-dpo eval {path}/config.yaml` brings it up to date"
        )
    return run


def _sets_of(line: Line) -> list[str]:
    return [name.removesuffix("/loss") for name in line if SET_LOSS.fullmatch(name)]


def _shown(line: Line, shown_set: str) -> Line:
    """With the numbers of that set under `eval/` too."""
    if shown_set == "eval":
        return line
    of_set = {name: value for name, value in line.items() if name.startswith(f"{shown_set}/")}
    return {**line, **{f"eval{name.removeprefix(shown_set)}": value for name, value in of_set.items()}}


def _best_step(evaluations: Sequence[Line], config: Line) -> int | None:
    """The first of the best, as `selection.py` chooses."""
    metric, sign = config.get("checkpoint.best_metric"), -1 if config.get("checkpoint.best_mode") == "min" else 1
    values = [(sign * _number(line.get(metric)), -int(line["step"])) for line in evaluations]
    finite = [value for value in values if math.isfinite(value[0])]
    return -max(finite)[1] if finite else None


def _read_samples(path: Path, problems: list[str]) -> list[Line]:
    """Strings stay strings here: a response may be the word nan."""
    if not path.is_file():
        return []
    parts = lines_of(path.read_text(encoding="utf-8", errors="replace"))
    lines = [_parse(part) for part in parts]
    texts = ("set", "id", "prompt", "response")
    whole = [line for line in lines if line is not None and isinstance(line.get("step"), int)]
    whole = [line for line in whole if all(isinstance(line.get(name), str) for name in texts)]
    if len(whole) < len(parts):
        problems.append(f"{path.name}: {len(parts) - len(whole)} of {len(parts)} lines are damaged and left out")
    return whole


def _read_evaluation(path: Path, config: Line, problems: list[str], shown_set: str) -> tuple[Line, Sequence[Line]]:
    pairs_name = pairs_file(shown_set)
    if config.get("objective.name") == "sft" and not (path / "eval.json").exists():
        return {}, []  # it has no margins to show, and its held-out loss is in metrics.jsonl
    if not (path / "eval.json").exists() and not (path / pairs_name).exists():
        problems.append(
            f"eval.json and {pairs_name} are missing, so figures of single held-out pairs lack this run: "
            f"`sr-dpo eval {path}/config.yaml` writes them"
        )
        return {}, []
    lines = _read_lines(path / "eval.json", problems, needs=("step",), hint="run `sr-dpo eval`", whole=True)
    if config.get("objective.name") == "sft":
        return (lines[0] if lines else {}), []
    pairs = _read_lines(path / pairs_name, problems, needs=PAIR_NUMBERS, hint="run `sr-dpo eval`")
    return (lines[0] if lines else {}), pairs


def _read_config(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        problems.append("config.yaml is missing: objective, β and λ are not known")
        return {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        problems.append(f"config.yaml cannot be read ({type(error).__name__}): objective, β and λ are not known")
        return {}
    if not isinstance(raw, dict):
        problems.append("config.yaml is damaged: objective, β and λ are not known")
        return {}
    return raw


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
    path: Path, problems: list[str], *, needs: Sequence[str], hint: str, whole: bool = False
) -> list[dict[str, Any]]:
    """JSON objects, one a line, or the one that the `whole` file is; each that lacks a number of `needs` is named."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        reason = f"is missing ({hint})" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        problems.append(f"{path.name} {reason}")
        return []
    kept, damaged = [], []
    parts = [text] if whole else lines_of(text)
    for number, part in enumerate(parts, 1):
        line = _parse(part)
        if line is None or any(math.isnan(_number(line.get(name))) for name in needs):
            damaged.append(number)
        else:
            kept.append({name: _plain(value) for name, value in line.items()})
    if damaged and whole:
        problems.append(f"{path.name} is damaged ({hint})")
    elif damaged:
        listed = ", ".join(map(str, damaged[:LISTED_LINES])) + (", …" if len(damaged) > LISTED_LINES else "")
        cut = "; the last one was cut short, as a kill does" if damaged[-1] == len(parts) and text[-1:] != "\n" else ""
        problems.append(
            f"{path.name}: {len(damaged)} of {len(parts)} lines are damaged and left out (line {listed}){cut}"
        )
    return kept


def _parse(text: str) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _number(value: Any) -> float:
    """NaN for what is no number; metrics.jsonl writes NaN and infinities as strings."""
    if isinstance(value, str):
        return float(value) if value in ("nan", "inf", "-inf") else math.nan
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _plain(value: Any) -> Any:
    return value if isinstance(value, str) and value not in ("nan", "inf", "-inf") else _number(value)


def _last_of_each(lines: Sequence[dict[str, Any]], problems: list[str]) -> list[dict[str, Any]]:
    """Lines by step. Where a step was done twice, the later line stands: it is of the run that went on."""
    newest: dict[tuple[int, bool], dict[str, Any]] = {}
    again = set()
    for line in lines:
        key = (int(line["step"]), "loss" in line)
        again |= {key[0]} if key in newest else set()
        newest[key] = line
    if again:
        problems.append(
            f"metrics.jsonl: {len(again)} step(s) from {min(again)} to {max(again)} stand there more than once; the "
            "later lines are shown"
        )
    return [newest[key] for key in sorted(newest)]


def _name_not_finite(steps: Sequence[Line], problems: list[str]) -> None:
    bad = [int(line["step"]) for line in steps if not math.isfinite(_number(line["loss"]))]
    if bad:
        problems.append(f"the loss of {len(bad)} step(s), the first of them {bad[0]}, is not finite; curves have gaps")


def texts_of(run: Run, ids: Sequence[str]) -> dict[str, tuple[str, str, str]]:
    """Prompt, chosen and rejected text of pairs of the shown set by id; ids that occur twice are left out.

    Raises:
      UsageError: the data cannot be read.
    """
    path, split, own_format = "data.eval_path", "data.eval_split", "data.format"
    if run.shown_set != "eval":
        of_set = f"data.eval_sets.{run.shown_set.removeprefix('eval/')}"
        path, split, own_format = f"{of_set}.path", f"{of_set}.split", f"{of_set}.format"
    keys = [f"{path}.{index}" for index in range(len(run.config))]
    form = {"format": run.config.get(own_format) or run.config.get("data.format"), "split": run.config.get(split)}
    found: dict[str, list[Pair]] = {identity: [] for identity in ids}
    for key in (key for key in keys if f"{key}.path" in run.config):
        for row in read_rows(run.config[f"{key}.path"], revision=run.config.get(f"{key}.revision"), **form):
            if isinstance(row, Pair) and row.id in found:
                found[row.id].append(row)
    return {
        identity: (_as_text(rows[0].prompt), rows[0].chosen, rows[0].rejected)
        for identity, rows in found.items()
        if len(rows) == 1
    }


def _as_text(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message.role}: {message.content}" for message in prompt)
