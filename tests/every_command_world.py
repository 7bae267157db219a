"""What `every_command.sh` works on: a tiny model, HH-RLHF pairs, configurations, questions and a task.

python tests/every_command_world.py DIRECTORY
"""

import gzip
import json
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

import yaml  # noqa: E402
from benchmarks.hh_run import make_model  # noqa: E402
from runs import HH_FILE, make_pairs  # noqa: E402

from sr_dpo_jax.data.rows import Pair, read_rows  # noqa: E402

TRAIN_PAIRS, HELD_OUT_PAIRS, QUESTIONS = 96, 24, 20
PAIRS_PER_STEP = 8


def rows_of_hh() -> list[dict[str, str]]:
    """Transcripts of HH-RLHF, or others of that form where the file is absent."""
    count = TRAIN_PAIRS + 2 * HELD_OUT_PAIRS
    if HH_FILE.exists():
        with gzip.open(HH_FILE) as lines:
            return [json.loads(line) for line, _ in zip(lines, range(count), strict=False)]
    print(f"REAL DATA IS ABSENT: {HH_FILE}; pairs are generated")
    return [
        {side: f"\n\nHuman: {pair['prompt']}\n\nAssistant: {pair[side].strip()}" for side in ("chosen", "rejected")}
        for pair in make_pairs(count, seed=3)
    ]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def config_of(name: str, model: str, **sections: Any) -> dict[str, Any]:
    """One run's configuration; paths are relative to the directory in which the commands are given."""
    return {
        "output_dir": f"runs/{name}",
        "cache_dir": "cache",
        "model": {"path": model, "dtype": "float32", "init": "random" if name == "sft" else "pretrained"},
        "data": {
            "path": "train.jsonl",
            "eval_path": "held_out.jsonl",
            "format": "hh_rlhf",
            "max_length": 128,
            "max_prompt_length": 96,
            "max_bad_rows": 9,
        },
        "objective": {"name": name},
        "optimizer": {"name": "adamw", "learning_rate": 1e-3, "warmup_steps": 2},
        "batch": {"pairs_per_step": PAIRS_PER_STEP, "row_length": 256, "row_multiple": 8},
        "train": {"epochs": 1},
        "checkpoint": {"every_steps": 2},
        "generation": {"max_new_tokens": 32, "slots": 8},
        **sections,
    }


def write_task(directory: Path, pairs: list[Pair]) -> None:
    """The held-out pairs as multiple choice: which of two responses is the chosen one."""
    directory.mkdir(exist_ok=True)
    rows = []
    for number, pair in enumerate(pairs):
        choices = [pair.chosen, pair.rejected][:: 1 if number % 2 else -1]
        rows.append({"question": pair.prompt, "choices": choices, "answer": choices.index(pair.chosen)})
    write_lines(directory / "held_out.jsonl", rows)
    task = {
        "task": "held_out",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(directory.absolute() / "held_out.jsonl")},
            "cache_dir": str(directory.absolute() / "cache"),
        },
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    (directory / "held_out.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")


def main() -> None:
    root = Path(sys.argv[1])
    rows = rows_of_hh()
    parts = {"train": rows[:TRAIN_PAIRS]}
    parts["held_out"] = rows[TRAIN_PAIRS : TRAIN_PAIRS + HELD_OUT_PAIRS]
    parts["other"] = rows[TRAIN_PAIRS + HELD_OUT_PAIRS :]
    for name, part in parts.items():
        write_lines(root / f"{name}.jsonl", part)
    make_model(root / "base", hidden=64, layers=2, data=root / "train.jsonl")
    configs = {
        "sft": config_of("sft", "base"),
        "dpo": config_of(
            "dpo",
            "sft-model",
            train={"epochs": 1, "eval_every_steps": 4, "samples": 2},
            checkpoint={"every_steps": 4, "keep": 1, "best_metric": "eval/other/margin"},
        ),
        "sr_dpo": config_of("sr_dpo", "sft-model", objective={"name": "sr_dpo", "lam": 0.5}),
    }
    configs["dpo"]["data"]["eval_sets"] = {"other": {"path": "other.jsonl"}}
    for name, config in configs.items():
        (root / f"{name}.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    pairs = [row for row in read_rows(str(root / "held_out.jsonl"), format="hh_rlhf", split="test")]
    pairs = [pair for pair in pairs if isinstance(pair, Pair)]
    questions = [
        {"question_id": number, "category": ("short", "long")[len(pair.prompt) > 400], "prompt": pair.prompt}
        for number, pair in enumerate(pairs[:QUESTIONS])
    ]
    write_lines(root / "questions.jsonl", questions)
    write_task(root / "tasks", pairs)


if __name__ == "__main__":
    main()
