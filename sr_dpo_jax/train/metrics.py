"""The numbers of a run on their way to metrics.jsonl, TensorBoard, W&B and a progress bar. Process 0 alone writes.

Sample responses hold texts of the data: they go to samples.jsonl and TensorBoard, which stay in the run directory.
"""

import contextlib
import dataclasses
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import rich.progress
from tensorboardX import SummaryWriter

from sr_dpo_jax.data.pipeline import HostStep
from sr_dpo_jax.data.plan import Plan
from sr_dpo_jax.durable.files import kept_lines
from sr_dpo_jax.errors import RunError
from sr_dpo_jax.train.clock import Clock, goodput
from sr_dpo_jax.train.program import Work
from sr_dpo_jax.train.wandb_run import WandbRun

log = logging.getLogger(__name__)

DIVERGED = 1000
"""A loss this many times the usual one, or 1 where that is less, is warned of."""


class MetricsWriter:
    """Appends lines to metrics.jsonl and scalars to TensorBoard, skipped steps to skipped.jsonl beside it, and sample
    responses to samples.jsonl.

    Args:
      root: the run directory.
      first_step: steps done before this run starts. Later lines, from steps after the checkpoint that the run
        resumes from, are dropped: these steps are done again.
      evaluation_due: the evaluation of `first_step` is done again too.
      active: False on all processes but one.
      wandb: gets the lines too; None for none.
    """

    def __init__(
        self,
        root: Path,
        *,
        first_step: int,
        active: bool,
        evaluation_due: bool = False,
        wandb: WandbRun | None = None,
    ):
        self._active, self._wandb = active, wandb
        self._metrics_file = root / "metrics.jsonl"
        self.skipped_file, self._samples_file = root / "skipped.jsonl", root / "samples.jsonl"
        if not active:
            return
        evaluated = first_step - 1 if evaluation_due else first_step
        recorded = kept_lines(
            self._metrics_file, lambda line: line["step"] <= (first_step if "loss" in line else evaluated)
        )
        kept_lines(self.skipped_file, lambda line: line["step"] <= first_step)
        kept_lines(self._samples_file, lambda line: line["step"] <= evaluated)
        if wandb is not None:
            wandb.catch_up(recorded)
        self._file = self._metrics_file.open("a", encoding="utf-8")
        self._tensorboard = SummaryWriter(str(root / "tensorboard"), purge_step=first_step + 1)

    def write(self, line: dict[str, Any]) -> None:
        """Writes one line; numbers that are not finite become strings, as JSON has no number for them."""
        if not self._active:
            return
        exact = {key: value if math.isfinite(value) else str(value) for key, value in line.items()}
        if self._file.closed:
            self._file = self._metrics_file.open("a", encoding="utf-8")
        self._file.write(json.dumps(exact) + "\n")
        self._file.flush()
        for name, value in line.items():
            if name != "step":
                self._tensorboard.add_scalar(name, value, line["step"])
        if self._wandb is not None:
            self._wandb.log(line)

    def write_samples(self, step: int, samples: Sequence[dict[str, str]]) -> None:
        """Writes responses from `samples.Samples`, one JSON line each, with the step in front."""
        if not self._active or not samples:
            return
        with self._samples_file.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({"step": step, **sample}, ensure_ascii=False) + "\n" for sample in samples)
        for number, sample in enumerate(samples):
            text = f"{sample['prompt']}\n\n→ {sample['response']}"
            indented = text.replace("\n", "\n    ")  # code, to Markdown: shown as it is
            self._tensorboard.add_text(f"samples/{number}, {sample['set']} {sample['id']}", f"    {indented}", step)

    def write_skipped(self, step: int, pair_ids: list[str], numbers: dict[str, float]) -> None:
        """Names the pairs of a step that changed nothing, and the numbers that were not finite."""
        if not self._active:
            return
        bad = {name: str(value) for name, value in numbers.items() if not math.isfinite(value)}
        with self.skipped_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "pair_ids": pair_ids, "not_finite": bad}) + "\n")

    def commit(self) -> None:
        """Closes the file of lines until the next one: a mounted bucket shows a file only once it is closed."""
        if self._active:
            self._file.close()
            self._tensorboard.flush()

    def close(self) -> None:
        if self._active:
            self._file.close()
            self._tensorboard.close()
            if self._wandb is not None:
                self._wandb.finish()


