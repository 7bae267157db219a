"""Run directories -> results.json, and results.json -> tables: the page's numbers come from that file alone.

results.json holds for every arm and seed what was measured (lists have one value a seed), and the outcomes of refined
arms against the plain ones. Imports no jax.
"""

import json
import math
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from sr_dpo_jax import __version__
from sr_dpo_jax.commands.demo import measure
from sr_dpo_jax.commands.demo.corpus import Knobs
from sr_dpo_jax.commands.demo.protocol import LAMBDAS, MORE, PAIRS, SHUFFLED, Arm, Layout, Setting
from sr_dpo_jax.commands.demo.statistics import Mean, mean_of, outcomes, paired
from sr_dpo_jax.commands.report.tables import NONE, Table, number, without_empty_columns

DECODINGS = ("sampled", "greedy")
DIGITS = 5
KNOBS = ("rated_share", "rating_noise", "label_noise", "gaps", "beta")
Results = dict[str, Any]


def collect(layout: Layout, setting: Setting, knobs: Knobs, seeds: Sequence[int]) -> Results:
    """Everything that was measured on the seeds that are finished."""
    arms = {arm.name: _arm(layout, knobs, seeds, arm) for arm in setting.arms}
    base_scores = layout.base_run / "scores.jsonl"
    sft = [layout.run(seed, "sft") for seed in seeds]
    stages = {
        "base": {**_responses([layout.base_run]), **_columns([measure.stage_measures(base_scores, None)])},
        "sft": {
            **_responses(sft),
            **_columns([measure.stage_measures(run / "scores.jsonl", base_scores) for run in sft]),
        },
    }
    found = {
        "setting": {
            "name": setting.name,
            "seeds": len(seeds),
            "tasks": list(setting.tasks),
            "base_steps": setting.base_steps,
            "base_texts": setting.base_steps * setting.base_pairs_per_step,
            "held_out_pairs": setting.held_out_pairs,
            "more_factor": setting.more_factor,
            "rated_share": knobs.rated_share,
            "rating_noise": knobs.rating_noise,
            "label_noise": knobs.label_noise,
            "gaps": list(knobs.gaps),
            "pairs": knobs.pairs,
            "beta": knobs.beta,
        },
        "versions": {"sr_dpo_jax": __version__, "jax": version("jax")},
        "knowledge": measure.knowledge(layout.base_run / "rated.jsonl"),
        "counting_words": measure.counting_words(layout.data("held_out")),
        "stages": stages,
        "arms": arms,
        "outcomes": [_outcomes(layout, seeds, *names) for names in comparisons(setting)],
    }
    return _rounded(found)


def comparisons(setting: Setting) -> list[tuple[str, str]]:
    """Names of arms that are held against each other: against the plain objective, and λ = 1 against its control."""
    found = [(arm.name, against) for arm in setting.arms if (against := baseline_of(setting, arm)) is not None]
    for control in setting.arms:
        if control.beta_share is not None:
            refined = (f"sr_{control.objective}", max(LAMBDAS), control.data)
            found += [(arm.name, control.name) for arm in setting.arms if (arm.objective, arm.lam, arm.data) == refined]
    return found


def baseline_of(setting: Setting, arm: Arm) -> str | None:
    """The arm without refinement, and with everybody's β, on the same pairs; None for that arm itself."""
    if arm.lam is None and arm.beta_share is None:
        return None
    sought = (arm.objective.removeprefix("sr_"), arm.data, None)
    found = [other.name for other in setting.arms if (other.objective, other.data, other.beta_share) == sought]
    return found[0] if found else None


