"""What distinguishes one model family from another, as data: the decoder has no `if` on a family's name."""

import dataclasses
from typing import Literal


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
    norm: Literal["layer", "rms"]
    norm_epsilon: float
    parallel_residual: bool
    """Attention and MLP both read the layer's input, and their outputs are added together."""
    activation: Literal["gelu", "gelu_tanh", "silu"]
    gated: bool
    """MLP of down(activation(gate(x)) · up(x)); otherwise down(activation(up(x)))."""
    query_bias: bool
    """Biases of query, key and value."""
    output_bias: bool
    mlp_bias: bool
    rotary_dims: int
    """Leading dimensions of each head that are rotated; the rest pass unchanged."""
    rope_theta: float
    tied: bool
    """The unembedding is the embedding."""
    init_scale: float
    """Standard deviation of random matrices."""
