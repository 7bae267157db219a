"""A run in Weights & Biases, beside TensorBoard: the numbers of metrics.jsonl and the configuration, never a text.

The package is an extra and is imported on process 0 alone, when a run asks for it. The key comes from the environment.
"""

import json
import logging
import os
from pathlib import Path
from typing import Any

from sr_dpo_jax.durable.files import lines_of
from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.redaction import redact

log = logging.getLogger(__name__)

WITHOUT_KEY = ("offline", "disabled", "dryrun")
"""Values of WANDB_MODE."""


def require_wandb() -> None:
    """Raises UsageError where the package is missing, or there is no key and WANDB_MODE needs one."""
    _module()
    if not os.environ.get("WANDB_API_KEY") and os.environ.get("WANDB_MODE") not in WITHOUT_KEY:
        raise UsageError(
            "train.wandb_project: needs WANDB_API_KEY in the environment, or WANDB_MODE=offline; or set it to null"
        )


class WandbRun:
    """A W&B run; every start of the same run continues the same one.

    Steps that W&B lacks, as after a kill, are sent to it from metrics.jsonl. Where W&B cannot be reached or ends on the
    way, the log says so once, and the run goes on without it: metrics.jsonl and TensorBoard hold all.

    Args:
      root: the run directory; its name is the run's.
      project: the W&B project.
      config: the configuration's values, shown with the run.
      run_id: the id in the run's manifest, by which W&B knows the run.

    Raises:
      UsageError: the package is missing, or W&B takes neither the key nor the settings.
    """

    def __init__(self, root: Path, *, project: str, config: dict[str, Any], run_id: str):
        wandb = _module()
        from wandb.sdk import mailbox

        # Besides its own errors, its calls raise these where the service that sends everything has died.
        self._outages = (wandb.Error, OSError, mailbox.MailboxClosedError, mailbox.HandleAbandonedError)
        self._row: tuple[int, dict[str, float]] | None = None
        self._run: Any = None
        try:
            self._run = _init(wandb, root, project, config, run_id)
            self._next_step = self._run.starting_step
        except (wandb.errors.AuthenticationError, wandb.errors.UsageError) as error:
            raise UsageError(
                f"train.wandb_project={project}: W&B refuses the run ({redact(str(error))}); check WANDB_API_KEY "
                "and the project, or set WANDB_MODE=offline"
            ) from error
        except self._outages as error:
            self._give_up(error)
            return
        if os.environ.get("WANDB_MODE") not in WITHOUT_KEY:  # else nobody knows what W&B has
            for line in _recorded(root / "metrics.jsonl", first_step=self._next_step):
                self.log(line)

    def log(self, line: dict[str, Any]) -> None:
        """Logs a line of metrics.jsonl. Steps that W&B has from before the run was resumed stay as they are there.

        The lines of one step are sent as one row, when a later step comes: a row that W&B has can get no more numbers.
        """
        step, numbers = line["step"], {name: value for name, value in line.items() if name != "step"}
        if self._row is not None and step > self._row[0]:
            self._send()
        if self._row is not None and step == self._row[0]:
            self._row[1].update(numbers)
        else:  # a row of a later step was read from metrics.jsonl, and its step is done again
            self._row = (step, numbers) if step >= self._next_step else None

    def finish(self) -> None:
        """Waits until all is sent."""
        self._send()
        if self._run is not None:
            try:
                self._run.finish()
            except self._outages as error:
                self._give_up(error)

    def _send(self) -> None:
        if self._run is None or self._row is None:
            return
        (step, numbers), self._row = self._row, None
        try:
            self._run.log(numbers, step=step)
        except self._outages as error:
            self._give_up(error)
        self._next_step = step + 1

    def _give_up(self, error: Exception) -> None:
        self._run, self._next_step = None, 0
        log.warning(
            "train.wandb_project: W&B gets nothing more of this run (%s: %s); training goes on, and metrics.jsonl and "
            "TensorBoard hold all",
            type(error).__name__,
            redact(str(error)),
        )


def _init(wandb: Any, root: Path, project: str, config: dict[str, Any], run_id: str) -> Any:
    # Console, code, git state and command line stay here: they may hold texts and paths. W&B itself adds its version,
    # the host's name and load.
    settings = wandb.Settings(
        console="off",
        save_code=False,
        disable_code=True,
        disable_git=True,
        x_disable_meta=True,
        x_save_requirements=False,
    )
    return wandb.init(
        project=project,
        id=run_id,
        name=root.name,
        resume="allow",
        dir=str(root),
        config=json.loads(redact(json.dumps(config))),
        settings=settings,
    )


def _recorded(metrics_file: Path, *, first_step: int) -> list[dict[str, Any]]:
    """Reads the lines from that step on; a line that a kill cut short is left out, and `metrics.py` says so."""
    if not metrics_file.exists():
        return []
    found = []
    for text in lines_of(metrics_file.read_text(encoding="utf-8")):
        try:
            line = json.loads(text)
            if line["step"] >= first_step:
                found.append({name: value if name == "step" else float(value) for name, value in line.items()})
        except (json.JSONDecodeError, KeyError):
            continue
    return found


def _module() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UsageError(
            "train.wandb_project needs the package wandb: pip install 'sr_dpo_jax[wandb]', or set it to null"
        ) from error
    return wandb
