"""Finds out whether a configuration fits a topology and, where it does not, the cheapest change that helps.

Changes are tried in the order of what they cost in time: recomputing less, then more; more, smaller micro-batches;
shorter rows; a mesh that splits parameters or activations further. They add up until it fits; then each of them that
the last has made needless is taken back. Where none helps, LoRA adapters in place of all weights are tried,
and then a base in int8.

`show.py` prints the result.
"""

import dataclasses
import logging
import resource
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax

from sr_dpo_jax.commands.compile.machine import devices_of, only_one
from sr_dpo_jax.commands.compile.programs import Compiled, compile_for
from sr_dpo_jax.commands.compile.typical import LENGTHS, typical_pairs
from sr_dpo_jax.config.load import config_from_dict
from sr_dpo_jax.config.schema import Config
from sr_dpo_jax.data import tokens
from sr_dpo_jax.data.dataset import TokenizedPairs
from sr_dpo_jax.data.messages import Message
from sr_dpo_jax.data.records import BadRow
from sr_dpo_jax.data.rows import Pair
from sr_dpo_jax.data.tokenizer_fit import require_fit
from sr_dpo_jax.errors import RunError, UsageError
from sr_dpo_jax.train.objective import OBJECTIVES
from sr_dpo_jax.train.setup import objective_of, read_held_out, read_training
from sr_dpo_jax.weights import directory as weights

log = logging.getLogger(__name__)

