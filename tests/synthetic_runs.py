"""Makes run directories from a seed, without training, with all files that the report reads of a real run."""

import json
from pathlib import Path

import numpy as np

from sr_dpo_jax.commands.correlation import rating_metrics
from sr_dpo_jax.config.load import config_from_dict

LAM = {"sr_dpo": 0.3, "sr_ipo": 0.5}


def loss_of(objective: str, margin: np.ndarray, delta: np.ndarray, beta: float) -> np.ndarray:
    shift = LAM.get(objective, 0.0) * delta
    if objective.endswith("dpo"):
        return np.logaddexp(0, -(beta * margin - shift))
    return (margin - shift - 1 / (2 * beta)) ** 2


def make_run(
    root: Path,
    name: str,
    objective: str,
    *,
    steps: int = 300,
    seed: int = 0,
    rated: bool = True,
    skill: float = 1.0,
    sets: tuple[str, ...] = (),
) -> Path:
    """Makes a preference run of `steps` steps with two evaluations and the files of `sr-dpo eval` at its end.

    With `sets`, each of which learns less than the one before, it has samples and six evaluations, the fourth the best.
    """
    rng, path, beta = np.random.default_rng(seed), root / name, 0.1
    path.mkdir(parents=True)
    raw = {
        "output_dir": str(path),
        "model": {"path": "EleutherAI/pythia-410m"},
        "data": {"path": "train.jsonl", "eval_path": str(root / "held_out.jsonl"), "format": "preference"},
        "objective": {"name": objective, "beta": beta, "lam": LAM.get(objective)},
    }
    evaluated = (steps // 2, steps)
    if sets:
        raw["data"]["eval_sets"] = {one: {"path": f"{one}.jsonl"} for one in sets}
        raw["train"] = {"eval_every_steps": steps // 6}
        raw["checkpoint"] = {"best_metric": "eval/rewards/accuracies"}
        evaluated = tuple(range(steps // 6, steps + 1, steps // 6))
    (path / "config.yaml").write_text(config_from_dict(raw, where="test").to_yaml(), encoding="utf-8")
    lines = []
    for step in range(1, steps + 1):
        mean = skill * 9 * (1 - np.exp(-step / (steps / 3)))
        values = means(objective, *draw(rng, mean, 64), beta)
        speed = 5200 * (0.81 if objective in LAM else 1.0) * rng.normal(1, 0.02)
        padding = {"padding_fraction": 0.016 + 0.004 * rng.random(), "step_time_s": 21000 / speed}
        lines.append({"step": step, "epoch": step / steps, **values, "grad_norm": 3.0, "learning_rate": 5e-7})
        lines[-1] |= {"pairs_per_second": speed / 330, "tokens_per_second": speed, **padding}
        if step in evaluated:
            learned = 0.9 * mean - (0.7 * mean if sets and step > evaluated[3] else 0)
            margin, augmented = draw(np.random.default_rng(7), learned, 300)
            evaluation = {f"eval/{key}": value for key, value in means(objective, margin, augmented, beta).items()}
            lines.append({"step": step, **evaluation, "eval/pairs": 300})
            for number, one in enumerate(sets, 1):
                of_set = means(objective, *draw(np.random.default_rng(number), learned / 3**number - 1, 80), beta)
                lines[-1] |= {f"eval/{one}/{key}": value for key, value in of_set.items()} | {f"eval/{one}/pairs": 80}
    write_lines(path / "metrics.jsonl", lines)
    if sets:
        write_lines(path / "samples.jsonl", samples(name, evaluated))
    write_evaluation(path, {**lines[-1]}, margin, augmented, rated=rated)
    return path


def samples(name: str, steps: tuple[int, ...]) -> list[dict]:
    return [
        {
            "step": step,
            "set": "eval",
            "id": str(number),
            "prompt": f"\n\nHuman: Which question is number {number}?\n\nAssistant:",
            "response": f" <i>{name}</i> says at step {step} that it is number {number}." + " And so on." * number,
            "finish_reason": "end",
        }
        for step in steps
        for number in range(3)
    ]


def make_sft_run(root: Path, name: str, *, steps: int = 300) -> Path:
    path = root / name
    path.mkdir(parents=True)
    raw = {
        "output_dir": str(path),
        "model": {"path": "gpt2"},
        "data": {"path": "a.jsonl"},
        "objective": {"name": "sft"},
    }
    (path / "config.yaml").write_text(config_from_dict(raw, where="test").to_yaml(), encoding="utf-8")
    loss = 120 * np.exp(-np.arange(steps) / (steps / 2)) + 40 + np.random.default_rng(3).normal(0, 4, steps)
    speed = {"pairs_per_second": 30.0, "tokens_per_second": 6100.0, "padding_fraction": 0.012, "step_time_s": 2.1}
    lines = [{"step": n, "loss": value, "logps/chosen": -value, **speed} for n, value in enumerate(loss, 1)]
    write_lines(path / "metrics.jsonl", [*lines, {"step": steps, "eval/loss": 66.0, "eval/pairs": 300}])
    return path


def draw(rng: np.random.Generator, mean: float, pairs: int) -> tuple[np.ndarray, np.ndarray]:
    margin = rng.normal(mean, 4 + 0.6 * mean, pairs)
    return margin, 1.15 * margin + rng.normal(0.1 * mean, 2 + 0.2 * mean, pairs)


def means(objective: str, margin: np.ndarray, augmented: np.ndarray, beta: float) -> dict[str, float]:
    delta = beta * augmented
    metrics = {
        "loss": loss_of(objective, margin, delta, beta).mean(),
        "rewards/margins": beta * margin.mean(),
        "rewards/accuracies": (margin > 0).mean(),
        "margin": margin.mean(),
        "augmented/margin": augmented.mean(),
        "augmented/accuracies": (augmented > 0).mean(),
    }
    if objective in LAM:
        metrics["refinement"] = delta.mean()
    return {key: float(value) for key, value in metrics.items()}


def write_lines(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def write_evaluation(
    path: Path, evaluation: dict[str, float], margin: np.ndarray, augmented: np.ndarray, *, rated: bool
) -> None:
    """Writes eval.json and eval_pairs.jsonl, with ratings in halves as UltraFeedback has them."""
    rng = np.random.default_rng(11)
    difference = np.clip(np.round(2 * (margin / 8 + rng.normal(1.5, 1, len(margin)))) / 2, 0, 8)
    tokens = rng.integers(5, 300, (len(margin), 2))
    pairs = [
        {
            "id": f"prompt-{number:04d}",
            "prompt_tokens": 40,
            "chosen_tokens": int(tokens[number, 0]),
            "rejected_tokens": int(tokens[number, 1]),
            "margin": float(margin[number]),
            "augmented_margin": float(augmented[number]),
            **({"rating_difference": float(difference[number])} if rated else {}),
        }
        for number in range(len(margin))
    ]
    write_lines(path / "eval_pairs.jsonl", pairs)
    if rated:
        evaluation = evaluation | rating_metrics(
            {"margin": margin, "augmented_margin": augmented}, difference, seed=0, name="eval"
        )
    (path / "eval.json").write_text(json.dumps(evaluation), encoding="utf-8")
