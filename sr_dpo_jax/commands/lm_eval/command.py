"""Runs tasks of lm-evaluation-harness with the model on the mesh.

The harness brings the tasks, fetches their data and computes the metrics; it runs on every host and needs no PyTorch.

Next: `commands/lm_eval/mesh_lm.py`, the model as the harness sees it.
"""

import difflib
import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sr_dpo_jax.commands import console
from sr_dpo_jax.config.load import config_for_model, load_config
from sr_dpo_jax.config.schema import Config
from sr_dpo_jax.durable.files import require_output, write_text
from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.train.identity import digests_of
from sr_dpo_jax.train.setup import read_model, set_up

try:
    import lm_eval
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    from sr_dpo_jax.commands.lm_eval.mesh_lm import MeshLM
except ImportError as missing:
    raise UsageError(
        f"lm-evaluation-harness is not installed ({missing.name}); pip install 'sr_dpo_jax[eval]'"
    ) from missing

BOOTSTRAP = 1000
"""The number of resamples for the standard error of a metric that has no formula for it."""


PAPER = {
    "arc_challenge": (25, "acc_norm,none"),
    "truthfulqa_mc2": (0, "acc,none"),
    "winogrande": (5, "acc,none"),
    "gsm8k": (5, "exact_match,strict-match"),
    "hellaswag": (10, "acc_norm,none"),
    "mmlu": (5, "acc,none"),
}
"""The Open LLM Leaderboard as the paper reports it: for each task the few-shot count, and the metric with its filter.
TruthfulQA has six examples of its own in each prompt."""


def lm_eval_command(
    model: str,
    overrides: Sequence[str],
    *,
    tasks: Sequence[str] | None,
    include_path: Path | None,
    num_fewshot: int | None,
    limit: int | None,
    output: Path | None,
    best: bool = False,
    apply_chat_template: bool = False,
) -> None:
    """Runs tasks, prints their metrics and writes them to `output`.

    Args:
      model: the output_dir of a run, whose latest or `best` checkpoint is taken, or a Hugging Face directory or name.
      overrides: `section.key=value`, of the run's configuration or of the defaults.
      tasks: names of tasks of the harness or of `include_path`; None takes those of the paper.
      num_fewshot: examples before each question, except in tasks that fix the count to 0; None takes each task's own.
      limit: the number of first examples of each task; None takes all.
      apply_chat_template: asks each question as a user of the chat template, with its examples before it.

    Raises:
      UsageError: model, tasks or options cannot be used, or there is no best checkpoint or chat template.
    """
    is_run = (Path(model) / "config.yaml").is_file()
    if best and not is_run:
        raise UsageError(f"{model}: is no run, and --best takes the best checkpoint of one; name a run's output_dir")
    _check(tasks, include_path, num_fewshot, limit, output)
    config = read_config(model, overrides)
    of_paper = {task: count for task, (count, _) in PAPER.items()}
    fewshot = of_paper if tasks is None else dict.fromkeys(tasks, num_fewshot)
    task_dict = load_tasks(fewshot, include_path)
    directory, tokenizer = read_model(config)
    if apply_chat_template and tokenizer.chat_template is None:
        raise UsageError(f"--apply-chat-template: {config.model.path} has no chat template; leave it out")
    asked = {"tasks": [fewshot, limit], "--best": best, "--apply-chat-template": apply_chat_template}
    setup = set_up(config, directory, asked | digests_of(tokenizer), has_cache=is_run)
    params, step = setup.latest_params(best=best)
    if step == 0 and is_run:
        raise UsageError(f"{model}: has no checkpoint; train first, or name a Hugging Face directory")
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # the harness would fork for its bootstrap, below jax's threads
    options = {"limit": limit, "apply_chat_template": apply_chat_template}
    lm = MeshLM(setup, params, tokenizer)
    answers = evaluate(lm, task_dict, bootstrap_iters=BOOTSTRAP, log_samples=False, **options)
    result = {
        "model": model,
        "step": step,
        "dtype": config.model.dtype,
        "revision": directory.revision,
        **options,
        "lm_eval": lm_eval.__version__,
        **{name: answers[name] for name in ("results", "n-shot", "n-samples", "versions", "higher_is_better")},
        **({"paper": paper_table(answers["results"])} if tasks is None else {}),
    }
    if jax.process_index() == 0:
        if output is not None:
            write_text(output, json.dumps(result, indent=2, ensure_ascii=False, default=str) + "\n")
        print_result(result)


