"""The configurations in `configs/`, their head comments and the commands that stand there: for every test of them."""

import argparse
import shlex
from functools import cache
from pathlib import Path

from sr_dpo_jax import cli
from sr_dpo_jax.config.load import load_config
from sr_dpo_jax.config.schema import Config

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
OBJECTIVES = ("dpo", "ipo", "sr_dpo", "sr_ipo")
CONTRAST = "pythia_2.8b_hh_sr_dpo_contrast"
NAMES = sorted(
    ["pythia_2.8b_hh_sft", CONTRAST, "llama3_8b_ultrafeedback_sr_dpo", "llama3_70b_sr_dpo", "qwen3_8b_sr_dpo"]
    + ["llama3_8b_lora_sr_dpo", "llama3_70b_lora_sr_dpo"]
    + [f"{start}_{name}" for start in ("pythia_2.8b_hh", "zephyr_7b_ultrafeedback") for name in OBJECTIVES]
)


MODEL_OF = {
    "pythia": "pythia-2.8b",
    "zephyr": "mistral-7b",
    "llama3_8b": "llama-3.1-8b",
    "llama3_70b": "llama-3.1-70b",
    "qwen3": "qwen3-8b",
}


@cache
def load(name: str, overrides: tuple[str, ...] = ()) -> Config:
    return load_config(CONFIGS / f"{name}.yaml", overrides)


def head(name: str) -> list[str]:
    """The comment that a file starts with, without the signs."""
    lines = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    length = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    return [line.removeprefix("#").removeprefix(" ") for line in lines[:length]]


def commands(name: str, command: str) -> list[list[str]]:
    """The arguments of every `sr-dpo COMMAND ...` that stands on a line of its own in the head comment."""
    start = f"  sr-dpo {command} "
    return [shlex.split(line)[1:] for line in head(name) if line.startswith(start)]


def known_model(name: str) -> str:
    """Of which model in `known_models` a configuration is."""
    return next(model for start, model in MODEL_OF.items() if name.startswith(start))


def options(arguments: list[str]) -> argparse.Namespace:
    return cli.parser().parse_args(arguments)
