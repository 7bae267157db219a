"""Makers shared by tests: tiny models of three kinds, random pairs, and packed batches of them."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh

from sr_dpo_jax.batch import SIDES, Batch, Placed, Rows, build_row
from sr_dpo_jax.model.adapter import Lora
from sr_dpo_jax.model.architecture import Architecture, LayerKind, Rope
from sr_dpo_jax.model.attention import DENSE, AttentionPath
from sr_dpo_jax.model.decoder import Decoder
from sr_dpo_jax.parallel import mesh as meshes
from sr_dpo_jax.train.objective import OBJECTIVES, Objective
from sr_dpo_jax.train.state import TrainState, abstract_state, first_state
from sr_dpo_jax.weights.directory import ModelDirectory
from sr_dpo_jax.weights.families import tensors_of
from sr_dpo_jax.weights.layout import flatten
from sr_dpo_jax.weights.write import save_params

VOCABULARY = 24


def rope(rotary_dims: int, theta: float = 10_000.0, scale: float = 1.0) -> Rope:
    return Rope(tuple(theta ** -(np.arange(0, rotary_dims, 2) / rotary_dims)), scale)


NEOX = Architecture(
    vocabulary_tokens=VOCABULARY,
    hidden=32,
    layers=2,
    heads=4,
    kv_heads=4,
    head_dim=8,
    mlp=48,
    context_tokens=2048,
    kinds=(LayerKind(rope(4), window=None),),
    kind_of_layer=(0, 0),
    query_scale=8**-0.5,
    attention_cap=None,
    logit_cap=None,
    head_norm="none",
    norm="layer",
    norm_epsilon=1e-5,
    norm_offset=0.0,
    norm_inputs=True,
    norm_outputs=False,
    parallel_residual=True,
    activation="gelu",
    gated=False,
    query_bias=True,
    output_bias=True,
    mlp_bias=True,
    embedding_scale=1.0,
    tied=False,
    init_scale=0.2,
)
LLAMA = dataclasses.replace(
    NEOX,
    kv_heads=2,
    head_dim=6,
    mlp=40,
    kinds=(LayerKind(rope(6), window=None),),
    query_scale=6**-0.5,
    norm="rms",
    norm_epsilon=1e-6,
    parallel_residual=False,
    activation="silu",
    gated=True,
    query_bias=False,
    output_bias=False,
    mlp_bias=False,
    tied=True,
)
GEMMA = dataclasses.replace(
    LLAMA,
    layers=3,
    kinds=(LayerKind(rope(6, 50.0, scale=1.2), window=None), LayerKind(rope(6), window=3)),
    kind_of_layer=(1, 0, 1),
    query_scale=0.6,
    attention_cap=2.0,
    logit_cap=4.0,
    head_norm="head",
    norm_offset=1.0,
    norm_outputs=True,
    activation="gelu_tanh",
    embedding_scale=32**0.5,
)
"""All that Llama has not: two kinds of layers, one with a window shorter than a pair, caps, norms on both sides."""
ARCHITECTURES = {"gpt_neox": NEOX, "llama": LLAMA, "gemma": GEMMA}


def make_mesh(replica: int = 1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh of the first replica × fsdp × tensor devices."""
    shape, names = (replica, fsdp, tensor), ("replica", "fsdp", "tensor")
    devices = jax.devices()[: replica * fsdp * tensor]
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * 3, devices=devices)


@dataclasses.dataclass(frozen=True)
class Model:
    """A tiny `weights.placement.PlacedModel`, without a directory of files."""

    mesh: Mesh
    graph: nnx.GraphDef
    abstract: Any
    shardings: Any
    make: Any

    def params(self, seed: int = 0) -> Any:
        """Random parameters on the mesh, drawn in NumPy; biases and norms too, so that a test sees them."""
        rng = np.random.default_rng(seed)

        def draw(path: Any, shape: jax.ShapeDtypeStruct) -> np.ndarray:
            centre = 1.0 if path[-1].key == "scale" else 0.0
            return (centre + 0.25 * rng.normal(size=shape.shape)).astype(shape.dtype)

        return jax.device_put(jax.tree.map_with_path(draw, self.shapes), self.shardings)

    def state(self, optimizer: Any, seed: int = 0) -> TrainState:
        """The state before the first update."""
        return first_state(self.abstract_state(optimizer), self.params(seed), optimizer)

    @property
    def shapes(self) -> Any:
        return jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
            nnx.to_pure_dict(self.abstract),
            self.shardings,
        )

    def abstract_state(self, optimizer: Any) -> TrainState:
        return abstract_state(self.shapes, optimizer, self.mesh)


