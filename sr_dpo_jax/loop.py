"""The training loop, the only stateful file: step, log, evaluate, save, stop."""

import json
import logging
import platform
import time
from importlib.metadata import version
from pathlib import Path

import jax

from sr_dpo_jax import __version__
from sr_dpo_jax.assembly import Assembly, assemble, read_data, read_model
from sr_dpo_jax.config import Config
from sr_dpo_jax.data.dataset import TokenizedPairs
from sr_dpo_jax.data.pipeline import HostStep
from sr_dpo_jax.data.tokens import tokenizer_digest
from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.metrics import MetricsWriter, Progress, Trace
from sr_dpo_jax.preemption import Preempted, StopSignal
from sr_dpo_jax.prepare import Job, prepare
from sr_dpo_jax.train_step import TrainState

log = logging.getLogger(__name__)

EXIT_DONE, EXIT_PREEMPTED = 0, 75


def train(config: Config) -> int:
    """Runs or resumes training; returns the exit code: 0 done, 75 preempted (the same command goes on)."""
    root = Path(config.output_dir)
    if root.exists() and not root.is_dir():
        raise UsageError(f"output_dir={root}: is a file; name a directory")
    with StopSignal() as stop:  # before jax.distributed starts, whose own handler must come last
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
                    config, config.data.eval_path, split, tokenizer, directory.architecture, augmentation_prompt=p
                )
            assembly = assemble(config, directory)
            job, state = prepare(assembly, pairs, eval_pairs)
        except Preempted:
            log.warning("stopped by a signal before the first step; run the same command to go on")
            return EXIT_PREEMPTED
        if jax.process_index() == 0:
            _write_run_files(assembly, pairs, tokenizer_digest(tokenizer))
        return run(job, state, stop)


def run(job: Job, state: TrainState, stop: StopSignal) -> int:
    """The loop. Step n is on its way to the device before the metrics of step n − 1 are fetched."""
    stop.stepping()
    config, leader = job.config, jax.process_index() == 0
    first, root = int(state.step), Path(config.output_dir)
    writer = MetricsWriter(root / "metrics.jsonl", root / "tensorboard", first_step=first, active=leader)
    steps = job.feed.batches(first)
    pending: tuple[int, HostStep, dict[str, jax.Array]] | None = None
    clock = time.monotonic()
    step, saved, preempted = first, first if first else None, False
    trace = Trace(root / "profile", steps=config.train.profile_steps)
    with trace, Progress(config.objective.name, total=job.total_steps, active=leader) as progress:
        progress.update(first)
        while step < job.total_steps and not preempted:
            trace.before_step(step - first)
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
    shape, real_tokens = job.plan.shape, int(job.work.tokens[host_step.pair].sum())
    numbers |= {
        "epoch": step / job.plan.steps_per_epoch,
        "pairs_per_second": shape.pairs / (now - since),
        "tokens_per_second": real_tokens / (now - since),
        "tokens_per_second_per_chip": real_tokens / (now - since) / job.work.devices,
        "padding_fraction": 1 - real_tokens / (shape.rows * shape.row_length),
        "step_time_s": now - since,
    }
    if job.work.peak_flops is not None:
        numbers["mfu"] = float(job.work.flops[host_step.pair].sum()) / (now - since) / job.work.peak_flops
    if step % job.config.train.log_every_steps == 0 or step == job.total_steps:
        writer.write({"step": step, **numbers})
    accuracy = f"accuracy {numbers['rewards/accuracies']:.2f}  " if "rewards/accuracies" in numbers else ""
    progress.update(step, f"loss {numbers['loss']:.4f}  {accuracy}{numbers['pairs_per_second']:.1f} pairs/s")
    return now


def _write_run_files(assembly: Assembly, pairs: TokenizedPairs, tokenizer: str) -> None:
    """config.yaml as resolved, and manifest.json: what the run was made from."""
    root = Path(assembly.config.output_dir)
    root.mkdir(parents=True, exist_ok=True)
    (root / "config.yaml").write_text(assembly.config.to_yaml(), encoding="utf-8")
    manifest = {
        "versions": {
            "sr_dpo_jax": __version__,
            "python": platform.python_version(),
            **{module: version(module) for module in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")},
        },
        "digests": {
            "data": pairs.content_digest,
            "tokens": pairs.digest,
            "tokenizer": tokenizer,
            "weights": assembly.base_digest,
        },
        "model": {"path": assembly.config.model.path, "revision": assembly.directory.revision},
        "pairs": len(pairs.ids),
        "bad_rows": len(pairs.report.bad_rows),
        "mesh": dict(assembly.mesh.shape),
        "processes": jax.process_count(),
    }
    (root / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
