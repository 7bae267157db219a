"""Self-refined preference optimisation (arXiv:2405.21040) for JAX and TPU pods.

    config = sr_dpo_jax.load_config("run.yaml", ["seed=1"])
    sr_dpo_jax.train(config)                                    what `sr-dpo train` does; returns its exit code
    sr_dpo_jax.evaluate(config)                                 metrics on the held-out sets, by name
    sr_dpo_jax.score(config, Path("scores.jsonl"))              log-probs of every pair; returns the count
    sr_dpo_jax.export(Path("runs/x"), Path("model"))            a Hugging Face directory
    sr_dpo_jax.losses.sr_dpo(margin, augmented_margin, beta=0.1, lam=0.5)

Importing the package loads no jax: each name loads what it needs when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sr_dpo_jax import losses as losses
    from sr_dpo_jax.commands.evaluate import evaluate_command as evaluate
    from sr_dpo_jax.commands.evaluate import score_command as score
    from sr_dpo_jax.commands.export import export as export
    from sr_dpo_jax.config.load import load_config as load_config
    from sr_dpo_jax.train.loop import train as train

__version__ = "0.1.0"
__all__ = ["evaluate", "export", "load_config", "losses", "score", "train"]

_PLACES = {
    "evaluate": ("sr_dpo_jax.commands.evaluate", "evaluate_command"),
    "export": ("sr_dpo_jax.commands.export", "export"),
    "load_config": ("sr_dpo_jax.config.load", "load_config"),
    "score": ("sr_dpo_jax.commands.evaluate", "score_command"),
}


def __getattr__(name: str) -> Any:
    if name in ("losses", "train"):  # `train` is the package of that name, which can be called
        return importlib.import_module(f"sr_dpo_jax.{name}")
    if name in _PLACES:
        module, attribute = _PLACES[name]
        return getattr(importlib.import_module(module), attribute)
    raise AttributeError(f"module 'sr_dpo_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
