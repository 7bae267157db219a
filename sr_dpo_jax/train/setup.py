"""All that precedes the first step: the plan, the reference's scores, the state, the compiled programs.

How a run starts, the first that holds: a checkpoint in output_dir is resumed; model.init=random draws the weights from
the seed; else the weights of model.path are loaded. A reference that the cache does not hold is scored before step 0.

Next: `loop.py`, which takes the steps.
"""

import dataclasses
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from transformers import PreTrainedTokenizerBase

from sr_dpo_jax.config.schema import Config
from sr_dpo_jax.data.dataset import TokenizedPairs
from sr_dpo_jax.data.pipeline import Feed
from sr_dpo_jax.data.plan import Plan, Shape, covering_plan, scoring_plan, training_plan
from sr_dpo_jax.data.tokens import tokenizer_digest
from sr_dpo_jax.durable.checkpoint import Checkpoints
from sr_dpo_jax.durable.files import require_room
from sr_dpo_jax.durable.preemption import StopSignal
from sr_dpo_jax.durable.selection import Selection
from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.model.kernels.splash import LONGEST_ROW, padded_length
from sr_dpo_jax.parallel.chips import peak_flops
from sr_dpo_jax.parallel.processes import on_leader
from sr_dpo_jax.train.evaluate import HeldOut
from sr_dpo_jax.train.flops import pair_flops
from sr_dpo_jax.train.identity import identity_of, report_drift, require_same_run, surroundings
from sr_dpo_jax.train.metrics import Progress
from sr_dpo_jax.train.optim import make_optimizer, make_schedule
from sr_dpo_jax.train.reference import ReferenceScores
from sr_dpo_jax.train.samples import Samples
from sr_dpo_jax.train.train_step import (
    Objective,
    Params,
    Scores,
    TrainState,
    abstract_state,
    initialise,
    make_score_step,
    make_train_step,
    state_shapes,
    state_shardings,
)
from sr_dpo_jax.weights.placement import Assembly, objective_of, pair_sizes

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Work:
    """What the pairs cost, for throughput, padding and MFU."""

    tokens: np.ndarray
    """`[N]`, tokens of each pair in a row."""
    flops: np.ndarray
    """`[N]`, model flops that each pair costs a step."""
    devices: int
    peak_flops: float | None
    """What the devices can do in a second; None where that is not known."""


@dataclasses.dataclass(frozen=True)
class Job:
    """What the loop works with and never changes."""

    config: Config
    plan: Plan
    total_steps: int
    work: Work
    pair_ids: tuple[str, ...]
    """`[N]`, to name the pairs of a step that was skipped."""
    record: dict[str, Any]
    """What a checkpoint holds besides state and step, for the start that goes on from it."""
    feed: Feed
    train_step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    """Compiled: a batch of another shape raises instead of compiling again."""
    reference_params: Params | None
    held_out: tuple[HeldOut, ...]
    samples: Samples | None
    selection: Selection
    """What the evaluations before this start have given."""
    checkpoints: Checkpoints


