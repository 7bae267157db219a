"""Multiplies by a weight matrix; every projection of a layer goes through here. Its name becomes a `jax.named_scope`,
which profiles show. A LoRA adapter attaches here, and a matrix may be held in int8.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from sr_dpo_jax.model.adapter import Adapter

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8:
    """A matrix W = values · scale that is not trained, with one scale for each of its outputs."""

    values: Array
    """int8, in the shape of W."""
    scale: Array
    """float32, in the shape of W without the axes of its inputs."""


def linear(
    name: str,
    x: Array,
    weight: nnx.Param,
    bias: nnx.Param | None = None,
    *,
    adapter: Adapter | None = None,
    axes: int = 1,
) -> Array:
    """Computes `x · W + b`, and with an adapter `x · W + s · (x · A) · B + b`, in the type of `x`.

    Args:
      name: the parameter's name, such as `query` or `down`; it is the `jax.named_scope` of the operations.
      x: `[..., inputs]`, whose last `axes` axes are contracted with the first ones of the matrix.
      weight: W, `[inputs, outputs]`, of any type, or `Int8`; inputs and outputs may be several axes.
      bias: b, `[outputs]`, or None.
      adapter: stands beside the matrix, or None.
      axes: how many axes the inputs have.
    """
    with jax.named_scope(name):
        product = _product(x, weight.get_value(), axes)
        if adapter is not None:
            product = product + adapter(x, axes=axes)
        return product if bias is None else product + bias[...].astype(x.dtype)


def _product(x: Array, weight: Array | Int8, axes: int) -> Array:
    """Computes `x · W` in the type of `x`. bfloat16 holds int8 exactly, so an `Int8` is rounded by its scale alone."""
    if isinstance(weight, Int8):
        wide = jnp.promote_types(x.dtype, jnp.float32)
        return (_product(x, weight.values, axes).astype(wide) * weight.scale).astype(x.dtype)
    return jnp.tensordot(x, weight.astype(x.dtype), axes=axes)
