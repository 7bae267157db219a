"""Whether a configuration fits a topology, and where it does not, what to change: the cheapest change that helps.

Changes are tried in the order of what they cost in time: recomputing less, then more; more, smaller micro-batches;
shorter rows; a mesh that splits parameters or activations further.

Next: `aot_print.py`, which prints the result.
"""

import dataclasses
import logging
import resource
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from sr_dpo_jax import config as configuration
from sr_dpo_jax.aot import Compiled, compile_for, devices_of, only_one
from sr_dpo_jax.assembly import read_data, read_held_out
from sr_dpo_jax.config import Config
from sr_dpo_jax.data import tokens
from sr_dpo_jax.data.dataset import TokenizedPairs
from sr_dpo_jax.data.fit import require_fit
from sr_dpo_jax.data.rows import BadRow, Message, Pair
from sr_dpo_jax.data.typical import LENGTHS, typical_pairs
from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.weights import directory as weights

log = logging.getLogger(__name__)

TYPICAL_P_TOKENS = 50
"""The paper's p in common vocabularies."""
LEAST_EFFORT = -1.0
REMAT_AFTER = {"none": ("dots", "full"), "dots": ("full",), "full": ()}


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One change and what came of it."""

    overrides: dict[str, Any]
    """`section.key`: value, on top of the configuration."""
    compiled: Compiled | None
    problem: str | None
    """Why it cannot run so at all; None where it was compiled."""

    @property
    def fits(self) -> bool:
        return self.compiled is not None and self.compiled.fits


@dataclasses.dataclass(frozen=True)
class Report:
    topology: str
    slices: int
    quick: bool
    """Whether the compiler made its least effort: memory close to that of a run, cycles far too many."""
    lengths: str
    """Where the lengths of the pairs come from."""
    processes: int
    """As configured."""
    compiled: Compiled
    attempts: tuple[Attempt, ...]
    """Changes that were tried, in order; the last one fits, if any does."""
    host_peak_bytes: int
    """Most memory that this command held on this machine."""

    @property
    def remedy(self) -> Attempt | None:
        return self.attempts[-1] if self.attempts and self.attempts[-1].fits else None


def compile_command(config: Config, *, topology: str, slices: int, read: bool, quick: bool) -> Report:
    """Compiles, and where that does not fit, looks for what does.

    Args:
      config: what to run.
      topology: of one slice, as jax names it.
      slices: how many of them.
      read: whether to plan from the real data instead of typical lengths.
      quick: asks the compiler for its least effort.

    Raises:
      UsageError: the configuration, model, data or topology is at fault.
    """
    jax.config.update("jax_enable_compilation_cache", False)  # or compile seconds would be those of a look-up
    if quick:
        jax.config.update("jax_exec_time_optimization_effort", LEAST_EFFORT)
    directory = weights.open_directory(config.model.path, revision=config.model.revision, weights=False)
    # Weights are neither read nor looked for.
    config = config.model_copy(update={"model": config.model.model_copy(update={"init": "random"})})
    pairs, eval_sets, lengths = _read(config, directory) if read else _typical(config, directory)
    with only_one():
        devices = devices_of(topology, slices)
        compiled = compile_for(devices, config, directory, pairs, eval_sets)
        if quick:
            compiled = dataclasses.replace(compiled, step_s=None, mfu=None)
        attempts: list[Attempt] = []
        if not compiled.fits:
            log.warning("does not fit; looking for a change that does")
            for overrides in changes(config, compiled, slices):
                attempts.append(_attempt(devices, config, directory, pairs, eval_sets, overrides))
                if attempts[-1].fits:
                    break
    scale = 1 if sys.platform == "darwin" else 1024
    return Report(
        topology=topology,
        slices=slices,
        quick=quick,
        lengths=lengths,
        processes=config.distributed.processes,
        compiled=compiled,
        attempts=tuple(attempts),
        host_peak_bytes=scale * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    )


def changes(config: Config, compiled: Compiled, slices: int) -> Iterator[dict[str, Any]]:
    """Overrides to try, each on top of those before it except where they stand for the same key."""
    made: dict[str, Any] = {}
    # Where the arguments alone are too many, only the mesh can help.
    if all(program.refusal is None or program.compile_s > 0 for program in compiled.programs):
        for remat in REMAT_AFTER[config.model.remat]:
            made = {**made, "model.remat": remat}
            yield made
        for factor in (2, 4):
            made = {**made, "batch.accumulation_steps": factor * config.batch.accumulation_steps}
            yield made
        if compiled.shape.row_length > config.batch.row_multiple:
            yield {**made, "batch.row_length": compiled.shape.row_length // 2}
    mesh = compiled.mesh
    if mesh["replica"] > slices:
        made = {**made, "mesh.replica": slices, "mesh.fsdp": -1}
        yield made
    tensor = mesh["tensor"]
    while (tensor := 2 * tensor) <= min(8, compiled.chips // slices):
        yield {**made, "mesh.tensor": tensor, "mesh.fsdp": -1}


def override_arguments(overrides: dict[str, Any]) -> Sequence[str]:
    return [f"{key}={value}" for key, value in overrides.items()]


def _attempt(
    devices: Sequence[jax.Device],
    config: Config,
    directory: weights.ModelDirectory,
    pairs: TokenizedPairs,
    eval_sets: Sequence[TokenizedPairs],
    overrides: dict[str, Any],
) -> Attempt:
    named = " ".join(override_arguments(overrides))
    log.warning("trying %s", named)
    raw = config.model_dump(mode="json")
    for path, value in overrides.items():
        section, key = path.split(".")
        raw[section][key] = value
    try:
        changed = configuration.from_dict(raw, where=named)
        return Attempt(overrides, compile_for(devices, changed, directory, pairs, eval_sets), None)
    except UsageError as error:
        return Attempt(overrides, None, str(error))


def _read(config: Config, directory: weights.ModelDirectory) -> tuple[TokenizedPairs, Sequence[TokenizedPairs], str]:
    tokenizer = tokens.load_tokenizer(str(directory.path))
    require_fit(tokenizer, directory.path, vocabulary_tokens=directory.architecture.vocabulary_tokens)
    p = config.refinement.prompt if config.objective.name != "sft" else None
    pairs = read_data(
        config, config.data.path, config.data.split, tokenizer, directory.architecture, augmentation_prompt=p
    )
    eval_sets = list(read_held_out(config, tokenizer, directory.architecture).values())
    return pairs, eval_sets, f"data.path, {len(pairs):,} pairs; p has {len(pairs.augmentation)} tokens"


def _typical(config: Config, directory: weights.ModelDirectory) -> tuple[TokenizedPairs, Sequence[TokenizedPairs], str]:
    head_tokens = p_tokens = 0
    said = "no p"
    if config.refinement.prompt is not None and config.objective.name != "sft":
        head_tokens, p_tokens, said = _prefix(config, directory)
    pairs = typical_pairs(
        config.data.format,
        least_pairs=64 * config.batch.pairs_per_step,
        head_tokens=head_tokens,
        augmentation_tokens=p_tokens,
        max_length=config.data.max_length,
        max_prompt_length=config.data.max_prompt_length,
    )
    typical = LENGTHS[config.data.format]
    lengths = (
        f"typical of {config.data.format}, not read from data.path: prompt {typical.prompt[0]:g}, chosen "
        f"{typical.chosen[0]:g}, rejected {typical.rejected[0]:g} tokens on average, long tails, cut to "
        f"data.max_length={config.data.max_length}; {said}"
    )
    return pairs, [pairs for _ in config.data.held_out], lengths


def _prefix(config: Config, directory: weights.ModelDirectory) -> tuple[int, int, str]:
    """Tokens of the template head and of p, and how they were counted."""
    if not (directory.path / "tokenizer.json").is_file():
        said = f"p taken to have {TYPICAL_P_TOKENS} tokens, as there is no tokenizer.json"
        return 0, TYPICAL_P_TOKENS, said
    encoder = tokens.PairEncoder(
        tokens.load_tokenizer(str(directory.path)), augmentation_prompt=config.refinement.prompt
    )
    prompt = "Hello" if config.data.format == "hh_rlhf" else (Message("user", "Hello"),)
    (encoded,) = encoder.encode([Pair("0", "an example", 1, prompt, "Hi", "No")])
    if isinstance(encoded, BadRow):
        raise UsageError(f"model.path={config.model.path}: {encoded.reason}")
    return len(encoded.head), len(encoded.augmentation), f"p has {len(encoded.augmentation)} tokens"
