"""One table for each model family: config fields -> Architecture, and tensor names <-> parameters, in both directions.

A table row names a tensor, the parameters it holds and its layout, written as axes in the order of its memory, with
parentheses around axes that the file keeps as one dimension. The layout of a parameter stands in its own metadata, so
import and export need nothing else.

Next: `layout.py`, which does the arithmetic of a row.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.model.architecture import Architecture, LayerKind, Rope
from sr_dpo_jax.weights.rope import rope_of


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One row of a family's table."""

    name: str
    """The name in the file; `{layer}` stands for the layer's number."""
    layout: str
    """The axes as they lie in memory, e.g. `(heads part head_dim) embed`; for keys and values `heads` means `kv_heads`.

    `part` runs over the parameters of a fused tensor. Without it, several parameters stand one after the other along
    the first dimension, each with its own size there.
    """
    params: tuple[str, ...]
    """The paths of the parameters in the tree, in the order in which the tensor holds them."""


def require_known(model_type: Any, *, where: str) -> None:
    """Refuses a config that names no family, or one that has no table here.

    Raises:
      UsageError: names the value and the families that are known.
    """
    known = ", ".join(FAMILIES)
    if model_type is None:
        raise UsageError(
            f"{where}: has no model_type, which names the family; restore the model's own config.json, or add one of "
            f"{known}"
        )
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        hint = "; its text-only form, gemma3_text, is" if model_type == "gemma3" else ""
        raise UsageError(f"{where}: model_type={model_type!r} is not supported{hint}; known: {known}")


def tensors_of(architecture: Architecture, model_type: str) -> tuple[Tensor, ...]:
    """Lists the tensors that the weight files of this architecture hold, one row for all layers."""
    if model_type == "gpt_neox":
        return tuple(_gpt_neox_tensors(architecture))
    norms = LLAMA_NORMS if not architecture.norm_outputs else GEMMA_NORMS if architecture.norm_inputs else OLMO2_NORMS
    return tuple(_llama_tensors(architecture, norms, fused=model_type == "phi3"))


# Configs


FAMILIES = (
    *("gpt_neox", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2", "olmo3"),
    *("smollm3", "granite", "seed_oss"),
)
"""The values of `model_type` that are known; Mistral and Phi-3 differ from the shared fields in nothing."""
PARTIAL_ROTARY = ("gpt_neox", "phi3")
"""Families that turn a part of each head where a config says so; transformers' other models would turn all of it."""
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "silu": "silu",
}
"""Names of activations in configs, and in `Architecture`."""


def architecture_of(config: Any, *, where: str) -> Architecture:
    """Reads an architecture from the fields that most families share, as Llama has them, and the family's choices.

    Args:
      config: a transformers config of a known family.
      where: names the file in errors.

    Raises:
      UsageError: something that the config asks for is not supported; names the field and its value.
    """
    choices = _choices(config, where)
    activation = "hidden_activation" if hasattr(config, "hidden_activation") else "hidden_act"
    if getattr(config, activation) not in ACTIVATIONS:
        _refuse(where, activation, getattr(config, activation), ", ".join(ACTIVATIONS))
    if "kinds" not in choices:
        choices = choices | _kinds(config, where, {"": getattr(config, "sliding_window", None)})
    shared = {
        "vocabulary_tokens": config.vocab_size,
        "hidden": config.hidden_size,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "kv_heads": getattr(config, "num_key_value_heads", config.num_attention_heads),
        "head_dim": _head_dim(config),
        "mlp": config.intermediate_size,
        "context_tokens": config.max_position_embeddings,
        "query_scale": _head_dim(config) ** -0.5,
        "norm_epsilon": getattr(config, "rms_norm_eps", None),
        "activation": ACTIVATIONS[getattr(config, activation)],
        "tied": config.tie_word_embeddings,
        "init_scale": config.initializer_range,
    }
    if shared["heads"] % shared["kv_heads"]:
        _refuse(where, "num_key_value_heads", shared["kv_heads"], f"divisors of {shared['heads']} heads")
    return Architecture(**shared | choices)


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _kinds(config: Any, where: str, windows: dict[str, int | None]) -> dict[str, Any]:
    """Gives `kinds` and `kind_of_layer` from the window of each layer type; the key "" stands for all layers alike."""
    layer_types = [""] * config.num_hidden_layers if "" in windows else list(config.layer_types)
    unknown = sorted(set(layer_types) - set(windows))
    if unknown:
        _refuse(where, "layer_types", unknown, ", ".join(windows))
    names = sorted(set(layer_types))
    kinds = []
    for name in names:
        if windows[name] is not None and windows[name] < 1:
            _refuse(where, "sliding_window", windows[name], "null and positive numbers of tokens")
        parameters = config.rope_parameters.get(name, config.rope_parameters)  # one for all layers, or one a type
        share = parameters.get("partial_rotary_factor", 1.0)
        if share != 1.0 and config.model_type not in PARTIAL_ROTARY:
            _refuse(where, "partial_rotary_factor", share, f"1.0 for {config.model_type}")
        context = config.max_position_embeddings
        rope = rope_of(parameters, head_dim=_head_dim(config), context_tokens=context, where=where)
        kinds.append(LayerKind(rope, windows[name]))
    return {"kinds": tuple(kinds), "kind_of_layer": tuple(names.index(name) for name in layer_types)}


