"""Measures a run from its files: true quality of its responses, and its margins against the true gap. Imports no jax.

    true gap             quality of the chosen response − quality of the rejected one, held-out pairs
    preference d, d̂      log π(y⁺|x) − log π(y⁻|x) without and with p in front
    margin m, m̂          d and d̂ of the policy − those of its reference

The base model has d and d̂ alone; the SFT model also m and m̂ with the base model as reference; after preference
training there are m and m̂ with the SFT model as reference, and Δ = β·m̂.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from sr_dpo_jax.commands.demo.protocol import Arm
from sr_dpo_jax.commands.demo.statistics import partial_spearman, spearman
from sr_dpo_jax.commands.demo.tasks import LIST_WORDS, NUMBERS, OTHER_WORDS, RATINGS, quality
from sr_dpo_jax.durable.files import read_lines

LEAST_GAP = 20.0
"""Pairs whose true gap is at least this many points are clear ones."""
CURVES = ("margin", "augmented/margin", "rewards/accuracies", "augmented/accuracies", "loss")
STATISTICS = ("pearson", "spearman", "kendall")


def qualities(responses: Path) -> np.ndarray:
    """Computes the true quality of each response of a file that `sr-dpo generate` wrote, `[N]`, 0 to 100."""
    return np.array([quality(line["response"], line["answer"].split()) for line in read_lines(responses)])


def knowledge(rated: Path) -> dict[str, Any]:
    """Measures whether quality rises with the rating asked for: mean quality at each rating, and Spearman."""
    lines, found = read_lines(rated), qualities(rated)
    ratings = np.array([line["rating"] for line in lines])
    kinds = np.array([line["kind"] for line in lines])
    means = [float(found[ratings == rating].mean()) for rating in RATINGS]
    groups = sorted(set(zip(ratings.tolist(), kinds.tolist(), strict=True)))
    of_groups = [found[(ratings == rating) & (kinds == kind)].mean() for rating, kind in groups]
    return {
        "ratings": list(RATINGS),
        "mean_quality": means,
        "spearman": spearman(RATINGS, means),
        "spearman_by_task": spearman([rating for rating, _ in groups], of_groups),
        "spearman_of_responses": spearman(ratings, found),
    }


def preferences(scores: Path) -> dict[str, np.ndarray]:
    """Reads d and d̂ of each held-out pair from a file of `sr-dpo score`, `[N]`, nats, and the true gap, points."""
    lines = read_lines(scores)

    def difference(kind: str) -> np.ndarray:
        return np.array([line[f"logp_chosen{kind}"] - line[f"logp_rejected{kind}"] for line in lines])

    gap = np.array([line["chosen_score"] - line["rejected_score"] for line in lines])
    return {"plain": difference(""), "augmented": difference("_augmented"), "gap": gap}


def against_gap(margin: np.ndarray, gap: np.ndarray) -> dict[str, float]:
    """Measures how well margins, `[N]`, order pairs: shares above 0 of all and of clear pairs, Spearman with the gap.

    A margin of 0 counts as wrong.
    """
    return _against_gap(margin, margin > 0, gap) | {"mean": float(margin.mean())}


def _against_gap(verdict: np.ndarray, right: np.ndarray, gap: np.ndarray) -> dict[str, float]:
    clear = gap >= LEAST_GAP
    return {
        "accuracy": float(right.mean()),
        "accuracy_of_clear": float(right[clear].mean()) if clear.any() else np.nan,
        "spearman": spearman(verdict, gap),
    }


def counting_words(held_out: Path) -> dict[str, float]:
    """Measures a judge that knows no task: it counts a response's words that are in the task's list or are numbers.

    It subtracts the difference of the response's length from that of right answers. Equal counts are half right.
    """
    lines = read_lines(held_out)

    def count(line: dict[str, Any], side: str) -> int:
        words, known = line[side].split(), {*line["prompt"].split()} - {*OTHER_WORDS} | {*NUMBERS}
        return sum(word in known for word in words) - abs(len(words) - LIST_WORDS)

    difference = np.array([count(line, "chosen") - count(line, "rejected") for line in lines])
    gap = np.array([line["score_chosen"] - line["score_rejected"] for line in lines])
    return _against_gap(difference, (difference > 0) + 0.5 * (difference == 0), gap)


def stage_measures(scores: Path, reference: Path | None) -> dict[str, Any]:
    """Measures a model before preference training, by d and d̂ and, with the scores of its reference, by m and m̂."""
    own, kinds = preferences(scores), ("plain", "augmented")
    measures = {kind: against_gap(own[kind], own["gap"]) for kind in kinds}
    measures["augmented"]["given_plain"] = partial_spearman(own["augmented"], own["gap"], own["plain"])
    if reference is not None:
        base = preferences(reference)
        measures |= {f"{kind}_margin": against_gap(own[kind] - base[kind], own["gap"]) for kind in kinds}
    return measures


def arm_measures(run: Path, *, scale: float, arm: Arm) -> dict[str, float]:
    """Measures one preference run, from eval.json, eval_pairs.jsonl and metrics.jsonl.

    λΔ is subtracted from `scale`·m. Without refinement, and where `auto` gave no weight, there is no share of it.
    """
    evaluation = json.loads((run / "eval.json").read_text(encoding="utf-8"))
    pairs = read_lines(run / "eval_pairs.jsonl")
    margin, augmented, gap = (
        np.array([pair[name] for pair in pairs]) for name in ("margin", "augmented_margin", "rating_difference")
    )
    plain, with_p = against_gap(margin, gap), against_gap(augmented, gap)
    measures = {
        "margin": plain["mean"],
        "augmented_margin": with_p["mean"],
        "accuracy": plain["accuracy"],
        "augmented_accuracy": with_p["accuracy"],
        "augmented_accuracy_of_clear": with_p["accuracy_of_clear"],
        "given_plain": partial_spearman(augmented, gap, margin),
        "margins_agree": float(np.corrcoef(margin, augmented)[0, 1]),
    }
    for name in STATISTICS:
        measures[name] = evaluation[f"eval/margin/{name}"]
        measures[f"augmented_{name}"] = evaluation[f"eval/augmented_margin/{name}"]
    if arm.lam is not None:
        lam = lam_of(run) if arm.lam == "auto" else float(arm.lam)
        # Where `auto` gave no weight the run is plain, and its pairs have no Δ.
        shift = lam * np.array([pair["refinement"] for pair in pairs]) if lam else np.zeros(len(pairs))
        if arm.lam == "auto":
            measures["settled_lam"] = lam
        measures["shift_share"] = float(np.abs(shift).mean() / np.abs(scale * margin).mean())
    # Slow steps may have shared the machine with other work, so a step's time is the tenth percentile.
    times = [line["step_time_s"] for line in read_lines(run / "metrics.jsonl") if "step_time_s" in line]
    measures["step_time_s"] = float(np.percentile(times, 10))
    return measures


def lam_of(run: Path) -> float:
    """Reads the λ that `auto` settled from a run's manifest."""
    return float(json.loads((run / "manifest.json").read_text(encoding="utf-8"))["knowledge"]["lam"])


def curves(run: Path) -> dict[str, list[float]]:
    """Gives held-out metrics over the steps of training."""
    lines = [line for line in read_lines(run / "metrics.jsonl") if "eval/loss" in line]
    return {"step": [line["step"] for line in lines]} | {
        name: [line[f"eval/{name}"] for line in lines] for name in CURVES
    }


if __name__ == "__main__":  # a scorer for `sr-dpo compare`
    for _line in map(json.loads, sys.stdin):
        print(f"{quality(_line['response'], _line['answer'].split()):.6g}")
