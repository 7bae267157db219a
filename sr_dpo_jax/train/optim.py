"""Learning-rate schedule and optimizer, as the paper's code base (PyTorch) defines them."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

Schedule = Callable[[jax.Array | int], jax.Array]


def make_schedule(*, name: str, learning_rate: float, warmup_steps: int, total_steps: int) -> Schedule:
    """Makes the function that gives the learning rate of update n, counted from 0.

    Warm-up: `peak · min(1, (n + 1) / (warmup_steps + 1))`, as in the code base of arXiv:2305.18290. After it, with
    f = (n − warmup_steps) / (total_steps − warmup_steps): constant 1, linear 1 − f, or cosine (1 + cos πf) / 2.
    """
    decay_steps = max(total_steps - warmup_steps, 1)

    def schedule(step: jax.Array | int) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        warm = jnp.minimum(1.0, (step + 1.0) / (warmup_steps + 1.0))
        fraction = jnp.clip((step - warmup_steps) / decay_steps, 0.0, 1.0)
        shape = {"constant": 1.0, "linear": 1.0 - fraction, "cosine": 0.5 + 0.5 * jnp.cos(jnp.pi * fraction)}
        return learning_rate * warm * shape[name]

    return schedule


def rmsprop(schedule: Schedule, *, max_grad_norm: float) -> optax.GradientTransformation:
    """Clips the global norm, then takes RMSprop's step: `v ← 0.99·v + 0.01·g²`, `p ← p − lr·g / (√v + 1e-8)`, v from 0.

    These are the defaults of torch.optim.RMSprop; optax's own differ in decay, and put epsilon inside the root.
    """
    scale = optax.scale_by_rms(decay=0.99, eps=1e-8, initial_scale=0.0, eps_in_sqrt=False)
    return optax.chain(optax.clip_by_global_norm(max_grad_norm), scale, optax.scale_by_learning_rate(schedule))


def adamw(
    schedule: Schedule,
    *,
    max_grad_norm: float,
    weight_decay: float,
    b1: float,
    b2: float,
    first_moment_dtype: str | None,
) -> optax.GradientTransformation:
    """Clips the global norm, then takes AdamW's step with epsilon 1e-8; matrices alone decay.

    The mean of gradients is kept in `first_moment_dtype`, or as the parameters where that is None; the mean of squares,
    whose root is divided by, always as the parameters.
    """
    return optax.chain(
        optax.clip_by_global_norm(max_grad_norm),
        optax.chain(
            optax.scale_by_adam(b1=b1, b2=b2, eps=1e-8, mu_dtype=first_moment_dtype),
            optax.add_decayed_weights(weight_decay, mask=_is_matrix),
        ),
        optax.scale_by_learning_rate(schedule),
    )


OPTIMIZERS = {"rmsprop": rmsprop, "adamw": adamw}
"""Every optimizer by its name in the configuration; its keyword numbers are the section's other keys."""


def updates_done(optimizer_state: optax.OptState) -> jax.Array:
    """Reads the schedule's own count of updates, int32; steps that were skipped are not in it."""
    (count,) = [
        node.count
        for node in jax.tree.leaves(optimizer_state, is_leaf=lambda node: isinstance(node, optax.ScaleByScheduleState))
        if isinstance(node, optax.ScaleByScheduleState)
    ]
    return count


def _is_matrix(params: Any) -> Any:
    """Marks the parameters that decay: not norms and biases, though stacked biases have up to three axes."""
    return jax.tree.map_with_path(lambda path, _: path[-1].key != "scale" and "bias" not in path[-1].key, params)
