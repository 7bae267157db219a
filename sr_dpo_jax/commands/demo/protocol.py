"""Says which runs the demo makes, in which order, with which configurations; imports no jax.

    arm        one preference run of a seed: an objective, with its λ, on one of the seed's preference sets
    seed       draws the preference sets and the order of the pairs; every arm of a seed starts from its SFT model
    base       one base model for all seeds, as the paper has one Pythia: seeds repeat what a researcher with one model
               can repeat

Directories under the output directory: `data/`, `base`, `base-run/`, `base-model/`, then for each seed `seed-N/` with
`sft/`, `sft-model/` and one run directory an arm, each with its YAML file beside it.
"""

import dataclasses
from pathlib import Path
from typing import Any

from sr_dpo_jax.commands.demo.corpus import Knobs
from sr_dpo_jax.commands.demo.tasks import TASKS
from sr_dpo_jax.config.load import config_from_dict
from sr_dpo_jax.config.schema import Config

LAMBDAS = (0.1, 0.3, 0.5, 1.0)
BASE_TEXTS_PER_STEP, PAIRS_PER_STEP = 64, 32
TEMPERATURES = {"sampled": 1.0, "greedy": 0.0}
"""The temperature of each file of responses that a model gives to held-out tasks."""
PAIRS, MORE, SHUFFLED = "pairs", "more", "shuffled"
"""Preference sets: the seed's own, one of several times its size, and its own with labels drawn by a coin."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """One preference run of a seed."""

    name: str
    objective: str
    lam: float | str | None = None
    data: str = PAIRS
    beta_share: float | None = None
    """β as a share of the β of all others; None for the same β."""
    refinement: tuple[tuple[str, Any], ...] = ()
    """Keys of the configuration's section `refinement`; empty for the paper's, the margin judged by the policy."""
    keys: tuple[tuple[str, Any], ...] = ()
    """More keys of the section `objective`."""

    def beta(self, common: float) -> float:
        """Gives the arm's β from the β of all others."""
        return common * (1.0 if self.beta_share is None else self.beta_share)


@dataclasses.dataclass(frozen=True)
class Setting:
    """The tasks, the arms and the sizes of a demo."""

    name: str
    tasks: tuple[str, ...]
    base_steps: int
    seeds: int
    arms: tuple[Arm, ...]
    held_out_pairs: int
    """The number of held-out pairs; responses are sampled to their tasks."""
    more_factor: int
    """The size of the preference set `more` as a multiple of that of `pairs`."""
    evaluations: int
    """The number of evaluations on held-out pairs while an arm trains, the last one at its end."""
    label_noise: float = 0.0
    """The share of pairs that are labelled the wrong way round, unless the user gives another one."""

    @property
    def base_texts(self) -> int:
        return self.base_steps * BASE_TEXTS_PER_STEP

    def pairs_of(self, data: str, knobs: Knobs) -> int:
        """Gives the size of a preference set."""
        return knobs.pairs * (self.more_factor if data == MORE else 1)


def _with_beta(objective: str, beta_share: float) -> Arm:
    """Makes a control: the plain objective with the weight, or the target, that refinement gives it on average."""
    return Arm(f"{objective}-beta-{beta_share:g}", objective, beta_share=beta_share)


def _smoothed(name: str, objective: str, beta_share: float | None) -> Arm:
    """Makes an objective that is told the share of wrong labels."""
    name += "" if beta_share is None else f"-beta-{beta_share:g}"
    return Arm(name, objective, beta_share=beta_share, keys=(("label_smoothing", 0.3),))


def _contrast(lam: float | str, judge: str = "reference") -> Arm:
    name = f"contrast-{lam}" + ("-policy" if judge == "policy" else "")
    return Arm(name, "sr_dpo", lam, refinement=(("form", "contrast"), ("judge", judge)))


def _refined(objective: str, lam: float, data: str = PAIRS) -> Arm:
    return Arm(f"{objective}-{lam:g}" + (f"-{data}" if data != PAIRS else ""), objective, lam, data)


SMALL = Setting(
    name="small",
    tasks=("copy", "reverse", "sort", "count", "sort+reverse"),  # without looking up, which takes longest to learn
    base_steps=700,
    seeds=1,
    arms=(
        Arm("dpo", "dpo"),
        Arm("ipo", "ipo"),
        _refined("sr_dpo", 0.5),
        _refined("sr_ipo", 0.5),
        _contrast(1.0),
        _contrast("auto"),
    ),
    held_out_pairs=256,
    more_factor=4,
    evaluations=1,
    label_noise=0.3,
)
FULL = Setting(
    name="full",
    tasks=TASKS,
    base_steps=4000,
    seeds=5,
    arms=(
        Arm("dpo", "dpo"),
        Arm("ipo", "ipo"),
        *(_refined("sr_dpo", lam) for lam in LAMBDAS),
        *(_refined("sr_ipo", lam) for lam in LAMBDAS),
        # Controls do on average what λ = 1 does, but without what Δ says of single pairs (README.md). The first has
        # the mean weight and mean margin of Sr-DPO, the second the mean target of Sr-IPO, the third its mean margin.
        _with_beta("dpo", 0.3),
        _with_beta("ipo", 0.7),
        _with_beta("ipo", 0.6),
        Arm("dpo-more", "dpo", data=MORE),
        _refined("sr_dpo", 0.5, MORE),
        Arm("dpo-shuffled", "dpo", data=SHUFFLED),
        _refined("sr_dpo", 0.5, SHUFFLED),
    ),
    held_out_pairs=512,
    more_factor=4,
    evaluations=4,
)


