"""Multiplies by a weight matrix; every projection of a layer goes through here. Its name becomes a `jax.named_scope`,
which profiles show. A LoRA adapter attaches here, and a quantised matrix would.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from sr_dpo_jax.model.adapter import Adapter

Array = jax.Array


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
      weight: W, `[inputs, outputs]`, of any type; inputs and outputs may be several axes.
      bias: b, `[outputs]`, or None.
      adapter: stands beside the matrix, or None.
      axes: how many axes the inputs have.
    """
    with jax.named_scope(name):
        product = jnp.tensordot(x, weight[...].astype(x.dtype), axes=axes)
        if adapter is not None:
            product = product + adapter(x, axes=axes)
        return product if bias is None else product + bias[...].astype(x.dtype)
