"""The report's tables as lists of texts: final metrics (also as Markdown and LaTeX), config diff, sample pairs."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.stats

from sr_dpo_jax.commands.report.pair_figures import share_interval
from sr_dpo_jax.commands.report.read import REFINED, Run, series

NONE = "–"
SIGNIFICANT = 0.05
SAMPLES_OF_EACH_KIND = 4
LATEX = {
    "\\": r"\textbackslash{}",
    **{char: f"\\{char}" for char in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{"β": r"$\beta$", "λ": r"$\lambda$", "Δ": r"$\Delta$", "–": "--", "−": "$-$", "|": r"\textbar{}"},
}


@dataclasses.dataclass(frozen=True)
class Table:
    """Headings and rows of texts. Columns in which no row says anything are left out."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        lines = [self.head, ["---"] + ["---:"] * (len(self.head) - 1), *self.rows]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)

    def latex(self) -> str:
        """For the booktabs package."""

        def line(cells: Sequence[str]) -> str:
            return " & ".join("".join(LATEX.get(char, char) for char in cell) for cell in cells) + r" \\"

        columns = "l" + "r" * (len(self.head) - 1)
        body = [r"\toprule", line(self.head), r"\midrule", *map(line, self.rows), r"\bottomrule"]
        return "\n".join([rf"\begin{{tabular}}{{{columns}}}", *body, r"\end{tabular}"])


def without_empty_columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    kept = [index for index in range(len(head)) if any(row[index] != NONE for row in rows)]
    return Table([head[index] for index in kept], [[row[index] for index in kept] for row in rows])


def number(value: Any, digits: int = 3) -> str:
    """A number of a table: so many decimals, or four digits where it is large."""
    if not isinstance(value, int | float) or not np.isfinite(value):
        return NONE
    text = f"{value:.4g}" if abs(value) >= 1000 else f"{value:.{digits}f}"
    return text.replace("-", "−")


def final_metrics(runs: Sequence[Run]) -> Table:
    """One row a run: its newest evaluation, and its median throughput."""
    columns = {
        "loss": "eval/loss",
        "margin m": "eval/margin",
        "accuracy": "eval/rewards/accuracies",
        "augmented accuracy": "eval/augmented/accuracies",
        "Δ": "eval/refinement",
    }
    statistics = {name.capitalize(): f"eval/margin/{name}" for name in ("pearson", "spearman", "kendall")}
    rows = []
    for run in runs:
        final = run.final()
        speed = series(run.steps, "pairs_per_second")[1]
        cells = [run.label, run.objective, _plain(run.beta) if run.objective != "sft" else NONE, _plain(run.lam)]
        cells += [_plain(final.get("step", run.last_step)), _set_name(run.shown_set), _plain(final.get("eval/pairs"))]
        for heading, name in columns.items():
            cells.append(_share(final, name) if "accuracy" in heading else number(final.get(name)))
        cells.append(number(shift_share(run)))
        cells += [_with_interval(final, name) for name in statistics.values()]
        cells += [_best(run), number(float(np.median(speed)), 1) if len(speed) else NONE]
        rows.append(cells)
    head = ["run", "objective", "β", "λ", "step", "held-out set", "pairs", *columns, "λΔ / βm", *statistics]
    return without_empty_columns([*head, "best", "pairs/s"], rows)


def held_out_sets(runs: Sequence[Run]) -> Table:
    """One row for each run and each of its held-out sets; none where no run has several."""
    rows = []
    for run in runs if any(len(run.sets) > 1 for run in runs) else []:
        for name in run.sets:
            line = next(line for line in reversed(run.evaluations) if f"{name}/loss" in line)
            of_set = {f"eval{key.removeprefix(name)}": line[key] for key in line if key.startswith(f"{name}/")}
            cells = [run.label, "data.eval_path" if name == "eval" else _set_name(name), _plain(line["step"])]
            cells += [
                _plain(of_set.get("eval/pairs")),
                number(of_set.get("eval/loss")),
                number(of_set.get("eval/margin")),
            ]
            rows.append([*cells, *(_share(of_set, f"eval/{part}/accuracies") for part in ("rewards", "augmented"))])
    head = ["run", "held-out set", "step", "pairs", "loss", "margin m", "accuracy", "augmented accuracy"]
    return without_empty_columns(head, rows)


def samples(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Prompts with each run's responses, (step, text), newest first; for those who ask for texts."""
    asked = dict.fromkeys((line["set"], line["id"], line["prompt"]) for run in runs for line in run.samples)
    return [
        {
            "set": "data.eval_path" if key[0] == "eval" else _set_name(key[0]),
            "id": key[1],
            "prompt": key[2],
            "responses": [
                [
                    (line["step"], line["response"])
                    for line in reversed(run.samples)
                    if (line["set"], line["id"], line["prompt"]) == key
                ]
                for run in runs
                if run.samples
            ],
        }
        for key in asked
    ]


def _set_name(held_out: str) -> str:
    """The name of a set; none for that of data.eval_path."""
    return held_out.removeprefix("eval/") if held_out != "eval" else NONE


def _best(run: Run) -> str:
    """The best metric and its step."""
    found = [line for line in run.evaluations if line["step"] == run.best_step]
    return f"{number(found[0][run.config['checkpoint.best_metric']])} (step {run.best_step})" if found else NONE


def shift_share(run: Run) -> float:
    """Mean |λΔ| over mean |βm| (|m| in the IPO family) of held-out pairs; NaN where the objective is not refined."""
    if run.objective not in REFINED or not run.pairs:
        return float("nan")
    reward = np.abs(run.scale * run.column("margin")).mean()
    return (
        float(run.lam * np.abs(run.beta * run.column("augmented_margin")).mean() / reward) if reward else float("nan")
    )


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) and np.isfinite(value) else NONE


