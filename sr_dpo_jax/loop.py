"""The training loop, the only stateful file: start or resume, step, log, evaluate, save, stop.

How a run starts, the first that holds: a checkpoint in output_dir is resumed; model.init=random draws the weights from
the seed; else the weights of model.path are loaded. A reference that the cache does not hold is scored before step 0.
"""

import dataclasses
import json
import logging
import platform
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from sr_dpo_jax import __version__
from sr_dpo_jax.assembly import Assembly, assemble, objective_of, pair_sizes, read_data, read_model
from sr_dpo_jax.checkpoint import Checkpoints, abstract_state
from sr_dpo_jax.config import Config
from sr_dpo_jax.data.dataset import TokenizedPairs
from sr_dpo_jax.data.pipeline import Feed, HostStep
from sr_dpo_jax.data.plan import Plan, covering_plan, scoring_plan, training_plan
from sr_dpo_jax.data.tokens import tokenizer_digest
from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.evaluate import HeldOut
from sr_dpo_jax.metrics import MetricsWriter, Progress
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

EXIT_DONE, EXIT_PREEMPTED = 0, 75


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


def train(config: Config) -> int:
    """Runs or resumes training; returns the exit code: 0 done, 75 preempted (the same command goes on)."""
    root = Path(config.output_dir)
    if root.exists() and not root.is_dir():
        raise UsageError(f"output_dir={root}: is a file; name a directory")
    with StopSignal() as stop:  # before jax.distributed starts, whose own handler must come last
        try:
            directory, tokenizer = read_model(config)
            p = config.refinement.prompt if config.objective.name != "sft" else None
            pairs = read_data(config, config.data.path, config.data.split, tokenizer, augmentation_prompt=p)
            eval_pairs = None
            if config.data.eval_path is not None:
                split = config.data.eval_split
                eval_pairs = read_data(config, config.data.eval_path, split, tokenizer, augmentation_prompt=p)
            assembly = assemble(config, directory)
            job, state = prepare(assembly, pairs, eval_pairs)
        except Preempted:
            log.warning("stopped by a signal before the first step; run the same command to go on")
            return EXIT_PREEMPTED
        if jax.process_index() == 0:
            _write_run_files(assembly, pairs, tokenizer_digest(tokenizer))
        return run(job, state, stop)


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


def run(job: Job, state: TrainState, stop: "StopSignal") -> int:
    """The loop. Step n is on its way to the device before the metrics of step n − 1 are fetched."""
    stop.stepping()
    config, leader = job.config, jax.process_index() == 0
    first, root = int(state.step), Path(config.output_dir)
    writer = MetricsWriter(root / "metrics.jsonl", root / "tensorboard", first_step=first, active=leader)
    steps = job.feed.batches(first)
    pending: tuple[int, HostStep, dict[str, jax.Array]] | None = None
    clock = time.monotonic()
    step, saved, preempted = first, first if first else None, False
    with Progress(config.objective.name, total=job.total_steps, active=leader) as progress:
        progress.update(first)
        while step < job.total_steps and not preempted:
            host_step, batch = next(steps)
            state, metrics = job.train_step(state, job.reference_params, batch)
            step += 1
            if pending is not None:
                clock = _log(job, writer, progress, *pending, clock)
            pending = (step, host_step, metrics)
            evaluate_now = job.held_out is not None and (
                step == job.total_steps or (config.train.eval_every_steps and step % config.train.eval_every_steps == 0)
            )
            preempted = stop.requested(step)
            save_now = step == job.total_steps or preempted or step % config.checkpoint.every_steps == 0
            if evaluate_now or save_now:
                _log(job, writer, progress, *pending, clock)
                pending = None
            if evaluate_now:  # before saving: a committed step has all its lines, and a lost one is done again
                writer.write({"step": step, **job.held_out.metrics(state.params)})
            if save_now:
                position = {"next_step": step, "identity": job.identity}
                job.checkpoints.save(step, state, position=position, config=config.model_dump(mode="json"))
                saved = step
            if evaluate_now or save_now:
                clock = time.monotonic()
    writer.close()
    if saved is not None:
        job.checkpoints.finish(saved)
    if step < job.total_steps:
        log.warning("stopped by a signal at step %d of %d; run the same command to go on", step, job.total_steps)
        return EXIT_PREEMPTED
    return EXIT_DONE


def _log(
    job: Job,
    writer: MetricsWriter,
    progress: Progress,
    step: int,
    host_step: HostStep,
    metrics: dict[str, jax.Array],
    since: float,
) -> float:
    """Waits for one step's metrics and writes them; returns the time at which they were there."""
    numbers = {name: float(value) for name, value in jax.device_get(metrics).items()}
    now = time.monotonic()
    shape, real_tokens = job.plan.shape, int(job.tokens[host_step.pair].sum())
    numbers |= {
        "epoch": step / job.plan.steps_per_epoch,
        "pairs_per_second": shape.pairs / (now - since),
        "tokens_per_second": real_tokens / (now - since),
        "padding_fraction": 1 - real_tokens / (shape.rows * shape.row_length),
        "step_time_s": now - since,
    }
    if step % job.config.train.log_every_steps == 0 or step == job.total_steps:
        writer.write({"step": step, **numbers})
    accuracy = f"accuracy {numbers['rewards/accuracies']:.2f}  " if "rewards/accuracies" in numbers else ""
    progress.update(step, f"loss {numbers['loss']:.4f}  {accuracy}{numbers['pairs_per_second']:.1f} pairs/s")
    return now


class Preempted(BaseException):
    """SIGTERM came before the first step: there is nothing to save that is not saved."""


class StopSignal:
    """SIGTERM, as a preempted machine gets it: the step in flight is finished, saved, and the run ends with 75.

    Before the first step it raises Preempted where it meets the program. In a run of several processes, jax's own
    handler takes over when they join, and makes all of them stop after the same step. A context manager: afterwards
    SIGTERM does again what it did before.
    """

    def __init__(self) -> None:
        self._stepping, self._received = False, False

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def requested(self, step: int) -> bool:
        """Whether to stop after this step; every process must ask at every step."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._received

    def stepping(self) -> None:
        """From here on the signal waits for the end of a step."""
        self._stepping = True

    def _receive(self, _number: int, _frame: FrameType | None) -> None:
        self._received = True
        if not self._stepping:
            raise Preempted


def _write_run_files(assembly: Assembly, pairs: TokenizedPairs, tokenizer: str) -> None:
    """config.yaml as resolved, and manifest.json: what the run was made from."""
    root = Path(assembly.config.output_dir)
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.yaml").write_text(assembly.config.to_yaml(), encoding="utf-8")
    manifest = {
        "versions": {
            "sr_dpo_jax": __version__,
            "python": platform.python_version(),
            **{module: _version(module) for module in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")},
        },
        "digests": {
            "data": pairs.content_digest,
            "tokens": pairs.digest,
            "tokenizer": tokenizer,
            "weights": assembly.base_digest,
        },
        "pairs": len(pairs.ids),
        "bad_rows": len(pairs.report.bad_rows),
        "mesh": dict(assembly.mesh.shape),
        "processes": jax.process_count(),
    }
    (root / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)