def _alternating(config: Any, where: str) -> dict[str, Any]:
    if config.sliding_window is None and "sliding_attention" in config.layer_types:
        _refuse(where, "sliding_window", None, "a number of tokens, where layer_types has sliding_attention")
    return _kinds(config, where, {"full_attention": None, "sliding_attention": config.sliding_window})


def _unrotated(config: Any, where: str) -> dict[str, Any]:
    """Gives `kinds` and `kind_of_layer` where `no_rope_layers` has a 0 for each layer that rotates nothing."""
    rotated = _alternating(config, where)
    flags = config.no_rope_layers
    if len(flags) < config.num_hidden_layers:
        _refuse(where, "no_rope_layers", flags, f"a 0 or 1 for each of the {config.num_hidden_layers} layers")
    of_layer = [rotated["kinds"][number] for number in rotated["kind_of_layer"]]
    of_layer = [
        kind if flag else dataclasses.replace(kind, rope=Rope(())) for kind, flag in zip(of_layer, flags, strict=False)
    ]
    kinds = tuple(dict.fromkeys(of_layer))
    return {"kinds": kinds, "kind_of_layer": tuple(map(kinds.index, of_layer))}


_OLMO = {"head_norm": "all", "norm_inputs": False, "norm_outputs": True}


def _choices(config: Any, where: str) -> dict[str, Any]:
    """Gives the fields in which a family differs from the shared ones and from the defaults of `Architecture`."""
    biases = {name: getattr(config, "attention_bias", False) for name in ("query_bias", "output_bias")}
    match config.model_type:
        case "gpt_neox":
            return biases | {
                "norm": "layer",
                "norm_epsilon": config.layer_norm_eps,
                "parallel_residual": config.use_parallel_residual,
                "gated": False,
                "mlp_bias": True,
            }
        case "llama":
            return biases | {"mlp_bias": config.mlp_bias} | _kinds(config, where, {"": None})
        case "qwen2":
            return {"query_bias": True} | _alternating(config, where)
        case "qwen3":
            return biases | {"head_norm": "head"} | _alternating(config, where)
        case "gemma2":
            return biases | _gemma(config, where) | {"attention_cap": config.attn_logit_softcapping}
        case "gemma3_text":
            if config.attn_logit_softcapping is not None:
                _refuse(where, "attn_logit_softcapping", config.attn_logit_softcapping, "null for gemma3_text")
            return biases | _gemma(config, where) | {"head_norm": "head"}
        case "olmo2":
            return biases | _OLMO
        case "olmo3":
            return biases | _OLMO | _alternating(config, where)
        case "smollm3":
            return biases | {"mlp_bias": config.mlp_bias} | _unrotated(config, where)
        case "granite":
            if not config.logits_scaling:
                _refuse(where, "logits_scaling", config.logits_scaling, "numbers other than 0")
            factors = {
                "embedding_scale": config.embedding_multiplier,
                "query_scale": config.attention_multiplier,
                "residual_scale": config.residual_multiplier,
                "logit_scale": 1 / config.logits_scaling,
            }
            return biases | {"mlp_bias": config.mlp_bias} | factors | _kinds(config, where, {"": None})
        case "seed_oss":
            output = {"output_bias": config.attention_out_bias, "mlp_bias": config.mlp_bias}
            return biases | output | _kinds(config, where, {"": None})
    return {}


def _gemma(config: Any, where: str) -> dict[str, Any]:
    if config.use_bidirectional_attention:
        _refuse(where, "use_bidirectional_attention", True, "false")
    choices = {
        "query_scale": config.query_pre_attn_scalar**-0.5,
        "logit_cap": config.final_logit_softcapping,
        "norm_offset": 1.0,
        "norm_outputs": True,
        "embedding_scale": config.hidden_size**0.5,
    }
    return choices | _alternating(config, where)


