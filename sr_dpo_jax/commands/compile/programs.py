"""`sr-dpo compile`: the real programs of a configuration, compiled for TPUs that are not there.

libtpu's compiler runs on any Linux machine. The train step and the scoring step are lowered from shapes alone, on the
mesh of a described topology, and the compiler says what they need: no weights, no devices. Batch shapes come from the
plan that a run would make, of the data itself or of typical lengths.

`machine.py` describes the chips, `search.py` looks for what to change where it does not fit, `show.py` prints it.
"""

import dataclasses
import math
import re
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sr_dpo_jax.batch import Batch, Rows
from sr_dpo_jax.commands.compile import hlo as aot_hlo
from sr_dpo_jax.commands.compile.machine import hosts_of
from sr_dpo_jax.commands.compile.traced_flops import splash_flops, traced_flops
from sr_dpo_jax.config.schema import Config
from sr_dpo_jax.data.dataset import TokenizedPairs
from sr_dpo_jax.data.pipeline import HostStep, pair_sizes
from sr_dpo_jax.data.plan import Plan, Shape, scoring_plan
from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.model.adapter import adapter_weights, split
from sr_dpo_jax.model.architecture import Architecture
from sr_dpo_jax.model.attention import Visible
from sr_dpo_jax.model.kernels.splash import padded_length, tables_of
from sr_dpo_jax.parallel import mesh as meshes
from sr_dpo_jax.parallel.chips import GIB, TPUS, Chip, chip_of
from sr_dpo_jax.train.memory import refusal_of
from sr_dpo_jax.train.setup import Setup, set_up_on
from sr_dpo_jax.train.train_step import make_score_step
from sr_dpo_jax.weights.directory import ModelDirectory
from sr_dpo_jax.weights.layout import flatten
from sr_dpo_jax.weights.placement import PlacedModel, reference_copy

RUNTIME_SHARE = 0.05
"""The share of a chip's memory that is left to the runtime, for its own buffers and for fragments."""


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled program; bytes and cycles are of one chip and one step, unless a field says otherwise."""

    name: str
    fits: bool
    hbm_bytes: int
    peak_bytes: int
    """The sum of arguments, temporaries, new outputs, code, and the resident bytes beside the program."""
    refusal: str | None
    """The compiler's words where it finds no room; there are no further figures then."""
    compile_s: float = 0.0
    argument_bytes: int = 0
    temporary_bytes: int = 0
    output_bytes: int = 0
    """Outputs that do not take an argument's place."""
    code_bytes: int = 0
    resident_bytes: int = 0
    """Optimizer state and online reference beside the scoring step, where it evaluates while training."""
    traced_flops: float = 0.0
    """Flops of the program's matmuls before it is split, all chips together, recomputation and padding included."""
    estimated_cycles: float = 0.0
    """The compiler's estimate, kernels and communication not included."""
    kernel_cycles: float = 0.0
    """Attention kernels at the peak of the matrix unit, without the blocks that they skip."""
    collectives: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    """The number of runs of each kind, and the bytes that they give or take."""
    unknown_loops: int = 0
    unknown_kernels: int = 0
    repeated_operations: int = 0


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A configuration compiled for a topology."""

    chips: int
    hosts: int
    device_kind: str
    mesh: dict[str, int]
    parameters: int
    adapters: int
    """The parameters of LoRA adapters, which alone are trained; 0 without them."""
    attention: str
    shape: Shape
    augmented_length: int | None
    """Tokens of a row with p."""
    padding: float
    """The mean share of a step's tokens that is padding."""
    blocks_visited: dict[str, float]
    """The share of the attention kernels' blocks that hold a visible key, of plain and of augmented rows; 1 without
    kernels."""
    model_flops_a_pair: float
    """Model flops as MFU counts them, mean over the pairs."""
    programs: tuple[Program, ...]
    step_s: float | None
    """The time of a train step that the cycles imply at the chip's clock, without communication. None where the
    compiler was not asked for its best."""
    mfu: float | None

    @property
    def fits(self) -> bool:
        return all(program.fits for program in self.programs)


