"""The configurations that the package comes with: they load, say what they are for, and their commands are exact."""

import math
import re
from collections import Counter
from functools import cache
from pathlib import Path

import jax
import jax.extend
import known_models
import pytest
import tiny
from published_configs import CONFIGS, CONTRAST, NAMES, OBJECTIVES, commands, head, known_model, load, options

from sr_dpo_jax.commands.compile.programs import first_step, train_step_of
from sr_dpo_jax.commands.compile.search import TYPICAL_P_TOKENS
from sr_dpo_jax.commands.compile.traced_flops import traced_flops
from sr_dpo_jax.commands.compile.typical import typical_pairs
from sr_dpo_jax.config.schema import PAPER_INSTRUCTION
from sr_dpo_jax.data import dataset
from sr_dpo_jax.data.rows import FORMATS
from sr_dpo_jax.parallel.chips import chip_of
from sr_dpo_jax.train.flops import body_weights, pair_flops
from sr_dpo_jax.train.setup import objective_of, set_up_on
from sr_dpo_jax.weights.directory import open_directory

HELD_OUT_PAIRS = {"hh_rlhf": 8_552, "ultrafeedback": 2_000}
"""In the splits that the configurations name."""
COMPILER_STEP_S = {"pythia_2.8b_hh_sr_dpo": 0.348, "pythia_2.8b_hh_sr_ipo": 0.348}
"""What `sr-dpo compile` says at its full effort, where it was run; both have the same program."""


@cache
def typical(format: str):
    lengths = {"max_length": 512, "max_prompt_length": 256}
    return typical_pairs(format, least_pairs=0, head_tokens=0, augmentation_tokens=TYPICAL_P_TOKENS, **lengths)


def expected_time(root: Path, name: str) -> str:
    """What a head says of the time that a run takes, from the model flops of pairs of typical lengths."""
    given = options(commands(name, "compile")[0])
    config, pairs = load(name), typical(load(name).data.format)
    directory = open_directory(str(known_models.model_directory(root, known_model(name))), weights=False)
    sft, objective = config.objective.name == "sft", objective_of(config)
    sizes = {"prompt_tokens": pairs.prompt_tokens, "chosen_tokens": pairs.chosen_tokens}
    sizes["rejected_tokens"] = 0 * pairs.rejected_tokens if sft else pairs.rejected_tokens
    plain, with_p = (
        pair_flops(directory.architecture, **sizes, prefix_tokens=tokens).mean() for tokens in (0, TYPICAL_P_TOKENS)
    )
    steps = len(pairs) // config.batch.pairs_per_step
    saved = 0.0
    if config.lora is not None:  # the base's matrices have no gradient; adapters add to every pass
        tokens = pairs.prompt_tokens + sizes["chosen_tokens"] + sizes["rejected_tokens"]
        a = directory.architecture
        thin = 2 * lora_weights(a, config.lora.rank) * tokens.mean()
        saved = (
            2 * body_weights(a) * tokens + 2 * a.vocabulary_tokens * a.hidden * (tokens - pairs.prompt_tokens)
        ).mean()
        plain, with_p = plain + thin, with_p + thin
    step = config.batch.pairs_per_step * (3 * plain - saved + objective.judged_in_step * with_p)
    held_out = HELD_OUT_PAIRS[config.data.format]
    beside = (
        held_out * plain
        if sft
        else len(pairs) * (plain + objective.scored_with_p * with_p) + 2 * held_out * (plain + with_p)
    )
    chip, _, chips = given.topology.partition(":")
    peak = given.slices * math.prod(map(int, chips.split("x"))) * chip_of(f"TPU {chip}").bfloat16_flops

    def seconds(flops: float) -> tuple[float, float]:
        return flops / (0.4 * peak), flops / (0.2 * peak)

    def minutes(flops: float) -> str:
        least, most = (max(1, round(time / 60)) for time in seconds(flops))
        return f"{least} minute{'s' * (least > 1)}" if least == most else f"{least} to {most} minutes"

    least, most = seconds(step)
    around = "the evaluation after them" if sft else "the scores of the reference before and the evaluation after them"
    bound = f": {COMPILER_STEP_S[name]} s a step, so count on the slow end" if name in COMPILER_STEP_S else ""
    return (
        f"Expected time on {given.topology}: {steps:,} steps of {least:.2f} to {most:.2f} s, {minutes(steps * step)}, "
        f"and {minutes(beside)} for {around}. Assumed, not measured: 20 to 40 % of the chips' peak, at {step:.3g} "
        "model flops a step; loading, compiling and saving come on top. The first command below prints the compiler's "
        f"own lower bound{bound}."
    )


