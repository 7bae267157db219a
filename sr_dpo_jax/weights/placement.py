"""A model laid out on a mesh: its decoder, where its parameters go, and the parameters, made when asked for."""

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.model.adapter import ADAPTERS, TARGETS, Lora, adapter_weights, input_axes, join, split
from sr_dpo_jax.model.architecture import Architecture
from sr_dpo_jax.model.attention import DENSE
from sr_dpo_jax.model.decoder import Decoder, Params
from sr_dpo_jax.model.linear import Int8
from sr_dpo_jax.model.paths import attention_name, attention_path
from sr_dpo_jax.parallel.mesh import initialise, jit_on, param_shardings
from sr_dpo_jax.weights.adapters import AdapterDirectory, load_adapters
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
    lora: Lora | None
    attention: str
    """The name of the attention path that `model.attention` resolves to, see `model/paths.py`."""
    dtype: jnp.dtype
    """The type of activations."""
    param_dtype: jnp.dtype
    """The type of what training changes, and of norms."""
    seed: int
    """Draws the weights, where they are not read, and the adapters."""
    drawn: bool = False
    """The weights are drawn from the seed, and not read from the directory."""
    adapter: AdapterDirectory | None = None
    """Holds the adapters that training starts from; None: they are drawn, or there are none."""
    frozen: bool = False
    """No part of the model is trained."""

    @property
    def architecture(self) -> Architecture:
        return self.directory.architecture

    @cached_property
    def base_digest(self) -> str:
        """The digest of the weights without adapters."""
        if not self.drawn:
            return weights_digest(self.directory)
        return _sha256((self.directory.path / "config.json").read_bytes() + f" random {self.seed}".encode())

    @property
    def digest(self) -> str:
        """The digest of what training starts from and the reference keeps; drawn adapters add nothing to the model."""
        parts = [self.base_digest, *([] if self.adapter is None else [self.adapter.digest])]
        parts += [] if self.lora is None or self.lora.base is None else [self.lora.base]
        return parts[0] if len(parts) == 1 else _sha256(" ".join(parts).encode())

    @property
    def shapes(self) -> Params:
        """Shapes, types and shardings of the parameters; `split` parts them into what is trained and the base.

        What is trained has `param_dtype`; a base beside adapters, or a frozen model, has the types of `frozen_type`,
        and with `lora.base` the matrices of its layers are `Int8`.
        """
        return unflatten_dict({path: self._described(path, shape) for path, shape in flatten_dict(self._read).items()})

    @property
    def _read(self) -> Params:
        """The parameters as they are read or drawn: `shapes`, but with arrays in place of each `Int8`."""
        shapes = nnx.to_pure_dict(self.abstract)
        only_adapters = self.frozen or split(shapes)[1] is not None

        def described(path: Any, shape: Any, where: Any) -> jax.ShapeDtypeStruct:
            frozen = only_adapters and not any(key.key == ADAPTERS for key in path)
            dtype = frozen_type(path, self.dtype, self.param_dtype) if frozen else self.param_dtype
            return jax.ShapeDtypeStruct(shape.shape, dtype, sharding=where)

        return jax.tree.map_with_path(described, shapes, self.shardings)

    def _in_int8(self, path: Sequence[str]) -> bool:
        """Tells whether the parameter at this path is held in int8."""
        return self.lora is not None and self.lora.base == "int8" and ADAPTERS not in path and path[-1] in TARGETS

    def _described(self, path: Sequence[str], shape: jax.ShapeDtypeStruct) -> Any:
        """Gives the shape, type and sharding in which a parameter is held that is read as `shape`."""
        if not self._in_int8(path):
            return shape
        where, outputs = shape.sharding, 1 + input_axes(path[-1])
        sides = [*where.spec, *[None] * (len(shape.shape) - len(where.spec))]
        of_scale = NamedSharding(where.mesh, PartitionSpec(sides[0], *sides[outputs:]))
        return Int8(
            jax.ShapeDtypeStruct(shape.shape, jnp.int8, sharding=where),
            jax.ShapeDtypeStruct((shape.shape[0], *shape.shape[outputs:]), jnp.float32, sharding=of_scale),
        )

    def _held(self, name: str, array: jax.Array) -> Any:
        """Gives a parameter, named by its path, as it is held; the array is given up where that is another."""
        path = name.split(".")
        described = self._described(path, array)
        if not isinstance(described, Int8):
            return array
        where = jax.tree.map(lambda part: part.sharding, described)
        return jit_on(self.mesh, partial(quantised, path[-1]), out_shardings=where)(array)

    def base_params(self) -> Params:
        """Makes the parameters that training starts from, on the mesh, as `shapes` describes them.

        The weights are read from the directory, or drawn from the seed; so are adapters, where there are any.
        """
        trained, base = split(self._read)
        if base is None:
            return self._weights(trained)
        if self.adapter is None:
            adapters = self._drawn(trained, lambda drawn: split(drawn)[0])
        else:
            adapters = load_adapters(self.adapter, self.directory, self.abstract, self.lora, trained)
        return join(adapters, self._weights(base))

    def _weights(self, shapes: Params) -> Params:
        """Makes all parameters but the adapters."""
        if self.drawn:
            drawn = flatten(self._drawn(shapes, lambda drawn: split(drawn)[1] or drawn))
            return unflatten_dict({name: self._held(name, array) for name, array in drawn.items()}, sep=".")
        return load_params(self.directory, self.abstract, shapes, held=self._held)

    def _drawn(self, shapes: Params, part: Callable[[Params], Params]) -> Params:
        """Draws parameters from the seed; `part` picks those that `shapes` describes."""
        make = _decoder_maker(self.architecture, self.dtype, self.param_dtype, seed=self.seed, lora=self.lora)

        def draw() -> Params:
            drawn = part(nnx.to_pure_dict(nnx.state(make())))
            return jax.tree.map(lambda values, shape: values.astype(shape.dtype), drawn, shapes)

        return initialise(self.mesh, draw, jax.tree.map(lambda shape: shape.sharding, shapes))

    def reference_copy(self, params: Params) -> Params:
        """Copies what training changes for an online reference, in the type that the model computes in.

        Of a model with adapters that is the adapters: policy and reference have the base in common.
        """
        return reference_copy(split(params)[0], self.dtype)


