"""A decoder-only transformer over packed rows; the layers are stacked and scanned, so compile time has no depth in it.

Parameters have logical axes in their metadata (`axes`), which `parallel/mesh.py` maps to the mesh:

    layers   one entry a layer, never sharded     heads, kv_heads   attention heads
    embed    the residual stream                  head_dim          within a head
    mlp      the MLP's hidden units               vocabulary        token ids
    table    the residual stream, in the embedding and the unembedding alone
    rank     between the two matrices of a LoRA adapter

    d  hidden size    H, K  query and key heads    D  head dimension    F  MLP units    V  vocabulary    L  layers

Next: `model/logprobs.py`, which turns hidden states into log-probs.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sr_dpo_jax.batch import Rows
from sr_dpo_jax.model.adapter import Lora, adapters_of
from sr_dpo_jax.model.architecture import Architecture, Rope
from sr_dpo_jax.model.attention import Attention, AttentionPath, Visible, at_least_float32
from sr_dpo_jax.model.linear import linear
from sr_dpo_jax.parallel.mesh import constrain

Array = jax.Array
Params = Any
"""A tree of the decoder's parameters: nested dicts of arrays, or of their shapes or shardings."""

ACTIVATIONS = {"gelu": partial(jax.nn.gelu, approximate=False), "gelu_tanh": jax.nn.gelu, "silu": jax.nn.silu}
REMAT_POLICIES = {
    # The name is splash attention's for what its backward pass needs; a kernel is no dot, and would run twice.
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names("attention"),
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def _matrix(rngs: nnx.Rngs, architecture: Architecture, dtype: jnp.dtype, **axes: int) -> nnx.Param:
    scale = jnp.asarray(architecture.init_scale, dtype)
    return nnx.Param(scale * jax.random.normal(rngs.params(), tuple(axes.values()), dtype), axes=tuple(axes))


def _constant(value: float, dtype: jnp.dtype, **axes: int) -> nnx.Param:
    return nnx.Param(jnp.full(tuple(axes.values()), value, dtype), axes=tuple(axes))


class Norm(nnx.Module):
    """LayerNorm or RMSNorm over the axes of its scale, in float32 also where the activations are bfloat16."""

    def __init__(self, architecture: Architecture, param_dtype: jnp.dtype, **axes: int):
        self.epsilon, self.offset = architecture.norm_epsilon, architecture.norm_offset
        self.centred = architecture.norm == "layer"
        self.scale = _constant(1.0 - self.offset, param_dtype, **axes)
        self.bias = _constant(0.0, param_dtype, **axes) if self.centred else None

    def __call__(self, x: Array) -> Array:
        scale = self.scale[...]
        wide, axes = x.astype(at_least_float32(x.dtype)), tuple(range(-scale.ndim, 0))
        if self.centred:
            wide = wide - wide.mean(axis=axes, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(axis=axes, keepdims=True) + self.epsilon)
        wide = wide * (self.offset + scale.astype(wide.dtype))
        if self.centred:
            wide = wide + self.bias[...].astype(wide.dtype)
        return wide.astype(x.dtype)


class SelfAttention(nnx.Module):
    """The projections of attention and the norms of queries and keys."""

    def __init__(self, architecture: Architecture, param_dtype: jnp.dtype, lora: Lora | None, rngs: nnx.Rngs):
        a, matrix = architecture, partial(_matrix, rngs, architecture, param_dtype, layers=architecture.layers)
        zeros = partial(_constant, 0.0, param_dtype, layers=a.layers)
        norm = partial(Norm, a, param_dtype, layers=a.layers)
        self.query = matrix(embed=a.hidden, heads=a.heads, head_dim=a.head_dim)
        self.key = matrix(embed=a.hidden, kv_heads=a.kv_heads, head_dim=a.head_dim)
        self.value = matrix(embed=a.hidden, kv_heads=a.kv_heads, head_dim=a.head_dim)
        self.output = matrix(heads=a.heads, head_dim=a.head_dim, embed=a.hidden)
        self.query_bias = zeros(heads=a.heads, head_dim=a.head_dim) if a.query_bias else None
        self.key_bias = zeros(kv_heads=a.kv_heads, head_dim=a.head_dim) if a.query_bias else None
        self.value_bias = zeros(kv_heads=a.kv_heads, head_dim=a.head_dim) if a.query_bias else None
        self.output_bias = zeros(embed=a.hidden) if a.output_bias else None
        all_heads = a.head_norm == "all"
        query_heads, key_heads = ({"heads": a.heads}, {"kv_heads": a.kv_heads}) if all_heads else ({}, {})
        self.query_norm = norm(**query_heads, head_dim=a.head_dim) if a.head_norm != "none" else None
        self.key_norm = norm(**key_heads, head_dim=a.head_dim) if a.head_norm != "none" else None
        matrices = {"query": self.query, "key": self.key, "value": self.value, "output": self.output}
        self.adapters = adapters_of(lora, matrices, dtype=param_dtype, rngs=rngs)

    def __call__(self, x: Array, attention: Attention) -> Array:
        """Maps `[R, T, d]` to `[R, T, d]`; rotates and mixes through `attention.attend`."""
        adapter = self.adapters.get
        query = linear("query", x, self.query, self.query_bias, adapter=adapter("query"))
        key = linear("key", x, self.key, self.key_bias, adapter=adapter("key"))
        value = linear("value", x, self.value, self.value_bias, adapter=adapter("value"))
        mixed = attention.attend(_normalised(query, self.query_norm), _normalised(key, self.key_norm), value)
        return linear("output", mixed, self.output, self.output_bias, adapter=adapter("output"), axes=2)


class MLP(nnx.Module):
    """down(activation(up(x))), or down(activation(gate(x)) · up(x)) where it is gated."""

    def __init__(self, architecture: Architecture, param_dtype: jnp.dtype, lora: Lora | None, rngs: nnx.Rngs):
        a, matrix = architecture, partial(_matrix, rngs, architecture, param_dtype, layers=architecture.layers)
        zeros = partial(_constant, 0.0, param_dtype, layers=a.layers)
        self.activation = a.activation
        self.gate = matrix(embed=a.hidden, mlp=a.mlp) if a.gated else None
        self.up = matrix(embed=a.hidden, mlp=a.mlp)
        self.down = matrix(mlp=a.mlp, embed=a.hidden)
        self.gate_bias = zeros(mlp=a.mlp) if a.gated and a.mlp_bias else None
        self.up_bias = zeros(mlp=a.mlp) if a.mlp_bias else None
        self.down_bias = zeros(embed=a.hidden) if a.mlp_bias else None
        matrices = {"gate": self.gate, "up": self.up, "down": self.down}
        self.adapters = adapters_of(lora, matrices, dtype=param_dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """Maps `[R, T, d]` to `[R, T, d]`."""
        adapter = self.adapters.get
        units = linear("up", x, self.up, self.up_bias, adapter=adapter("up"))
        if self.gate is None:
            units = ACTIVATIONS[self.activation](units)
        else:
            gate = linear("gate", x, self.gate, self.gate_bias, adapter=adapter("gate"))
            units *= ACTIVATIONS[self.activation](gate)
        return linear("down", units, self.down, self.down_bias, adapter=adapter("down"))


class Block(nnx.Module):
    """One layer. Built with the parameters of all layers stacked, called with those of one."""

    def __init__(self, architecture: Architecture, param_dtype: jnp.dtype, lora: Lora | None, rngs: nnx.Rngs):
        a = architecture
        norm = partial(Norm, a, param_dtype, layers=a.layers, embed=a.hidden)
        self.parallel_residual, self.residual_scale = a.parallel_residual, a.residual_scale
        self.attention_norm = norm() if a.norm_inputs else None
        self.attention = SelfAttention(a, param_dtype, lora, rngs)
        self.attention_output_norm = norm() if a.norm_outputs else None
        self.mlp_norm = norm() if a.norm_inputs else None
        self.mlp = MLP(a, param_dtype, lora, rngs)
        self.mlp_output_norm = norm() if a.norm_outputs else None

    def __call__(self, x: Array, attention: Attention) -> Array:
        """Maps `[R, T, d]` to `[R, T, d]`."""
        with jax.named_scope("attention"):
            attended = self.attention(_normalised(x, self.attention_norm), attention)
            middle = x + _scaled(_normalised(attended, self.attention_output_norm), self.residual_scale)
        with jax.named_scope("mlp"):
            units = self.mlp(_normalised(x if self.parallel_residual else middle, self.mlp_norm))
            return middle + _scaled(_normalised(units, self.mlp_output_norm), self.residual_scale)


@dataclasses.dataclass(frozen=True)
class LayerAttention:
    """Rotation and attention as one layer of the scan has them; its kind is known when the loop runs."""

    kinds: Sequence[tuple[tuple[Array, Array], Attention]]
    """For each kind of layers, cosine and sine of the rotation, and attention over the rows."""
    kind: Array
    """The index of this layer's kind."""

    def attend(self, query: Array, key: Array, value: Array) -> Array:
        def as_kind(number: int, query: Array, key: Array, value: Array) -> Array:
            rotation, attention = self.kinds[number]
            return attention.attend(rotate(query, rotation), rotate(key, rotation), value)

        branches = [partial(as_kind, number) for number in range(len(self.kinds))]
        if len(branches) == 1:
            return branches[0](query, key, value)
        return jax.lax.switch(self.kind, branches, query, key, value)


class Decoder(nnx.Module):
    """Turns token ids of packed rows into hidden states after the final norm.

    Args:
      architecture: shapes and choices of the family.
      dtype: type of activations and matmuls.
      param_dtype: type of the parameters.
      remat: what the backward pass recomputes: "none", "dots" (all but the matmuls) or "full" (whole layers).
      attention: the way to compute attention.
      lora: the adapters beside the matrices of the layers; None: there are none.
      rngs: the `params` stream draws the initial weights, `adapters` those of adapters.
    """

    def __init__(
        self,
        architecture: Architecture,
        *,
        dtype: jnp.dtype,
        param_dtype: jnp.dtype,
        remat: str,
        attention: AttentionPath,
        lora: Lora | None = None,
        rngs: nnx.Rngs,
    ):
        a = architecture
        self.architecture, self.dtype, self.remat, self.attention = a, dtype, remat, attention
        self.embedding = _matrix(rngs, a, param_dtype, vocabulary=a.vocabulary_tokens, table=a.hidden)
        self.layers = Block(a, param_dtype, lora, rngs)
        self.final_norm = Norm(a, param_dtype, embed=a.hidden)
        self.unembedding = (
            None if a.tied else _matrix(rngs, a, param_dtype, vocabulary=a.vocabulary_tokens, table=a.hidden)
        )

    @property
    def vocabulary_matrix(self) -> Array:
        """The matrix whose product with a hidden state gives the logits, `[V, d]`."""
        return (self.embedding if self.unembedding is None else self.unembedding)[...]

    def __call__(self, plain: Rows, *augmented: Rows) -> tuple[Array, ...]:
        """Computes hidden states `[R, T, d]` of the plain rows and, under stop_gradient, of each of the augmented ones.

        All go through one scan over the layers, and the augmented branches leave nothing for the backward pass.
        """
        block, stacked = nnx.split(self.layers)
        attentions = [self._attention_on(rows) for rows in (plain, *augmented)]

        def layer(hidden: tuple[Array, ...], of_layer: tuple[nnx.State, Array]) -> tuple[tuple[Array, ...], None]:
            params, kind = of_layer
            frozen = jax.lax.stop_gradient(params)
            advanced = []
            for branch, (x, kinds) in enumerate(zip(hidden, attentions, strict=True)):
                x = nnx.merge(block, frozen if branch else params)(x, LayerAttention(kinds, kind))
                advanced.append(constrain(x, ("rows", None, None)))
            return tuple(advanced), None

        if self.remat != "none":
            layer = jax.checkpoint(layer, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        embedded = [self.embed(plain.tokens), *(jax.lax.stop_gradient(self.embed(rows.tokens)) for rows in augmented)]
        kinds = jnp.asarray(self.architecture.kind_of_layer, jnp.int32)
        hidden, _ = jax.lax.scan(layer, tuple(embedded), (stacked, kinds))
        frozen = [jax.lax.stop_gradient(self.leave(states)) for states in hidden[1:]]
        return self.leave(hidden[0]), *frozen

    def embed(self, tokens: Array) -> Array:
        """Maps token ids `[R, T]` to what enters the first layer, `[R, T, d]`."""
        embedded = look_up(self.embedding[...], tokens, self.dtype)
        # In the activations' type: Gemma's models were trained with the factor rounded to it.
        embedded *= jnp.asarray(self.architecture.embedding_scale, self.dtype)
        return constrain(embedded, ("rows", None, None))

    def leave(self, states: Array) -> Array:
        """Maps what leaves the last layer, `[R, T, d]`, to what meets the vocabulary matrix.

        The factor on the logits is put here, where it costs nothing; those of known models are powers of two.
        """
        return _scaled(self.final_norm(states), self.architecture.logit_scale)

    def _attention_on(self, rows: Rows) -> list[tuple[tuple[Array, Array], Attention]]:
        """Prepares rotation and attention for each kind of layers. A window that no row is long enough to notice is
        left out."""
        length, dtype, a = rows.tokens.shape[-1], at_least_float32(self.dtype), self.architecture
        prepared = []
        for kind in a.kinds:
            window = kind.window if kind.window is not None and kind.window < length else None
            visible = Visible(rows.key_start, rows.key_end, rows.positions, rows.prefix_tokens, window)
            attention = self.attention.on_rows(visible, scale=a.query_scale, cap=a.attention_cap)
            prepared.append((rotation_of(rows.positions, kind.rope, dtype), attention))
        return prepared


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def look_up(table: Array, tokens: Array, dtype: jnp.dtype) -> Array:
    """Reads `table[tokens]` in `dtype`, with a gradient summed in float32.

    The transpose that jax would take sums in `dtype`: of 4,096 equal contributions to one token, bfloat16 keeps 256.
    The table is whole on every device while it is read.
    """
    return constrain(table.astype(dtype), (None, None))[tokens]


def _look_up_forward(table: Array, tokens: Array, dtype: jnp.dtype) -> tuple[Array, tuple[Array, Array]]:
    return look_up(table, tokens, dtype), (table, tokens)


def _look_up_backward(dtype: jnp.dtype, kept: tuple[Array, Array], cotangent: Array) -> tuple[Array, np.ndarray]:
    table, tokens = kept
    wide = at_least_float32(table.dtype)
    # Whole on every device, which then adds up its own columns of the table. Left alone, the compiler exchanges rows
    # for columns with an all-to-all where the mesh has a tensor axis.
    cotangent = constrain(cotangent, (None, None, None))
    gradient = jnp.zeros(table.shape, wide).at[tokens].add(cotangent.astype(wide))
    gradient = constrain(gradient, ("vocabulary", "table")).astype(table.dtype)
    return gradient, np.zeros(tokens.shape, jax.dtypes.float0)


look_up.defvjp(_look_up_forward, _look_up_backward)


def rotation_of(positions: Array, rope: Rope, dtype: jnp.dtype) -> tuple[Array, Array]:
    """Gives cosine and sine of each position's angles, `[R, T, 1, len(frequencies)]`, times the rope's scale.

    Never in the activations' bfloat16, which rounds position 257 to 256.
    """
    angles = positions[..., None, None].astype(dtype) * jnp.asarray(rope.frequencies, dtype)
    return rope.scale * jnp.cos(angles), rope.scale * jnp.sin(angles)


def rotate(heads: Array, rotation: tuple[Array, Array]) -> Array:
    """Rotates `[R, T, heads, D]`: with n angles, dimension i turns with i + n, and dimensions from 2n on stay."""
    cosine, sine = rotation
    rotary_dims = 2 * cosine.shape[-1]
    first, second = jnp.split(heads[..., :rotary_dims].astype(cosine.dtype), 2, axis=-1)
    turned = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return jnp.concatenate([turned.astype(heads.dtype), heads[..., rotary_dims:]], axis=-1)


def _normalised(x: Array, norm: Norm | None) -> Array:
    return x if norm is None else norm(x)


def _scaled(x: Array, factor: float) -> Array:
    """Multiplies by a factor that is not rounded to the type of x."""
    return x if factor == 1 else (x.astype(at_least_float32(x.dtype)) * factor).astype(x.dtype)