def prepare(
    assembly: Assembly,
    pairs: TokenizedPairs,
    eval_sets: Mapping[str, TokenizedPairs],
    *,
    tokenizer: PreTrainedTokenizerBase,
    stop: StopSignal,
    allowed_changes: Sequence[str],
) -> tuple[Job, TrainState]:
    """Plans, scores the reference, loads or restores the state, compiles: all that precedes the first step."""
    config, objective = assembly.config, objective_of(assembly.config)
    preference = objective.name != "sft"
    online = preference and config.reference.mode == "online"
    sizes = pair_sizes(pairs, with_rejected=preference)
    plan = plan_of(assembly, pairs, sizes, eval_sets.values())
    score_step = make_score_step(assembly.graph, pairs=plan.shape.pairs, mesh=assembly.mesh)
    checkpoints = Checkpoints(config.output_dir, keep=config.checkpoint.keep, strict=config.checkpoint.strict)
    identity = identity_of(assembly, pairs, plan, tokenizer_digest(tokenizer))
    record: dict[str, Any] = {"identity": identity, "surroundings": surroundings(assembly)}
    resumed, before = _resumed(assembly, checkpoints, record, allowed_changes)

    feeds = {name: _held_out_feed(assembly, plan, of_set) for name, of_set in eval_sets.items()}
    reference = _reference(assembly, plan, pairs, eval_sets, feeds) if preference else {}
    scored = before.get("reference", {})
    doubted = {name: scores for name, scores in reference.items() if scored.get(name) != scores.digest}
    base = assembly.base_params() if resumed is None or online or doubted else None
    _score_reference(doubted, score_step, base, stop, dtype=config.model.dtype)
    record["reference"] = {name: scores.digest for name, scores in reference.items()}
    reference_params = assembly.frozen(base) if online else None
    if resumed is not None:
        base = None  # its memory is needed for what the checkpoint holds
    total_steps = min(len(plan), config.train.max_steps or len(plan))
    program = make_program(assembly, pairs=plan.shape.pairs, total_steps=total_steps)
    _require_room(assembly, checkpoints, program.state)
    state = _first_state(program, base) if resumed is None else checkpoints.restore(program.state, step=resumed)[0]
    del base  # the first step consumes it

    known = {name: scores.scores for name, scores in reference.items()}
    feed = assembly.feed(
        pairs, plan, augmented=objective.refined, with_rejected=preference, reference=known.get("training")
    )
    stop.meet()
    job = Job(
        config=config,
        plan=plan,
        total_steps=total_steps,
        work=work_of(assembly, pairs, sizes[0], online=online),
        pair_ids=pairs.ids,
        record=record,
        feed=feed,
        train_step=_compiled(program, state, reference_params, feed),
        reference_params=reference_params,
        held_out=_held_out(objective, score_step, state.params, eval_sets, feeds, known),
        samples=Samples(assembly, eval_sets, tokenizer, state.params) if config.train.samples else None,
        selection=_selection(config, checkpoints, before.get("selection")),
        checkpoints=checkpoints,
    )
    return job, state


def _reference(
    assembly: Assembly,
    plan: Plan,
    pairs: TokenizedPairs,
    eval_sets: Mapping[str, TokenizedPairs],
    feeds: Mapping[str, tuple[Feed, Plan]],
) -> dict[str, ReferenceScores]:
    """Whose scores the run needs, as far as the cache has them."""
    reference = {}
    if assembly.config.reference.mode == "cached":
        covering = covering_plan(plan, *pair_sizes(pairs, with_rejected=True))
        augmented = objective_of(assembly.config).refined
        reference["training"] = assembly.reference_scores(pairs, covering, augmented=augmented)
    for name, of_set in eval_sets.items():
        augmented = len(of_set.augmentation) > 0
        reference[name] = assembly.reference_scores(of_set, feeds[name][1], augmented=augmented)
    return reference


def _compiled(program: "Program", state: TrainState, reference_params: Params | None, feed: Feed) -> Any:
    """The train step, compiled for the batches that come."""
    started = time.monotonic()
    step = program.step.lower(state, reference_params, next(feed.batches(0))[1]).compile()
    log.info("compiled in %.1f s", time.monotonic() - started)
    return step


def _held_out(
    objective: Objective,
    score_step: Any,
    params: Params,
    eval_sets: Mapping[str, TokenizedPairs],
    feeds: Mapping[str, tuple[Feed, Plan]],
    reference: Mapping[str, np.ndarray],
) -> tuple[HeldOut, ...]:
    """Every held-out set with the score step compiled for its batches."""
    found, by_shape = [], {}
    for name, pairs in eval_sets.items():
        feed = feeds[name][0]
        batch = next(feed.batches(0))[1]
        leaves, tree = jax.tree.flatten(batch)
        shape = (tree, *(leaf.shape for leaf in leaves))  # sets differ in it where what precedes p does
        if shape not in by_shape:
            by_shape[shape] = score_step.lower(params, batch).compile()
        found.append(HeldOut(name, objective, by_shape[shape], feed, len(pairs), reference.get(name)))
    return tuple(found)