def lora_weights(architecture, rank: int) -> int:
    """The weights of adapters beside all matrices of the layers."""
    a = architecture
    heads, kv_heads = a.heads * a.head_dim, a.kv_heads * a.head_dim
    sides = [(a.hidden, heads), (a.hidden, kv_heads), (a.hidden, kv_heads), (heads, a.hidden)] + 3 * [(a.hidden, a.mlp)]
    return a.layers * rank * sum(inputs + outputs for inputs, outputs in sides)


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
def test_the_head_says_how_long_a_run_takes(tmp_path, name):
    assert expected_time(tmp_path, name) in " ".join(" ".join(head(name)).split())


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
    assert getattr(config.objective, "beta", 0.1) == 0.1
    assert (config.batch.pairs_per_step, config.train.epochs) == (64, 1)
    optimizer = config.optimizer
    if config.lora is None:
        assert (optimizer.name, optimizer.learning_rate, optimizer.warmup_steps) == ("rmsprop", 5e-7, 150)
        assert (optimizer.schedule, optimizer.max_grad_norm) == ("constant", 10.0)
    assert config.refinement.prompt == PAPER_INSTRUCTION
    assert (config.model.dtype, config.model.param_dtype) == ("bfloat16", "float32")
    paper = config.refinement.form == "margin"
    assert getattr(config.objective, "lam", 0.1) in (0.1, 0.3, 0.5, 1.0) if paper else config.objective.lam == "auto"


@pytest.mark.parametrize("start", ["pythia_2.8b_hh", "zephyr_7b_ultrafeedback"])
def test_objectives_of_one_experiment_differ_in_nothing_else(start):
    """They share the scores of the reference."""

    def rest(name: str) -> dict:
        return load(f"{start}_{name}").model_dump(exclude={"objective", "output_dir"})

    assert all(rest(name) == rest("dpo") for name in OBJECTIVES)
    assert [load(f"{start}_{name}").objective.name for name in OBJECTIVES] == list(OBJECTIVES)
    assert load(f"{start}_sr_dpo").objective.lam == load(f"{start}_sr_ipo").objective.lam


def test_the_contrast_differs_from_sr_dpo_in_the_refinement_alone():
    contrast, paper = load(CONTRAST), load("pythia_2.8b_hh_sr_dpo")
    exclude = {"output_dir": True, "objective": {"lam"}, "refinement": {"form", "judge"}}
    assert contrast.model_dump(exclude=exclude) == paper.model_dump(exclude=exclude)
    assert (contrast.refinement.form, contrast.refinement.judge) == ("contrast", "reference")


def equations(jaxpr: jax.extend.core.Jaxpr) -> Counter:
    """How often a program has each operation with each shape of results; results of a few numbers left out."""
    found = Counter()
    for equation in jaxpr.eqns:
        shapes = tuple(variable.aval.shape for variable in equation.outvars if hasattr(variable.aval, "shape"))
        if any(math.prod(shape) > 64 for shape in shapes):
            found[equation.primitive.name, shapes] += 1
        for value in jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            if hasattr(value, "eqns"):
                found += equations(getattr(value, "jaxpr", value))
    return found


@pytest.mark.parametrize("start", ["pythia_2.8b_hh", "zephyr_7b_ultrafeedback"])
@pytest.mark.parametrize(("name", "other"), [("dpo", "ipo"), ("sr_dpo", "sr_ipo")])
def test_programs_that_differ_by_the_loss_alone(tmp_path, start, name, other):
    """The same arguments on the same devices, the same flops, and no operation on more than a number a pair differs:
    so `test_aot.py` compiles one of the two."""

    def traced(objective: str):
        config = load(f"{start}_{objective}")
        directory = open_directory(str(known_models.model_directory(tmp_path, known_model(start))), weights=False)
        setup = set_up_on(tiny.make_mesh(fsdp=8), config, directory)
        pairs = dataset.first(typical(config.data.format), 640)
        plan = setup.plan(pairs, ())
        step = first_step(setup, pairs, plan, augmented=objective.startswith("sr_"))
        program, arguments = train_step_of(setup, plan, step)
        described = [(leaf.shape, leaf.dtype, leaf.sharding) for leaf in jax.tree.leaves(arguments)]
        jaxpr = program.trace(*arguments).jaxpr.jaxpr
        return described, traced_flops(jaxpr), equations(jaxpr)

    mine, theirs = traced(name), traced(other)
    assert mine[:2] == theirs[:2]
    assert mine[2] == theirs[2] and len(mine[2]) > 100


def test_alignment_starts_from_the_exported_sft_model():
    run_dir, out_dir = load("pythia_2.8b_hh_sft").output_dir, load("pythia_2.8b_hh_dpo").model.path
    for name in ("sft", *OBJECTIVES, CONTRAST.removeprefix("pythia_2.8b_hh_")):
        assert f"sr-dpo export {run_dir} {out_dir}" in " ".join(head(f"pythia_2.8b_hh_{name}"))