def _share(final: Mapping[str, Any], name: str) -> str:
    if name not in final or not final.get("eval/pairs"):
        return number(final.get(name))
    low, high = share_interval(final[name], final["eval/pairs"])
    return f"{number(final[name])} [{number(low)}, {number(high)}]"


def _with_interval(final: Mapping[str, Any], name: str) -> str:
    low, high = (number(final.get(f"{name}/{end}"), 2) for end in ("low", "high"))
    value = number(final.get(name), 2)
    return value if NONE in (low, high) else f"{value} [{low}, {high}]"


def headline(runs: Sequence[Run]) -> list[str]:
    """What the held-out pairs say, in sentences: who is most accurate, and whether chance may explain it."""
    scored = [(run, run.final()) for run in runs if "eval/rewards/accuracies" in run.final()]
    if not scored:
        return ["No run here was evaluated on held-out preference pairs: there is no accuracy to compare."]
    scored.sort(key=lambda item: -item[1]["eval/rewards/accuracies"])
    (best, final), others = scored[0], scored[1:]
    share = final["eval/rewards/accuracies"]
    said = [
        f"{best.label} prefers the chosen response in {100 * share:.1f} % of {final['eval/pairs']:.0f} held-out pairs"
        + (", the highest of these runs. Against it:" if others else ".")
    ]
    return said + [_comparison(best, other, share - line["eval/rewards/accuracies"]) for other, line in others]


def _comparison(best: Run, other: Run, difference: float) -> str:
    """With McNemar's exact test where both were scored on the same pairs: only those that they order unlike count."""
    text = f"{other.label}: {number(100 * difference, 1)} points less"
    ids = [[pair.get("id") for pair in run.pairs] for run in (best, other)]
    if not ids[0] or ids[0] != ids[1]:
        return f"{text} (not known pair by pair on the same pairs, so not tested)."
    right = [run.column("margin") > 0 for run in (best, other)]
    if abs(right[0].mean() - right[1].mean() - difference) > 1e-6:
        return f"{text} (eval_pairs.jsonl is of another step, so not tested)."
    won, lost = int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
    if won + lost == 0:
        return f"{other.label}: the same, on every pair."
    chance = float(scipy.stats.binomtest(won, won + lost).pvalue)
    verdict = "chance may explain it" if chance > SIGNIFICANT else "more than chance would give"
    return f"{text}; of the {won + lost} pairs that they order unlike it loses {won}, p = {number(chance)}: {verdict}."


def config_difference(runs: Sequence[Run]) -> Table:
    """The keys in which the configurations differ, each with its values."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    rows = []
    for key in keys:
        values = [_value(run.config[key]) if key in run.config else NONE for run in runs]
        if key != "output_dir" and len(set(values)) > 1:
            rows.append([key, *values])
    return Table(["key", *(run.label for run in runs)], rows)


def _value(value: Any) -> str:
    """As YAML would write it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def sample_pairs(runs: Sequence[Run]) -> tuple[list[str], Table]:
    """Ids and numbers of the pairs with the smallest, middle and largest m̂ (m without p) of the first run with pairs.

    The first refined run decides where there is one, because its Δ shifted its loss.
    """
    scored = [run for run in runs if run.pairs]
    if not scored:
        return [], Table([], [])
    decides = next((run for run in scored if run.objective in REFINED), scored[0])
    name = "augmented_margin" if np.isfinite(decides.column("augmented_margin")).any() else "margin"
    order = np.argsort(decides.column(name), kind="stable")
    count, middle = SAMPLES_OF_EACH_KIND, max(0, len(order) // 2 - SAMPLES_OF_EACH_KIND // 2)
    picked = [*order[:count], *order[middle : middle + count], *order[-count:]]
    ids = list(dict.fromkeys(str(decides.pairs[index].get("id")) for index in picked))
    by_id = [{str(pair.get("id")): pair for pair in run.pairs} for run in scored]
    head = ["id", "tokens, chosen / rejected", "rating difference"]
    rows = [[identity] for identity in ids]
    for row, identity in zip(rows, ids, strict=True):
        pair = by_id[scored.index(decides)][identity]
        row += [
            f"{pair['chosen_tokens']:.0f} / {pair['rejected_tokens']:.0f}",
            number(pair.get("rating_difference"), 1),
        ]
    for run, pairs in zip(scored, by_id, strict=True):
        refined = run.objective in REFINED
        head += [f"{run.label}: m", "m̂", *(["Δ", "λΔ"] if refined else [])]
        for row, identity in zip(rows, ids, strict=True):
            pair = pairs.get(identity, {})
            delta = run.beta * pair["augmented_margin"] if "augmented_margin" in pair else None
            row += [number(pair.get("margin"), 2), number(pair.get("augmented_margin"), 2)]
            row += [number(delta), number(None if delta is None else run.lam * delta)] if refined else []
    return ids, without_empty_columns(head, rows)
