"""`sr-dpo demo`: a small world, a model from random weights, SFT, then DPO and Sr-DPO from it, a table and a report.

Everything goes through the same code as `sr-dpo train`, on files that stay in the output directory: data, configs and
runs. Running it again resumes what was cut short.

The world: an instruction and a few words; the chosen response carries it out, the rejected one gets it wrong. SFT
sees prompts with the paper's p in front answered rightly and prompts without it answered rightly or wrongly, so the
model has what the method builds on: it can tell more about a response when it is asked for a good one.
"""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rich.console
import rich.table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPTNeoXConfig, PreTrainedTokenizerFast

from sr_dpo_jax import config as configuration
from sr_dpo_jax.config import PAPER_PROMPT
from sr_dpo_jax.evaluate import evaluate_command
from sr_dpo_jax.export import export
from sr_dpo_jax.loop import EXIT_DONE, train
from sr_dpo_jax.report.page import report

TRAIN_PAIRS, HELD_OUT_PAIRS = 2500, 300
SFT_WRONG = 0.4
"""Share of wrong answers among the SFT rows without p."""
WORDS = [
    "acorn",
    "birch",
    "cedar",
    "daisy",
    "elder",
    "fern",
    "grape",
    "hazel",
    "iris",
    "jasmine",
    "kelp",
    "lemon",
    "maple",
    "nettle",
    "olive",
    "plum",
    "quince",
    "rose",
    "sage",
    "thyme",
    "umbel",
    "violet",
    "willow",
    "yarrow",
    "zinnia",
]
TASKS: dict[str, Callable[[list[str]], list[str]]] = {
    "Copy": lambda words: words,
    "Reverse": lambda words: words[::-1],
    "Sort": sorted,
    "First and last": lambda words: [words[0], words[-1]],
}
END = "<|end|>"


def demo(output_dir: Path) -> int:
    """Runs or resumes all stages under `output_dir`; returns an exit code."""
    console = rich.console.Console(highlight=False)
    _make_world(output_dir)
    stages = {"sft": _stage(output_dir, "sft", output_dir / "base", epochs=2, learning_rate=2e-3)}
    aligned = output_dir / "sft-model"
    for name, extra in (("dpo", {}), ("sr_dpo", {"lam": 0.5})):
        stages[name] = _stage(output_dir, name, aligned, epochs=1, learning_rate=1e-4, **extra)
    for name, stage in stages.items():
        console.rule(f"{name}: sr-dpo train {output_dir / f'{name}.yaml'}")
        code = train(configuration.load(stage))
        if code != EXIT_DONE:
            return code
        if name == "sft" and not aligned.exists():
            export(output_dir / "sft", aligned)
    for name in ("dpo", "sr_dpo"):
        console.rule(f"{name}: sr-dpo eval {output_dir / f'{name}.yaml'}")
        evaluate_command(configuration.load(stages[name]))
    page = output_dir / "report.html"
    report([output_dir / name for name in stages], page, with_texts=True)
    results = {name: _last_evaluation(output_dir / name / "metrics.jsonl") for name in stages}
    console.print(_table(results))
    console.print(
        f"Means over {HELD_OUT_PAIRS} held-out pairs. Loss of sft: nats a response. Runs, data and configs are in "
        f"{output_dir}; curves: tensorboard --logdir {output_dir}"
    )
    console.print(f"The runs side by side, with held-out pairs and their texts: open {page}")
    return EXIT_DONE


