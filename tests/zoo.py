"""Model directories of every family that break naive code, with weights that are a function of the tensors' names.

PyTorch and this package read the same directory; `golden/make.py` keeps PyTorch's answers for tests without PyTorch.
"""

import json
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tiny
from flax import nnx
from safetensors.numpy import save_file
from transformers import AutoConfig

from sr_dpo_jax.batch import Rows
from sr_dpo_jax.weights import directory as weights
from sr_dpo_jax.weights.read import load_params

GOLDEN = Path(__file__).resolve().parent / "golden"
TOKENS = 24
"""Longer than every window below."""

COMMON = {
    "vocab_size": 37,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 28,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 10}  # heads × head_dim = 40, hidden size 24


def rope(rope_type: str, theta: float = 10_000.0, **fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": theta, **fields}}


YARN = rope("yarn", factor=4.0, original_max_position_embeddings=16)
LLAMA3 = rope(
    "llama3",
    theta=500_000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
PLAIN = rope("default")["rope_parameters"]
WINDOWS = {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1}
GEMMA_ROPE = {
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    }
}

CASES: dict[str, dict[str, dict[str, Any]]] = {
    "gpt_neox": {
        "parallel": rope("default", partial_rotary_factor=0.5),
        "sequential, tied": {"use_parallel_residual": False, "tie_word_embeddings": True, **rope("linear", factor=2.0)},
        "no bias, dynamic": {"attention_bias": False, "hidden_act": "gelu_new", **rope("dynamic", factor=2.0)},
    },
    "llama": {
        "llama3 rope": {**GROUPED, **LLAMA3},
        "biases, tied": {**GROUPED, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, **YARN},
        "one key head": {"num_key_value_heads": 1, "vocab_size": 41, **rope("linear", factor=3.0)},
    },
    "mistral": {
        "window": {**GROUPED, "sliding_window": 5},
        "no window, tied": {"num_key_value_heads": 4, "sliding_window": None, "tie_word_embeddings": True},
        "window of 1, yarn": {**GROUPED, "vocab_size": 39, "sliding_window": 1, **YARN},
    },
    "qwen2": {
        "full": {"num_key_value_heads": 2},
        "window from layer 1": {"num_key_value_heads": 2, **WINDOWS},
        "tied, yarn": {"num_key_value_heads": 1, "tie_word_embeddings": True, "vocab_size": 41, **YARN},
    },
    "qwen3": {
        "full": GROUPED,
        "window from layer 1, biases": {**GROUPED, **WINDOWS, "attention_bias": True},
        "tied, yarn": {**GROUPED, "tie_word_embeddings": True, "vocab_size": 39, **YARN},
    },
    "gemma2": {
        "alternating": {**GROUPED, "sliding_window": 4, "tie_word_embeddings": True, "query_pre_attn_scalar": 17},
        "no caps": {**GROUPED, "sliding_window": 6, "attn_logit_softcapping": None, "final_logit_softcapping": None},
        "hard caps": {
            **GROUPED,
            "sliding_window": 3,
            "attn_logit_softcapping": 1.5,
            "final_logit_softcapping": 2.0,
            "attention_bias": True,
            "vocab_size": 41,
            "tie_word_embeddings": True,
        },
    },
    "gemma3_text": {
        "two ropes": {**GROUPED, "sliding_window": 4, "tie_word_embeddings": True, "query_pre_attn_scalar": 17},
        "every second": {
            **GROUPED,
            "sliding_window": 7,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            **GEMMA_ROPE,
        },
        "all local, cap": {
            **GROUPED,
            "sliding_window": 2,
            "final_logit_softcapping": 3.0,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "layer_types": ["sliding_attention"] * 3,
        },
    },
    "phi3": {
        "window": {"num_key_value_heads": 2, "sliding_window": 5},
        "partial rotary": {"vocab_size": 41, "partial_rotary_factor": 0.67, "tie_word_embeddings": True},
        "longrope": {
            "num_key_value_heads": 1,
            "original_max_position_embeddings": 32,
            **rope("longrope", short_factor=[1.0, 1.3, 2.0], long_factor=[2.0, 3.0, 4.0]),
        },
    },
    "olmo2": {
        "grouped": {"num_key_value_heads": 2},
        "biases, tied": {"num_key_value_heads": 1, "attention_bias": True, "tie_word_embeddings": True},
        "yarn": {"num_key_value_heads": 4, "vocab_size": 41, **YARN},
    },
    "olmo3": {
        "window, yarn of full layers": {
            "num_key_value_heads": 2,
            "sliding_window": 5,
            "num_hidden_layers": 5,  # three of four layers have a window
            "rope_parameters": {"full_attention": YARN["rope_parameters"], "sliding_attention": PLAIN},
        },
        "biases, tied": {
            "num_key_value_heads": 1,
            "sliding_window": 3,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
        "no layer with a window": {"sliding_window": 4, "layer_types": ["full_attention"] * 3, "vocab_size": 41},
    },
    "smollm3": {
        "every second layer unrotated": {
            "num_key_value_heads": 2,
            "no_rope_layers": [1, 0, 1],
            "tie_word_embeddings": True,
            **YARN,
        },
        "windows": {
            "num_key_value_heads": 1,
            "num_hidden_layers": 4,
            "no_rope_layer_interval": 2,
            "use_sliding_window": True,
            "sliding_window": 4,
            "attention_bias": True,
            "mlp_bias": True,
        },
        "no layer rotated": {"num_key_value_heads": 4, "no_rope_layers": [0, 0, 0], "vocab_size": 41},
    },
    "granite": {
        "multipliers": {
            "num_key_value_heads": 2,
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.0625,
            "residual_multiplier": 0.22,
            "logits_scaling": 0.25,
            "tie_word_embeddings": True,
        },
        "biases": {
            "num_key_value_heads": 1,
            "attention_bias": True,
            "mlp_bias": True,
            "attention_multiplier": 0.5,
            "residual_multiplier": 1.4,
            "logits_scaling": 3.0,
            **rope("linear", factor=3.0),
        },
        "scores as they are": {"num_key_value_heads": 4, "vocab_size": 41},  # its default multipliers are all 1
    },
    "seed_oss": {
        "biases of q, k and v": GROUPED,
        "biases of all": {**GROUPED, "attention_out_bias": True, "mlp_bias": True, "tie_word_embeddings": True, **YARN},
        "bias of the output": {
            "head_dim": 8,
            "num_key_value_heads": 1,
            "attention_bias": False,
            "attention_out_bias": True,
        },
    },
}
ROPES: dict[str, dict[str, Any]] = {
    "plain": rope("default"),
    "half of the head": rope("default", theta=25_000.0, partial_rotary_factor=0.5),
    "linear": rope("linear", factor=8.0, theta=1_000_000.0),
    "dynamic": rope("dynamic", factor=2.0),
    "Llama 3.1": rope(
        "llama3",
        theta=500_000.0,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    ),
    "Llama 3.2": rope(
        "llama3",
        theta=500_000.0,
        factor=32.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    ),
    "yarn": rope("yarn", theta=1_000_000.0, factor=4.0, original_max_position_embeddings=32_768),
    "yarn, own bounds": rope(
        "yarn", factor=16.0, original_max_position_embeddings=4096, beta_fast=16.5, beta_slow=1.5, attention_factor=1.1
    ),
    "yarn, not truncated": rope("yarn", factor=3.0, original_max_position_embeddings=4096, truncate=False),
    "yarn, mscale": rope("yarn", factor=40.0, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=0.7),
}
"""Scalings as real models have them, each for heads of 128 dimensions and a context of 131,072."""

ALL = [(family, case) for family, cases in CASES.items() for case in cases]


def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Values that depend on the name alone; RandomState's stream is frozen for all versions of NumPy."""
    values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
    return (centre + 0.25 * values).astype(np.float32)


def config_of(family: str, case: str) -> Any:
    return AutoConfig.for_model(family, **(COMMON | CASES[family][case]))


def write(path: Path, family: str, case: str, shapes: dict[str, list[int]]) -> None:
    """A directory of this case with config.json and these tensors; no tokenizer."""
    config_of(family, case).save_pretrained(path)
    tensors = {name: tensor(name, tuple(shape)) for name, shape in shapes.items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def golden(family: str, case: str) -> tuple[np.ndarray, dict[str, list[int]]]:
    """What `golden/make.py` kept of PyTorch's model: logits of `token_ids`, and names and shapes of its tensors."""
    with np.load(GOLDEN / f"{family}.npz", allow_pickle=False) as kept:
        return kept[f"{case}/logits"], json.loads(str(kept[f"{case}/shapes"]))


def token_ids(vocabulary_tokens: int, rows: int = 2) -> np.ndarray:
    return np.random.RandomState(7).randint(0, vocabulary_tokens, (rows, TOKENS)).astype(np.int32)


def logits(model: tiny.Model, params: Any, tokens: np.ndarray) -> np.ndarray:
    """`[rows, T, V]` float32 of plain causal rows, without any of the code for log-probs."""
    every = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    unused = np.zeros((len(tokens), 1), np.int32)
    rows = Rows(tokens, every, np.zeros_like(every), every + 1, unused, unused, unused)

    @jax.jit
    def run(params: Any) -> jax.Array:
        decoder = nnx.merge(model.graph, params)
        raw, cap = decoder(rows)[0] @ decoder.vocabulary_matrix.T, decoder.architecture.logit_cap
        return raw if cap is None else cap * jnp.tanh(raw / cap)

    return np.asarray(run(params))


def load(directory: weights.ModelDirectory, mesh: Any) -> tuple[tiny.Model, Any]:
    """The model and its parameters on a mesh, read as a run reads them."""
    model = tiny.build(directory.architecture, mesh)
    return model, load_params(directory, model.abstract, model.shapes)
