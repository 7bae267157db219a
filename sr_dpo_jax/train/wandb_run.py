"""A run in Weights & Biases, beside TensorBoard: the numbers of metrics.jsonl and the configuration, never a text.

The package is an extra and is imported on process 0 alone, when a run asks for it. The key comes from the environment.
"""

import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
    """A W&B run, named as the run directory `root`; every start with the same `run_id` continues the same one.

    Where W&B cannot be reached or ends on the way, the log says so once, and the run goes on without it: metrics.jsonl
    and TensorBoard hold all.

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

    def catch_up(self, recorded: Sequence[dict[str, Any]]) -> None:
        """Logs the lines of metrics.jsonl from before this start: W&B may lack some, as after a kill."""
        if os.environ.get("WANDB_MODE") not in WITHOUT_KEY:  # else nobody knows what W&B has
            for line in recorded:  # a number that is not finite is a text there
                self.log(line | {name: float(value) for name, value in line.items() if name != "step"})

    def log(self, line: dict[str, Any]) -> None:
        """Logs a line of metrics.jsonl. Steps that W&B has from before the run was resumed stay as they are there.

        The lines of one step are sent as one row, when a later step comes: a row that W&B has can get no more numbers.
        """
        step, numbers = line["step"], {name: value for name, value in line.items() if name != "step"}
        if self._run is None or step < self._next_step:
            return
        if self._row is not None and step > self._row[0]:
            self._send()
        if self._row is None:
            self._row = (step, {})
        self._row[1].update(numbers)

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
        self._next_step = step + 1
        try:
            self._run.log(numbers, step=step)
        except self._outages as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._run = self._row = None
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


def _module() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UsageError(
            "train.wandb_project needs the package wandb: pip install 'sr_dpo_jax[wandb]', or set it to null"
        ) from error
    return wandb
