"""Model flops of a step, as MFU counts them: real tokens, what they attend to, every forward, and nothing twice.

One forward over T tokens that see A (query, key) pairs, of which S predict a scored token, costs

    f = 2·N_b·T + 4·H·D·Σ_layers A + 2·N_h·S

with N_b matmul weights in the layers and N_h in the unembedding; its backward pass 2·f. Where LoRA adapters with N_a
weights are trained, f has 2·N_a·T more, and the backward pass 2·N_b·T + 2·N_h·S less: the base has no gradient.
Padding, masked keys and what rematerialisation repeats are work, but not model flops.

Nor is this: our step runs the head four times instead of three, as the backward pass makes the logits again, block by
block: the price of keeping no logits, 1 to 4 % of a step (`tests/train/test_flops.py`).
"""

import numpy as np

from sr_dpo_jax.model.architecture import Architecture


def body_weights(architecture: Architecture) -> int:
    """Counts N_b, the weights of the layers that take part in matmuls."""
    a = architecture
    attention = a.hidden * a.head_dim * (2 * a.heads + 2 * a.kv_heads)
    return a.layers * (attention + (3 if a.gated else 2) * a.hidden * a.mlp)


def pair_flops(
    architecture: Architecture,
    *,
    prompt_tokens: np.ndarray,
    chosen_tokens: np.ndarray,
    rejected_tokens: np.ndarray,
    prefix_tokens: int,
    adapter_weights: int = 0,
) -> np.ndarray:
    """Counts the flops of one forward over each pair with its prompt run once, `[N]` float64.

    Args:
      architecture: the model's.
      prompt_tokens, chosen_tokens, rejected_tokens: `[N]`; zeros for the rejected ones of SFT.
      prefix_tokens: tokens of p, which every pair sees; they run once a row and are not counted themselves.
      adapter_weights: N_a, 0 without adapters.
    """
    a = architecture
    responses = chosen_tokens + rejected_tokens
    flops = matrix_flops(a, prompt_tokens=prompt_tokens, response_tokens=responses)
    flops = flops + 2.0 * adapter_weights * (prompt_tokens + responses)
    start = prefix_tokens + prompt_tokens
    for number, kind in enumerate(a.kinds):
        seen = _seen(start, kind.window) - _seen(np.asarray(prefix_tokens), kind.window)
        for response in (chosen_tokens, rejected_tokens):
            seen = seen + _seen(start + response, kind.window) - _seen(start, kind.window)
        flops += 4.0 * a.heads * a.head_dim * a.kind_of_layer.count(number) * seen
    return flops


def matrix_flops(architecture: Architecture, *, prompt_tokens: np.ndarray, response_tokens: np.ndarray) -> np.ndarray:
    """Counts 2·N_b·T + 2·N_h·S of each pair, `[N]`: the model's matrices forward, and their gradient again."""
    a = architecture
    body = 2.0 * body_weights(a) * (prompt_tokens + response_tokens)
    return body + 2.0 * a.vocabulary_tokens * a.hidden * response_tokens


def _seen(tokens: np.ndarray, window: int | None) -> np.ndarray:
    """Counts the (query, key) pairs of causal attention over this many tokens."""
    inside = tokens if window is None else np.minimum(tokens, window)
    return inside * (inside + 1.0) / 2 + (tokens - inside) * (window or 0.0)