def _held_out_feed(assembly: Assembly, plan: Plan, pairs: TokenizedPairs) -> tuple[Feed, Plan]:
    """Held-out pairs in the shape that training compiles for."""
    preference = assembly.config.objective.name != "sft"
    eval_plan = scoring_plan(*pair_sizes(pairs, with_rejected=preference), plan.shape)
    augmented = len(pairs.augmentation) > 0
    return assembly.feed(pairs, eval_plan, augmented=augmented, with_rejected=preference), eval_plan


def _selection(config: Config, checkpoints: Checkpoints, record: Mapping[str, Any] | None) -> Selection:
    """What the checkpoint that is resumed has counted, under the rule of the configuration."""
    section, train = config.checkpoint, config.train
    rule = Selection(
        section.best_metric, section.best_mode, train.early_stopping_min_delta, train.early_stopping_patience
    )
    selection = rule if record is None else rule.resumed(record)
    if selection is None:
        log.warning(
            "checkpoint.best_metric is another one than before: the evaluations so far do not count, and the best "
            "checkpoint so far stays no longer than others"
        )
        return rule
    if selection.step is not None:
        try:
            checkpoints.existing(selection.step)
        except UsageError as error:
            message = f"the best checkpoint cannot be used any more: {error}"
            if config.checkpoint.strict:
                raise UsageError(f"{message}; checkpoint.strict=true: restore it, or set that to false") from error
            log.warning("%s; only a better one takes its place", message)
    return selection


def work_of(assembly: Assembly, pairs: TokenizedPairs, tokens: np.ndarray, *, online: bool) -> Work:
    """Flops of a pair: forward and backward, p's forward, and those of an online reference."""
    objective = objective_of(assembly.config)
    forward = partial(
        pair_flops,
        assembly.directory.architecture,
        prompt_tokens=pairs.prompt_tokens,
        chosen_tokens=pairs.chosen_tokens,
        rejected_tokens=pairs.rejected_tokens if objective.name != "sft" else 0 * pairs.rejected_tokens,
    )
    flops = (4 if online else 3) * forward(prefix_tokens=0)
    if objective.refined:
        flops += (2 if online else 1) * forward(prefix_tokens=len(pairs.augmentation))
    devices = assembly.mesh.devices.flatten().tolist()
    return Work(tokens, flops, len(devices), peak_flops(devices))


def _resumed(
    assembly: Assembly, checkpoints: Checkpoints, record: dict[str, Any], allowed_changes: Sequence[str]
) -> tuple[int | None, dict[str, Any]]:
    """The step that the run goes on from, and what `record` was when it was saved; this is that run."""
    step = checkpoints.newest_good()
    if step is None:
        return None, {}
    before, where = checkpoints.restore_position(step), f"{assembly.config.output_dir}: step {step}"
    require_same_run(before["identity"], record["identity"], where=where, allowed_changes=allowed_changes)
    strict = assembly.config.checkpoint.strict
    report_drift(before["surroundings"], record["surroundings"], where=where, strict=strict)
    log.info("resuming at step %d", before["next_step"])
    return step, before


def _score_reference(
    reference: dict[str, ReferenceScores],
    score_step: Callable[..., Scores],
    base: Params | None,
    stop: StopSignal,
    *,
    dtype: str,
) -> None:
    """What the cache holds is tried on a few pairs, and what it lacks is scored."""
    for name, scores in reference.items():
        scores.distrust(score_step, base, dtype=dtype)
        if not scores.complete:
            title, leader = f"reference on {name} pairs", jax.process_index() == 0
            with Progress(title, total=scores.steps, active=leader) as progress:

                def done(steps: int, progress: Progress = progress) -> None:
                    progress.update(steps)
                    stop.meet()

                scores.fill(score_step, base, done)


