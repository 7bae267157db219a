"""The training loop, the only stateful file: step, log, evaluate, save, stop."""

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from sr_dpo_jax.config.schema import Config
from sr_dpo_jax.data.pipeline import HostStep
from sr_dpo_jax.data.tokens import tokenizer_digest
from sr_dpo_jax.durable.files import require_writable
from sr_dpo_jax.durable.lease import Lease
from sr_dpo_jax.durable.preemption import Preempted, StopSignal
from sr_dpo_jax.durable.selection import Selection
from sr_dpo_jax.durable.watchdog import Watchdog
from sr_dpo_jax.errors import RunError, UsageError
from sr_dpo_jax.parallel.processes import from_leader, on_leader
from sr_dpo_jax.train.identity import run_id_of, write_run_files
from sr_dpo_jax.train.metrics import MetricsWriter, Progress, Trace
from sr_dpo_jax.train.setup import Job, prepare
from sr_dpo_jax.train.train_step import Params, TrainState
from sr_dpo_jax.train.wandb_run import WandbRun, require_wandb
from sr_dpo_jax.weights.placement import assemble, read_data, read_held_out, read_model

log = logging.getLogger(__name__)

EXIT_DONE, EXIT_PREEMPTED = 0, 75


def train(config: Config, *, allowed_changes: Sequence[str] = ()) -> int:
    """Runs or resumes training; returns the exit code: 0 done, 75 preempted (the same command goes on)."""
    root = Path(config.output_dir)
    if root.exists() and not root.is_dir():
        raise UsageError(f"output_dir={root}: is a file; name a directory")
    with StopSignal() as stop, Lease(root) as lease:
        try:
            directory, tokenizer = read_model(config)
            p = config.refinement.prompt if config.objective.name != "sft" else None
            pairs = read_data(
                config, config.data.path, config.data.split, tokenizer, directory.architecture, augmentation_prompt=p
            )
            eval_sets = read_held_out(config, tokenizer, directory.architecture)
            assembly = assemble(config, directory)
            stop.joined()
            on_leader(lambda: require_writable(root))
            on_leader(lease.take)
            if config.train.wandb_project is not None:
                on_leader(require_wandb)
            job, state = prepare(
                assembly, pairs, eval_sets, tokenizer=tokenizer, stop=stop, allowed_changes=allowed_changes
            )
        except Preempted:
            log.warning("stopped by a signal before the first step; run the same command to go on")
            return EXIT_PREEMPTED
        if jax.process_index() == 0:
            write_run_files(assembly, pairs, job.record["identity"], tokenizer_digest(tokenizer))
        return run(job, state, stop, lease)


def run(job: Job, state: TrainState, stop: StopSignal, lease: Lease) -> int:
    """The loop. Step n is on its way to the device before the metrics of step n − 1 are fetched."""
    stop.stepping()
    config, leader, selection = job.config, jax.process_index() == 0, job.selection
    first, root = int(state.step), Path(config.output_dir)
    step, saved, preempted = first, first if first else None, False
    wandb = _wandb(job) if first < job.total_steps and not selection.over else None
    writer = MetricsWriter(root / "metrics.jsonl", root / "tensorboard", first_step=first, active=leader, wandb=wandb)
    steps = job.feed.batches(first)
    with (
        job.checkpoints,
        Progress(config.objective.name, total=job.total_steps, active=leader) as progress,
        Watchdog(config.train.hang_timeout_s) as watchdog,
        Trace(root / "profile", steps=config.train.profile_steps) as trace,
    ):
        progress.update(first)
        lines = _StepLines(job, writer, progress)
        while step < job.total_steps and not preempted and not selection.over:
            trace.before_step(step - first)
            host_step, batch = next(steps)
            state, metrics = job.train_step(state, job.reference_params, batch)
            step += 1
            trace.after_step(step - first, metrics)
            lines.add(step, host_step, metrics)
            lease.check()
            watchdog.beat()
            preempted = stop.requested()
            last = step == job.total_steps
            every = config.train.eval_every_steps
            evaluate_now = job.held_out and (last or (every and step % every == 0))
            save_now = job.checkpoints.save_failed() or last or preempted or step % config.checkpoint.every_steps == 0
            if evaluate_now or save_now:
                lines.flush()
            if evaluate_now:  # before saving: a committed step has all its lines, and a lost one is done again
                selection = _evaluate(job, step, state.params, selection, writer, watchdog.beat)
                save_now = save_now or selection.over or selection.step == step
            if save_now:
                job.checkpoints.save_failed(wait=True)  # where it has, this save is the other attempt
                _save(job, step, state, selection)
                saved = step
            if evaluate_now or save_now:
                lines.restart_clock()
                watchdog.beat()
        writer.close()
        if saved is not None:
            while job.checkpoints.save_failed(wait=True):
                _save(job, step, state, selection)
            job.checkpoints.finish(saved, best=selection.step)
    return _end(job, step, selection)


