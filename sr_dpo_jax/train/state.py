"""The state that a train step takes and gives: parameters, optimizer state and step; its shapes and shardings."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from sr_dpo_jax.model.decoder import Params
from sr_dpo_jax.parallel.mesh import initialise, replicated

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that training changes. The frozen reference is not in here: it is an argument of its own."""

    step: Array
    """int32, steps of the plan done so far, skipped ones too: where the data goes on. The optimizer counts updates."""
    params: Params
    optimizer_state: optax.OptState

    def tree(self) -> dict[str, Any]:
        """Gives the state as the mapping that a checkpoint holds; `TrainState(**tree)` is its inverse."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def abstract_state(params: Params, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Describes the state that goes with parameters by shapes, types and shardings, as `params` describes these.

    The optimizer's moments lie where their parameters lie, and counters on every device.
    """
    everywhere = replicated(mesh)
    optimizer_state = optax.tree_utils.tree_map_params(
        optimizer,
        lambda moment, param: moment.update(sharding=param.sharding),
        jax.eval_shape(optimizer.init, params),
        params,
        transform_non_params=lambda counter: counter.update(sharding=everywhere),
    )
    return TrainState(jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere), params, optimizer_state)


def first_state(abstract: TrainState, params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """Builds the state around `params` before any update, as `abstract` describes it."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    moments = initialise(shardings.step.mesh, lambda: optimizer.init(params), shardings.optimizer_state)
    return TrainState(jax.device_put(jnp.int32(0), shardings.step), params, moments)
