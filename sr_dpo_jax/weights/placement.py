"""A model laid out on a mesh: its decoder, where its parameters go, and the parameters, made when asked for."""

import dataclasses
import hashlib
import logging
from collections.abc import Callable
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from sr_dpo_jax.model.architecture import Architecture
from sr_dpo_jax.model.attention import DENSE
from sr_dpo_jax.model.decoder import Decoder, Params
from sr_dpo_jax.model.paths import attention_name, attention_path
from sr_dpo_jax.parallel.mesh import initialise, param_shardings
from sr_dpo_jax.weights.directory import ModelDirectory, weights_digest
from sr_dpo_jax.weights.layout import flatten
from sr_dpo_jax.weights.read import load_params

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PlacedModel:
    """A model on a mesh. Its parameters are not in it: each caller makes, restores or frees its own."""

    directory: ModelDirectory
    mesh: Mesh
    graph: nnx.GraphDef
    """The decoder without its parameters."""
    abstract: Any
    """The tree of abstract nnx parameters."""
    shardings: Params
    attention: str
    """The name of the attention path that `model.attention` resolves to, see `model/paths.py`."""
    dtype: jnp.dtype
    """The type of activations."""
    param_dtype: jnp.dtype
    seed: int | None
    """The seed of random weights; None where they are read from the directory."""

    @property
    def architecture(self) -> Architecture:
        return self.directory.architecture

    @cached_property
    def digest(self) -> str:
        """The digest of the weights that training starts from and that the reference keeps."""
        if self.seed is None:
            return weights_digest(self.directory)
        config_json = (self.directory.path / "config.json").read_bytes()
        return hashlib.sha256(config_json + f" random {self.seed}".encode()).hexdigest()

    @property
    def shapes(self) -> Params:
        """Shapes, types and shardings of the parameters."""
        return jax.tree.map(
            lambda shape, where: jax.ShapeDtypeStruct(shape.shape, self.param_dtype, sharding=where),
            nnx.to_pure_dict(self.abstract),
            self.shardings,
        )

    def base_params(self) -> Params:
        """Reads the weights of the directory, or draws them from the seed, onto the mesh in `param_dtype`."""
        if self.seed is None:
            return load_params(self.directory, self.abstract, self.shardings, dtype=self.param_dtype)
        make = _decoder_maker(self.architecture, self.dtype, self.param_dtype, seed=self.seed)
        return initialise(self.mesh, lambda: nnx.to_pure_dict(nnx.state(make())), self.shardings)

    def reference_copy(self, params: Params) -> Params:
        """Copies the parameters for an online reference, in the type that the model computes in."""
        return reference_copy(params, self.dtype)


def reference_copy(params: Params, dtype: jnp.dtype) -> Params:
    """Copies parameters into `dtype`, the type that the model computes in.

    Norms stay as they are: they are applied in float32, all else is cast to `dtype` where it is used, so the copy gives
    the same numbers as the original.
    """

    def narrow(path: Any, param: jax.Array) -> jax.Array:
        is_norm = any("norm" in key.key for key in path)
        return jnp.array(param, dtype=param.dtype if is_norm else dtype, copy=True)

    return jax.tree.map_with_path(narrow, params)


def abstract_params(architecture: Architecture) -> Any:
    """Gives the tree of abstract nnx parameters, float32, with their logical axes; touches no device."""
    float32 = jnp.dtype("float32")
    return nnx.state(nnx.eval_shape(_decoder_maker(architecture, float32, float32)))


def place_model(
    directory: ModelDirectory,
    mesh: Mesh,
    *,
    dtype: str,
    param_dtype: str,
    remat: str,
    attention: str,
    seed: int | None,
) -> PlacedModel:
    """Lays a model out on a mesh, whose devices may be described ones that are not attached; makes no parameters.

    Args:
      directory: from `weights.directory.open_directory`.
      mesh: the device mesh.
      dtype: type of activations and matmuls.
      param_dtype: type of the parameters.
      remat: what the backward pass recomputes, see `Decoder`.
      attention: the way to compute attention, or `auto`.
      seed: the seed of random weights; None: they are read from the directory.

    Raises:
      UsageError: parameters do not divide over the mesh, or the attention path does not run here.
    """
    architecture, types = directory.architecture, (jnp.dtype(dtype), jnp.dtype(param_dtype))
    name = attention_name(attention, mesh, architecture, types[0])
    path = attention_path(name, mesh, architecture, types[0])
    make = _decoder_maker(architecture, *types, remat=remat, attention=path)
    graph, abstract = nnx.split(nnx.eval_shape(make))
    shardings = nnx.to_pure_dict(param_shardings(mesh, abstract))
    axes = " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    count = sum(np.prod(param.shape) for param in flatten(abstract).values())
    log.info(f"{directory.model_type} on {axes}: {count:,} parameters, attention {name}, activations {dtype}")
    return PlacedModel(directory, mesh, graph, abstract, shardings, name, *types, seed)


def _decoder_maker(
    architecture: Architecture,
    dtype: jnp.dtype,
    param_dtype: jnp.dtype,
    *,
    remat: str = "none",
    attention: Any = DENSE,
    seed: int = 0,
) -> Callable[[], Decoder]:
    types = {"dtype": dtype, "param_dtype": param_dtype}
    return lambda: Decoder(architecture, **types, remat=remat, attention=attention, rngs=nnx.Rngs(seed))
