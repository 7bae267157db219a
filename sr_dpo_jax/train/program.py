"""The train step of a run and the state that goes through it, as shapes; the plan of its steps and what they cost.

The functions that make programs start no computation, so they also serve to compile for devices that are not there.
"""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sr_dpo_jax.data.dataset import TokenizedPairs
from sr_dpo_jax.data.pipeline import Feed, Packing, instruction_room, pair_sizes
from sr_dpo_jax.data.plan import Limits, Plan, round_up, scoring_plan, training_plan
from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.model.adapter import split
from sr_dpo_jax.model.architecture import Architecture
from sr_dpo_jax.model.decoder import Params
from sr_dpo_jax.parallel.chips import peak_flops
from sr_dpo_jax.train.flops import matrix_flops, pair_flops
from sr_dpo_jax.train.memory import compile_within_memory
from sr_dpo_jax.train.objective import Objective
from sr_dpo_jax.train.optim import OPTIMIZERS, make_schedule
from sr_dpo_jax.train.state import TrainState, abstract_state
from sr_dpo_jax.train.train_step import make_train_step
from sr_dpo_jax.weights.placement import PlacedModel

log = logging.getLogger(__name__)

COARSE_RATES = {"bfloat16": 2e-5, "float32": 3e-10}
"""An update is about as large as the learning rate, and a weight of 0.01 of this type loses all below this."""

MUCH_PADDING = 0.1
"""A run whose rows hold a larger share of padding is told how to fill them."""


@dataclasses.dataclass(frozen=True)
class Program:
    """The jitted train step, its optimizer, and the state that goes through it."""

    step: Any
    optimizer: Any
    state: TrainState
    """Shapes and types, with shardings."""
    layers: int
    devices: list[jax.Device]
    """Those of the mesh."""

    def compiled(self, state: TrainState, base: Params | None, reference_params: Params | None, feed: Feed) -> Any:
        """Compiles the train step for the batches that come; a batch of another shape raises from then on."""
        traced = self.step.trace(state, base, reference_params, next(feed.batches(0))[1])
        return compile_within_memory(traced, layers=self.layers, devices=self.devices)


def make_program(
    model: PlacedModel, objective: Objective, optimizer: Mapping[str, Any], *, pairs: int, total_steps: int
) -> Program:
    """Makes the train step; computes nothing.

    `optimizer` holds name, schedule and numbers: all keys of the configuration's section `optimizer`. A step holds
    this many `pairs`, and the schedule ends after `total_steps`.
    """
    numbers = dict(optimizer)
    schedule = make_schedule(
        name=numbers.pop("schedule"),
        learning_rate=numbers.pop("learning_rate"),
        warmup_steps=warmup_of(numbers.pop("warmup_steps"), numbers.pop("warmup_ratio"), total_steps),
        total_steps=total_steps,
    )
    transformation = OPTIMIZERS[numbers.pop("name")](schedule, **numbers)
    state = abstract_state(split(model.shapes)[0], transformation, model.mesh)
    step = make_train_step(
        model.graph, transformation, schedule, objective, pairs=pairs, mesh=model.mesh, abstract=state
    )
    devices = list(model.mesh.devices.flat)
    return Program(step, transformation, state, model.architecture.layers, devices)


def warmup_of(steps: int, ratio: float | None, total_steps: int) -> int:
    """Gives the updates of the warm-up: the ratio takes the place of the steps."""
    return steps if ratio is None else round(ratio * total_steps)


def warn_of_no_learning(optimizer: Mapping[str, Any], total_steps: int, param_dtype: np.dtype) -> None:
    """Warns of a run that will learn next to nothing, with the number and the remedy.

    `optimizer` holds the keys of the configuration's section, and `param_dtype` is the type of what is trained.
    """
    learning_rate = optimizer["learning_rate"]
    warmup_steps = warmup_of(optimizer["warmup_steps"], optimizer["warmup_ratio"], total_steps)
    if warmup_steps >= total_steps:
        log.warning(
            "optimizer.warmup_steps=%d, and the run takes %d steps: the learning rate ends at %.2g of %.2g; lower it, "
            "or set optimizer.warmup_ratio=0.1",
            warmup_steps,
            total_steps,
            learning_rate * total_steps / (warmup_steps + 1),
            learning_rate,
        )
    kind = jnp.dtype(param_dtype).name
    if learning_rate < COARSE_RATES.get(kind, 0):
        log.warning(
            "optimizer.learning_rate=%.2g with model.param_dtype=%s: a %s parameter loses updates below 1/%d of its "
            "value, so most of these change nothing; %s",
            learning_rate,
            *(kind, kind, int(4 / float(jnp.finfo(kind).eps))),
            "raise the rate" if kind == "float32" else "set model.param_dtype=float32",
        )


def plan_training(
    limits: Limits,
    objective: Objective,
    pairs: TokenizedPairs,
    held_out: Sequence[TokenizedPairs],
    *,
    seed: int,
    epochs: int,
    attention: str,
) -> Plan:
    """Plans all steps of training, in rows that have room for every held-out pair too.

    Raises:
      UsageError: a pair is longer than a row, an epoch holds less than one step, or the rows are longer than the
        attention path takes.
    """
    sizes_of = partial(pair_sizes, with_rejected=objective.kind.needs_rejected)
    tokens, scored = sizes_of(pairs)
    longest = [tuple(int(size.max()) for size in sizes_of(held)) for held in held_out]
    plan = training_plan(
        tokens,
        scored,
        limits,
        source=pairs.source,
        source_weights=pairs.source_weights,
        seed=seed,
        epochs=epochs,
        room_for=tuple(map(max, zip((0, 0), *longest, strict=True))),
    )
    shape = plan.shape
    if objective.scored_with_p and len(pairs.head_tokens):
        _log_own_places(limits, pairs, plan)
    if attention == "splash":
        rooms = [_room(pairs, plan)] if objective.scored_with_p else []
        rooms += [_room(held, scoring_plan(*sizes_of(held), shape)) for held in held_out]
        require_short_rows(limits, shape.row_length, max(rooms, default=0))
    _log_shape(limits, plan, tokens, max([int(tokens.max()), *(most for most, _ in longest)]))
    return plan


