"""What distinguishes one model family from another, as data: the decoder has no `if` on a family's name."""

import dataclasses
from typing import Literal

from sr_dpo_jax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary embedding: dimension i of a head turns with dimension i + len(frequencies), the rest pass unchanged."""

    frequencies: tuple[float, ...]
    """Radians a position, one for each pair of dimensions."""
    scale: float = 1.0
    """Factor on the rotated dimensions of queries and of keys (YaRN, LongRoPE)."""
    exact_positions: int | None = None
    """Longer sequences would have other frequencies (dynamic NTK, LongRoPE) and are refused; None: no such limit."""


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """How a layer's attention differs from that of layers of another kind."""

    rope: Rope
    window: int | None
    """A query sees keys less than this many positions before it; None: all of them."""


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Shapes and choices of a decoder-only transformer."""

    vocabulary_tokens: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    context_tokens: int
    """Length that the model was made for; longer sequences are a matter of quality, not of correctness."""

    kinds: tuple[LayerKind, ...]
    kind_of_layer: tuple[int, ...]
    """Index into `kinds` of each layer."""
    query_scale: float
    """Factor on the attention scores."""
    attention_cap: float | None
    """Scores s become cap · tanh(s / cap)."""
    logit_cap: float | None
    """The same for the logits."""
    head_norm: Literal["none", "head", "all"]
    """RMSNorm of queries and keys before rotation: within each head, or over all heads together."""

    norm: Literal["layer", "rms"]
    norm_epsilon: float
    norm_offset: float
    """Norms multiply by offset + scale; 1 where files hold the distance from 1."""
    norm_inputs: bool
    """Attention and MLP read the normalised residual stream."""
    norm_outputs: bool
    """What attention and MLP give is normalised before it is added to the residual stream."""
    parallel_residual: bool
    """Attention and MLP both read the layer's input, and their outputs are added together."""

    activation: Literal["gelu", "gelu_tanh", "silu"]
    gated: bool
    """MLP of down(activation(gate(x)) · up(x)); otherwise down(activation(up(x)))."""
    query_bias: bool
    """Biases of query, key and value."""
    output_bias: bool
    mlp_bias: bool
    embedding_scale: float
    """Factor on the embeddings as they enter the residual stream."""
    tied: bool
    """The unembedding is the embedding."""
    init_scale: float
    """Standard deviation of random matrices."""


def require_exact_positions(architecture: Architecture, longest_tokens: int, *, what: str, remedy: str) -> None:
    """Refuses texts beyond the length up to which the model's rotary frequencies are those of every length.

    Raises:
      UsageError: `what` is too long, and the remedy.
    """
    limits = [kind.rope.exact_positions for kind in architecture.kinds if kind.rope.exact_positions is not None]
    if limits and longest_tokens > min(limits):
        raise UsageError(
            f"{what}; beyond {min(limits)} the rope scaling of model.path gives every length other frequencies, which "
            f"neither a packed row nor a cache of keys can have; {remedy}"
        )
