"""Compares objectives fairly: the same pairs in the same order, equal steps, β swept for each, and paired tests.

    sr-dpo compare run.yaml dpo sr_dpo,lam=1 sr_dpo,lam=auto,refinement.form=contrast,refinement.judge=reference

Every run is `sr-dpo train` and `sr-dpo eval` in processes of their own, on a YAML file that stands beside its directory
output_dir/compare/OBJECTIVE/beta-B-seed-S. All share one cache, so the reference scores each data set once. The first
seed takes every β; the best one of each objective, by accuracy on every second held-out pair, is trained with the other
seeds too. The pairs that did not choose are compared. compare.json holds what is finished: the same command goes on.

β decides more than the objective does (arXiv:2502.01237): without the sweep a comparison says little. Imports no jax.
"""

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from sr_dpo_jax.commands import console
from sr_dpo_jax.commands.demo.statistics import holm, mean_of, paired
from sr_dpo_jax.commands.report.tables import Table, number, with_interval
from sr_dpo_jax.commands.tune import EXIT_DONE, Child, content_reader
from sr_dpo_jax.config.load import config_from_dict, load_config
from sr_dpo_jax.config.objectives import PairObjective
from sr_dpo_jax.config.schema import Config, Refinement
from sr_dpo_jax.durable.files import json_digest, read_lines, write_json, write_text
from sr_dpo_jax.errors import UsageError

log = logging.getLogger(__name__)