SHARES_OF_BETA = (0.3, 0.1, 0.03)
"""β of the controls as shares of the common one: on noisy labels a weaker pull alone makes a better model."""
OFFSET = (("judge", "ratings"), ("offset", "linear"), ("alpha", 0.05))
"""Δ from the true qualities, five nats for the whole scale: what a judge that is never wrong would give."""
NOISE = dataclasses.replace(
    SMALL,
    name="noise",
    base_steps=1500,
    seeds=5,
    arms=(
        Arm("dpo", "dpo"),
        *(_with_beta("dpo", share) for share in SHARES_OF_BETA),
        Arm("ipo", "ipo"),
        _with_beta("ipo", 0.3),
        *(_smoothed("cdpo", "dpo", share) for share in (None, 0.1)),
        *(_smoothed("robust", "robust", share) for share in (None, 0.1)),
        _refined("sr_dpo", 1.0),
        _refined("sr_ipo", 1.0),
        _contrast(0.5),
        _contrast(1.0),
        _contrast("auto"),
        _contrast(1.0, judge="policy"),
        Arm("ratings", "sr_dpo", 1.0, refinement=OFFSET),
    ),
    held_out_pairs=512,
)
"""The contrast against objectives that are made for, or tuned to, labels of which some are wrong."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """The paths of all files under the output directory."""

    root: Path

    @property
    def base(self) -> Path:
        return self.root / "base"

    @property
    def base_run(self) -> Path:
        return self.root / "base-run"

    @property
    def base_model(self) -> Path:
        return self.root / "base-model"

    def data(self, name: str, seed: int | None = None) -> Path:
        return self.root / "data" / (f"{name}.jsonl" if seed is None else f"{name}-{seed}.jsonl")

    def run(self, seed: int, name: str) -> Path:
        return self.root / f"seed-{seed}" / name

    def sft_model(self, seed: int) -> Path:
        return self.run(seed, "sft-model")


def base_config(layout: Layout, setting: Setting) -> Config:
    """Configures the base model, from random weights."""
    return _config(
        layout,
        layout.base_run,
        model={"path": str(layout.base), "init": "random"},
        data={"path": str(layout.data("base"))},
        objective={"name": "sft"},
        optimizer={"learning_rate": 4e-3, "warmup_steps": 50, "schedule": "cosine"},
        batch={"pairs_per_step": BASE_TEXTS_PER_STEP},
        train={"max_steps": setting.base_steps},
    )


def sft_config(layout: Layout, seed: int) -> Config:
    """Configures SFT of the base model on the chosen responses of the seed's pairs."""
    return _config(
        layout,
        layout.run(seed, "sft"),
        seed=seed,
        model={"path": str(layout.base_model)},
        data={"path": str(layout.data(PAIRS, seed))},
        objective={"name": "sft"},
        optimizer={"learning_rate": 5e-4},
    )


def arm_config(layout: Layout, setting: Setting, knobs: Knobs, seed: int, arm: Arm) -> Config:
    """Configures one preference run from the seed's SFT model."""
    steps = setting.pairs_of(arm.data, knobs) // PAIRS_PER_STEP
    return _config(
        layout,
        layout.run(seed, arm.name),
        seed=seed,
        model={"path": str(layout.sft_model(seed))},
        data={"path": str(layout.data(arm.data, seed)), "eval_path": str(layout.data("held_out"))},
        objective={"name": arm.objective, "beta": arm.beta(knobs.beta), "lam": arm.lam, **dict(arm.keys)},
        refinement=dict(arm.refinement),
        train={"eval_every_steps": max(1, steps // setting.evaluations)},
    )


def scoring_config(layout: Layout, model: Path) -> Config:
    """Configures `sr-dpo score` of the held-out pairs with the base or an SFT model, which have no reference."""
    return _config(
        layout,
        model.parent / f"{model.name}-scores",
        model={"path": str(model)},
        data={"path": str(layout.data("held_out"))},
        objective={"name": "dpo"},
    )


def _config(layout: Layout, output_dir: Path, *, seed: int = 0, **sections: dict[str, Any]) -> Config:
    """Makes the configuration that all runs share; the keys in `sections` add to it or replace its own."""
    shared: dict[str, dict[str, Any]] = {
        # Rows are shorter than two tiles: computing a whole row at once is faster.
        "model": {"dtype": "float32", "attention": "dense"},
        "data": {"format": "preference", "max_length": 48, "max_prompt_length": 32},
        "optimizer": {
            "name": "adamw",
            "learning_rate": 1e-4,
            "warmup_steps": 10,
            "max_grad_norm": 1.0,
            "schedule": "constant",
            "b2": 0.98,
        },
        # All runs have one row length, so that a program is compiled once and the next run finds it.
        "batch": {"pairs_per_step": PAIRS_PER_STEP, "row_length": 64, "row_multiple": 64},
        "checkpoint": {"every_steps": 1000},
        "generation": {"max_new_tokens": 10, "slots": 128},
    }
    merged = {name: shared.get(name, {}) | sections.get(name, {}) for name in (*shared, *sections)}
    raw = {"output_dir": str(output_dir), "cache_dir": str(layout.root / "cache"), "seed": seed, **merged}
    return config_from_dict(raw, where=str(output_dir))
