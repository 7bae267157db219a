"""Makes the report's tables and its headline as texts: final metrics, held-out sets, configurations, sample pairs.

Takes the runs that `read.py` gives. Every table also gives itself as Markdown and as LaTeX.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import scipy.stats

from sr_dpo_jax.commands.report.read import Run, series, set_title
from sr_dpo_jax.train.clock import goodput
from sr_dpo_jax.train.knowledge import TITLES, share_interval

NONE = "–"
SIGNIFICANT = 0.05
SAMPLES_OF_EACH_KIND = 4
LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        **{char: f"\\{char}" for char in "&%$#_{}"},
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        **{"β": r"$\beta$", "λ": r"$\lambda$", "Δ": r"$\Delta$", "–": "--", "−": "$-$", "|": r"\textbar{}"},
    }
)


@dataclasses.dataclass(frozen=True)
class Table:
    """Headings, and rows of as many texts."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, str]]) -> "Table":
        """Makes a table of rows that map the same headings to texts, without the columns that are empty in all rows."""
        return without_empty_columns(list(rows[0]) if rows else [], [list(row.values()) for row in rows])

    def markdown(self) -> str:
        lines = [self.head, ["---"] + ["---:"] * (len(self.head) - 1), *self.rows]
        return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)

    def latex(self) -> str:
        """Gives a tabular for the booktabs package."""

        def line(cells: Sequence[str]) -> str:
            return " & ".join(cell.translate(LATEX) for cell in cells) + r" \\"

        columns = "l" + "r" * (len(self.head) - 1)
        body = [r"\toprule", line(self.head), r"\midrule", *map(line, self.rows), r"\bottomrule"]
        return "\n".join([rf"\begin{{tabular}}{{{columns}}}", *body, r"\end{tabular}"])


def without_empty_columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    kept = [index for index in range(len(head)) if any(row[index] != NONE for row in rows)]
    return Table([head[index] for index in kept], [[row[index] for index in kept] for row in rows])


def number(value: Any, digits: int = 3) -> str:
    """Gives a number as text with this many decimals, or with four digits from 1000 on; NONE where it is not finite."""
    if not isinstance(value, int | float) or not np.isfinite(value):
        return NONE
    text = f"{value:.4g}" if abs(value) >= 1000 else f"{value:.{digits}f}"
    return text.replace("-", "−")


def with_interval(value: Any, low: Any, high: Any, digits: int = 3) -> str:
    """Gives a number as text, with its interval in brackets where both ends are finite."""
    text, *ends = (number(part, digits) for part in (value, low, high))
    return text if NONE in ends else f"{text} [{', '.join(ends)}]"


def final_metrics(runs: Sequence[Run]) -> Table:
    """Has one row a run: its newest evaluation, and its median throughput."""
    rows = []
    for run in runs:
        final = run.final()
        speed = series(run.steps, "pairs_per_second")[1]
        best = [line for line in run.evaluations if line["step"] == run.best_step]
        row = {
            "run": run.label,
            "objective": run.objective,
            "β": _plain(run.beta) if run.kind.needs_rejected else NONE,
            "λ": _plain(run.lam),
            "step": _plain(final.get("step", run.last_step)),
            "held-out set": NONE if run.shown_set == "eval" else set_title(run.shown_set),
            **_set_metrics(final, "eval"),
            "Δ": number(final.get("eval/refinement")),
            "λΔ / βm": number(shift_share(run)),
        }
        for name in ("pearson", "spearman", "kendall"):
            row[name.capitalize()] = with_interval(
                *(final.get(f"eval/margin/{name}{end}") for end in ("", "/low", "/high")), 2
            )
        row["best"] = (
            f"{number(best[0][run.config['checkpoint.best_metric']])} (step {run.best_step})" if best else NONE
        )
        row["pairs/s"] = number(float(np.median(speed)), 1) if len(speed) else NONE
        rows.append(row)
    return Table.of(rows)


def held_out_sets(runs: Sequence[Run]) -> Table:
    """Has one row for each run and each of its held-out sets; none where no run has several."""
    rows = []
    for run in runs if any(len(run.sets) > 1 for run in runs) else []:
        for name in run.sets:
            line = next(line for line in reversed(run.evaluations) if f"{name}/loss" in line)
            about = {"run": run.label, "held-out set": set_title(name), "step": _plain(line["step"])}
            rows.append(about | _set_metrics(line, name))
    return Table.of(rows)


def _set_metrics(line: Mapping[str, Any], name: str) -> dict[str, str]:
    """Gives the cells that an evaluation fills for one held-out set, `eval` or `eval/NAME`."""
    shares = {"accuracy": f"{name}/rewards/accuracies", "augmented accuracy": f"{name}/augmented/accuracies"}
    return {
        "pairs": _plain(line.get(f"{name}/pairs")),
        "loss": number(line.get(f"{name}/loss")),
        "margin m": number(line.get(f"{name}/margin")),
        **{heading: _share(line.get(key), line.get(f"{name}/pairs")) for heading, key in shares.items()},
    }


def knowledge(runs: Sequence[Run]) -> Table:
    """Has a row for d, d̂ and c of each run whose model was asked at the start whether it knows the labels."""
    rows = []
    for run in runs:
        for key, title in TITLES.items() if run.knowledge else ():
            known = run.knowledge[key]
            row = {"run": run.label, "": title, "accuracy": with_interval(known["accuracy"], *known["interval"])}
            row |= {"mean": number(known["mean"]), "spread": number(known["std"])}
            row |= {name: number(group["accuracy"]) for name, group in known["by_length"].items()}
            slope = run.knowledge["slope"]
            row["slope"] = with_interval(slope["value"], *slope["interval"], 2) if key == "contrast" else NONE
            row["λ"] = _plain(run.lam) if key == "contrast" and run.kind.refined else NONE
            rows.append(row)
    return Table.of(rows)


