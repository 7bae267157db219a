"""The configurations that the package comes with: they load, say what they are for, and their commands are exact."""

import math
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from sr_dpo_jax import cli
from sr_dpo_jax import config as configuration
from sr_dpo_jax.config import Config
from sr_dpo_jax.data.rows import FORMATS

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
OBJECTIVES = ("dpo", "ipo", "sr_dpo", "sr_ipo")
NAMES = sorted(
    ["pythia_2.8b_hh_sft", "llama3_8b_ultrafeedback_sr_dpo", "llama3_70b_sr_dpo", "qwen3_8b_sr_dpo"]
    + [f"{start}_{name}" for start in ("pythia_2.8b_hh", "zephyr_7b_ultrafeedback") for name in OBJECTIVES]
)


@cache
def load(name: str, overrides: tuple[str, ...] = ()) -> Config:
    return configuration.load(CONFIGS / f"{name}.yaml", overrides)


def head(name: str) -> list[str]:
    """The comment that a file starts with, without the signs."""
    lines = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    length = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    return [line.removeprefix("#").removeprefix(" ") for line in lines[:length]]


def commands(name: str, command: str) -> list[list[str]]:
    """The arguments of every `sr-dpo COMMAND ...` that stands on a line of its own in the head comment."""
    start = f"  sr-dpo {command} "
    return [shlex.split(line)[1:] for line in head(name) if line.startswith(start)]


def options(arguments: list[str]):
    return cli.parser().parse_args(arguments)


def test_the_files_are_those_that_are_promised():
    assert sorted(path.stem for path in CONFIGS.iterdir()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_head_says_what_for_and_how(name):
    text = "\n".join(head(name))
    for start in ("Purpose: ", "Hardware: ", "Expected time on "):
        assert re.search(rf"^{start}\S", text, re.MULTILINE), start
    assert "TODO" not in text
    compiled, trained = commands(name, "compile"), commands(name, "train")
    assert compiled and len(compiled) == len(trained)
    for compile_arguments, train_arguments in zip(compiled, trained, strict=True):
        assert Path(compile_arguments[1]) == Path("configs") / f"{name}.yaml"
        assert options(compile_arguments).overrides == options(train_arguments).overrides
        assert options(compile_arguments).config == options(train_arguments).config
        assert options(compile_arguments).topology in text.partition("Expected time")[0]


@pytest.mark.parametrize("name", NAMES)
def test_the_mesh_fits_the_topology(name):
    """Chips of the topology are what the mesh and the processes make up.

    A host of a slice has four chips; but v5litepod-8 and v6e-8, whose topology is 2x4, are one machine of eight.
    """
    for arguments in commands(name, "compile"):
        given = options(arguments)
        config = load(name, tuple(given.overrides))
        sizes = re.fullmatch(r"(?:v4|v5e|v5p|v6e):(\d+(?:x\d+)+)", given.topology).group(1)
        chips = given.slices * math.prod(map(int, sizes.split("x")))
        mesh = config.mesh.model_dump().values()
        fixed = math.prod(size for size in mesh if size != -1)
        assert chips % fixed == 0 if -1 in mesh else chips == fixed
        chips_a_host = 8 if given.topology in ("v5e:2x4", "v6e:2x4") else 4
        assert config.distributed.processes == chips // chips_a_host
        assert config.mesh.replica % given.slices == 0


@pytest.mark.parametrize("name", NAMES)
def test_the_protocol_is_the_papers(name):
    config = load(name)
    assert config.output_dir == f"runs/{name}"
    assert config.data.format in FORMATS
    assert (config.data.max_length, config.data.max_prompt_length) == (512, 256)
    assert (config.objective.beta, config.batch.pairs_per_step, config.train.epochs) == (0.1, 64, 1)
    optimizer = config.optimizer
    assert (optimizer.name, optimizer.learning_rate, optimizer.warmup_steps) == ("rmsprop", 5e-7, 150)
    assert (optimizer.schedule, optimizer.max_grad_norm) == ("constant", 10.0)
    assert config.refinement.prompt == configuration.PAPER_PROMPT
    assert (config.model.dtype, config.model.param_dtype) == ("bfloat16", "float32")
    assert config.objective.lam in (None, 0.1, 0.3, 0.5, 1.0)


@pytest.mark.parametrize("start", ["pythia_2.8b_hh", "zephyr_7b_ultrafeedback"])
def test_objectives_of_one_experiment_differ_in_nothing_else(start):
    """They share the scores of the reference, and `test_aot.py` compiles one of each kind for both."""

    def rest(name: str) -> dict:
        return load(f"{start}_{name}").model_dump(exclude={"objective", "output_dir"})

    assert all(rest(name) == rest("dpo") for name in OBJECTIVES)
    assert [load(f"{start}_{name}").objective.name for name in OBJECTIVES] == list(OBJECTIVES)
    assert load(f"{start}_sr_dpo").objective.lam == load(f"{start}_sr_ipo").objective.lam


def test_alignment_starts_from_the_exported_sft_model():
    run_dir, out_dir = load("pythia_2.8b_hh_sft").output_dir, load("pythia_2.8b_hh_dpo").model.path
    for name in ("sft", *OBJECTIVES):
        assert f"sr-dpo export {run_dir} {out_dir}" in " ".join(head(f"pythia_2.8b_hh_{name}"))