def compile_for(
    devices: Sequence[jax.Device],
    config: Config,
    directory: ModelDirectory,
    pairs: TokenizedPairs,
    eval_sets: Sequence[TokenizedPairs],
) -> Compiled:
    """Compiles the programs of a configuration for these devices; a program that does not fit is a result.

    Args:
      devices: from `machine.devices_of`.
      config: the run.
      directory: the model; config.json is enough.
      pairs, eval_sets: only their lengths count.

    Raises:
      UsageError: the configuration cannot run so: the mesh does not divide, a pair is longer than a row, ...
      RunError: the compiler itself fails.
    """
    mesh = meshes.make_mesh(**config.mesh.model_dump(), devices=devices)
    setup = set_up_on(mesh, config, directory)
    unlike = setup.reference.architecture != setup.model.architecture
    plan, work = setup.plan(pairs, eval_sets), setup.work(pairs)
    kind = setup.objective.kind
    evaluates_p = bool(eval_sets) and kind.needs_rejected and config.refinement.prompt is not None
    step = first_step(setup, pairs, plan, augmented=setup.objective.scored_with_p or evaluates_p)
    visited = blocks_visited(setup.model, step)
    programs = [train_program(setup, plan, step, visited)]
    if (kind.needs_reference and not setup.online) or config.data.held_out:
        scored = _longest_scored(setup, step, plan, eval_sets if evaluates_p else ())
        visited = visited if scored is step else blocks_visited(setup.model, scored)
        programs.append(_score_program(setup, plan, scored, visited))
        if unlike:
            of_reference = blocks_visited(setup.reference, scored)
            programs.append(_score_program(setup, plan, scored, of_reference, by_reference=True))
    model_flops = float(work.flops.mean())
    step_s = mfu = None
    if programs[0].refusal is None and work.peak_flops is not None:
        cycles = programs[0].estimated_cycles + programs[0].kernel_cycles
        step_s = cycles / _tpu(devices[0].device_kind).clock_hz
        mfu = model_flops * plan.shape.pairs / (step_s * work.peak_flops)
    return Compiled(
        chips=len(devices),
        hosts=hosts_of(devices),
        device_kind=devices[0].device_kind,
        mesh=dict(mesh.shape),
        parameters=sum(math.prod(param.shape) for param in flatten(setup.model.abstract).values()),
        adapters=adapter_weights(setup.model.shapes),
        attention=setup.model.attention,
        shape=plan.shape,
        augmented_length=None if step.augmented is None else step.augmented["tokens"].shape[-1],
        padding=1 - float(work.tokens[plan.pair].sum()) / (len(plan) * plan.shape.rows * plan.shape.row_length),
        blocks_visited=visited,
        model_flops_a_pair=model_flops,
        programs=tuple(programs),
        step_s=step_s,
        mfu=mfu,
    )