OF_A_REFINEMENT = tuple(key for key in Refinement.model_fields if key != "prompt")
HELD_OUT = "eval_pairs.jsonl"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One objective of the comparison."""

    label: str
    """As the user wrote it; it names the directory of its runs."""
    sections: Mapping[str, Mapping[str, Any]]
    """The keys that it sets, by section of the configuration."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run of an objective."""

    entry: Entry
    beta: float | None
    """None for an objective without a β."""
    seed: int
    config: Config

    @property
    def root(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def name(self) -> str:
        return f"{self.entry.label}: seed {self.seed}" + ("" if self.beta is None else f", beta {self.beta:g}")


def parse_entry(text: str) -> Entry:
    """Reads NAME[,key=value...]; a key without a section is one of `objective`.

    Raises:
      UsageError: it does not begin with a name, or a key has no value.
    """
    name, *rest = text.split(",")
    sections: dict[str, dict[str, Any]] = {"objective": {"name": name}}
    if "=" in name or not name:
        raise UsageError(f"{text}: begin with the objective's name, as in sr_dpo,lam=0.5")
    for item in rest:
        key, equals, value = item.partition("=")
        section, dot, inner = key.rpartition(".")
        if not equals or not inner or "." in section:
            raise UsageError(f"{text}: {item!r} is not of the form key=value or section.key=value")
        try:
            sections.setdefault(section if dot else "objective", {})[inner] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UsageError(f"{text}: the value of {key} is no YAML; put it in quotes") from error
    return Entry(text, sections)


def compare(path: str, named: Sequence[str], *, seeds: int, factors: Sequence[float]) -> int:
    """Trains what is not finished, writes table and report, and returns the exit code.

    Args:
      path: the configuration that all runs share.
      named: objectives, as for `parse_entry`, and overrides `section.key=value` for all runs.
      seeds: how many seeds each objective gets, from the configuration's on.
      factors: multiples of each objective's β that the first seed tries.

    Raises:
      UsageError: fewer than two objectives, one twice, a configuration of a run is refused, or no held-out pairs.
    """
    overrides = [text for text in named if "=" in text.partition(",")[0]]
    entries = [parse_entry(text) for text in named if text not in overrides]
    _check(entries, named, seeds, factors)
    base = load_config(path, overrides)
    if base.data.eval_path is None:
        raise UsageError("data.eval_path is not set: it names the held-out pairs on which objectives are compared")
    root = Path(base.output_dir) / "compare"
    sweep = {entry.label: [_run(base, root, entry, factor, base.seed) for factor in factors] for entry in entries}
    sweep = {label: list({run.root: run for run in runs}.values()) for label, runs in sweep.items()}  # no β, one run
    own = [override for override in overrides if override.startswith("distributed.")]
    finished = _Finished(root / "compare.json")
    with Child() as child:
        for run in (run for runs in sweep.values() for run in runs):
            if (code := finished.make(run, child, own)) != EXIT_DONE:
                return code
        chosen = {label: max(runs, key=_deciding) for label, runs in sweep.items()}
        of_seeds: dict[str, list[Run]] = {}
        for entry in entries:
            best = chosen[entry.label]
            more = [_run(base, root, entry, None, base.seed + number, beta=best.beta) for number in range(1, seeds)]
            for run in more:
                if (code := finished.make(run, child, own)) != EXIT_DONE:
                    return code
            of_seeds[entry.label] = [best, *more]
    _show(root, of_seeds, sweep)
    return EXIT_DONE


def _check(entries: Sequence[Entry], named: Sequence[str], seeds: int, factors: Sequence[float]) -> None:
    labels = [entry.label for entry in entries]
    if len(labels) < 2:
        raise UsageError(f"{' '.join(named)}: name two objectives or more, as in: dpo sr_dpo,lam=0.5")
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise UsageError(f"{twice}: named twice; name each objective once")
    if seeds < 1:
        raise UsageError(f"--seeds {seeds}: must be 1 or more")
    if not factors or min(factors) <= 0:
        raise UsageError(f"--betas {','.join(map(str, factors))}: are factors of each objective's β, all above 0")


def _run(base: Config, root: Path, entry: Entry, factor: float | None, seed: int, *, beta: float | None = None) -> Run:
    """Configures one run; its β is `beta`, or its own times `factor`."""
    raw = base.model_dump(mode="json", exclude={"distributed"})
    raw |= {"seed": seed, "cache_dir": str(base.cache_path), "objective": {}, "output_dir": str(root)}
    for key in OF_A_REFINEMENT:  # a plain objective has none, and every refined one says its own
        raw["refinement"].pop(key)
    for section, keys in entry.sections.items():
        if section not in raw or not isinstance(raw[section], dict):
            raise UsageError(f"{entry.label}: the configuration has no section {section}")
        raw[section] = {**raw[section], **keys}
    first = config_from_dict(raw, where=entry.label)
    if isinstance(first.objective, PairObjective):
        beta = first.objective.beta * factor if beta is None and factor is not None else beta
        raw["objective"]["beta"] = beta
    name = f"seed-{seed}" if beta is None else f"beta-{beta:g}-seed-{seed}"
    raw["output_dir"] = str(root / entry.label.replace("/", "_") / name)
    return Run(entry, beta, seed, config_from_dict(raw, where=entry.label))


class _Finished:
    """The runs that are trained and evaluated, by a digest of configuration and content."""

    def __init__(self, file: Path):
        self._file, self._content = file, content_reader()
        self._digests: dict[str, str] = {}
        if file.is_file():
            try:
                self._digests = dict(json.loads(file.read_bytes())["finished"])
            except (ValueError, KeyError, TypeError) as error:
                log.warning("%s: damaged (%s); finished runs are looked at again", file, type(error).__name__)

    def make(self, run: Run, child: Child, own: Sequence[str]) -> int:
        """Trains and evaluates a run that is not finished; returns the exit code."""
        digest = json_digest([run.config.model_dump(mode="json", exclude={"distributed"}), self._content(run.config)])
        if self._digests.get(str(run.root)) == digest and (run.root / HELD_OUT).is_file():
            log.info("%s: finished before", run.name)
            return EXIT_DONE
        file = run.root.with_name(run.root.name + ".yaml")
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, run.config.to_yaml())
        log.info("%s", run.name)
        for command in ("train", "eval"):
            code = child.run([command, str(file), *own])
            if code != EXIT_DONE:
                log.warning("%s: ended with exit code %d; the same command goes on from here", run.name, code)
                return code
        self._digests[str(run.root)] = digest
        write_json(self._file, {"finished": self._digests})
        return EXIT_DONE