def write(results: Results, path: Path) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(results, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def _arm(layout: Layout, knobs: Knobs, seeds: Sequence[int], arm: Arm) -> dict[str, Any]:
    runs = [layout.run(seed, arm.name) for seed in seeds]
    ipo = arm.objective in ("ipo", "sr_ipo")
    numbers = _columns([measure.arm_measures(run, beta=knobs.beta, lam=arm.lam, ipo=ipo) for run in runs])
    histories = [measure.curves(run) for run in runs]
    means = {name: np.mean([history[name] for history in histories], axis=0).tolist() for name in histories[0]}
    about = {"objective": arm.objective, "lam": arm.lam, "data": arm.data}
    about["beta"] = None if arm.beta_share is None else arm.beta(knobs.beta)
    return {**about, **_responses(runs), **numbers, "curves": means}


def _responses(runs: Sequence[Path]) -> dict[str, list[float]]:
    return {name: [float(measure.qualities(run / f"{name}.jsonl").mean()) for run in runs] for name in DECODINGS}


def _outcomes(layout: Layout, seeds: Sequence[int], arm: str, baseline: str) -> dict[str, Any]:
    found: dict[str, Any] = {"arm": arm, "against": baseline}
    for name in DECODINGS:
        shares = [
            outcomes(*(measure.qualities(layout.run(seed, which) / f"{name}.jsonl") for which in (arm, baseline)))
            for seed in seeds
        ]
        found[name] = {key: [share[place] for share in shares] for place, key in enumerate(("win", "tie", "lose"))}
    return found


def _columns(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Dictionaries of one form, one a seed -> one dictionary of lists."""
    return {
        key: _columns([row[key] for row in rows]) if isinstance(value, dict) else [row[key] for row in rows]
        for key, value in rows[0].items()
    }


def _rounded(value: Any) -> Any:
    """Floats to five digits, NaN as null: what stands in the file is what the tables are made from."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value


def tables(results: Results) -> dict[str, Table]:
    """Every table of the page, by its title."""
    return {
        "What the base model knows": knowledge_table(results),
        "True quality of responses": quality_table(results),
        "Win, tie and lose by true quality (table 2)": outcome_table(results),
        "Correlation of margins with the true gap (table 4)": correlation_table(results),
        "Accuracy, correlation and greedy responses, paired": paired_table(results),
        "Margins against the true gap, stage by stage": stage_table(results),
        "What the shift is": shift_table(results),
        "Cost (table 5)": cost_table(results),
    }


def markdown(results: Results) -> str:
    """The tables as Markdown, each under its title."""
    setting = results["setting"]
    knobs = ", ".join(f"{name.replace('_', ' ')} {setting[name]}" for name in KNOBS)
    intro = (
        f"{setting['seeds']} seed(s); {setting['pairs']} pairs; {setting['held_out_pairs']} held-out pairs; tasks "
        f"{', '.join(setting['tasks'])}; base model "
        f"of {setting['base_texts']} texts; {knobs}. Means over seeds with 95 % intervals (Student's t); p of paired t "
        "tests over seeds."
    )
    parts = [intro, *(f"### {title}\n\n{table.markdown()}" for title, table in tables(results).items())]
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
    head = ["", "sampled", "greedy", "accuracy of m", "accuracy of m̂"]
    rows = [[name, *(_cell(stage[key], 1) for key in DECODINGS), NONE, NONE] for name, stage in _stages(results)]
    for arm in results["arms"].values():
        quality = [_cell(arm[key], 1) for key in DECODINGS]
        rows.append([label(arm), *quality, _cell(arm["accuracy"]), _cell(arm["augmented_accuracy"])])
    return Table(head, rows)


def outcome_table(results: Results) -> Table:
    head = ["", "against", "win %", "tie %", "lose %", "win − lose", "p of it", "difference in quality", "p of that"]
    rows = []
    for found in results["outcomes"]:
        arm, baseline = results["arms"][found["arm"]], results["arms"][found["against"]]
        shares = found["sampled"]
        balance = paired(shares["win"], shares["lose"])
        difference = paired(arm["sampled"], baseline["sampled"])
        rows.append(
            [
                label(arm),
                label(baseline),
                *(number(100 * float(np.mean(shares[key])), 1) for key in ("win", "tie", "lose")),
                _mean(_scaled(balance.difference, 100), 1),
                _p(balance.p),
                _mean(difference.difference, 1),
                _p(difference.p),
            ]
        )
    return without_empty_columns(head, rows)  # one seed has no p


def correlation_table(results: Results) -> Table:
    names = {"Pearson": "pearson", "Spearman": "spearman", "Kendall": "kendall"}
    head = ["", *(f"m: {name}" for name in names), *(f"m̂: {name}" for name in names)]
    rows = []
    for arm in results["arms"].values():
        plain = [_cell(arm[key]) for key in names.values()]
        rows.append([label(arm), *plain, *(_cell(arm[f"augmented_{key}"]) for key in names.values())])
    return Table(head, rows)


def paired_table(results: Results) -> Table:
    """Differences arm − the other one, and p of their paired t tests."""
    compared = {"accuracy of m": "accuracy", "Spearman of m and the gap": "spearman", "greedy quality": "greedy"}
    head = ["", "against", *(heading for name in compared for heading in (name, f"p of {name}"))]
    rows = []
    for found in results["outcomes"]:
        arm, baseline = results["arms"][found["arm"]], results["arms"][found["against"]]
        tests = [paired(arm[key], baseline[key]) for key in compared.values()]
        digits = [1 if key == "greedy" else 3 for key in compared.values()]
        cells = [
            cell for test, n in zip(tests, digits, strict=True) for cell in (_mean(test.difference, n), _p(test.p))
        ]
        rows.append([label(arm), label(baseline), *cells])
    return without_empty_columns(head, rows)  # one seed has no p


def stage_table(results: Results) -> Table:
    accuracy = f"accuracy, gap ≥ {measure.LEAST_GAP:g}"
    head = ["", "what", "accuracy", accuracy, "Spearman with the gap", "the same, given what is said without p"]
    kinds = {
        "plain": "d: no reference",
        "augmented": "d̂: no reference, with p",
        "plain_margin": "m: reference base",
        "augmented_margin": "m̂: reference base, with p",
    }
    rows = []
    for name, stage in _stages(results):
        for key, what in kinds.items():
            if key in stage:
                found = stage[key]
                columns = (found["accuracy"], found["accuracy_of_clear"], found["spearman"])
                given = _cell(found["given_plain"], 2) if "given_plain" in found else NONE
                rows.append([name, what, *map(_cell, columns), given])
    for arm in results["arms"].values():
        columns = (arm["augmented_accuracy"], arm["augmented_accuracy_of_clear"], arm["augmented_spearman"])
        rows.append([label(arm), "m̂: reference SFT, with p", *map(_cell, columns), _cell(arm["given_plain"], 2)])
    counted = [number(results["counting_words"][key]) for key in ("accuracy", "accuracy_of_clear", "spearman")]
    rows.append(["no model", "words that stand in the task, counted", *counted, NONE])
    return Table(head, rows)


def shift_table(results: Results) -> Table:
    head = ["", "margin m", "augmented margin m̂", "Pearson of m and m̂", "λΔ relative to what it is taken from"]
    rows = []
    for arm in results["arms"].values():
        share = _cell(arm["shift_share"], 2) if "shift_share" in arm else NONE
        of_pairs = [_cell(arm["margin"], 1), _cell(arm["augmented_margin"], 1), _cell(arm["margins_agree"], 2)]
        rows.append([label(arm), *of_pairs, share])
    return Table(head, rows)


def cost_table(results: Results) -> Table:
    """Of the fastest seed: another user of the machine makes a run slower, never faster."""
    rows = []
    for found in results["outcomes"]:
        arm, baseline = results["arms"][found["arm"]], results["arms"][found["against"]]
        if arm["lam"] is not None and arm["data"] == PAIRS and baseline["beta"] is None:
            fastest, plain = min(arm["step_time_s"]), min(baseline["step_time_s"])
            rows.append([label(arm), number(fastest), number(plain), number(fastest / plain, 2)])
    return Table(["", "step, s", "step of the plain objective, s", "ratio"], rows)


def label(arm: dict[str, Any]) -> str:
    """How an arm is called in tables and figures."""
    objective = {"dpo": "DPO", "ipo": "IPO", "sr_dpo": "Sr-DPO", "sr_ipo": "Sr-IPO"}[arm["objective"]]
    text = objective if arm["lam"] is None else f"{objective}, λ = {arm['lam']:g}"
    text += "" if arm["beta"] is None else f", β = {arm['beta']:g}"
    return text + {PAIRS: "", MORE: ", more pairs", SHUFFLED: ", shuffled labels"}[arm["data"]]


def _stages(results: Results) -> list[tuple[str, dict[str, Any]]]:
    return [("Base model", results["stages"]["base"]), ("SFT", results["stages"]["sft"])]


def _cell(values: Sequence[float | None], digits: int = 3) -> str:
    return _mean(mean_of([math.nan if value is None else value for value in values]), digits)


def _mean(mean: Mean, digits: int) -> str:
    text = number(mean.value, digits)
    return text if math.isnan(mean.low) else f"{text} [{number(mean.low, digits)}, {number(mean.high, digits)}]"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.0005 else number(value)


def _scaled(mean: Mean, factor: float) -> Mean:
    return Mean(factor * mean.value, factor * mean.low, factor * mean.high)
