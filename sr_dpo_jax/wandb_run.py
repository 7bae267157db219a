"""A run in Weights & Biases, beside TensorBoard: the numbers of metrics.jsonl and the configuration, never a text.

The package is an extra and is imported on process 0 alone, when a run asks for it. The key comes from the environment.
"""

import json
import os
from pathlib import Path
from typing import Any

from sr_dpo_jax.config import Config
from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.redaction import redact

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
    """One W&B run, the same one again after every start of the same run.

    Args:
      config: shown with the run; it names the project.
      run_id: of the run, from its manifest: W&B knows the run by it.

    Raises:
      UsageError: the package is missing, or W&B refuses the run.
    """

    def __init__(self, config: Config, *, run_id: str):
        wandb, root = _module(), Path(config.output_dir)
        try:
            # Console, code, git state and command line stay here: they may hold texts and paths. W&B itself adds its
            # version, the host's name and load.
            settings = wandb.Settings(
                console="off",
                save_code=False,
                disable_code=True,
                disable_git=True,
                x_disable_meta=True,
                x_save_requirements=False,
            )
            self._run = wandb.init(
                project=config.train.wandb_project,
                id=run_id,
                name=root.name,
                resume="allow",
                dir=str(root),
                config=json.loads(redact(json.dumps(config.model_dump(mode="json")))),
                settings=settings,
            )
        except wandb.Error as error:
            raise UsageError(
                f"train.wandb_project={config.train.wandb_project}: W&B refuses the run ({redact(str(error))}); check "
                "WANDB_API_KEY and the project, or set WANDB_MODE=offline"
            ) from error

    def log(self, line: dict[str, Any]) -> None:
        """One line of metrics.jsonl. Steps that W&B has from before the run was resumed are left as they are there."""
        if line["step"] >= self._run.starting_step:
            self._run.log({name: value for name, value in line.items() if name != "step"}, step=line["step"])

    def finish(self) -> None:
        """Waits until all is sent."""
        self._run.finish()


def _module() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UsageError(
            "train.wandb_project needs the package wandb: pip install 'sr_dpo_jax[wandb]', or set it to null"
        ) from error
    return wandb