def make_pairs(count: int, seed: int) -> list[dict[str, str]]:
    """Rows of prompt, chosen and rejected text, drawn from `seed`."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        task, words = rng.choice(list(TASKS)), rng.sample(WORDS, rng.randint(3, 6))
        right = TASKS[task](words)
        wrong = _spoil(right, rng)
        prompt = f"{task}: {' '.join(words)}\nAnswer:"
        rows.append({"prompt": prompt, "chosen": " " + " ".join(right), "rejected": " " + " ".join(wrong)})
    return rows


def make_sft_rows(count: int, seed: int) -> list[dict[str, str]]:
    """Rows to imitate: every other one with p in front and a right answer, the others answered at mixed quality."""
    rng = random.Random(seed)
    rows = make_pairs(count, seed)
    for number, row in enumerate(rows):
        if number % 2:
            row["prompt"] = PAPER_PROMPT + row["prompt"]
        elif rng.random() < SFT_WRONG:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    return rows


def _spoil(words: list[str], rng: random.Random) -> list[str]:
    """Swaps two words, drops one or puts a foreign one in: always another list."""
    wrong = list(words)
    match rng.randrange(3):
        case 0:
            first, second = rng.sample(range(len(wrong)), 2)
            wrong[first], wrong[second] = wrong[second], wrong[first]
        case 1:
            del wrong[rng.randrange(len(wrong))]
        case 2:
            wrong[rng.randrange(len(wrong))] = rng.choice([word for word in WORDS if word not in words])
    return wrong


def _make_world(output_dir: Path) -> None:
    """Preference files, a tokenizer trained on them, and a config.json without weights."""
    base = output_dir / "base"
    if base.exists():
        return
    partial = output_dir / "base.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    rows = {
        "sft": make_sft_rows(3 * TRAIN_PAIRS, seed=1),
        "train": make_pairs(TRAIN_PAIRS, seed=2),
        "held_out": make_pairs(HELD_OUT_PAIRS, seed=3),
    }
    for name, pairs in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in pairs)
        (output_dir / f"{name}.jsonl").write_text(text, encoding="utf-8")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((row["prompt"] + row["chosen"] for row in rows["sft"]), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END).save_pretrained(partial)
    GPTNeoXConfig(
        vocab_size=1024,
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=512,
        rotary_pct=1.0,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=0,
    ).save_pretrained(partial)
    partial.rename(base)


def _stage(output_dir: Path, name: str, model: Path, *, epochs: int, learning_rate: float, **objective: float) -> Path:
    """Writes one stage's configuration beside its run, and returns where."""
    raw: dict[str, Any] = {
        "output_dir": str(output_dir / name),
        "cache_dir": str(output_dir / "cache"),
        "model": {"path": str(model), "dtype": "float32", "init": "random" if name == "sft" else "pretrained"},
        "data": {
            "path": str(output_dir / ("sft.jsonl" if name == "sft" else "train.jsonl")),
            "eval_path": str(output_dir / "held_out.jsonl"),
            "format": "preference",
            "max_length": 128,
            "max_prompt_length": 64,
        },
        "objective": {"name": name, **objective},
        "optimizer": {"name": "adamw", "learning_rate": learning_rate, "warmup_steps": 10, "max_grad_norm": 1.0},
        "batch": {"pairs_per_step": 64, "row_length": 256, "row_multiple": 8},
        "train": {"epochs": epochs},
    }
    path = output_dir / f"{name}.yaml"
    path.write_text(configuration.from_dict(raw, where=str(path)).to_yaml(), encoding="utf-8")
    return path


def _last_evaluation(metrics_file: Path) -> dict[str, float]:
    lines = [json.loads(line) for line in metrics_file.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "eval/loss" in line][-1]


def _table(results: dict[str, dict[str, float]]) -> rich.table.Table:
    table = rich.table.Table(title="Held-out pairs after each stage")
    columns = {
        "loss": "eval/loss",
        "margin": "eval/margin",
        "accuracy": "eval/rewards/accuracies",
        "augmented accuracy": "eval/augmented/accuracies",
    }
    for heading in ("objective", *columns):
        table.add_column(heading, justify="left" if heading == "objective" else "right")
    for name, metrics in results.items():
        cells = [f"{metrics[key]:.3f}" if key in metrics else "–" for key in columns.values()]
        table.add_row(name, *cells)
    return table