def read_config(model: str, overrides: Sequence[str]) -> Config:
    """Reads the configuration of a run; for a model makes one of defaults."""
    file = Path(model) / "config.yaml"
    if not file.is_file():
        return config_for_model(model, overrides)
    # The run may have been moved since; without this its checkpoints would be looked for where it was.
    return load_config(file, [*overrides, f"output_dir={json.dumps(str(file.parent))}"])


def load_tasks(fewshot: dict[str, int | None], include_path: Path | None) -> dict[str, Any]:
    """Loads tasks, as the harness's `evaluate` takes them; their data is read or fetched.

    Seeds are those of the harness's own command, so examples and order are too. `fewshot` holds the number of examples
    before each question by task or group; None takes what the task says.

    Raises:
      UsageError: there is no such task, its data cannot be had, or it is of a kind that is not run here.
    """
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    unknown = [name for name in fewshot if name not in manager.all_tasks]
    if unknown:
        close = difflib.get_close_matches(unknown[0], manager.all_tasks, n=3)
        raise UsageError(
            f"--tasks {','.join(unknown)}: lm-evaluation-harness has no such task"
            + (f"; did you mean {' or '.join(close)}?" if close else "; --include-path names a directory of your own")
        )
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name, wanted in fewshot.items():
        try:
            part = manager.load([name])
        except (OSError, ValueError, KeyError) as error:
            raise UsageError(f"task {name}: cannot be loaded ({type(error).__name__}: {error})") from error
        for task_name, task in part["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
                raise UsageError(
                    f"task {task_name}: runs code that the model writes, or shows it pictures; neither is done here"
                )
            own = task.get_config("num_fewshot")
            if own != 0:  # a task that fixes the count to 0 is made for that
                task.set_config(key="num_fewshot", value=(own or 0) if wanted is None else wanted)
            task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
        for kind, of_kind in loaded.items():
            of_kind.update(part[kind])
    return loaded


def paper_table(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Picks the paper's columns from the results and adds their mean."""
    table = {task: float(results[task][metric]) for task, (_, metric) in PAPER.items()}
    return table | {"average": sum(table.values()) / len(table)}


def print_result(result: dict[str, Any]) -> None:
    """Prints one row a metric; below them the paper's table, where it was asked for."""
    table = console.table("task", ">few-shot", "metric", ">value", ">± s.e.")
    for task, metrics in result["results"].items():
        for key, value in metrics.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = metrics.get(f"{metric}_stderr,{filtered}")
            name = metric if filtered == "none" else f"{metric} ({filtered})"
            cells = (str(result["n-shot"].get(task, "")), name, f"{value:.4f}")
            console.row(table, task, *cells, f"{error:.4f}" if isinstance(error, int | float) else "")
    console.section(f"{result['model']}, step {result['step']}", table)
    for task, value in result.get("paper", {}).items():
        print(f"{task:16} {100 * value:6.2f}")


def _check(
    tasks: Sequence[str] | None,
    include_path: Path | None,
    num_fewshot: int | None,
    limit: int | None,
    output: Path | None,
) -> None:
    if output is not None:
        require_output(output)
    if tasks is None and num_fewshot is not None:
        raise UsageError(f"--num-fewshot {num_fewshot}: --paper has its own counts; name --tasks, or leave it out")
    if tasks is not None and not all(tasks):
        raise UsageError(f"--tasks {','.join(tasks)}: an empty name; separate names by one comma")
    if include_path is not None and not include_path.is_dir():
        raise UsageError(f"--include-path {include_path}: no such directory")
    for name, value, least in (("--num-fewshot", num_fewshot, 0), ("--limit", limit, 1)):
        if value is not None and value < least:
            raise UsageError(f"{name} {value}: must be at least {least}")