def _log_shape(limits: Limits, plan: Plan, tokens: np.ndarray, longest: int) -> None:
    """Says how full the rows are and, where the longest pair alone makes them so long, what would fill them."""
    shape = plan.shape
    used = tokens[plan.pair].sum(axis=1)
    padding = 1 - used.mean() / (shape.rows * shape.row_length)
    log.info(
        "%d steps an epoch, each %d pairs in %d rows of %d tokens, %d of them scored; %.1f %% padding",
        *(plan.steps_per_epoch, shape.pairs, shape.rows, shape.row_length, shape.scored, 100 * padding),
    )
    if padding <= MUCH_PADDING or shape.row_length - longest >= limits.row_multiple or shape.rows == 1:
        return
    remedy = (
        "more batch.pairs_per_step, fewer shards of rows (mesh.tensor in place of mesh.fsdp), fewer "
        "batch.accumulation_steps or a lower data.max_length may fill them"
    )
    if fewer := shape.rows - limits.rows_multiple:
        remedy = (
            f"batch.row_length={round_up(int(1.02 * used.max()) // fewer, limits.row_multiple)} or more may fill them"
        )
    log.warning(
        "%.0f %% of the rows is padding: each must hold the longest pair, %d tokens, and a step has %d for a row; %s",
        *(100 * padding, longest, round(used.mean() / shape.rows), remedy),
    )


def _room(pairs: TokenizedPairs, plan: Plan) -> int:
    return max(instruction_room(pairs, plan, len(ids)) for ids in (pairs.augmentation, pairs.against))


def _log_own_places(limits: Limits, pairs: TokenizedPairs, plan: Plan) -> None:
    """Says what it costs that p stands in each prompt: the length of rows with p, and that of such behind one head."""
    tokens, length = len(pairs.augmentation), plan.shape.row_length
    longer, once = (round_up(length + more, limits.row_multiple) for more in (_room(pairs, plan), tokens))
    log.info(
        "p stands in each prompt, as their heads differ: rows with p have %d tokens; with one head they would have %d",
        longer,
        once,
    )


def require_short_rows(limits: Limits, row_length: int, p_tokens: int) -> None:
    """Refuses rows that splash attention cannot take, before anything is loaded or compiled."""
    from sr_dpo_jax.model.kernels.splash import LONGEST_ROW, padded_length

    multiple = limits.row_multiple
    tokens = round_up(row_length + p_tokens, multiple)
    if padded_length(tokens) > LONGEST_ROW:
        most = (LONGEST_ROW - p_tokens) // multiple * multiple
        raise UsageError(
            f"batch.row_length={limits.row_length}: rows would have {tokens} tokens with p, and splash attention "
            f"takes at most {LONGEST_ROW}; set batch.row_length to {most} or less, and where a pair is longer than "
            "that, lower data.max_length"
        )


@dataclasses.dataclass(frozen=True)
class Work:
    """The cost of the pairs, for throughput, padding and MFU."""

    tokens: np.ndarray
    """`[N]`, tokens of each pair in a row."""
    flops: np.ndarray
    """`[N]`, model flops that each pair costs a step."""
    devices: int
    peak_flops: float | None
    """The bfloat16 flops a second of all devices; None where the chip is not known."""


def work_of(
    architecture: Architecture,
    packing: Packing,
    objective: Objective,
    pairs: TokenizedPairs,
    *,
    online: bool,
    adapter_weights: int = 0,
) -> Work:
    """Counts the flops of each pair: forward and backward, p's forward, and those of an online reference."""
    kind = objective.kind
    rejected_tokens = pairs.rejected_tokens if kind.needs_rejected else 0 * pairs.rejected_tokens
    forward = partial(
        pair_flops,
        architecture,
        prompt_tokens=pairs.prompt_tokens,
        chosen_tokens=pairs.chosen_tokens,
        rejected_tokens=rejected_tokens,
        adapter_weights=adapter_weights,
    )
    flops = (4 if online else 3) * forward(prefix_tokens=0)
    if adapter_weights:
        responses = pairs.chosen_tokens + rejected_tokens
        flops -= matrix_flops(architecture, prompt_tokens=pairs.prompt_tokens, response_tokens=responses)
    if objective.judged_in_step:
        for instruction in (pairs.augmentation, *[pairs.against] * (len(pairs.against) > 0)):
            within = len(instruction) if len(pairs.head_tokens) else 0  # each pair runs p, as a part of its prompt
            with_p = forward(prompt_tokens=pairs.prompt_tokens + within, prefix_tokens=len(instruction) - within)
            flops += (2 if online else 1) * with_p
    devices = packing.mesh.devices.flatten().tolist()
    tokens, _ = pair_sizes(pairs, with_rejected=kind.needs_rejected)
    return Work(tokens, flops, len(devices), peak_flops(devices))