def plan_of(
    assembly: Assembly,
    pairs: TokenizedPairs,
    sizes: tuple[np.ndarray, np.ndarray],
    eval_sets: Collection[TokenizedPairs],
) -> Plan:
    """The plan of training, in rows that have room for every held-out pair too."""
    config = assembly.config
    room_for = (0, 0)
    for of_set in eval_sets:
        tokens, scored = pair_sizes(of_set, with_rejected=config.objective.name != "sft")
        room_for = (max(room_for[0], int(tokens.max())), max(room_for[1], int(scored.max())))
    plan = training_plan(
        *sizes,
        source=pairs.source,
        source_weights=pairs.source_weights,
        seed=config.seed,
        epochs=config.train.epochs,
        pairs_per_step=config.batch.pairs_per_step,
        row_length=config.batch.row_length,
        row_multiple=config.batch.row_multiple,
        rows_multiple=assembly.rows_multiple,
        room_for=room_for,
    )
    shape = plan.shape
    _require_short_rows(assembly, shape, len(pairs.augmentation) if objective_of(config).refined or eval_sets else 0)
    log.info(
        "%d steps an epoch, each %d pairs in %d rows of %d tokens, %d of them scored; %.1f %% padding",
        plan.steps_per_epoch,
        shape.pairs,
        shape.rows,
        shape.row_length,
        shape.scored,
        100 * (1 - sizes[0][plan.pair].sum() / (len(plan) * shape.rows * shape.row_length)),
    )
    return plan


def _require_short_rows(assembly: Assembly, shape: Shape, p_tokens: int) -> None:
    """Refuses rows that the attention kernel cannot take, before anything is loaded or compiled."""
    section = assembly.config.batch
    tokens = -(-(shape.row_length + p_tokens) // section.row_multiple) * section.row_multiple
    if assembly.attention == "splash" and padded_length(tokens) > LONGEST_ROW:
        most = (LONGEST_ROW - p_tokens) // section.row_multiple * section.row_multiple
        raise UsageError(
            f"batch.row_length={section.row_length}: rows would have {tokens} tokens with p, and splash attention "
            f"takes at most {LONGEST_ROW}; set batch.row_length to {most} or less, and where a pair is longer than "
            "that, lower data.max_length"
        )


@dataclasses.dataclass(frozen=True)
class Program:
    """The jitted train step and the state that goes through it, as shapes."""

    step: Any
    optimizer: Any
    state: TrainState
    """Shapes and types, with shardings."""


def make_program(assembly: Assembly, *, pairs: int, total_steps: int) -> Program:
    """The train step of a configuration; reads nothing and computes nothing, so it serves to compile ahead of time."""
    section = assembly.config.optimizer
    schedule = make_schedule(
        name=section.schedule,
        learning_rate=section.learning_rate,
        warmup_steps=section.warmup_steps,
        total_steps=total_steps,
    )
    optimizer = make_optimizer(
        name=section.name,
        schedule=schedule,
        max_grad_norm=section.max_grad_norm,
        weight_decay=section.weight_decay,
        b1=section.b1,
        b2=section.b2,
        first_moment_dtype=section.first_moment_dtype,
    )
    shapes = state_shapes(assembly.param_shapes, optimizer)
    shardings = state_shardings(shapes, assembly.param_shardings, optimizer, assembly.mesh)
    step = make_train_step(
        assembly.graph,
        optimizer,
        schedule,
        objective_of(assembly.config),
        pairs=pairs,
        mesh=assembly.mesh,
        state_shardings=shardings,
    )
    return Program(step, optimizer, abstract_state(shapes, shardings))


def _first_state(program: Program, base: Params) -> TrainState:
    """The state around `base` before any update."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, program.state)
    moments = initialise(partial(program.optimizer.init, base), shardings.optimizer_state)
    return TrainState(jax.device_put(jnp.int32(0), shardings.step), base, moments)


def _require_room(assembly: Assembly, checkpoints: Checkpoints, state: TrainState) -> None:
    """`keep` checkpoints stand there, the best one beside them, and one more until it is verified."""
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    section = assembly.config.checkpoint
    kept = section.keep + (section.best_metric is not None)
    to_come = max(kept + 1 - len(checkpoints.verified_steps()), 1)
    on_leader(lambda: require_room(checkpoints.directory, checkpoint_bytes=size, checkpoints=to_come))