def first_step(setup: Setup, pairs: TokenizedPairs, plan: Plan, *, augmented: bool) -> HostStep:
    """Builds all rows of the plan's first step, as the processes of a run build them together."""
    rows = np.arange(plan.shape.rows // setup.packing.micro_batches)
    with_rejected = setup.objective.kind.needs_rejected
    against = augmented and setup.objective.refinement.against
    return setup.packing.source(pairs, plan, rows, augmented=augmented, with_rejected=with_rejected, against=against)[0]


def _longest_scored(setup: Setup, step: HostStep, plan: Plan, held_out: Sequence[TokenizedPairs]) -> HostStep:
    """Finds the step with the longest rows with p: a held-out set has its own where p stands in each of its prompts."""
    steps = [step]
    for pairs in held_out:
        if len(pairs.head_tokens) or step.prefix_tokens != len(pairs.head) + len(pairs.augmentation):
            held_plan = scoring_plan(*pair_sizes(pairs, with_rejected=True), plan.shape)
            steps.append(first_step(setup, pairs, held_plan, augmented=True))
    return max(steps, key=lambda one: 0 if one.augmented is None else one.augmented["tokens"].shape[-1])


def blocks_visited(model: PlacedModel, step: HostStep) -> dict[str, float]:
    """Gives the share of blocks that the kernel's own tables let run, mean over rows and layers, by kind of rows."""
    kinds = {"plain": (step.plain, 0), "augmented": (step.augmented, step.prefix_tokens)}
    return {
        name: _visited(model.architecture, rows, prefix_tokens) if model.attention == "splash" else 1.0
        for name, (rows, prefix_tokens) in kinds.items()
        if rows is not None
    }


def _visited(architecture: Architecture, rows: dict[str, np.ndarray], prefix_tokens: int) -> float:
    total = 0.0
    start, end, positions = (
        jnp.asarray(rows[name].reshape(-1, rows[name].shape[-1])) for name in ("key_start", "key_end", "positions")
    )
    for number, kind in enumerate(architecture.kinds):
        window = kind.window if kind.window is not None and kind.window < start.shape[-1] else None
        runs = tables_of(Visible(start, end, positions, prefix_tokens, window)).runs
        total += float(runs.mean()) * architecture.kind_of_layer.count(number)
    return total / architecture.layers


def share_visited(
    architecture: Architecture, batch: Batch, *, models: int, kernels: float, visited: dict[str, float]
) -> float:
    """Gives the share of a program's kernel flops that lies in blocks that run.

    Over augmented rows every model runs once forward; all else is over the plain ones: forward, backward, and what
    rematerialisation repeats.

    Args:
      architecture: the model's.
      batch: the program's argument.
      models: 2 where policy and reference are both in the program.
      kernels: flops of its kernels, no block skipped, all devices together; 0 where there are none.
      visited: from `blocks_visited`.
    """
    if batch.augmented is None or not kernels:
        return visited["plain"]
    *rows, length = batch.augmented.tokens.shape
    of_layer = splash_flops("fwd", (*rows, architecture.heads, padded_length(length), architecture.head_dim))
    augmented = models * architecture.layers * of_layer / kernels
    return visited["augmented"] * augmented + visited["plain"] * (1 - augmented)


def _abstract_batch(mesh: Mesh, step: HostStep, *, augmented: bool, scores: bool, shift: bool = False) -> Batch:
    def rows(arrays: dict[str, np.ndarray], prefix_tokens: int) -> Rows:
        axes = ("micro_batches", "rows", None)
        shapes = {}
        for name, array in arrays.items():
            sharding = meshes.sharding(mesh, axes, array.shape, f"batch.{name}")
            shapes[name] = jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
        return Rows(**shapes, prefix_tokens=prefix_tokens)

    everywhere = meshes.replicated(mesh)
    of_pairs = jax.ShapeDtypeStruct((len(step.pair), 2), jnp.float32, sharding=everywhere) if scores else None
    return Batch(
        rows(step.plain, 0),
        rows(step.augmented, step.prefix_tokens) if augmented else None,
        of_pairs,
        of_pairs if augmented else None,
        against=rows(step.against, step.against_prefix_tokens) if augmented and step.against is not None else None,
        refinement=jax.ShapeDtypeStruct((len(step.pair),), jnp.float32, sharding=everywhere) if shift else None,
    )


def train_program(setup: Setup, plan: Plan, step: HostStep, visited: dict[str, float]) -> Program:
    """Compiles the train step."""
    program, arguments = train_step_of(setup, plan, step)
    models = 1 if arguments[2] is None else 2
    return _compile("train step", setup.model, program, arguments, visited=visited, models=models)


def train_step_of(setup: Setup, plan: Plan, step: HostStep) -> tuple[Any, tuple[Any, ...]]:
    """Gives the jitted train step and the shapes of its arguments, with None for a base or a reference that is none."""
    if setup.objective.unsettled:  # a λ is a number in the program, and any number costs the same
        setup = dataclasses.replace(setup, objective=setup.objective.settled(1.0))
    program, kind = setup.program(plan), setup.objective.kind
    scores = kind.needs_reference and not setup.online
    in_step, before = setup.objective.judged_in_step, setup.objective.judged_before
    batch = _abstract_batch(setup.model.mesh, step, augmented=in_step, scores=scores, shift=before)
    reference = _abstract_reference(setup.model) if setup.online else None
    return program.step, (program.state, split(setup.model.shapes)[1], reference, batch)


def _score_program(
    setup: Setup, plan: Plan, step: HostStep, visited: dict[str, float], *, by_reference: bool = False
) -> Program:
    """Compiles the scoring step with the rows that need it most: with p where the reference or an evaluation has it.

    That of the model, or the one of a reference of another architecture, which runs before there is a state.
    """
    model, it = setup.reference if by_reference else setup.model, setup.objective
    batch = _abstract_batch(model.mesh, step, augmented=step.augmented is not None, scores=False)
    resident = 0
    if setup.config.data.held_out and not by_reference:
        state = train_step_of(setup, plan, step)[1][0]
        resident = meshes.bytes_a_chip(state.optimizer_state)
        if setup.config.reference.mode == "online":
            resident += meshes.bytes_a_chip(_abstract_reference(model))
    numbers = {"ld_alpha": it.ld_alpha, "squares": it.use_weighting and not by_reference}
    score_step = make_score_step(model.graph, pairs=plan.shape.pairs, mesh=model.mesh, **numbers)
    name = "reference's scoring step" if by_reference else "scoring step"
    return _compile(name, model, score_step, (model.shapes, batch), visited=visited, resident=resident)


def _abstract_reference(model: PlacedModel) -> Any:
    trained = split(model.shapes)[0]
    shapes = jax.eval_shape(partial(reference_copy, dtype=model.dtype), trained)
    return jax.tree.map(lambda shape, param: shape.update(sharding=param.sharding), shapes, trained)


def _compile(
    name: str,
    model: PlacedModel,
    step: Any,
    arguments: tuple[Any, ...],
    *,
    visited: dict[str, float],
    models: int = 1,
    resident: int = 0,
) -> Program:
    chip = _tpu(model.mesh.devices.flat[0].device_kind)
    hbm = chip.memory_gib * GIB
    needed = meshes.bytes_a_chip(arguments) + resident
    if needed > hbm:
        return Program(name, False, hbm, needed, "the arguments alone need more than a chip has")
    traced = step.trace(*arguments)
    flops, started = traced_flops(traced.jaxpr.jaxpr), time.monotonic()
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        peak = bytes_wanted(str(error), needed)
        if peak is None:
            raise refusal_of(name, str(error)) from error
        return Program(name, False, hbm, peak, str(error).partition("\n")[0], time.monotonic() - started)
    memory, compile_s = compiled.memory_analysis(), time.monotonic() - started
    batch = arguments[-1]
    share = share_visited(model.architecture, batch, models=models, kernels=flops.kernels, visited=visited)
    output = memory.output_size_in_bytes - memory.alias_size_in_bytes
    code = memory.generated_code_size_in_bytes
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes + output + code + resident
    tally = aot_hlo.read(compiled.as_text())
    return Program(
        name=name,
        fits=peak <= (1 - RUNTIME_SHARE) * hbm,
        hbm_bytes=hbm,
        peak_bytes=peak,
        refusal=None,
        compile_s=compile_s,
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        output_bytes=output,
        code_bytes=code,
        resident_bytes=resident,
        traced_flops=flops.matmuls + share * flops.kernels,
        estimated_cycles=tally.cycles,
        kernel_cycles=share * tally.kernel_flops * chip.clock_hz / chip.bfloat16_flops,
        collectives={kind: (count, tally.payload_bytes[kind]) for kind, count in sorted(tally.counts.items())},
        unknown_loops=tally.unknown_loops,
        unknown_kernels=sum(tally.unknown_kernels.values()),
        repeated_operations=tally.repeated_operations,
    )


def _tpu(device_kind: str) -> Chip:
    chip = chip_of(device_kind)
    if chip is None or not chip.is_tpu:
        known = ", ".join(kind for tpu in TPUS for kind in tpu.device_kinds)
        raise UsageError(f"nothing is known of {device_kind}; known: {known}")
    return chip


def bytes_wanted(message: str, argument_bytes: int) -> int | None:
    """Reads from the compiler's refusal the memory that a chip would need; None where it refuses for another reason."""
    if not re.search(r"out of memory (on|in memory space) hbm", message, re.IGNORECASE):
        return None
    wanted = re.search(r"(Used|temporaries \()\s*([\d.]+)([KMGT])", message)
    if wanted is None:
        return argument_bytes
    size = int(float(wanted[2]) * 1024 ** (1 + "KMGT".index(wanted[3])))
    return size if wanted[1] == "Used" else size + argument_bytes
