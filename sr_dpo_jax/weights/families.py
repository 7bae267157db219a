"""One table a model family: config fields -> Architecture, and tensor names <-> parameters, read in both directions.

A table row names a tensor, the parameters it holds and its layout, written as axes in the order of its memory, with
parentheses around axes that the file keeps as one dimension. `part` runs over the parameters of a fused tensor. Our
own layout is in the parameter's metadata, so the row says all there is to say about import and export.
"""

import dataclasses
from typing import Any

from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.model.architecture import Architecture


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One row of a family's table."""

    name: str
    """Name in the file; `{layer}` stands for the layer's number."""
    layout: str
    """Axes as they lie in memory, e.g. `(heads part head_dim) embed`."""
    params: tuple[str, ...]
    """Paths of the parameters within the tree, in the order of `part`."""


def architecture_of(config: Any, *, where: str) -> Architecture:
    """Architecture of a transformers config.

    Raises:
      UsageError: the family, or something that the config asks for, is not supported; names the field and its value.
    """
    reader = {"gpt_neox": _gpt_neox_architecture, "llama": _llama_architecture}.get(config.model_type)
    if reader is None:
        raise UsageError(f"{where}: model_type={config.model_type!r} is not supported; known: gpt_neox, llama")
    return reader(config, where)


def tensors_of(architecture: Architecture, model_type: str) -> tuple[Tensor, ...]:
    """All tensors that a file of this architecture holds, each once."""
    return {"gpt_neox": _gpt_neox_tensors, "llama": _llama_tensors}[model_type](architecture)


def _refuse(where: str, field: str, value: Any, supported: str) -> None:
    raise UsageError(f"{where}: {field}={value!r} is not supported; supported: {supported}")


def _rope(config: Any, where: str) -> tuple[float, float]:
    """Base and rotated share of a head."""
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "default":
        _refuse(where, "rope_parameters.rope_type", rope["rope_type"], "default")
    return float(rope["rope_theta"]), float(rope.get("partial_rotary_factor", 1.0))


def _activation(name: str, where: str) -> str:
    known = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh"}
    known["silu"] = "silu"
    if name not in known:
        _refuse(where, "hidden_act", name, ", ".join(known))
    return known[name]


def _gpt_neox_architecture(config: Any, where: str) -> Architecture:
    theta, rotary_share = _rope(config, where)
    head_dim = config.hidden_size // config.num_attention_heads
    return Architecture(
        vocabulary_tokens=config.vocab_size,
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_attention_heads,
        head_dim=head_dim,
        mlp=config.intermediate_size,
        norm="layer",
        norm_epsilon=config.layer_norm_eps,
        parallel_residual=config.use_parallel_residual,
        activation=_activation(config.hidden_act, where),
        gated=False,
        query_bias=config.attention_bias,
        output_bias=config.attention_bias,
        mlp_bias=True,
        rotary_dims=int(head_dim * rotary_share),
        rope_theta=theta,
        tied=config.tie_word_embeddings,
        init_scale=config.initializer_range,
    )


def _gpt_neox_tensors(a: Architecture) -> tuple[Tensor, ...]:
    layer, heads = "gpt_neox.layers.{layer}.", ("query", "key", "value")
    rows = [
        Tensor("gpt_neox.embed_in.weight", "vocabulary table", ("embedding",)),
        Tensor(
            layer + "attention.query_key_value.weight",
            "(heads part head_dim) embed",
            tuple(f"layers.attention.{name}" for name in heads),
        ),
        Tensor(layer + "attention.dense.weight", "embed (heads head_dim)", ("layers.attention.output",)),
        Tensor(layer + "mlp.dense_h_to_4h.weight", "mlp embed", ("layers.mlp.up",)),
        Tensor(layer + "mlp.dense_h_to_4h.bias", "mlp", ("layers.mlp.up_bias",)),
        Tensor(layer + "mlp.dense_4h_to_h.weight", "embed mlp", ("layers.mlp.down",)),
        Tensor(layer + "mlp.dense_4h_to_h.bias", "embed", ("layers.mlp.down_bias",)),
    ]
    for file_name, ours in (
        (layer + "input_layernorm", "layers.attention_norm"),
        (layer + "post_attention_layernorm", "layers.mlp_norm"),
        ("gpt_neox.final_layer_norm", "final_norm"),
    ):
        rows += [Tensor(f"{file_name}.weight", "embed", (f"{ours}.scale",))]
        rows += [Tensor(f"{file_name}.bias", "embed", (f"{ours}.bias",))]
    if a.query_bias:
        biases = tuple(f"layers.attention.{name}_bias" for name in heads)
        rows.append(Tensor(layer + "attention.query_key_value.bias", "(heads part head_dim)", biases))
        rows.append(Tensor(layer + "attention.dense.bias", "embed", ("layers.attention.output_bias",)))
    if not a.tied:
        rows.append(Tensor("embed_out.weight", "vocabulary table", ("unembedding",)))
    return tuple(rows)


def _llama_architecture(config: Any, where: str) -> Architecture:
    theta, rotary_share = _rope(config, where)
    return Architecture(
        vocabulary_tokens=config.vocab_size,
        hidden=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        mlp=config.intermediate_size,
        norm="rms",
        norm_epsilon=config.rms_norm_eps,
        parallel_residual=False,
        activation=_activation(config.hidden_act, where),
        gated=True,
        query_bias=config.attention_bias,
        output_bias=config.attention_bias,
        mlp_bias=config.mlp_bias,
        rotary_dims=int(config.head_dim * rotary_share),
        rope_theta=theta,
        tied=config.tie_word_embeddings,
        init_scale=config.initializer_range,
    )


def _llama_tensors(a: Architecture) -> tuple[Tensor, ...]:
    layer = "model.layers.{layer}."
    projections = [
        ("self_attn.q_proj", "(heads head_dim)", "embed", "attention.query", a.query_bias),
        ("self_attn.k_proj", "(kv_heads head_dim)", "embed", "attention.key", a.query_bias),
        ("self_attn.v_proj", "(kv_heads head_dim)", "embed", "attention.value", a.query_bias),
        ("self_attn.o_proj", "embed", "(heads head_dim)", "attention.output", a.output_bias),
        ("mlp.gate_proj", "mlp", "embed", "mlp.gate", a.mlp_bias),
        ("mlp.up_proj", "mlp", "embed", "mlp.up", a.mlp_bias),
        ("mlp.down_proj", "embed", "mlp", "mlp.down", a.mlp_bias),
    ]
    rows = [
        Tensor("model.embed_tokens.weight", "vocabulary table", ("embedding",)),
        Tensor(layer + "input_layernorm.weight", "embed", ("layers.attention_norm.scale",)),
        Tensor(layer + "post_attention_layernorm.weight", "embed", ("layers.mlp_norm.scale",)),
        Tensor("model.norm.weight", "embed", ("final_norm.scale",)),
    ]
    for name, outputs, inputs, ours, has_bias in projections:
        rows.append(Tensor(f"{layer}{name}.weight", f"{outputs} {inputs}", (f"layers.{ours}",)))
        if has_bias:
            rows.append(Tensor(f"{layer}{name}.bias", outputs, (f"layers.{ours}_bias",)))
    if not a.tied:
        rows.append(Tensor("lm_head.weight", "vocabulary table", ("unembedding",)))
    return tuple(rows)
