"""LoRA: two thin matrices beside a frozen one, y = x·W + s·(x·A)·B, and the parameters that training changes.

A model with adapters has them in the tree of its parameters, under `adapters` beside the matrices of a layer. Where
there are any, training changes them alone and everything else is the base, which stays as it was read.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

Array = jax.Array
ADAPTERS = "adapters"
"""The name under which adapters stand in the tree of parameters."""
TARGETS = ("query", "key", "value", "output", "gate", "up", "down")
"""The matrices of a layer that can have an adapter, by the names that the decoder gives them."""


@dataclasses.dataclass(frozen=True)
class Lora:
    """The adapters of a model: their size, and where they stand."""

    rank: int
    alpha: float
    rslora: bool = False
    targets: tuple[str, ...] = TARGETS
    """Names from TARGETS; one that a family lacks, such as `gate`, is passed over."""
    base: str | None = None
    """How the matrices of the layers are held: in the type that the model computes in, or in `int8`."""
    init: str = "zero_a"
    """The factor that is 0 at the start, `zero_a` or `zero_b`; the other is drawn from U(−1/√n, 1/√n) with n its
    inputs, as PEFT draws A."""

    @property
    def scale(self) -> float:
        """s: alpha / rank, or alpha / √rank of rank-stabilised LoRA (arXiv:2312.03732)."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class Adapter(nnx.Module):
    """The product s·A·B beside one matrix W `[inputs, outputs]`, each of whose sides may be several axes.

    A is `[inputs, rank]` and B `[rank, outputs]`; both are sharded as the sides of W are, and whole along the rank.
    """

    def __init__(self, lora: Lora, weight: nnx.Param, *, inputs: int, dtype: jnp.dtype, rngs: nnx.Rngs):
        """Makes the adapter of a stacked matrix `[layers, inputs, outputs]`, whose inputs have this many axes."""
        self.scale = lora.scale
        axes = dict(zip(weight.get_metadata()["axes"], weight.shape, strict=True))
        names = list(axes)
        sides = {
            "a": [*names[: 1 + inputs], "rank"],
            "b": [names[0], "rank", *names[1 + inputs :]],
        }
        axes["rank"] = lora.rank
        for factor, side in sides.items():
            shape = tuple(axes[name] for name in side)
            if lora.init == f"zero_{factor}":
                values = jnp.zeros(shape, dtype)
            else:
                fan_in = math.prod(shape[1 : 1 + inputs]) if factor == "a" else lora.rank
                bound = 1 / math.sqrt(fan_in)
                values = jax.random.uniform(rngs.adapters(), shape, dtype, -bound, bound)
            setattr(self, factor, nnx.Param(values, axes=tuple(side)))

    def __call__(self, x: Array, *, axes: int = 1) -> Array:
        """Computes s·(x·A)·B in the type of `x`, whose last `axes` axes are the inputs."""
        thin = jnp.tensordot(x, self.a[...].astype(x.dtype), axes=axes)
        return jnp.tensordot(self.scale * thin, self.b[...].astype(x.dtype), axes=1)


def input_axes(name: str) -> int:
    """Counts the axes of a matrix's inputs: those of `output` are heads and their dimensions."""
    return 2 if name == "output" else 1


def adapters_of(lora: Lora | None, weights: Mapping[str, nnx.Param | None], *, dtype: jnp.dtype, rngs: nnx.Rngs) -> Any:
    """Makes an adapter for each matrix that `lora` names."""
    chosen = () if lora is None else lora.targets
    return nnx.Dict(
        {
            name: Adapter(lora, weight, inputs=input_axes(name), dtype=dtype, rngs=rngs)
            for name, weight in weights.items()
            if name in chosen and weight is not None
        }
    )


def split(params: Any) -> tuple[Any, Any]:
    """Parts a tree of parameters into what training changes and what it leaves.

    Returns:
      The adapters and all else; or, of a model without adapters, everything and None.
    """
    flat = flatten_dict(params)
    adapters = {path: leaf for path, leaf in flat.items() if ADAPTERS in path}
    if not adapters:
        return params, None
    return unflatten_dict(adapters), unflatten_dict({path: leaf for path, leaf in flat.items() if path not in adapters})


def join(trained: Any, frozen: Any) -> Any:
    """Puts together what `split` has parted; `frozen` is None where everything is trained."""
    if frozen is None:
        return trained
    return unflatten_dict({**flatten_dict(frozen), **flatten_dict(trained)})


def adapter_weights(params: Any) -> int:
    """Counts the weights of the adapters of a tree of parameters or shapes; 0 where there are none."""
    trained, frozen = split(params)
    return 0 if frozen is None else sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(trained))
