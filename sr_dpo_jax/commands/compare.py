"""Compares objectives fairly: the same pairs in the same order, equal steps, β swept for each, and paired tests.

    sr-dpo compare run.yaml dpo sr_dpo,lam=1 sr_dpo,lam=auto,refinement.form=contrast,refinement.judge=reference

Every run is `sr-dpo train` and `sr-dpo eval` in processes of their own, on a YAML file that stands beside its directory
output_dir/compare/OBJECTIVE/beta-B-seed-S. All share one cache, so the reference scores each data set once. The first
seed takes every β; the best one of each objective, by accuracy on every second held-out pair, is trained with the other
seeds too. The pairs that did not choose are compared, seed by seed: seeds are the repetitions, and one of them has no
test. compare.json holds what is finished: the same command goes on.

With `--prompts FILE.jsonl` each of these runs responds to prompts, and `--scorer COMMAND` says how good the responses
are (`commands/scorer.py`).

β decides more than the objective does (arXiv:2502.01237): without the sweep a comparison says little. Imports no jax.
"""

import dataclasses
import json
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sr_dpo_jax.commands import console
from sr_dpo_jax.commands.demo.statistics import holm, mean_of, paired, spearman
from sr_dpo_jax.commands.report.tables import Table, number, with_interval
from sr_dpo_jax.commands.scorer import Generation, mean_score
from sr_dpo_jax.commands.tune import EXIT_DONE, Child, content_reader
from sr_dpo_jax.config.load import config_from_dict, load_config
from sr_dpo_jax.config.objectives import ScaledObjective
from sr_dpo_jax.config.schema import Config, Refinement
from sr_dpo_jax.config.section import TWIN
from sr_dpo_jax.config.yaml_text import apply_override
from sr_dpo_jax.durable.files import json_digest, pairs_file, read_lines, sampled_digest, write_json, write_text
from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.train.objective import OBJECTIVES

log = logging.getLogger(__name__)

