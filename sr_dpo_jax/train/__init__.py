"""Training: objective, state, train_step, optim, reference, program, setup, loop, and what a run writes down.

The package can be called: `sr_dpo_jax.train(config)` is `train.loop.train`. A trap: Python puts a subpackage under its
name into its parent once it is imported, over any function of that name there; so the subpackage is the function too.
"""

import importlib
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sr_dpo_jax.config.schema import Config


class _Train(ModuleType):
    def __call__(self, config: "Config", *, allowed_changes: Sequence[str] = ()) -> int:
        """Runs or resumes training; see `sr_dpo_jax.train.loop.train`."""
        return importlib.import_module(f"{__name__}.loop").train(config, allowed_changes=allowed_changes)


sys.modules[__name__].__class__ = _Train