def _refuse(where: str, field: str, value: Any, supported: str) -> None:
    raise UsageError(f"{where}: {field}={value!r} is not supported; supported: {supported}")


# Tensors


LLAMA_NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
OLMO2_NORMS = {
    "post_attention_layernorm": "attention_output_norm",
    "post_feedforward_layernorm": "mlp_output_norm",
}
GEMMA_NORMS = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "attention_output_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_output_norm",
}


def _gpt_neox_tensors(a: Architecture) -> Iterator[Tensor]:
    layer, heads = "gpt_neox.layers.{layer}.", ("query", "key", "value")
    fused = tuple(f"layers.attention.{name}" for name in heads)
    yield Tensor("gpt_neox.embed_in.weight", "vocabulary table", ("embedding",))
    yield Tensor(layer + "attention.query_key_value.weight", "(heads part head_dim) embed", fused)
    yield Tensor(layer + "attention.dense.weight", "embed (heads head_dim)", ("layers.attention.output",))
    yield Tensor(layer + "mlp.dense_h_to_4h.weight", "mlp embed", ("layers.mlp.up",))
    yield Tensor(layer + "mlp.dense_h_to_4h.bias", "mlp", ("layers.mlp.up_bias",))
    yield Tensor(layer + "mlp.dense_4h_to_h.weight", "embed mlp", ("layers.mlp.down",))
    yield Tensor(layer + "mlp.dense_4h_to_h.bias", "embed", ("layers.mlp.down_bias",))
    for file_name, ours in (
        (layer + "input_layernorm", "layers.attention_norm"),
        (layer + "post_attention_layernorm", "layers.mlp_norm"),
        ("gpt_neox.final_layer_norm", "final_norm"),
    ):
        yield Tensor(f"{file_name}.weight", "embed", (f"{ours}.scale",))
        yield Tensor(f"{file_name}.bias", "embed", (f"{ours}.bias",))
    if a.query_bias:
        biases = tuple(f"{path}_bias" for path in fused)
        yield Tensor(layer + "attention.query_key_value.bias", "(heads part head_dim)", biases)
        yield Tensor(layer + "attention.dense.bias", "embed", ("layers.attention.output_bias",))
    if not a.tied:
        yield Tensor("embed_out.weight", "vocabulary table", ("unembedding",))


def _llama_tensors(a: Architecture, norms: dict[str, str], *, fused: bool) -> Iterator[Tensor]:
    layer = "model.layers.{layer}."
    yield Tensor("model.embed_tokens.weight", "vocabulary table", ("embedding",))
    for file_name, ours in norms.items():
        yield Tensor(f"{layer}{file_name}.weight", "embed", (f"layers.{ours}.scale",))
    if a.head_norm != "none":
        layout = "head_dim" if a.head_norm == "head" else "(heads head_dim)"
        yield Tensor(layer + "self_attn.q_norm.weight", layout, ("layers.attention.query_norm.scale",))
        yield Tensor(layer + "self_attn.k_norm.weight", layout, ("layers.attention.key_norm.scale",))
    heads, units = ("query", "key", "value"), ("gate", "up")
    if fused:
        inputs = [("self_attn.qkv_proj", "(heads head_dim)", heads), ("mlp.gate_up_proj", "mlp", units)]
    else:
        inputs = [(f"self_attn.{name[0]}_proj", "(heads head_dim)", (name,)) for name in heads]
        inputs += [(f"mlp.{name}_proj", "mlp", (name,)) for name in units]
    for file_name, outputs, names in inputs:
        part, has_bias = ("attention", a.query_bias) if names[0] in heads else ("mlp", a.mlp_bias)
        paths = tuple(f"layers.{part}.{name}" for name in names)
        yield Tensor(f"{layer}{file_name}.weight", f"{outputs} embed", paths)
        if has_bias:
            yield Tensor(f"{layer}{file_name}.bias", outputs, tuple(f"{path}_bias" for path in paths))
    yield Tensor(layer + "self_attn.o_proj.weight", "embed (heads head_dim)", ("layers.attention.output",))
    yield Tensor(layer + "mlp.down_proj.weight", "embed mlp", ("layers.mlp.down",))
    if a.output_bias:
        yield Tensor(layer + "self_attn.o_proj.bias", "embed", ("layers.attention.output_bias",))
    if a.mlp_bias:
        yield Tensor(layer + "mlp.down_proj.bias", "embed", ("layers.mlp.down_bias",))
    yield Tensor("model.norm.weight", "embed", ("final_norm.scale",))
    if not a.tied:
        yield Tensor("lm_head.weight", "vocabulary table", ("unembedding",))
