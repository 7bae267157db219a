"""Takes the runs of the protocol through `train`, `export`, `eval`, `score` and `generate`, as a user would.

What is on disk is not done again: every stage leaves its last file when it is whole, and a run that was cut short goes
on from its checkpoint. So the same command resumes the demo.
"""

import logging
from pathlib import Path

from sr_dpo_jax.commands.demo.base_model import write_base_model
from sr_dpo_jax.commands.demo.corpus import Knobs, base_rows, preference_rows, write_rows
from sr_dpo_jax.commands.demo.protocol import (
    MORE,
    PAIRS,
    PREFERENCE_SETS,
    SHUFFLED,
    Arm,
    Layout,
    Setting,
    arm_config,
    base_config,
    scoring_config,
    sft_config,
)
from sr_dpo_jax.commands.demo.tasks import RATINGS, instruction
from sr_dpo_jax.commands.evaluate import evaluate_command, score_command
from sr_dpo_jax.commands.export import export
from sr_dpo_jax.commands.generate import generate_command
from sr_dpo_jax.config.schema import Config
from sr_dpo_jax.durable.files import read_lines
from sr_dpo_jax.train.loop import EXIT_DONE, train

log = logging.getLogger(__name__)

GREEDY, SAMPLED, RATED, SCORES = "greedy.jsonl", "sampled.jsonl", "rated.jsonl", "scores.jsonl"
DECODING = {GREEDY: 0.0, SAMPLED: 1.0}
"""File of responses -> temperature."""
RATED_PROMPTS = 64
"""Held-out tasks that the base model is asked for at every rating."""


class Interrupted(Exception):
    """A stage ended with another exit code than 0; the same command goes on."""

    def __init__(self, code: int):
        super().__init__(code)
        self.code = code


def make_base(layout: Layout, setting: Setting, knobs: Knobs) -> None:
    """Held-out data and the base model, with what it knows: responses at every rating, scores of held-out pairs."""
    layout.data("held_out").parent.mkdir(parents=True, exist_ok=True)
    write_base_model(layout.base)
    held_out = preference_rows(
        setting.held_out_pairs, kinds=setting.tasks, gaps=knobs.gaps, label_noise=0.0, seed="held out"
    )
    _write_once(layout.data("held_out"), held_out)
    rated = [
        {**row, "prompt": instruction(rating) + row["prompt"], "rating": rating}
        for rating in RATINGS
        for row in held_out[:RATED_PROMPTS]
    ]
    _write_once(layout.data("rated"), rated)
    base = base_config(layout, setting)
    if not layout.data("base").exists():
        count = setting.base_steps * setting.base_pairs_per_step
        rows = base_rows(
            count, kinds=setting.tasks, rated_share=knobs.rated_share, rating_noise=knobs.rating_noise, seed=0
        )
        write_rows(layout.data("base"), rows)
    if not layout.base_model.exists():
        _train(base)
        export(layout.base_run, layout.base_model)
    _score(layout, setting, layout.base_model, layout.base_run / SCORES)
    _respond(base, layout.data("rated"), layout.base_run / RATED, temperature=1.0)
    _respond_to_all(base, layout)


def make_sft(layout: Layout, setting: Setting, knobs: Knobs, seed: int) -> None:
    """The seed's preference sets and its SFT model."""
    held_out = {row["prompt"] for row in read_lines(layout.data("held_out"))}
    sizes = {PAIRS: 1, MORE: setting.more_factor, SHUFFLED: 1}
    needed = {PAIRS} | {arm.data for arm in setting.arms}
    for name in PREFERENCE_SETS:
        if name in needed and not layout.data(name, seed).exists():
            rows = preference_rows(
                knobs.pairs * sizes[name],
                kinds=setting.tasks,
                gaps=knobs.gaps,
                label_noise=0.5 if name == SHUFFLED else knobs.label_noise,
                seed=f"{MORE if name == MORE else PAIRS} {seed}",  # shuffled pairs are the seed's own pairs
                without=held_out,
            )
            write_rows(layout.data(name, seed), rows)
    config = sft_config(layout, setting, seed)
    if not layout.sft_model(seed).exists():
        _train(config)
        export(layout.run(seed, "sft"), layout.sft_model(seed))
    _score(layout, setting, layout.sft_model(seed), layout.run(seed, "sft") / SCORES)
    _respond_to_all(config, layout)


def run_arm(layout: Layout, setting: Setting, knobs: Knobs, seed: int, arm: Arm) -> None:
    """Trains one arm, evaluates it on held-out pairs and lets it respond to their tasks."""
    config = arm_config(layout, setting, knobs, seed, arm)
    run = Path(config.output_dir)
    if not (run / "eval.json").exists():
        _train(config)
        evaluate_command(config)
    _respond_to_all(config, layout)


def _write_once(path: Path, rows: list) -> None:
    if not path.exists():
        write_rows(path, rows)


def _train(config: Config) -> None:
    run = Path(config.output_dir)
    run.parent.mkdir(parents=True, exist_ok=True)
    file = run.with_name(run.name + ".yaml")
    file.write_text(config.to_yaml(), encoding="utf-8")
    log.info("sr-dpo train %s", file)
    code = train(config)
    if code != EXIT_DONE:
        raise Interrupted(code)


def _score(layout: Layout, setting: Setting, model: Path, output: Path) -> None:
    if not output.exists():
        score_command(scoring_config(layout, setting, model), output)


def _respond_to_all(config: Config, layout: Layout) -> None:
    for name, temperature in DECODING.items():
        _respond(config, layout.data("held_out"), Path(config.output_dir) / name, temperature=temperature)


def _respond(config: Config, prompts: Path, output: Path, *, temperature: float) -> None:
    if not output.exists():
        section = config.generation.model_copy(update={"temperature": temperature})
        # One seed for all runs: the same draws for the same task, so that runs are compared pair by pair.
        generate_command(config.model_copy(update={"generation": section, "seed": 0}), prompts, output)
