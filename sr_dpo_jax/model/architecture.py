"""The sizes and choices that distinguish model families, as data: the decoder has no `if` on a family's name."""

import dataclasses
from typing import Literal

from sr_dpo_jax.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary embedding: dimensions i and i + len(frequencies) of a head rotate together; the others pass unchanged."""

    frequencies: tuple[float, ...]
    """Radians per position, one for each pair of dimensions; none where positions are not rotated."""
    scale: float = 1.0
    """The factor on the rotated dimensions of queries and keys (YaRN, LongRoPE)."""
    exact_positions: int | None = None
    """The longest sequence with these frequencies (dynamic NTK, LongRoPE); longer ones are refused. None: no limit."""


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """The choices of attention in which the layers of a model may differ."""

    rope: Rope
    window: int | None
    """The sliding window: a query sees keys fewer than this many positions before it; None: all of them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """The sizes and choices of a decoder-only transformer; a choice that is not made is as in most families."""

    vocabulary_tokens: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    context_tokens: int
    """The length that the model was trained for; longer sequences give worse results, but correct computation."""

    kinds: tuple[LayerKind, ...]
    kind_of_layer: tuple[int, ...]
    """The index into `kinds` of each layer."""
    query_scale: float
    """The factor on the attention scores."""
    attention_cap: float | None = None
    """Attention scores s become cap · tanh(s / cap); None leaves them."""
    logit_cap: float | None = None
    """The same cap for the logits."""
    head_norm: Literal["none", "head", "all"] = "none"
    """The RMSNorm of queries and keys before rotation: none, within each head, or over all heads together."""

    norm: Literal["layer", "rms"] = "rms"
    norm_epsilon: float
    norm_offset: float = 0.0
    """Norms multiply by offset + scale; the offset is 1 where weight files hold the factor − 1."""
    norm_inputs: bool = True
    """Attention and MLP read the normalised residual stream."""
    norm_outputs: bool = False
    """The outputs of attention and MLP are normalised before they are added to the residual stream."""
    parallel_residual: bool = False
    """Attention and MLP both read the layer's input, and both outputs are added to it."""

    activation: Literal["gelu", "gelu_tanh", "silu"]
    gated: bool = True
    """The MLP is down(activation(gate(x)) · up(x)); otherwise down(activation(up(x)))."""
    query_bias: bool = False
    """Query, key and value have biases."""
    output_bias: bool = False
    mlp_bias: bool = False
    embedding_scale: float = 1.0
    """The factor on the embeddings as they enter the residual stream."""
    residual_scale: float = 1.0
    """The factor on the outputs of attention and MLP as they are added to the residual stream."""
    logit_scale: float = 1.0
    """The factor on the logits."""
    tied: bool
    """The unembedding is the embedding."""
    init_scale: float
    """The standard deviation of randomly drawn matrices."""


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