TYPICAL_P_TOKENS = 50
"""The paper's p in common vocabularies."""
LEAST_EFFORT = -1.0
LORA = {"lora.rank": 16}
"""The last resort: adapters are trained, and no longer all weights."""
REMAT_AFTER = {"none": ("dots", "full"), "dots": ("full",), "full": ()}


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One change and its result."""

    overrides: dict[str, Any]
    """`section.key`: value, on top of the configuration."""
    compiled: Compiled | None
    problem: str | None
    """The reason why it cannot run so at all; None where it was compiled."""

    @property
    def fits(self) -> bool:
        return self.compiled is not None and self.compiled.fits


@dataclasses.dataclass(frozen=True)
class Report:
    topology: str
    slices: int
    quick: bool
    """The compiler made its least effort: memory is close to that of a run, cycles are far too many."""
    lengths: str
    """Tells where the lengths of the pairs come from."""
    processes: int
    compiled: Compiled
    attempts: tuple[Attempt, ...]
    host_peak_bytes: int
    """The most memory that this command held on this machine."""

    @property
    def remedy(self) -> Attempt | None:
        """The last that fits: those after the first are smaller changes."""
        return next((attempt for attempt in reversed(self.attempts) if attempt.fits), None)


def compile_command(config: Config, *, topology: str, slices: int, read_data: bool, quick: bool) -> Report:
    """Compiles a configuration and, where it does not fit, looks for a change that does.

    Args:
      config: the run.
      topology: one slice, as jax names it.
      slices: the number of slices.
      read_data: whether to plan from the real data instead of typical lengths.
      quick: asks the compiler for its least effort.

    Raises:
      UsageError: the configuration, model, data or topology is at fault.
      RunError: the compiler itself fails.
    """
    jax.config.update("jax_enable_compilation_cache", False)  # or compile seconds would be those of a look-up
    if quick:
        jax.config.update("jax_exec_time_optimization_effort", LEAST_EFFORT)
    directory = weights.open_directory(config.model.path, revision=config.model.revision, weights=False)
    # Weights are neither read nor looked for.
    config = config.model_copy(update={"model": config.model.model_copy(update={"init": "random"})})
    pairs, eval_sets, lengths = _read(config, directory) if read_data else _typical(config, directory)
    with only_one():
        devices = devices_of(topology, slices)
        compiled = compile_for(devices, config, directory, pairs, eval_sets)
        if quick:
            compiled = dataclasses.replace(compiled, step_s=None, mfu=None)
        attempts: Sequence[Attempt] = ()
        if not compiled.fits:
            log.warning("does not fit; looking for a change that does")
            attempt = partial(_attempt, devices, config, directory, pairs, eval_sets)
            attempts = search(config, compiled, slices, attempt)
    host_peak_bytes = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    processes = config.distributed.processes
    return Report(topology, slices, quick, lengths, processes, compiled, tuple(attempts), host_peak_bytes)


def search(
    config: Config, compiled: Compiled, slices: int, attempt: Callable[[dict[str, Any]], Attempt]
) -> Sequence[Attempt]:
    """Tries `changes` until one fits, and then leaves out each of its parts that is not needed.

    Args:
      config: a configuration that does not fit.
      compiled: its programs.
      slices: the number of slices that the devices form.
      attempt: compiles the configuration with overrides.
    """
    attempts: list[Attempt] = []
    for overrides in changes(config, compiled, slices):
        attempts.append(attempt(overrides))
        if attempts[-1].fits:
            break
        if attempts[-1].compiled is not None and _state_too_large(attempts[-1].compiled):
            break  # what comes after splits the state no further
    if attempts and attempts[-1].fits:
        kept, before = attempts[-1].overrides, attempts[-2].overrides if len(attempts) > 1 else {}
        parts = dict.fromkeys(map(_part, kept))  # costliest first, as they were made
        needed = {_part(key) for key, value in kept.items() if before.get(key) != value}
        needed |= {"mesh"} if _state_too_large(compiled) else set()
        for part in [part for part in parts if part not in needed]:
            smaller = {key: value for key, value in kept.items() if _part(key) != part}
            attempts.append(attempt(smaller))
            kept = smaller if attempts[-1].fits else kept
    else:
        for overrides in _with_adapters(config):
            attempts.append(attempt(overrides))
            if attempts[-1].fits:
                break
    return attempts


def _with_adapters(config: Config) -> Iterator[dict[str, Any]]:
    """Yields what remains where full training does not fit: adapters, and then a base in half the bytes."""
    full = {} if config.model.remat == "full" else {"model.remat": "full"}
    if config.lora is None:
        yield LORA
        if full:
            yield {**LORA, **full}
    if config.lora is None or config.lora.base is None:
        yield {**({} if config.lora is not None else LORA), **full, "lora.base": "int8"}


def _part(key: str) -> str:
    """Groups the keys that are changed together: those of the mesh; others stand by themselves."""
    return "mesh" if key.startswith("mesh.") else key


def _state_too_large(compiled: Compiled) -> bool:
    """Tells whether the arguments alone need more than a chip has: only fewer replicas can help then."""
    return any(program.refusal is not None and program.compile_s == 0 for program in compiled.programs)


def changes(config: Config, compiled: Compiled, slices: int) -> Iterator[dict[str, Any]]:
    """Yields overrides to try, each on top of those before it except where they are for the same key.

    Fewer replicas come first where the state alone is too large, as nothing else makes it smaller, and after what costs
    less otherwise.
    """
    made: dict[str, Any] = {}
    mesh, too_large = dict(compiled.mesh), _state_too_large(compiled)
    fewer_replicas = mesh["replica"] > slices
    if too_large and not fewer_replicas:
        return
    if too_large:
        mesh["replica"] = slices
        made = _mesh_overrides(config, mesh)
        yield made
    for remat in REMAT_AFTER[config.model.remat]:
        made = {**made, "model.remat": remat}
        yield made
    for factor in (2, 4):
        made = {**made, "batch.accumulation_steps": factor * config.batch.accumulation_steps}
        yield made
    if compiled.shape.row_length > config.batch.row_multiple:
        yield {**made, "batch.row_length": compiled.shape.row_length // 2}
    if fewer_replicas and not too_large:
        mesh["replica"] = slices
        made = {**made, **_mesh_overrides(config, mesh)}
        yield made
    while mesh["tensor"] < min(8, compiled.chips // mesh["replica"]):
        mesh["tensor"] *= 2
        yield {**made, **_mesh_overrides(config, mesh)}


def _mesh_overrides(config: Config, mesh: dict[str, int]) -> dict[str, Any]:
    """Gives the overrides for this mesh: fsdp takes all devices that are left, and so no other axis may."""
    configured = config.mesh.model_dump()
    changed = {f"mesh.{name}": mesh[name] for name in ("replica", "tensor") if configured[name] != mesh[name]}
    return {**changed, "mesh.fsdp": -1}


def arguments_text(overrides: dict[str, Any]) -> str:
    """Writes overrides as the command line takes them."""
    return " ".join(f"{key}={value}" for key, value in overrides.items())


def _attempt(
    devices: Sequence[jax.Device],
    config: Config,
    directory: weights.ModelDirectory,
    pairs: TokenizedPairs,
    eval_sets: Sequence[TokenizedPairs],
    overrides: dict[str, Any],
) -> Attempt:
    named = arguments_text(overrides)
    log.warning("trying %s", named)
    raw = config.model_dump(mode="json")
    for path, value in overrides.items():
        section, key = path.split(".")
        raw[section] = {**(raw[section] or {}), key: value}
    try:
        changed = config_from_dict(raw, where=named)
        return Attempt(overrides, compile_for(devices, changed, directory, pairs, eval_sets), None)
    except (UsageError, RunError) as error:
        return Attempt(overrides, None, str(error))


def _read(config: Config, directory: weights.ModelDirectory) -> tuple[TokenizedPairs, Sequence[TokenizedPairs], str]:
    tokenizer = tokens.load_tokenizer(str(directory.path))
    require_fit(tokenizer, directory.path, vocabulary_tokens=directory.architecture.vocabulary_tokens)
    pairs = read_training(config, tokenizer, directory.architecture)
    eval_sets = list(read_held_out(config, tokenizer, directory.architecture).values())
    place = ", in each prompt, as their heads differ" if len(pairs.head_tokens) else ""
    return pairs, eval_sets, f"data.path, {len(pairs):,} pairs; p has {len(pairs.augmentation)} tokens{place}"


def _typical(config: Config, directory: weights.ModelDirectory) -> tuple[TokenizedPairs, Sequence[TokenizedPairs], str]:
    head_tokens = p_tokens = 0
    said = "no p"
    if config.refinement.prompt is not None and OBJECTIVES[config.objective.name].needs_rejected:
        try:
            head_tokens, p_tokens, said = _prefix(config, directory, config.refinement.prompt)
        except UsageError:
            if objective_of(config).scored_with_p or config.data.held_out:
                raise
            head_tokens, p_tokens, said = _prefix(config, directory, None)
    pairs = typical_pairs(
        config.data.format,
        least_pairs=64 * config.batch.pairs_per_step,
        head_tokens=head_tokens,
        augmentation_tokens=p_tokens,
        max_length=config.data.max_length,
        max_prompt_length=config.data.max_prompt_length,
    )
    if config.refinement.against is not None:  # taken to be as long as p
        pairs = dataclasses.replace(pairs, against=pairs.augmentation)
    typical = LENGTHS[config.data.format]
    lengths = (
        f"typical of {config.data.format}, not read from data.path: prompt {typical.prompt[0]:g}, chosen "
        f"{typical.chosen[0]:g}, rejected {typical.rejected[0]:g} tokens on average, long tails, cut to "
        f"data.max_length={config.data.max_length}; {said}"
    )
    return pairs, [pairs for _ in config.data.held_out], lengths


def _prefix(config: Config, directory: weights.ModelDirectory, p: str | None) -> tuple[int, int, str]:
    """Counts the tokens of the template head and of p, and says how."""
    if not (directory.path / "tokenizer.json").is_file():
        return 0, TYPICAL_P_TOKENS, f"p taken to have {TYPICAL_P_TOKENS} tokens, as there is no tokenizer.json"
    tokenizer = tokens.load_tokenizer(str(directory.path))
    encoder = tokens.PairEncoder(tokenizer, augmentation_prompt=p)
    prompt = "Hello" if config.data.format == "hh_rlhf" else (Message("user", "Hello"),)
    (encoded,) = encoder.encode([Pair("0", "an example", 1, prompt, "Hi", "No")])
    if isinstance(encoded, BadRow):
        raise UsageError(f"model.path={config.model.path}: {encoded.reason}")
    return len(encoded.head), len(encoded.augmentation), f"p has {len(encoded.augmentation)} tokens"
