"""Collects results.json from the run directories, and makes tables of it: the page's numbers come from that file alone.

results.json holds what was measured of every stage and arm, as lists of one value a seed, and the comparisons of arms.
Imports no jax.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from sr_dpo_jax import __version__
from sr_dpo_jax.commands.demo import measure
from sr_dpo_jax.commands.demo.corpus import Knobs
from sr_dpo_jax.commands.demo.protocol import (
    LAMBDAS,
    MORE,
    PAIRS,
    SHUFFLED,
    TEMPERATURES,
    Arm,
    Layout,
    Setting,
)
from sr_dpo_jax.commands.demo.statistics import holm, mean_of, outcomes, paired
from sr_dpo_jax.commands.report.tables import Table, number, with_interval
from sr_dpo_jax.train.objective import OBJECTIVES

DIGITS = 5
OUTCOMES = ("win", "tie", "lose")
KNOBS = ("rated_share", "rating_noise", "label_noise", "gaps", "beta")
PLAIN_ARMS = ("dpo", "ipo")
"""The objectives that others are compared with; one with neither name in it is compared with the first."""
Results = dict[str, Any]


def collect(layout: Layout, setting: Setting, knobs: Knobs, seeds: Sequence[int]) -> Results:
    """Measures everything on the seeds that are finished."""
    base, sft = layout.base_run, [layout.run(seed, "sft") for seed in seeds]
    scores = base / "scores.jsonl"
    sizes = {name: getattr(setting, name) for name in ("name", "tasks", "base_steps", "held_out_pairs", "more_factor")}
    results = {
        "setting": {**sizes, **dataclasses.asdict(knobs), "seeds": len(seeds), "base_texts": setting.base_texts},
        "versions": {"sr_dpo_jax": __version__, "jax": version("jax")},
        "knowledge": measure.knowledge(base / "rated.jsonl"),
        "counting_words": measure.counting_words(layout.data("held_out")),
        "stages": {
            "base": _responses([base]) | _columns([measure.stage_measures(scores, None)]),
            "sft": _responses(sft) | _columns([measure.stage_measures(run / "scores.jsonl", scores) for run in sft]),
        },
        "arms": {arm.name: _arm(layout, knobs, seeds, arm) for arm in setting.arms},
        "outcomes": [_outcomes(layout, seeds, *names) for names in comparisons(setting)],
    }
    return _rounded(results)


def comparisons(setting: Setting) -> list[tuple[str, str]]:
    """Names the arms that are compared: each with the plain objective, and λ = 1 with its controls."""
    found = [(arm.name, against) for arm in setting.arms if (against := baseline_of(setting, arm)) is not None]
    for control in setting.arms:
        if control.beta_share is not None and not control.keys:
            refined = (f"sr_{control.objective}", max(LAMBDAS), control.data, ())
            found += [
                (arm.name, control.name)
                for arm in setting.arms
                if (arm.objective, arm.lam, arm.data, arm.refinement) == refined
            ]
    return found


def baseline_of(setting: Setting, arm: Arm) -> str | None:
    """Names the arm of the plain objective, with the common β, on the same pairs; None for that arm itself."""
    if arm.lam is None and arm.beta_share is None and not arm.keys:
        return None
    plain = arm.objective.removeprefix("sr_")
    sought = (plain if plain in PLAIN_ARMS else PLAIN_ARMS[0], arm.data, None, ())
    found = [
        other.name for other in setting.arms if (other.objective, other.data, other.beta_share, other.keys) == sought
    ]
    return found[0] if found else None


def _arm(layout: Layout, knobs: Knobs, seeds: Sequence[int], arm: Arm) -> dict[str, Any]:
    runs = [layout.run(seed, arm.name) for seed in seeds]
    scale = arm.beta(knobs.beta) if OBJECTIVES[arm.objective].scaled else 1.0
    numbers = _columns([measure.arm_measures(run, scale=scale, arm=arm) for run in runs])
    histories = [measure.curves(run) for run in runs]
    means = {name: np.mean([history[name] for history in histories], axis=0).tolist() for name in histories[0]}
    about: dict[str, Any] = {"objective": arm.objective, "lam": arm.lam, "data": arm.data}
    about["beta"] = None if arm.beta_share is None else arm.beta(knobs.beta)
    about |= {"refinement": dict(arm.refinement), "keys": dict(arm.keys)}
    return {**about, **_responses(runs), **numbers, "curves": means}


def _responses(runs: Sequence[Path]) -> dict[str, list[float]]:
    return {name: [float(measure.qualities(run / f"{name}.jsonl").mean()) for run in runs] for name in TEMPERATURES}


def _outcomes(layout: Layout, seeds: Sequence[int], arm: str, baseline: str) -> dict[str, Any]:
    compared: dict[str, Any] = {"arm": arm, "against": baseline}
    for name in TEMPERATURES:
        pairs = [[layout.run(seed, which) / f"{name}.jsonl" for which in (arm, baseline)] for seed in seeds]
        shares = [outcomes(*map(measure.qualities, pair)) for pair in pairs]
        compared[name] = dict(zip(OUTCOMES, zip(*shares, strict=True), strict=True))
    return compared


def _columns(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Turns dictionaries of one form, one a seed, into one dictionary of lists."""
    return {
        key: _columns([row[key] for row in rows]) if isinstance(value, dict) else [row[key] for row in rows]
        for key, value in rows[0].items()
    }


