"""Takes the runs of the protocol through `train`, `export`, `eval`, `score` and `generate`, as a user would.

Every file is written whole, a file that is there is not made again, and a run that was stopped resumes at its
checkpoint: so the same command resumes the demo.
"""

import logging
from pathlib import Path

from sr_dpo_jax.commands.demo.base_model import write_base_model
from sr_dpo_jax.commands.demo.corpus import Knobs, base_rows, preference_rows, write_rows
from sr_dpo_jax.commands.demo.protocol import (
    MORE,
    PAIRS,
    SHUFFLED,
    TEMPERATURES,
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
from sr_dpo_jax.durable.files import read_lines, write_text
from sr_dpo_jax.train.loop import EXIT_DONE, train

log = logging.getLogger(__name__)

RATED_PROMPTS = 64
"""The number of held-out tasks that the base model does at every rating."""


class Interrupted(Exception):
    """A stage ended with another exit code than 0; the same command resumes it."""

    def __init__(self, code: int):
        super().__init__(code)
        self.code = code


def make_base(layout: Layout, setting: Setting, knobs: Knobs) -> None:
    """Makes held-out data and the base model, its responses at every rating and its scores of held-out pairs."""
    layout.data("held_out").parent.mkdir(parents=True, exist_ok=True)
    write_base_model(layout.base)
    kinds = setting.tasks
    if not layout.data("base").exists():
        held_out = preference_rows(
            setting.held_out_pairs, kinds=kinds, gaps=knobs.gaps, label_noise=0.0, seed="held out"
        )
        rated = [
            {**row, "prompt": instruction(rating) + row["prompt"], "rating": rating}
            for rating in RATINGS
            for row in held_out[:RATED_PROMPTS]
        ]
        texts = base_rows(
            setting.base_texts, kinds=kinds, rated_share=knobs.rated_share, rating_noise=knobs.rating_noise, seed=0
        )
        write_rows(layout.data("held_out"), held_out)
        write_rows(layout.data("rated"), rated)
        write_rows(layout.data("base"), texts)  # the last one: where it is, all three are
    config = base_config(layout, setting)
    _make_model(layout, config, layout.base_model)
    _respond(config, layout.data("rated"), layout.base_run / "rated.jsonl", temperature=1.0)


def make_sft(layout: Layout, setting: Setting, knobs: Knobs, seed: int) -> None:
    """Makes the seed's preference sets and its SFT model."""
    held_out = {row["prompt"] for row in read_lines(layout.data("held_out"))}
    for name in dict.fromkeys([PAIRS, *(arm.data for arm in setting.arms)]):
        if not layout.data(name, seed).exists():
            rows = preference_rows(
                setting.pairs_of(name, knobs),
                kinds=setting.tasks,
                gaps=knobs.gaps,
                label_noise=0.5 if name == SHUFFLED else knobs.label_noise,
                seed=f"{MORE if name == MORE else PAIRS} {seed}",  # shuffled pairs are the seed's own pairs
                without=held_out,
            )
            write_rows(layout.data(name, seed), rows)
    _make_model(layout, sft_config(layout, seed), layout.sft_model(seed))


def run_arm(layout: Layout, setting: Setting, knobs: Knobs, seed: int, arm: Arm) -> None:
    """Trains one arm, evaluates it on held-out pairs and samples responses to their tasks."""
    config = arm_config(layout, setting, knobs, seed, arm)
    run = Path(config.output_dir)
    if not (run / "eval.json").exists():
        _train(config)
        evaluate_command(config)
    _respond_to_all(config, layout)


def _make_model(layout: Layout, config: Config, model: Path) -> None:
    """Trains and exports a model without a reference, scores the held-out pairs with it and samples its responses."""
    run = Path(config.output_dir)
    if not model.exists():
        _train(config)
        export(run, model)
    scores = run / "scores.jsonl"
    if not scores.exists():
        score_command(scoring_config(layout, model), scores)
    _respond_to_all(config, layout)


def _train(config: Config) -> None:
    run = Path(config.output_dir)
    run.parent.mkdir(parents=True, exist_ok=True)
    file = run.with_name(run.name + ".yaml")
    write_text(file, config.to_yaml())
    log.info("sr-dpo train %s", file)
    code = train(config)
    if code != EXIT_DONE:
        raise Interrupted(code)


def _respond_to_all(config: Config, layout: Layout) -> None:
    for name, temperature in TEMPERATURES.items():
        output = Path(config.output_dir) / f"{name}.jsonl"
        _respond(config, layout.data("held_out"), output, temperature=temperature)


def _respond(config: Config, prompts: Path, output: Path, *, temperature: float) -> None:
    if not output.exists():
        section = config.generation.model_copy(update={"temperature": temperature})
        # All runs take one seed, hence the same random draws for the same task: they are compared task by task.
        generate_command(config.model_copy(update={"generation": section, "seed": 0}), prompts, output)
