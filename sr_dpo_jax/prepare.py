"""All that precedes the first step: the plan, the reference's scores, the state, the compiled programs.

How a run starts, the first that holds: a checkpoint in output_dir is resumed; model.init=random draws the weights from
the seed; else the weights of model.path are loaded. A reference that the cache does not hold is scored before step 0.

Next: `loop.py`, which takes the steps.
"""

import dataclasses
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sr_dpo_jax.assembly import Assembly, objective_of, pair_sizes
from sr_dpo_jax.checkpoint import Checkpoints, abstract_state
from sr_dpo_jax.config import Config
from sr_dpo_jax.data.dataset import TokenizedPairs
from sr_dpo_jax.data.pipeline import Feed
from sr_dpo_jax.data.plan import Plan, covering_plan, scoring_plan, training_plan
from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.evaluate import HeldOut
from sr_dpo_jax.metrics import Progress
from sr_dpo_jax.optim import make_optimizer, make_schedule
from sr_dpo_jax.reference import ReferenceScores
from sr_dpo_jax.train_step import (
    Params,
    Scores,
    TrainState,
    initialise,
    make_score_step,
    make_train_step,
    state_shapes,
    state_shardings,
)

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Job:
    """What the loop works with and never changes."""

    config: Config
    plan: Plan
    total_steps: int
    tokens: np.ndarray
    """`[N]`, tokens of each pair in a row, for throughput and padding."""
    identity: dict[str, Any]
    """What a checkpoint of this run must agree with to be resumed."""
    feed: Feed
    train_step: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    """Compiled: a batch of another shape raises instead of compiling again."""
    reference_params: Params | None
    held_out: HeldOut | None
    checkpoints: Checkpoints


def prepare(assembly: Assembly, pairs: TokenizedPairs, eval_pairs: TokenizedPairs | None) -> tuple[Job, TrainState]:
    """Plans, scores the reference, loads or restores the state, compiles: all that precedes the first step."""
    config, objective = assembly.config, objective_of(assembly.config)
    preference, online = objective.name != "sft", config.reference.mode == "online"
    sizes = pair_sizes(pairs, with_rejected=preference)
    plan = _plan(assembly, pairs, sizes, eval_pairs)
    score_step = make_score_step(assembly.graph, pairs=plan.shape.pairs, mesh=assembly.mesh)
    checkpoints = Checkpoints(config.output_dir, keep=config.checkpoint.keep)

    reference: dict[str, ReferenceScores] = {}
    if preference and not online:
        covering = covering_plan(plan, *sizes)
        reference["training"] = assembly.reference_scores(pairs, covering, augmented=objective.refined)
    eval_feed = None
    if eval_pairs is not None:
        eval_plan = scoring_plan(*pair_sizes(eval_pairs, with_rejected=preference), plan.shape)
        augmented = len(eval_pairs.augmentation) > 0
        eval_feed = assembly.feed(eval_pairs, eval_plan, augmented=augmented, with_rejected=preference)
        if preference:
            reference["held-out"] = assembly.reference_scores(eval_pairs, eval_plan, augmented=augmented)

    resume = checkpoints.latest is not None
    base = None
    if not resume or (online and preference) or not all(scores.complete for scores in reference.values()):
        base = assembly.base_params()
    _score_reference(reference, score_step, base)
    reference_params = assembly.frozen(base) if online and preference else None
    total_steps = min(len(plan), config.train.max_steps or len(plan))
    identity = _identity(assembly, pairs, plan)
    if resume:
        base = None  # its memory is needed for what the checkpoint holds
    train_step, state = _state_and_step(assembly, plan, total_steps, checkpoints, base, identity)
    del base  # the first step consumes it

    train_scores = reference["training"].scores if "training" in reference else None
    feed = assembly.feed(pairs, plan, augmented=objective.refined, with_rejected=preference, reference=train_scores)
    started = time.monotonic()
    train_step = train_step.lower(state, reference_params, next(feed.batches(0))[1]).compile()
    held_out = None
    if eval_feed is not None:
        compiled = score_step.lower(state.params, next(eval_feed.batches(0))[1]).compile()
        eval_scores = reference["held-out"].scores if preference else None
        held_out = HeldOut(objective, compiled, eval_feed, len(eval_pairs.ids), eval_scores)
    log.info("compiled in %.1f s", time.monotonic() - started)
    job = Job(config, plan, total_steps, sizes[0], identity, feed, train_step, reference_params, held_out, checkpoints)
    return job, state


def _identity(assembly: Assembly, pairs: TokenizedPairs, plan: Plan) -> dict[str, Any]:
    """What must be the same for a checkpoint to go on as the run that it was, by the key that decides it."""
    config = assembly.config
    return {
        "data.path": pairs.digest,
        "model.path": assembly.base_digest,
        "steps (seed, data.path weights, train.epochs, batch.pairs_per_step)": plan.digest,
        "objective": config.objective.model_dump(),
        "optimizer": config.optimizer.model_dump(),
        "model.param_dtype": config.model.param_dtype,
    }


def _score_reference(
    reference: dict[str, ReferenceScores], score_step: Callable[..., Scores], base: Params | None
) -> None:
    for name, scores in reference.items():
        if not scores.complete:
            title, leader = f"reference on {name} pairs", jax.process_index() == 0
            with Progress(title, total=scores.steps, active=leader) as progress:
                scores.fill(score_step, base, progress.update)


def _plan(
    assembly: Assembly,
    pairs: TokenizedPairs,
    sizes: tuple[np.ndarray, np.ndarray],
    eval_pairs: TokenizedPairs | None,
) -> Plan:
    config = assembly.config
    room_for = (0, 0)
    if eval_pairs is not None:
        tokens, scored = pair_sizes(eval_pairs, with_rejected=config.objective.name != "sft")
        room_for = (int(tokens.max()), int(scored.max()))
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


def _state_and_step(
    assembly: Assembly,
    plan: Plan,
    total_steps: int,
    checkpoints: Checkpoints,
    base: Params | None,
    identity: dict[str, Any],
) -> tuple[Callable[..., Any], TrainState]:
    """The jitted train step, and the state: fresh around `base`, or of the latest checkpoint where `base` is None."""
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
    )
    shapes = state_shapes(assembly.param_shapes, optimizer)
    shardings = state_shardings(shapes, assembly.param_shardings, optimizer, assembly.mesh)
    if base is None:
        state, position = checkpoints.restore(abstract_state(shapes, shardings))
        changed = [key for key, value in identity.items() if position["identity"].get(key) != value]
        if changed:
            raise UsageError(
                f"{assembly.config.output_dir}: step {position['next_step']} was reached with another value of "
                f"{', '.join(changed)}; restore it, or choose another output_dir"
            )
        log.info("resuming at step %d", position["next_step"])
    else:
        moments = initialise(partial(optimizer.init, base), shardings.optimizer_state)
        state = TrainState(jax.device_put(jnp.int32(0), shardings.step), base, moments)
    step = make_train_step(
        assembly.graph,
        optimizer,
        schedule,
        objective_of(assembly.config),
        pairs=plan.shape.pairs,
        mesh=assembly.mesh,
        state_shardings=shardings,
    )
    return step, state