def build(
    architecture: Architecture,
    mesh: Mesh,
    *,
    dtype: Any = jnp.float32,
    remat: str = "none",
    attention: AttentionPath = DENSE,
    lora: Lora | None = None,
) -> Model:
    """Graph, abstract parameters and shardings, nothing allocated yet."""

    def make() -> Decoder:
        return Decoder(
            architecture,
            dtype=jnp.dtype(dtype),
            param_dtype=jnp.dtype(dtype),
            remat=remat,
            attention=attention,
            lora=lora,
            rngs=nnx.Rngs(0),
        )

    graph, abstract = nnx.split(nnx.eval_shape(make))
    return Model(mesh, graph, abstract, nnx.to_pure_dict(meshes.param_shardings(mesh, abstract)), make)


def save_weights(
    params: Any,
    directory: ModelDirectory,
    abstract: Any,
    out: Path,
    *,
    dtype: str = "float32",
    shard_bytes: int = 10**9,
) -> None:
    """A whole tree of parameters as a directory's weight files."""
    flat = jax.device_get(flatten(params))
    tensors = tensors_of(directory.architecture, directory.model_type)
    groups = ({param: flat[param] for param in tensor.params} for tensor in tensors)
    save_params(groups, directory, abstract, out, dtype=np.dtype(dtype), shard_bytes=shard_bytes)


def objective_of(name: str, beta: float = 0.1, lam: float = 0.5) -> Objective:
    """An objective with these numbers, as far as it has them."""
    numbers = {} if name == "sft" else {"beta": beta}
    return Objective(name, numbers | ({"lam": lam} if OBJECTIVES[name].refined else {}))


Pair = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Prompt, chosen, rejected."""


def random_pairs(
    rng: np.random.Generator, lengths: list[tuple[int, int, int]], *, head: np.ndarray | None = None
) -> list[Pair]:
    """Pairs of random tokens with these lengths of (prompt, chosen, rejected); every prompt starts with `head`."""
    head = np.zeros(0, np.int32) if head is None else head
    drawn = [[rng.integers(0, VOCABULARY, n).astype(np.int32) for n in of_pair] for of_pair in lengths]
    return [(np.concatenate([head, prompt[len(head) :]]), *responses) for prompt, *responses in drawn]


def pack(
    pairs: list[Pair],
    row_of: list[int],
    *,
    micro_batches: int,
    rows: int,
    row_length: int,
    scored: int,
    head_tokens: int = 0,
    prefix: np.ndarray | None = None,
) -> Rows:
    """Rows `[A, R, ...]` of NumPy arrays with pair i in row `row_of[i]`, counted over all micro-batches."""
    prefix = np.zeros(0, np.int32) if prefix is None else prefix
    built = []
    for row in range(micro_batches * rows):
        members = [Placed(SIDES * slot, *pair) for slot, pair in enumerate(pairs) if row_of[slot] == row]
        built.append(
            build_row(
                members,
                row_length=row_length,
                scored=scored,
                unused_slot=SIDES * len(pairs),
                head_tokens=head_tokens,
                prefix=prefix,
            )
        )
    fields = {name: np.stack([row[name] for row in built]).reshape(micro_batches, rows, -1) for name in built[0]}
    return Rows(**fields, prefix_tokens=len(prefix))


def place(batch: Batch, mesh: Mesh) -> Batch:
    """The batch on the mesh, rows sharded as `Feed` shards them, reference scores everywhere."""

    def put(array: np.ndarray) -> jax.Array:
        if array.ndim == 2:
            return jax.device_put(array, meshes.replicated(mesh))
        return jax.device_put(array, meshes.sharding(mesh, ("micro_batches", "rows", None), array.shape, "batch"))

    return jax.tree.map(put, batch)
