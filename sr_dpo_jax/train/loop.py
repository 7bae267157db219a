"""Runs the training loop: step, write the metrics of the step before, evaluate, save, stop."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from sr_dpo_jax.config.schema import Config
from sr_dpo_jax.data.tokens import tokenizer_digest
from sr_dpo_jax.durable.files import clear_way, require_writable
from sr_dpo_jax.durable.lease import Lease
from sr_dpo_jax.durable.preemption import Preempted, StopSignal
from sr_dpo_jax.durable.selection import Selection
from sr_dpo_jax.durable.watchdog import Watchdog
from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.model.adapter import join
from sr_dpo_jax.model.decoder import Params
from sr_dpo_jax.parallel.processes import everywhere, from_leader, on_leader
from sr_dpo_jax.train.clock import NAME as CLOCK
from sr_dpo_jax.train.clock import Clock, sentence
from sr_dpo_jax.train.identity import digests_of, write_run_files
from sr_dpo_jax.train.metrics import MetricsWriter, Progress, StepLog, Trace, is_due
from sr_dpo_jax.train.prepare import Job, prepare
from sr_dpo_jax.train.setup import read_held_out, read_model, read_reference, read_training, set_up
from sr_dpo_jax.train.state import TrainState
from sr_dpo_jax.train.wandb_run import WandbRun, require_wandb

log = logging.getLogger(__name__)

EXIT_DONE, EXIT_PREEMPTED = 0, 75
LINES = ("metrics.jsonl", "samples.jsonl", "skipped.jsonl", CLOCK)
SIDE_FILES = ("lease.json", "config.yaml", "manifest.json", *LINES)


def train(config: Config, *, allowed_changes: Sequence[str] = ()) -> int:
    """Runs or resumes training.

    Args:
      config: the run.
      allowed_changes: keys that may have another value than in the checkpoint that is resumed.

    Returns:
      The exit code: 0 done, 75 preempted (the same call goes on).

    Raises:
      UsageError: configuration, data or weights are at fault.
      RunError: the run cannot go on.
    """
    root, clock = Path(config.output_dir), Clock()
    if root.exists() and not root.is_dir():
        raise UsageError(f"output_dir={root}: is a file; name a directory")
    try:
        with StopSignal() as stop, Lease(root) as lease:
            directory, tokenizer = read_model(config)
            pairs = read_training(config, tokenizer, directory.architecture)
            eval_sets = read_held_out(config, tokenizer, directory.architecture)
            reference = read_reference(config, tokenizer)
            setup = set_up(config, directory, digests_of(tokenizer, {"data.path": pairs, **eval_sets}, reference))
            stop.joined()
            everywhere(lambda: require_writable(root))  # each process writes its part of a checkpoint
            on_leader(lambda: _make_ready(root))
            on_leader(lease.take)
            if config.train.wandb_project is not None:
                on_leader(require_wandb)
            job, state = prepare(
                setup, pairs, eval_sets, tokenizer=tokenizer, stop=stop, clock=clock, allowed_changes=allowed_changes
            )
            on_leader(
                lambda: write_run_files(
                    root,
                    pairs,
                    config=config.to_yaml(),
                    model={"path": config.model.path, "revision": directory.revision},
                    digests={"tokenizer": tokenizer_digest(tokenizer), "weights": setup.model.base_digest},
                    record=job.record,
                    mesh=setup.model.mesh,
                    reference=setup.other_reference,
                )
            )
            stop.stepping()  # from here on a signal waits for the end of a step, which saves
            return run(job, state, stop, lease, clock)
    except Preempted:
        log.warning("stopped by a signal before the first step; run the same command to go on")
        return EXIT_PREEMPTED


def _make_ready(root: Path) -> None:
    """Moves out of the way whatever stands where the run will write beside its checkpoints."""
    for name in SIDE_FILES:
        clear_way(root / name)
    clear_way(root / "tensorboard", directory=True)


def run(job: Job, state: TrainState, stop: StopSignal, lease: Lease, clock: Clock) -> int:
    """Takes the steps. Step n is on its way to the device before the metrics of step n − 1 are fetched."""
    config, total, selection = job.setup.config, job.total_steps, job.selection
    first, root, leader = int(state.step), Path(config.output_dir), jax.process_index() == 0
    step, saved, preempted, due = first, first if first else None, False, job.evaluation_due
    wandb = _wandb(config, job.record["run_id"]) if first < total and not selection.over else None
    writer = MetricsWriter(root, first_step=first, evaluation_due=due, active=leader, wandb=wandb)
    next_batch, evaluate = clock.timed("data", job.feed.batches(first).__next__), clock.timed("evaluation", _evaluate)
    with (
        job.checkpoints as checkpoints,
        Progress(config.objective.name, total=total, active=leader) as progress,
        Watchdog(config.train.hang_timeout_s) as watchdog,
        Trace(root / "profile", steps=config.train.profile_steps) as trace,
    ):
        progress.update(first)
        lines = _step_log(job, writer, progress, clock, first)

        def beat(*_: object) -> None:
            watchdog.beat()
            stop.meet()

        while (due or (step < total and not selection.over)) and not preempted:
            save_now = False
            if not due:
                trace.before_step(step - first)
                host_step, batch = next_batch()
                state, metrics = job.train_step(state, job.base, job.reference_params, batch)
                step += 1
                trace.after_step(step - first, metrics)
                lines.add(step, host_step, metrics)  # writes the line of the step before
                lease.check()
                watchdog.beat()
                preempted = stop.requested()
                due = bool(job.held_out) and is_due(step, config.train.eval_every_steps, last=total)
                save_now = checkpoints.poll_save() or is_due(step, config.checkpoint.every_steps, last=total)
            if pause := due or save_now or preempted:
                lines.flush()
            if due and not preempted:  # before saving: a committed step has all its lines, and a lost one is done again
                try:
                    selection = evaluate(job, step, join(state.params, job.base), selection, writer, beat)
                    due, save_now = False, save_now or selection.over or step in (selection.step, first)
                except Preempted:
                    preempted = True
            if save_now or (preempted and step > first):
                writer.commit()
                with watchdog.limit(config.checkpoint.save_timeout_s), clock("save"):
                    checkpoints.await_save()  # where it has failed, this save is the other attempt
                    _save(job, step, state, selection, evaluation_due=due)
                saved = step
            if pause:
                lines.resume(step)
                watchdog.beat()
        writer.close()
        if saved is not None:
            with watchdog.limit(config.checkpoint.save_timeout_s), clock("save"):
                while checkpoints.await_save():
                    _save(job, step, state, selection, evaluation_due=due)
                checkpoints.finish(saved, best=selection.step)
    return _end(job, step, selection, clock, evaluation_due=due)


def _step_log(job: Job, writer: MetricsWriter, progress: Progress, clock: Clock, first: int) -> StepLog:
    """Begins the log of steps, and on process 0 with it the clock of a run that has something left to do."""
    source, section = job.feed.source, job.setup.config.train
    left = job.evaluation_due or (first < job.total_steps and not job.selection.over)
    if left and jax.process_index() == 0:
        clock.begin(Path(job.setup.config.output_dir), first_step=first)
    return StepLog(
        source.plan,
        job.setup.work(source.pairs),
        source.pairs.ids,
        writer,
        progress,
        clock,
        every_steps=section.log_every_steps,
        total_steps=job.total_steps,
        max_skipped_steps=section.max_skipped_steps,
        usual_loss=job.setup.objective.kind.loss_at_zero(job.setup.config.objective.model_dump()),
    )


def _evaluate(
    job: Job,
    step: int,
    params: Params,
    selection: Selection,
    writer: MetricsWriter,
    beat: Callable[..., None],
) -> Selection:
    """Writes the metrics of every held-out set and the samples; returns the selection updated with these metrics.

    `beat` is called after each scoring step and response, and raises Preempted at a signal: nothing is written then.
    """
    metrics: dict[str, float] = {}
    for held in job.held_out:
        metrics |= held.metrics(job.setup.objective, held.scores(params, beat))
    samples = [] if job.samples is None else job.samples.responses(params, beat)
    writer.write({"step": step, **metrics})
    writer.write_samples(step, samples)
    if selection.metric is None:
        return selection
    return selection.after(step, from_leader(metrics[selection.metric]))


def _save(job: Job, step: int, state: TrainState, selection: Selection, *, evaluation_due: bool) -> None:
    record = {"evaluation_due": evaluation_due, "selection": selection.record()}
    position = {"next_step": step, **job.record, **record}
    config = job.setup.config.model_dump(mode="json")
    job.checkpoints.save(step, state.tree(), position=position, config=config, best=selection.step)


def _wandb(config: Config, run_id: str) -> WandbRun | None:
    """Starts the run in W&B on process 0, where the configuration asks for it; all processes raise its errors."""
    root, project = Path(config.output_dir), config.train.wandb_project
    if project is None:
        return None
    values = config.model_dump(mode="json")
    return on_leader(lambda: WandbRun(root, project=project, config=values, run_id=run_id))


def _end(job: Job, step: int, selection: Selection, clock: Clock, *, evaluation_due: bool) -> int:
    """Says how the run ended, and returns the exit code; a run whose last evaluation is due has not ended."""
    if clock.begun:
        clock.mark(step, now=True)
        log.info("%s", sentence(clock.life))
    if selection.metric is not None:
        log.info("%s", selection.summary)
    if step >= job.total_steps and not evaluation_due:  # a checkpoint may be from before train.max_steps was lowered
        return EXIT_DONE
    if selection.over and not evaluation_due:
        log.info(
            "done: stopped early at step %d of %d, after %d evaluations without a better one; there is nothing left to "
            "do unless train.early_stopping_patience is raised",
            *(step, job.total_steps, selection.waited),
        )
        return EXIT_DONE
    log.warning("stopped by a signal at step %d of %d; run the same command to go on", step, job.total_steps)
    return EXIT_PREEMPTED