def lives(runs: Sequence[Run]) -> Table:
    """Has a row for each run with a clock: its goodput, and the seconds of each phase of its life."""
    rows = []
    for run in runs:
        if run.life:
            row = {"run": run.label, "goodput": f"{100 * goodput(run.life):.1f} %"}
            seconds = {"life (s)": sum(run.life.values()), **run.life}
            rows.append(row | {name: number(value, 1) if value else NONE for name, value in seconds.items()})
    return Table.of(rows)


def samples(runs: Sequence[Run]) -> dict[tuple[str, str, str], list[list[tuple[int, str]]]]:
    """Gives the responses, (step, text), newest first, of each run with samples to each (set, id, prompt).

    Only for those who ask for texts.
    """
    sampled = [run for run in runs if run.samples]
    responses: dict[tuple[str, str, str], list[list[tuple[int, str]]]] = {}
    for place, run in enumerate(sampled):
        for line in run.samples:
            of_prompt = responses.setdefault(
                (set_title(line["set"]), line["id"], line["prompt"]), [[] for _ in sampled]
            )
            of_prompt[place].insert(0, (int(line["step"]), line["response"]))
    return responses


def shift_share(run: Run) -> float:
    """Gives mean |λΔ| over mean |βm| (|m| where λΔ shifts m itself) of held-out pairs; NaN where there is no Δ."""
    if not run.kind.refined or run.kind.per_token or not run.pairs:  # the margins of pairs are sums over tokens
        return math.nan
    reward = np.abs(run.scale * run.column("margin")).mean()
    return float(run.lam * np.abs(run.refinement()).mean() / reward) if reward else math.nan


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) and np.isfinite(value) else NONE


def _share(share: float | None, pairs: float | None) -> str:
    """Gives a share with its 95 % interval, where it and the number of pairs are known."""
    if share is None or not pairs:
        return number(share)
    return with_interval(share, *share_interval(share, pairs))


def headline(runs: Sequence[Run]) -> list[str]:
    """Says in sentences which run is most accurate on held-out pairs, and whether chance may explain its lead."""
    scored = [(run, run.final()) for run in runs if "eval/rewards/accuracies" in run.final()]
    if not scored:
        return ["No run here was evaluated on held-out preference pairs: there is no accuracy to compare."]
    scored.sort(key=lambda item: -item[1]["eval/rewards/accuracies"])
    (best, final), others = scored[0], scored[1:]
    share = final["eval/rewards/accuracies"]
    sentences = [
        f"{best.label} prefers the chosen response in {100 * share:.1f} % of {final['eval/pairs']:.0f} held-out pairs"
        + (", the highest of these runs. Against it:" if others else ".")
    ]
    return sentences + [_comparison(best, other, share - line["eval/rewards/accuracies"]) for other, line in others]


def _comparison(best: Run, other: Run, difference: float) -> str:
    """Compares two runs by McNemar's exact test, which counts the pairs that only one of them orders correctly.

    Both must have been scored on the same pairs.
    """
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
    """Has one row for each key in which the configurations differ, with the value of every run as YAML writes it."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    rows = []
    for key in keys:
        values = [run.config.get(key, NONE) for run in runs]
        values = [value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in values]
        if key != "output_dir" and len(set(values)) > 1:
            rows.append([key, *values])
    return Table(["key", *(run.label for run in runs)], rows)


def sample_pairs(runs: Sequence[Run]) -> tuple[list[str], Table]:
    """Gives ids and numbers of the pairs whose m̂ (m without p) is smallest, in the middle and largest.

    The first refined run with pairs decides which these are, because its Δ shifted its loss; else the first with pairs.
    """
    scored = [run for run in runs if run.pairs]
    if not scored:
        return [], Table([], [])
    deciding = next((run for run in scored if run.kind.refined), scored[0])
    name = "augmented_margin" if np.isfinite(deciding.column("augmented_margin")).any() else "margin"
    order = np.argsort(deciding.column(name), kind="stable")
    count, middle = SAMPLES_OF_EACH_KIND, max(0, len(order) // 2 - SAMPLES_OF_EACH_KIND // 2)
    chosen = [*order[:count], *order[middle : middle + count], *order[-count:]]
    shown = {str(deciding.pairs[index].get("id")): deciding.pairs[index] for index in chosen}
    head = ["id", "tokens, chosen / rejected", "rating difference"]
    for run in scored:
        head += [f"{run.label}: m", "m̂", *(["Δ", "λΔ"] if run.kind.refined else [])]
    by_id = [{str(pair.get("id")): pair for pair in run.pairs} for run in scored]
    deltas = {
        run.number: dict(zip((str(pair.get("id")) for pair in run.pairs), run.refinement(), strict=True))
        for run in scored
    }
    rows = []
    for identity, pair in shown.items():
        tokens = f"{pair['chosen_tokens']:.0f} / {pair['rejected_tokens']:.0f}"
        row = [identity, tokens, number(pair.get("rating_difference"), 1)]
        for run, pairs in zip(scored, by_id, strict=True):
            margin, augmented = (pairs.get(identity, {}).get(key) for key in ("margin", "augmented_margin"))
            delta = deltas[run.number].get(identity)
            row += [number(margin, 2), number(augmented, 2)]
            if run.kind.refined:
                row += [number(delta), number(None if delta is None else run.lam * delta)]
        rows.append(row)
    return list(shown), without_empty_columns(head, rows)