OWN = ("objective", "refinement", "optimizer")
"""The sections of which an objective may set keys; all else is the same for all runs."""
ITEM = re.compile(r"""(?:[^,'"]|'[^']*'|"[^"]*")+""")
"""Matches what stands between commas that are not in quotes."""
OF_A_REFINEMENT = tuple(key for key in Refinement.model_fields if key != "prompt")
HELD_OUT = pairs_file("eval")
RESPONSES, SCORES = "responses.jsonl", "scores.txt"


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
    beta: float
    seed: int
    config: Config

    @property
    def root(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def name(self) -> str:
        return f"{self.entry.label}: seed {self.seed}, beta {self.beta:g}"


def parse_entry(text: str) -> Entry:
    """Reads NAME[,key=value...]; a key without a section is one of `objective`, a comma in quotes is part of a value.

    Raises:
      UsageError: it does not begin with the name of an objective that compares pairs, a key has no value or is of a
        section that all runs share.
    """
    name, *rest = ITEM.findall(text) or [""]
    sections: dict[str, dict[str, Any]] = {"objective": {"name": name}}
    if "=" in name:
        raise UsageError(f"{text}: begin with the objective's name, as in sr_dpo,lam=0.5")
    if name in OBJECTIVES and not OBJECTIVES[name].function:
        raise UsageError(f"{text}: {name} has no β of its own to sweep; compare its terms, or train it by itself")
    if name in OBJECTIVES and not OBJECTIVES[name].needs_rejected:
        raise UsageError(f"{text}: {name} has no margins to compare; train it first, and compare from its export")
    for item in rest:
        key, equals, value = item.partition("=")
        section, _, inner = (key if "." in key else f"objective.{key}").rpartition(".")
        if not equals or not inner:
            raise UsageError(f"{text}: {item!r} is not of the form key=value or section.key=value")
        if section not in OWN:
            raise UsageError(f"{text}: {key} is the same for all runs; give it apart, as an override {key}=...")
        apply_override(sections, f"{section}.{inner}={value}")
        if isinstance(sections[section][inner], dict):
            raise UsageError(f"{text}: the value of {key} reads as a mapping; put it in quotes: {key}='...'")
    return Entry(text, sections)


def compare(
    path: str, named: Sequence[str], *, seeds: int, factors: Sequence[float], generation: Generation | None = None
) -> int:
    """Trains what is not finished, writes table and report, and returns the exit code.

    Args:
      path: the configuration that all runs share.
      named: objectives, as for `parse_entry`, and overrides `section.key=value` for all runs.
      seeds: how many seeds each objective gets, from the configuration's on.
      factors: multiples of each objective's β that the first seed tries.
      generation: what the runs with the best β respond to; None: nothing.

    Raises:
      UsageError: fewer than two objectives, one twice, a configuration of a run is refused, no held-out pairs, or the
        scorer cannot be run or does not write a number for each response.
    """
    overrides = [text for text in named if "=" in text.partition(",")[0]]
    entries = [parse_entry(text) for text in named if text not in overrides]
    _check(entries, named, seeds, factors)
    for override in overrides:
        if override.startswith(("objective.", *(f"refinement.{key}=" for key in OF_A_REFINEMENT))):
            raise UsageError(f"{override}: each objective says it for itself, as in sr_dpo,lam=0.5; give it there")
    base = load_config(path, overrides)
    if base.data.eval_path is None:
        raise UsageError("data.eval_path is not set: it names the held-out pairs on which objectives are compared")
    if generation is not None:
        generation.check(base)
    root = Path(base.output_dir) / "compare"
    sweep = {
        entry.label: [_run(base, root, entry, base.seed, factor=factor) for factor in dict.fromkeys(factors)]
        for entry in entries
    }
    given = base.distributed.model_dump(mode="json", exclude_defaults=True)
    own = [f"distributed.{key}={json.dumps(value)}" for key, value in given.items()]  # each process has its own
    finished = _Finished(root / "compare.json")
    with Child() as child:
        for run in (run for runs in sweep.values() for run in runs):
            if (code := finished.make(run, child, own)) != EXIT_DONE:
                return code
        chosen = {label: max(runs, key=_deciding) for label, runs in sweep.items()}
        of_seeds: dict[str, list[Run]] = {}
        for entry in entries:
            best = chosen[entry.label]
            more = [_run(base, root, entry, base.seed + number, beta=best.beta) for number in range(1, seeds)]
            for run in more:
                if (code := finished.make(run, child, own)) != EXIT_DONE:
                    return code
            of_seeds[entry.label] = [best, *more]
        for run in (run for runs in of_seeds.values() for run in runs):
            if generation is not None and (code := finished.respond(run, generation, child, own)) != EXIT_DONE:
                return code
    _show(root, of_seeds, sweep, scored=generation is not None and generation.scorer is not None)
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


def _run(base: Config, root: Path, entry: Entry, seed: int, *, factor: float = 1.0, beta: float | None = None) -> Run:
    """Configures one run; its β is `beta`, or its own times `factor`.

    Its own β is the one that the entry gives, or that of the file where the file's objective is the same loss, or the
    loss's default.
    """
    raw = base.model_dump(mode="json", exclude={"distributed"})
    raw |= {"seed": seed, "cache_dir": str(base.cache_path), "objective": {}, "output_dir": str(root)}
    for key in OF_A_REFINEMENT:  # a plain objective has none, and every refined one says its own
        raw["refinement"].pop(key)
    for section, keys in entry.sections.items():
        raw[section] = {**raw[section], **keys}
    plain = raw["objective"]["name"].removeprefix(TWIN)
    if base.objective.name.removeprefix(TWIN) == plain and isinstance(base.objective, ScaledObjective):
        raw["objective"].setdefault("beta", base.objective.beta)
    if beta is None:
        beta = config_from_dict(raw, where=entry.label).objective.beta * factor
    raw["objective"]["beta"] = beta
    raw["output_dir"] = str(root / _directory(entry.label) / f"beta-{beta:g}-seed-{seed}")
    return Run(entry, beta, seed, config_from_dict(raw, where=entry.label))


def _directory(label: str) -> str:
    """Gives a directory's name for an objective: the label, or where it is long or odd its start and a digest."""
    plain = re.sub(r"[^\w.=,+-]", "_", label)
    return label if plain == label and len(label) <= 100 else f"{plain[:80]}-{json_digest(label)[:8]}"


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
        decisive = run.config.model_dump(mode="json", exclude={"distributed", "cache_dir"})
        digest = json_digest([decisive, self._content(run.config)])
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
        self._note(run.root, digest)
        return EXIT_DONE

    def respond(self, run: Run, generation: Generation, child: Child, own: Sequence[str]) -> int:
        """Lets a finished run respond to the prompts, and scores the responses; returns the exit code."""
        responses, scores = run.root / RESPONSES, run.root / SCORES
        digest = json_digest([self._digests[str(run.root)], sampled_digest(generation.prompts)])
        if self._digests.get(str(responses)) != digest or not responses.is_file():
            log.info("%s: responses", run.name)
            file = run.root.with_name(run.root.name + ".yaml")
            asked = ["generate", str(file), *own, "--prompts", str(generation.prompts), "--output", str(responses)]
            if (code := child.run(asked)) != EXIT_DONE:
                return code
            self._note(responses, digest)
        digest = json_digest([digest, generation.scorer])
        if generation.scorer is not None and (self._digests.get(str(scores)) != digest or not scores.is_file()):
            log.info("%s: scores", run.name)
            if (code := generation.score(responses, scores, child)) != EXIT_DONE:
                return code
            self._note(scores, digest)
        return EXIT_DONE

    def _note(self, made: Path, digest: str) -> None:
        self._digests[str(made)] = digest
        write_json(self._file, {"finished": self._digests})


def _pairs(run: Run, *, deciding: bool) -> list[dict[str, Any]]:
    """Reads every second held-out pair, the ones that decide on β or the others."""
    return read_lines(run.root / HELD_OUT)[0 if deciding else 1 :: 2]


def _accuracy(pairs: Sequence[Mapping[str, Any]]) -> float:
    return float(np.mean([pair["margin"] > 0 for pair in pairs]))


def _deciding(run: Run) -> float:
    return _accuracy(_pairs(run, deciding=True))


def _table(of_seeds: Mapping[str, Sequence[Run]], *, scored: bool = False) -> Table:
    """Makes the table of the pairs that did not choose: a row an objective, and its difference from the first one.

    Intervals are Student's over seeds, differences are paired by seed, and p of their t test has Holm's correction for
    the number of rows. Where responses were `scored`, their mean scores are compared likewise.

    Raises:
      UsageError: two runs were not evaluated on the same pairs.
    """
    compared = {label: [_pairs(run, deciding=False) for run in runs] for label, runs in of_seeds.items()}
    ids = {tuple(pair["id"] for pair in pairs) for of_runs in compared.values() for pairs in of_runs}
    if len(ids) > 1 or not next(iter(ids)):
        raise UsageError("the runs were not evaluated on the same held-out pairs, of which two are needed; run it anew")
    accuracy = {label: [_accuracy(pairs) for pairs in of_runs] for label, of_runs in compared.items()}
    first, *others = accuracy
    tests = {label: paired(accuracy[label], accuracy[first]) for label in others}
    corrected = dict(zip(others, holm([test.p for test in tests.values()]), strict=True))
    rows = []
    for label, runs in of_seeds.items():
        margins = [[pair["margin"] for pair in pairs] for pairs in compared[label]]
        row = {"objective": label, "β": f"{runs[0].beta:g}", "λ": _lam(runs)}
        row["accuracy"] = with_interval(*mean_of(accuracy[label]), 3)
        row["margin"] = with_interval(*mean_of([float(np.mean(values)) for values in margins]), 2)
        gaps = [[pair.get("rating_difference") for pair in pairs] for pairs in compared[label]]
        rated = not any(gap is None for of_run in gaps for gap in of_run)
        ranks = [spearman(*pair) for pair in zip(margins, gaps, strict=True)] if rated else []
        row["Spearman with ratings"] = with_interval(*mean_of(ranks), 3) if ranks else ""
        row[f"accuracy, against {first}"] = with_interval(*tests[label].difference, 3) if label in tests else ""
        row["p, Holm"] = number(corrected[label]) if label in tests else ""
        rows.append(row)
    if scored:
        of_runs = {label: [mean_score(run.root / SCORES) for run in runs] for label, runs in of_seeds.items()}
        tests = {label: paired(of_runs[label], of_runs[first]) for label in others}
        corrected = dict(zip(others, holm([test.p for test in tests.values()]), strict=True))
        for row, (label, means) in zip(rows, of_runs.items(), strict=True):
            row["score of responses"] = with_interval(*mean_of(means), 2)
            row[f"score, against {first}"] = with_interval(*tests[label].difference, 2) if label in tests else ""
            row["p of scores, Holm"] = number(corrected[label]) if label in tests else ""
    return Table.of(rows)


def _lam(runs: Sequence[Run]) -> str:
    lam = getattr(runs[0].config.objective, "lam", None)
    if lam != "auto":
        return "" if lam is None else f"{lam:g}"
    settled = [json.loads((run.root / "manifest.json").read_text(encoding="utf-8"))["knowledge"]["lam"] for run in runs]
    return f"auto: {with_interval(*mean_of(settled), 2)}"


def _show(
    root: Path, of_seeds: Mapping[str, Sequence[Run]], sweep: Mapping[str, Sequence[Run]], *, scored: bool
) -> None:
    from sr_dpo_jax.commands.report.page import report

    table = _table(of_seeds, scored=scored)
    swept = Table.of(
        [
            {"objective": label, "β": f"{run.beta:g}", "accuracy": number(_deciding(run))}
            for label, runs in sweep.items()
            for run in runs
        ]
    )
    text = [
        f"Compared on every second held-out pair, {len(of_seeds[next(iter(of_seeds))])} seed(s); one has no test:",
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