def _right(run: Run, *, deciding: bool) -> np.ndarray:
    """Tells for each held-out pair that decides on β, or for each other one, whether the margin is above 0, `[N]`."""
    lines = read_lines(run.root / HELD_OUT)[0 if deciding else 1 :: 2]
    return np.array([line["margin"] > 0 for line in lines], np.float64)


def _deciding(run: Run) -> float:
    return float(_right(run, deciding=True).mean())


def _table(of_seeds: Mapping[str, Sequence[Run]]) -> Table:
    """Makes the table: one row an objective, with the β that was chosen and the difference from the first one.

    Intervals of means are Student's over seeds. The difference is a paired t test over held-out pairs of the share of
    seeds that order the pair correctly, and p has Holm's correction for the number of rows.
    """
    right = {label: np.mean([_right(run, deciding=False) for run in runs], axis=0) for label, runs in of_seeds.items()}
    first, *others = right
    tests = [paired(right[label], right[first]) for label in others]
    corrected = dict(zip(others, holm([test.p for test in tests]), strict=True))
    differences = dict(zip(others, tests, strict=True))
    rows = []
    for label, runs in of_seeds.items():
        metrics = [json.loads((run.root / "eval.json").read_text(encoding="utf-8")) for run in runs]
        row = {"objective": label, "β": "" if runs[0].beta is None else f"{runs[0].beta:g}", "λ": _lam(runs)}
        row["accuracy"] = with_interval(*mean_of([float(_right(run, deciding=False).mean()) for run in runs]), 3)
        row["margin"] = with_interval(*mean_of([line["eval/margin"] for line in metrics]), 2)
        ranks = [line.get("eval/margin/spearman") for line in metrics]
        row["Spearman with ratings"] = "" if None in ranks else with_interval(*mean_of(ranks), 3)
        test = differences.get(label)
        row[f"accuracy, against {first}"] = "" if test is None else with_interval(*test.difference, 3)
        row["p, Holm"] = "" if test is None else number(corrected[label])
        rows.append(row)
    return Table.of(rows)


def _lam(runs: Sequence[Run]) -> str:
    lam = getattr(runs[0].config.objective, "lam", None)
    if lam != "auto":
        return "" if lam is None else f"{lam:g}"
    settled = [json.loads((run.root / "manifest.json").read_text(encoding="utf-8"))["knowledge"]["lam"] for run in runs]
    return f"auto: {with_interval(*mean_of(settled), 2)}"


def _show(root: Path, of_seeds: Mapping[str, Sequence[Run]], sweep: Mapping[str, Sequence[Run]]) -> None:
    from sr_dpo_jax.commands.report.page import report

    table = _table(of_seeds)
    swept = Table.of(
        [
            {"objective": label, "β": "" if run.beta is None else f"{run.beta:g}", "accuracy": number(_deciding(run))}
            for label, runs in sweep.items()
            for run in runs
        ]
    )
    text = [
        f"Compared on every second held-out pair, {len(of_seeds[next(iter(of_seeds))])} seed(s):",
        table.markdown(),
        "The sweep of β, on the other pairs, first seed:",
        swept.markdown(),
    ]
    write_text(root / "compare.md", "\n\n".join(text) + "\n")
    report([runs[0].root for runs in of_seeds.values()], root / "report.html", with_texts=False)
    printed = console.table(table.head[0], *(f">{heading}" for heading in table.head[1:]))
    for cells in table.rows:
        console.row(printed, *cells)
    console.section("Objectives, each with its best β", printed)
    print(f"Tables, the sweep of β too: {root / 'compare.md'}; the runs side by side: {root / 'report.html'}")
