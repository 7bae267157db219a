"""What a run's files say: true quality of its responses, and its margins against the true gap. Imports no jax.

    true gap             quality of the chosen response − quality of the rejected one, held-out pairs
    margin m, m̂          as everywhere: log-ratios of the policy to its reference, without and with p in front
    preference d, d̂      the same without a reference, log π(y⁺|x) − log π(y⁻|x): what a model knows before it has one

For the base model there is d and d̂; for the SFT model also m and m̂ with the base model as reference; after preference
training m and m̂ with the SFT model as reference, and Δ = β·m̂.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from sr_dpo_jax.commands.demo.statistics import partial_spearman, spearman
from sr_dpo_jax.commands.demo.tasks import LIST_WORDS, NUMBERS, OTHER_WORDS, RATINGS, quality
from sr_dpo_jax.durable.files import read_lines

LEAST_GAP = 20.0
"""Points of quality from which on a pair counts for `accuracy`'s demanding form."""
CURVES = ("margin", "augmented/margin", "rewards/accuracies", "augmented/accuracies", "loss")
STATISTICS = ("pearson", "spearman", "kendall")


def qualities(responses: Path) -> np.ndarray:
    """True quality of each response of a file that `sr-dpo generate` wrote, `[N]`."""
    return np.array([quality(line["response"], line["answer"].split()) for line in read_lines(responses)])


def knowledge(rated: Path) -> dict[str, Any]:
    """Whether quality rises with the rating asked for: mean quality at each rating, and Spearman's correlation."""
    lines, found = read_lines(rated), qualities(rated)
    ratings = np.array([line["rating"] for line in lines])
    kinds = np.array([line["kind"] for line in lines])
    means = [float(found[ratings == rating].mean()) for rating in RATINGS]
    cells = sorted(set(zip(ratings.tolist(), kinds.tolist(), strict=True)))
    of_cells = [found[(ratings == rating) & (kinds == kind)].mean() for rating, kind in cells]
    return {
        "ratings": list(RATINGS),
        "mean_quality": means,
        "spearman": spearman(RATINGS, means),
        "spearman_by_task": spearman([rating for rating, _ in cells], of_cells),
        "spearman_of_responses": spearman(ratings, found),
    }


def preferences(scores: Path) -> dict[str, np.ndarray]:
    """d and d̂ of each held-out pair from a file of `sr-dpo score`, `[N]`, nats, and the true gap."""
    lines = read_lines(scores)

    def difference(kind: str) -> np.ndarray:
        return np.array([line[f"logp_chosen{kind}"] - line[f"logp_rejected{kind}"] for line in lines])

    gap = np.array([line["chosen_score"] - line["rejected_score"] for line in lines])
    return {"plain": difference(""), "augmented": difference("_augmented"), "gap": gap}


def against_gap(margin: np.ndarray, gap: np.ndarray) -> dict[str, float]:
    """How well margins order pairs: shares above 0, of all and of clear pairs, and Spearman's correlation."""
    clear = gap >= LEAST_GAP
    return {
        "accuracy": float((margin > 0).mean()),
        "accuracy_of_clear": float((margin[clear] > 0).mean()) if clear.any() else np.nan,
        "spearman": spearman(margin, gap),
        "mean": float(margin.mean()),
    }


def counting_words(held_out: Path) -> dict[str, float]:
    """How a judge does that knows no task: a response's words that stand in the task's list or are numbers, less what
    its length differs from that of right answers. Equal counts are half right."""
    lines = read_lines(held_out)

    def count(line: dict[str, Any], side: str) -> int:
        words, known = line[side].split(), {*line["prompt"].split()} - {*OTHER_WORDS} | {*NUMBERS}
        return sum(word in known for word in words) - abs(len(words) - LIST_WORDS)

    difference = np.array([count(line, "chosen") - count(line, "rejected") for line in lines])
    gap = np.array([line["score_chosen"] - line["score_rejected"] for line in lines])
    right = (difference > 0) + 0.5 * (difference == 0)
    clear = gap >= LEAST_GAP
    return {
        "accuracy": float(right.mean()),
        "accuracy_of_clear": float(right[clear].mean()) if clear.any() else np.nan,
        "spearman": spearman(difference, gap),
    }


def stage_measures(scores: Path, reference: Path | None) -> dict[str, Any]:
    """What a model before preference training knows; with its reference's scores also its margins against it."""
    of = preferences(scores)
    found = {kind: against_gap(of[kind], of["gap"]) for kind in ("plain", "augmented")}
    found["augmented"]["given_plain"] = partial_spearman(of["augmented"], of["gap"], of["plain"])
    if reference is not None:
        base = preferences(reference)
        for kind in ("plain", "augmented"):
            found[f"{kind}_margin"] = against_gap(of[kind] - base[kind], of["gap"])
    return found


def arm_measures(run: Path, *, beta: float, lam: float | None, ipo: bool) -> dict[str, float]:
    """Numbers of one preference run, from eval.json, eval_pairs.jsonl and metrics.jsonl."""
    evaluation = json.loads((run / "eval.json").read_text(encoding="utf-8"))
    pairs = read_lines(run / "eval_pairs.jsonl")
    margin, augmented, gap = (
        np.array([pair[name] for pair in pairs]) for name in ("margin", "augmented_margin", "rating_difference")
    )
    plain, refined = against_gap(margin, gap), against_gap(augmented, gap)
    found = {
        "margin": plain["mean"],
        "augmented_margin": refined["mean"],
        "accuracy": plain["accuracy"],
        "augmented_accuracy": refined["accuracy"],
        "augmented_accuracy_of_clear": refined["accuracy_of_clear"],
        "given_plain": partial_spearman(augmented, gap, margin),
        "margins_agree": float(np.corrcoef(margin, augmented)[0, 1]),
    }
    for name in STATISTICS:
        found[name] = evaluation[f"eval/margin/{name}"]
        found[f"augmented_{name}"] = evaluation[f"eval/augmented_margin/{name}"]
    if lam is not None:
        shifted = margin if ipo else beta * margin
        found["shift_share"] = float(np.abs(lam * beta * augmented).mean() / np.abs(shifted).mean())
    steps = [line for line in read_lines(run / "metrics.jsonl") if "step_time_s" in line]
    # Of a run's steps the tenth percentile: the others may have shared the machine.
    found["step_time_s"] = float(np.percentile([line["step_time_s"] for line in steps], 10))
    return found


def curves(run: Path) -> dict[str, list[float]]:
    """Held-out metrics over the steps of training."""
    lines = [line for line in read_lines(run / "metrics.jsonl") if "eval/loss" in line]
    return {"step": [line["step"] for line in lines]} | {
        name: [line[f"eval/{name}"] for line in lines] for name in CURVES
    }