def _rounded(value: Any) -> Any:
    """Rounds floats to five digits and makes NaN null, so that the tables are made from what is in the file."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value


def tables(results: Results) -> dict[str, Table]:
    """Makes every table of the page that has rows, by its title."""
    found = {
        "What the base model knows": knowledge_table(results),
        "True quality of responses": quality_table(results),
        "Against the best of each plain objective": rivals_table(results),
        "Win, tie and lose by true quality (table 2)": outcome_table(results),
        "Correlation of margins with the true gap (table 4)": correlation_table(results),
        "Accuracy, correlation and greedy responses, paired": paired_table(results),
        "Margins against the true gap, stage by stage": stage_table(results),
        "What the shift is": shift_table(results),
        "Cost (table 5)": cost_table(results),
    }
    return {title: table for title, table in found.items() if table.rows}


NOISE_TABLES = ("True quality of responses", "Against the best of each plain objective", "What the shift is")
"""The tables of `--noise` that stand on the findings page."""


def markdown(results: Results, titles: Collection[str] | None = None) -> str:
    """Gives the tables as Markdown, each under its title; with `titles` these alone."""
    setting = results["setting"]
    knobs = ", ".join(f"{name.replace('_', ' ')} {setting[name]}" for name in KNOBS)
    intro = (
        f"{setting['seeds']} seed(s); {setting['pairs']} pairs; {setting['held_out_pairs']} held-out pairs; tasks "
        f"{', '.join(setting['tasks'])}; base model "
        f"of {setting['base_texts']} texts; {knobs}. Means over seeds with 95 % intervals (Student's t); p of paired t "
        "tests over seeds."
    )
    shown = {title: table for title, table in tables(results).items() if titles is None or title in titles}
    parts = [intro, *(f"### {title}\n\n{table.markdown()}" for title, table in shown.items())]
    return "\n\n".join(parts) + "\n"


def knowledge_table(results: Results) -> Table:
    known = results["knowledge"]
    rows = [[str(k), number(mean, 1)] for k, mean in zip(known["ratings"], known["mean_quality"], strict=True)]
    rows += [
        ["Spearman, rating and mean quality", number(known["spearman"], 2)],
        ["the same, a mean for each kind of task", number(known["spearman_by_task"], 2)],
        ["the same, single responses", number(known["spearman_of_responses"], 2)],
    ]
    return Table(["rating asked for", "mean quality of sampled responses"], rows)


def quality_table(results: Results) -> Table:
    columns = {"sampled": ("sampled", 1), "greedy": ("greedy", 1)}
    columns |= {"accuracy of m": ("accuracy", 3), "accuracy of m̂": ("augmented_accuracy", 3)}
    return _means([({"": name}, measures) for name, measures in models_of(results)], columns)


def rivals_table(results: Results) -> Table:
    """Compares each contrast, and what true ratings would give, with the best arm of each plain objective.

    The best is chosen by the mean quality of sampled responses on the same tasks, which favours the rivals. p of the
    paired t tests over seeds has Holm's correction for all rows. Without a contrast the table is empty.
    """
    arms = list(results["arms"].values())
    refined = [arm for arm in arms if arm.get("refinement") and arm["data"] == PAIRS]
    rivals: dict[str, dict[str, Any]] = {}
    for arm in arms:
        if arm["lam"] is None and arm["data"] == PAIRS:
            kind = _name_of(arm)
            if kind not in rivals or np.mean(arm["sampled"]) > np.mean(rivals[kind]["sampled"]):
                rivals[kind] = arm
    rows, tests = [], []
    for arm in refined:
        for rival in rivals.values():
            tests.append(paired(arm["sampled"], rival["sampled"]))
            rows.append({"": label(arm), "against": label(rival)})
    for row, test, p in zip(rows, tests, holm([test.p for test in tests]), strict=True):
        row["difference in quality, sampled"] = with_interval(*test.difference, 1)
        row["p, Holm"] = _p(p)
    return Table.of(rows)


def outcome_table(results: Results) -> Table:
    rows = []
    for arm, baseline, shares in _compared(results):
        percent = {key: np.multiply(100, shares[key]) for key in OUTCOMES}
        row = {"": label(arm), "against": label(baseline)}
        row |= {f"{key} %": number(float(values.mean()), 1) for key, values in percent.items()}
        row["win − lose"], row["p of it"] = _difference(percent["win"], percent["lose"], 1)
        row["difference in quality"], row["p of that"] = _difference(arm["sampled"], baseline["sampled"], 1)
        rows.append(row)
    return Table.of(rows)


def correlation_table(results: Results) -> Table:
    columns = {
        f"{kind}: {name.capitalize()}": (f"{prefix}{name}", 3)
        for kind, prefix in (("m", ""), ("m̂", "augmented_"))
        for name in measure.STATISTICS
    }
    return _means(_arms_of(results), columns)


def paired_table(results: Results) -> Table:
    """Has the differences arm − baseline, and p of their paired t tests."""
    compared = {
        "accuracy of m": ("accuracy", 3),
        "Spearman of m and the gap": ("spearman", 3),
        "greedy quality": ("greedy", 1),
    }
    rows = []
    for arm, baseline, _ in _compared(results):
        row = {"": label(arm), "against": label(baseline)}
        for heading, (key, digits) in compared.items():
            row[heading], row[f"p of {heading}"] = _difference(arm[key], baseline[key], digits)
        rows.append(row)
    return Table.of(rows)


def stage_table(results: Results) -> Table:
    kinds = {
        "plain": "d: no reference",
        "augmented": "d̂: no reference, with p",
        "plain_margin": "m: reference base",
        "augmented_margin": "m̂: reference base, with p",
    }
    rows = [
        ({"": name, "what": what}, stage[key])
        for name, stage in _stages_of(results)
        for key, what in kinds.items()
        if key in stage
    ]
    for about, arm in _arms_of(results):
        measures = {key: arm[f"augmented_{key}"] for key in ("accuracy", "accuracy_of_clear", "spearman")}
        rows.append((about | {"what": "m̂: reference SFT, with p"}, measures | {"given_plain": arm["given_plain"]}))
    counted = {key: [value] for key, value in results["counting_words"].items()}
    rows.append(({"": "no model", "what": "words that stand in the task, counted"}, counted))
    columns = {
        "accuracy": ("accuracy", 3),
        f"accuracy, gap ≥ {measure.LEAST_GAP:g}": ("accuracy_of_clear", 3),
        "Spearman with the gap": ("spearman", 3),
        "the same, given what is said without p": ("given_plain", 2),
    }
    return _means(rows, columns)


def shift_table(results: Results) -> Table:
    columns = {
        "margin m": ("margin", 1),
        "augmented margin m̂": ("augmented_margin", 1),
        "Pearson of m and m̂": ("margins_agree", 2),
        "λΔ relative to what it is taken from": ("shift_share", 2),
    }
    if any("settled_lam" in arm for arm in results["arms"].values()):
        columns["λ that was settled"] = ("settled_lam", 2)
    return _means(_arms_of(results), columns)


def cost_table(results: Results) -> Table:
    """Has the step times of the fastest seed: another user of the machine makes a run slower, never faster."""
    rows = []
    for arm, baseline, _ in _compared(results):
        if arm["lam"] is not None and arm["data"] == PAIRS and baseline["beta"] is None and not baseline.get("keys"):
            refined, plain = min(arm["step_time_s"]), min(baseline["step_time_s"])
            cells = {"step, s": number(refined), "step of the plain objective, s": number(plain)}
            rows.append({"": label(arm), **cells, "ratio": number(refined / plain, 2)})
    return Table.of(rows)


def label(arm: dict[str, Any]) -> str:
    """Names an arm in tables and figures."""
    text, lam = _name_of(arm), arm["lam"]
    if lam is not None:
        text += f", λ = {lam if isinstance(lam, str) else format(lam, 'g')}"
    text += "" if arm["beta"] is None else f", β = {arm['beta']:g}"
    return text + {PAIRS: "", MORE: ", more pairs", SHUFFLED: ", shuffled labels"}[arm["data"]]


def _name_of(arm: dict[str, Any]) -> str:
    objective, made = arm["objective"], arm.get("refinement") or {}
    name = {"dpo": "DPO", "ipo": "IPO", "robust": "Robust DPO"}[objective.removeprefix("sr_")]
    if name == "DPO" and arm.get("keys", {}).get("label_smoothing"):
        name = f"c{name}"
    if made.get("judge") == "ratings":
        return f"{name} with true ratings"
    if made.get("form") == "contrast":
        return f"{name} with contrast by the {made['judge']}"
    return f"Sr-{name}" if objective.startswith("sr_") else name


def models_of(results: Results) -> list[tuple[str, dict[str, Any]]]:
    """Gives the models before and after preference training, with their names in tables and figures."""
    return _stages_of(results) + [(label(arm), arm) for arm in results["arms"].values()]


def _stages_of(results: Results) -> list[tuple[str, dict[str, Any]]]:
    return [("Base model", results["stages"]["base"]), ("SFT", results["stages"]["sft"])]


def _arms_of(results: Results) -> list[tuple[dict[str, str], dict[str, Any]]]:
    return [({"": label(arm)}, arm) for arm in results["arms"].values()]


def _compared(results: Results) -> list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]:
    """Gives arm, baseline and shares of sampled outcomes of each comparison."""
    arms = results["arms"]
    return [(arms[one["arm"]], arms[one["against"]], one["sampled"]) for one in results["outcomes"]]


def _means(rows: Sequence[tuple[dict[str, str], dict[str, Any]]], columns: Mapping[str, tuple[str, int]]) -> Table:
    """Makes a table of means over seeds.

    Args:
      rows: of each row the first cells by heading, and the measures, lists of one value a seed.
      columns: of each heading the measure, which a row may lack, and the number of decimals.
    """
    return Table.of(
        [
            first | {heading: _mean(measures.get(key, [None]), digits) for heading, (key, digits) in columns.items()}
            for first, measures in rows
        ]
    )


def _mean(values: Sequence[float | None], digits: int) -> str:
    return with_interval(*mean_of(values), digits)


def _difference(first: Sequence[float], second: Sequence[float], digits: int) -> tuple[str, str]:
    """Gives the cells of a paired test: the mean difference with its interval, and p."""
    test = paired(first, second)
    return with_interval(*test.difference, digits), _p(test.p)


def _p(value: float) -> str:
    return "< 0.001" if value < 0.0005 else number(value)