def _evaluate(
    job: Job, step: int, params: Params, selection: Selection, writer: MetricsWriter, beat: Callable[[], None]
) -> Selection:
    """Writes the metrics of every held-out set and the samples; returns the selection with what they say."""
    metrics = {name: value for one in job.held_out for name, value in one.metrics(params, lambda _: beat()).items()}
    writer.write({"step": step, **metrics})
    if job.samples is not None:
        writer.write_samples(step, job.samples.responses(params, beat))
    if selection.metric is None:
        return selection
    return selection.after(step, from_leader(metrics[selection.metric]))


def _save(job: Job, step: int, state: TrainState, selection: Selection) -> None:
    position = {"next_step": step, **job.record, "selection": selection.record()}
    config = job.config.model_dump(mode="json")
    job.checkpoints.save(step, state, position=position, config=config, best=selection.step)


def _wandb(job: Job) -> WandbRun | None:
    """The run in W&B, on process 0, where the configuration asks for one; what W&B refuses there, all refuse."""
    started: list[WandbRun] = []
    if job.config.train.wandb_project is not None:
        root = Path(job.config.output_dir)
        on_leader(lambda: started.append(WandbRun(job.config, run_id=run_id_of(root))))
    return started[0] if started else None


def _end(job: Job, step: int, selection: Selection) -> int:
    """Says how the run ended, and returns the exit code."""
    if selection.metric is not None:
        log.info("%s", selection.said)
    if step >= job.total_steps:  # a checkpoint may be from before train.max_steps was lowered
        return EXIT_DONE
    if selection.over:
        log.info(
            "done: stopped early at step %d of %d, after %d evaluations without a better one; there is nothing left to "
            "do unless train.early_stopping_patience is raised",
            *(step, job.total_steps, selection.waited),
        )
        return EXIT_DONE
    log.warning("stopped by a signal at step %d of %d; run the same command to go on", step, job.total_steps)
    return EXIT_PREEMPTED


class _StepLines:
    """The lines of metrics.jsonl: each step's is written when the next step is on its way, or at `flush`.

    Raises RunError from either where more steps in a row than train.max_skipped_steps were skipped.
    """

    def __init__(self, job: Job, writer: MetricsWriter, progress: Progress):
        self._job, self._writer, self._progress = job, writer, progress
        self._pending: tuple[int, HostStep, dict[str, jax.Array]] | None = None
        self._skipped_in_a_row = 0
        self.restart_clock()

    def restart_clock(self) -> None:
        """What came since the last line is no part of the next step's time."""
        self._clock = time.monotonic()

    def add(self, step: int, host_step: HostStep, metrics: dict[str, jax.Array]) -> None:
        self.flush()
        self._pending = step, host_step, metrics

    def flush(self) -> None:
        """Waits for the metrics of the last step, and writes them."""
        if self._pending is None:
            return
        (step, host_step, metrics), self._pending = self._pending, None
        job = self._job
        numbers = {name: float(value) for name, value in jax.device_get(metrics).items()}
        elapsed = time.monotonic() - self._clock
        self.restart_clock()
        shape, real_tokens = job.plan.shape, int(job.work.tokens[host_step.pair].sum())
        numbers |= {
            "epoch": step / job.plan.steps_per_epoch,
            "pairs_per_second": shape.pairs / elapsed,
            "tokens_per_second": real_tokens / elapsed,
            "tokens_per_second_per_chip": real_tokens / elapsed / job.work.devices,
            "padding_fraction": 1 - real_tokens / (shape.rows * shape.row_length),
            "step_time_s": elapsed,
        }
        if job.work.peak_flops is not None:
            numbers["mfu"] = float(job.work.flops[host_step.pair].sum()) / elapsed / job.work.peak_flops
        if step % job.config.train.log_every_steps == 0 or step == job.total_steps:
            self._writer.write({"step": step, **numbers})
        accuracy = f"accuracy {numbers['rewards/accuracies']:.2f}  " if "rewards/accuracies" in numbers else ""
        self._progress.update(step, f"loss {numbers['loss']:.4f}  {accuracy}{numbers['pairs_per_second']:.1f} pairs/s")
        self._count_skipped(step, host_step, numbers)

    def _count_skipped(self, step: int, host_step: HostStep, numbers: dict[str, float]) -> None:
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if numbers["skipped"] else 0
        if not numbers["skipped"]:
            return
        ids = [self._job.pair_ids[pair] for pair in host_step.pair if pair >= 0]
        self._writer.write_skipped(step, ids, numbers)
        log.warning("step %d: loss or gradient is not finite, nothing was updated; pairs: skipped.jsonl", step)
        most = self._job.config.train.max_skipped_steps
        if self._skipped_in_a_row > most:
            raise RunError(
                f"{self._skipped_in_a_row} steps in a row, the last of them {step}, had a loss or gradient that is not "
                f"finite, and train.max_skipped_steps={most} allows fewer; {self._job.config.output_dir}/skipped.jsonl "
                "names their pairs. Nothing was saved since. Look at these pairs, lower optimizer.learning_rate, or "
                "set model.dtype=float32"
            )
