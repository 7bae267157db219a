"""The training loop, the only stateful file: step, log, evaluate, save, stop."""

import logging
import time
from collections.abc import Sequence
from pathlib import Path

import jax

from sr_dpo_jax.assembly import assemble, read_data, read_model
from sr_dpo_jax.config import Config
from sr_dpo_jax.data.pipeline import HostStep
from sr_dpo_jax.data.tokens import tokenizer_digest
from sr_dpo_jax.errors import RunError, UsageError
from sr_dpo_jax.lease import Lease
from sr_dpo_jax.manifest import write_run_files
from sr_dpo_jax.mesh import on_leader
from sr_dpo_jax.metrics import MetricsWriter, Progress, Trace
from sr_dpo_jax.preemption import Preempted, StopSignal
from sr_dpo_jax.prepare import Job, prepare
from sr_dpo_jax.storage import require_writable
from sr_dpo_jax.train_step import TrainState
from sr_dpo_jax.watchdog import Watchdog

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
            eval_pairs = None
            if config.data.eval_path is not None:
                split = config.data.eval_split
                eval_pairs = read_data(
                    config,
                    config.data.eval_path,
                    split,
                    tokenizer,
                    directory.architecture,
                    augmentation_prompt=p,
                    first_pairs=config.data.eval_pairs,
                )
            assembly = assemble(config, directory)
            stop.joined()
            on_leader(lambda: require_writable(root))
            on_leader(lease.take)
            digest = tokenizer_digest(tokenizer)
            job, state = prepare(
                assembly, pairs, eval_pairs, tokenizer_digest=digest, stop=stop, allowed_changes=allowed_changes
            )
        except Preempted:
            log.warning("stopped by a signal before the first step; run the same command to go on")
            return EXIT_PREEMPTED
        if jax.process_index() == 0:
            write_run_files(assembly, pairs, job.record["identity"], digest)
        return run(job, state, stop, lease)


def run(job: Job, state: TrainState, stop: StopSignal, lease: Lease) -> int:
    """The loop. Step n is on its way to the device before the metrics of step n − 1 are fetched."""
    stop.stepping()
    config, leader = job.config, jax.process_index() == 0
    first, root = int(state.step), Path(config.output_dir)
    step, saved, preempted = first, first if first else None, False
    writer = MetricsWriter(root / "metrics.jsonl", root / "tensorboard", first_step=first, active=leader)
    steps = job.feed.batches(first)
    with (
        job.checkpoints,
        Progress(config.objective.name, total=job.total_steps, active=leader) as progress,
        Watchdog(config.train.hang_timeout_s) as watchdog,
        Trace(root / "profile", steps=config.train.profile_steps) as trace,
    ):
        progress.update(first)
        lines = _StepLines(job, writer, progress)
        while step < job.total_steps and not preempted:
            trace.before_step(step - first)
            host_step, batch = next(steps)
            state, metrics = job.train_step(state, job.reference_params, batch)
            step += 1
            lines.add(step, host_step, metrics)
            lease.check()
            watchdog.beat()
            preempted = stop.requested()
            last = step == job.total_steps
            every = config.train.eval_every_steps
            evaluate_now = job.held_out is not None and (last or (every and step % every == 0))
            save_now = job.checkpoints.save_failed() or last or preempted or step % config.checkpoint.every_steps == 0
            if evaluate_now or save_now:
                lines.flush()
            if evaluate_now:  # before saving: a committed step has all its lines, and a lost one is done again
                writer.write({"step": step, **job.held_out.metrics(state.params, watchdog.beat)})
            if save_now:
                job.checkpoints.save_failed(wait=True)  # where it has, this save is the other attempt
                _save(job, step, state)
                saved = step
            if evaluate_now or save_now:
                lines.restart_clock()
                watchdog.beat()
        writer.close()
        if saved is not None:
            while job.checkpoints.save_failed(wait=True):
                _save(job, step, state)
            job.checkpoints.finish(saved)
    if step < job.total_steps:
        log.warning("stopped by a signal at step %d of %d; run the same command to go on", step, job.total_steps)
        return EXIT_PREEMPTED
    return EXIT_DONE


def _save(job: Job, step: int, state: TrainState) -> None:
    position = {"next_step": step, **job.record}
    job.checkpoints.save(step, state, position=position, config=job.config.model_dump(mode="json"))


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