def is_due(step: int, every_steps: int | None, *, last: int) -> bool:
    """Tells whether something is to be done after this step: after every so many, and after the last in any case."""
    return step == last or (every_steps is not None and step % every_steps == 0)


class Trace(contextlib.AbstractContextManager):
    """A profile of some steps for XProf: `tensorboard --logdir OUTPUT_DIR/profile`, with the xprof plugin.

    Args:
      directory: where to; each process writes its own part.
      steps: how many to trace, from the third that this process takes, so that caches are warm; 0 traces none.
    """

    FIRST = 2

    def __init__(self, directory: Path, *, steps: int):
        self._directory, self._steps, self._running, self._written = directory, steps, False, False

    def __exit__(self, *_: object) -> None:
        self._stop()
        if self._steps and not self._written:
            log.warning(
                "train.profile_steps=%d: nothing was traced, as that starts with the third step of a process",
                self._steps,
            )

    def before_step(self, steps_taken: int) -> None:
        """Called before each step with the number of steps that this process has taken."""
        if self._steps and steps_taken == self.FIRST:
            jax.profiler.start_trace(str(self._directory))
            self._running = True

    def after_step(self, steps_taken: int, metrics: dict[str, jax.Array]) -> None:
        """Called when a step is on its way, with what it will give: the last traced one is waited for."""
        if self._running and steps_taken == self.FIRST + self._steps:
            jax.block_until_ready(metrics)
            self._stop()

    def _stop(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running, self._written = False, True


class Progress:
    """A bar with step, loss, accuracy, pairs/s and time left; plain lines now and then where there is no terminal."""

    LINES = 20

    def __init__(self, title: str, *, total: int, active: bool):
        self._console = rich.console.Console(quiet=not active, highlight=False, soft_wrap=True)
        self._title, self._total, self._last_line = title, total, -1
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn("{task.fields[numbers]}"),
            rich.progress.TimeRemainingColumn(),
            console=self._console,
            disable=not (active and self._console.is_terminal),
        )
        self._task = self._bar.add_task(title, total=total, numbers="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, done: int, numbers: str = "") -> None:
        self._bar.update(self._task, completed=done, numbers=numbers)
        mark = done * self.LINES // max(self._total, 1)
        if not self._console.is_terminal and (mark > self._last_line or done == self._total):
            self._console.print(f"{self._title} {done}/{self._total}  {numbers}".rstrip())
            self._last_line = mark


@dataclasses.dataclass
class StepLog:
    """The lines of metrics.jsonl: each step's is written when the next step is on its way, or at `flush`.

    Raises:
      RunError: from `add` or `flush`, where more steps in a row than `max_skipped_steps` were skipped.
    """

    plan: Plan
    work: Work
    pair_ids: Sequence[str]
    """The names of the pairs, for steps that are skipped."""
    writer: MetricsWriter
    progress: Progress
    """Shows the numbers of every step."""
    clock: Clock
    """Gives the goodput of each line, and is marked after it."""
    _: dataclasses.KW_ONLY
    every_steps: int
    """Steps between two lines; the last step has one in any case."""
    total_steps: int
    max_skipped_steps: int
    """More steps in a row that change nothing end the run."""
    usual_loss: float | None = None
    """The loss of a policy that is still the reference; None takes the first one of this start."""

    def __post_init__(self) -> None:
        self._pending: tuple[int, HostStep, dict[str, jax.Array]] | None = None
        self._skipped_in_a_row = 0
        self._warned = False
        self._line_at = time.monotonic()

    def resume(self, step: int) -> None:
        """Goes on after a pause that followed `step`, which counts in the run's clock and in no step's time."""
        self.clock.mark(step, now=True)
        self._line_at = time.monotonic()

    def add(self, step: int, host_step: HostStep, metrics: dict[str, jax.Array]) -> None:
        self.flush()
        self._pending = step, host_step, metrics

    def flush(self) -> None:
        """Waits for the metrics of the last step, and writes them."""
        if self._pending is None:
            return
        (step, host_step, metrics), self._pending = self._pending, None
        plan, work = self.plan, self.work
        numbers = {name: float(value) for name, value in jax.device_get(metrics).items()}
        elapsed = time.monotonic() - self._line_at
        self._line_at = time.monotonic()
        shape, real_tokens = plan.shape, int(work.tokens[host_step.pair].sum())
        numbers |= {
            "epoch": step / plan.steps_per_epoch,
            "pairs_per_second": shape.pairs / elapsed,
            "tokens_per_second": real_tokens / elapsed,
            "tokens_per_second_per_chip": real_tokens / elapsed / work.devices,
            "padding_fraction": 1 - real_tokens / (shape.rows * shape.row_length),
            "step_time_s": elapsed,
            "goodput": goodput(self.clock.life),
        }
        if work.peak_flops is not None:
            numbers["mfu"] = float(work.flops[host_step.pair].sum()) / elapsed / work.peak_flops
        if is_due(step, self.every_steps, last=self.total_steps):
            self.writer.write({"step": step, **numbers})
        speed = f"{numbers['pairs_per_second']:.3g} pairs/s"
        self.progress.update(step, f"loss {numbers['loss']:.4f}  {_accuracy(numbers)}{speed}")
        self.clock.mark(step)
        self._count_skipped(step, host_step, numbers)
        self._warn_of_divergence(step, numbers["loss"])

    def _warn_of_divergence(self, step: int, loss: float) -> None:
        """Warns once of a loss far above the usual one, which a run would otherwise carry to its end without a word."""
        if self.usual_loss is None:
            self.usual_loss = abs(loss)
        if not self._warned and loss > DIVERGED * max(self.usual_loss, 1.0):
            self._warned = True
            log.warning(
                "step %d: the loss is %.3g, more than %d times what it is at the start: the run diverges; lower "
                "optimizer.learning_rate, or start again from an earlier checkpoint",
                step,
                loss,
                DIVERGED,
            )

    def _count_skipped(self, step: int, host_step: HostStep, numbers: dict[str, float]) -> None:
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if numbers["skipped"] else 0
        if not numbers["skipped"]:
            return
        ids = [self.pair_ids[pair] for pair in host_step.pair if pair >= 0]
        self.writer.write_skipped(step, ids, numbers)
        log.warning("step %d: loss or gradient is not finite, nothing was updated; pairs: skipped.jsonl", step)
        if self._skipped_in_a_row > self.max_skipped_steps:
            raise RunError(
                f"{self._skipped_in_a_row} steps in a row, the last of them {step}, had a loss or gradient that is not "
                f"finite, and train.max_skipped_steps={self.max_skipped_steps} allows fewer; "
                f"{self.writer.skipped_file} names their pairs. Nothing was saved since. Look at these pairs, lower "
                "optimizer.learning_rate, or set model.dtype=float32"
            )


def _accuracy(numbers: Mapping[str, float]) -> str:
    """Shows the share of pairs with a margin above 0, which says nothing at the start: all margins are 0 there."""
    if "rewards/accuracies" not in numbers:
        return ""
    untrained = numbers["rewards/accuracies"] == 0 and numbers["margin"] == 0
    return "all margins 0  " if untrained else f"accuracy {numbers['rewards/accuracies']:.2f}  "