def require_int8(lora: Lora | None) -> None:
    """Raises UsageError where a base is to be held in int8, and qwix, which rounds it, is not installed."""
    try:
        if lora is not None and lora.base == "int8":
            import qwix  # noqa: F401
    except ImportError as error:
        raise UsageError("lora.base=int8 needs qwix: pip install 'sr_dpo_jax[int8]'; or leave it out") from error


def quantised(name: str, weight: jax.Array) -> Int8:
    """Rounds a stacked matrix `[layers, inputs, outputs]` of this name to int8, the largest of an output to ±127."""
    import qwix  # an extra, see `require_int8`

    inputs = tuple(range(1, 1 + input_axes(name)))
    outputs = [axis for axis in range(weight.ndim) if axis not in inputs]
    # A trap: bfloat16 has no room for the fractions of 64 to 127, which would round these twice.
    array = qwix.quantize(weight.astype(jnp.float32), jnp.int8, channelwise_axes=outputs, scale_dtype=jnp.float32)
    return Int8(array.qvalue, array.scale.squeeze(inputs))


def reference_copy(params: Params, dtype: jnp.dtype) -> Params:
    """Copies parameters into the types of a frozen model that computes in `dtype`, see `frozen_type`."""
    return jax.tree.map_with_path(
        lambda path, param: jnp.array(param, dtype=frozen_type(path, dtype, param.dtype), copy=True), params
    )


def frozen_type(path: Any, dtype: jnp.dtype, norm_dtype: jnp.dtype) -> jnp.dtype:
    """Gives the type of a parameter that is not trained, where the model computes in `dtype`.

    Norms keep `norm_dtype`: they are applied in float32. All else is cast to `dtype` where it is used, so a copy in
    these types gives the same numbers as the original.
    """
    return norm_dtype if any("norm" in key.key for key in path) else dtype


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def abstract_params(architecture: Architecture, lora: Lora | None = None) -> Any:
    """Gives the tree of abstract nnx parameters, float32, with their logical axes; touches no device."""
    float32 = jnp.dtype("float32")
    return nnx.state(nnx.eval_shape(_decoder_maker(architecture, float32, float32, lora=lora)))


def place_model(
    directory: ModelDirectory,
    mesh: Mesh,
    *,
    dtype: str,
    param_dtype: str,
    remat: str,
    attention: str,
    seed: int,
    drawn: bool,
    lora: Lora | None = None,
    adapter: AdapterDirectory | None = None,
    frozen: bool = False,
) -> PlacedModel:
    """Lays a model out on a mesh, whose devices may be described ones that are not attached; makes no parameters.

    Args:
      directory: from `weights.directory.open_directory`.
      mesh: the device mesh.
      dtype: type of activations and matmuls.
      param_dtype: type of the parameters.
      remat: what the backward pass recomputes, see `Decoder`.
      attention: the way to compute attention, or `auto`.
      seed: draws weights and adapters where they are not read.
      drawn: whether the weights are drawn from the seed; else they are read from the directory.
      lora: the adapters; None: there are none, and all parameters are trained.
      adapter: holds the adapters that training starts from; None: they are drawn.
      frozen: whether no part of it is trained, as of a reference.

    Raises:
      UsageError: parameters do not divide over the mesh, the attention path does not run here, or the model has none of
        the matrices that adapters are to stand beside.
    """
    architecture, types = directory.architecture, (jnp.dtype(dtype), jnp.dtype(param_dtype))
    name = attention_name(attention, mesh, architecture, types[0])
    path = attention_path(name, mesh, architecture, types[0])
    make = _decoder_maker(architecture, *types, remat=remat, attention=path, lora=lora)
    graph, abstract = nnx.split(nnx.eval_shape(make))
    shardings = nnx.to_pure_dict(param_shardings(mesh, abstract))
    axes = " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    count = sum(np.prod(param.shape) for param in flatten(abstract).values())
    trained = adapter_weights(nnx.to_pure_dict(abstract))
    if lora is not None and not trained:
        raise UsageError(
            f"lora.targets=[{','.join(lora.targets)}]: {directory.model_type} has none of them; choose from "
            f"{', '.join(name for name in TARGETS if name != 'gate')}"
        )
    beside = f", {trained:,} of them in adapters of rank {lora.rank}" if lora is not None else ""
    log.info(f"{directory.model_type} on {axes}: {count:,} parameters{beside}, attention {name}, activations {dtype}")
    return PlacedModel(directory, mesh, graph, abstract, shardings, lora, name, *types, seed, drawn, adapter, frozen)


def _decoder_maker(
    architecture: Architecture,
    dtype: jnp.dtype,
    param_dtype: jnp.dtype,
    *,
    remat: str = "none",
    attention: Any = DENSE,
    seed: int = 0,
    lora: Lora | None = None,
) -> Callable[[], Decoder]:
    options = {"dtype": dtype, "param_dtype": param_dtype, "remat": remat, "attention": attention, "lora": lora}

    def make() -> Decoder:
        of_adapters = jax.random.fold_in(jax.random.key(seed), 1)  # so that adapters do not move the weights' draws
        return Decoder(architecture, **options, rngs=nnx.Rngs(seed, adapters=of_adapters))

    return make
