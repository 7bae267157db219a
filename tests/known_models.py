"""config.json of models as they are on the hub, from their published architecture numbers: enough to compile for."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA3_8B: dict[str, Any] = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 14_336,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_parameters": LLAMA3_ROPE,
}
MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "pythia-2.8b": (
        "gpt_neox",
        {
            "vocab_size": 50_304,
            "hidden_size": 2560,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "intermediate_size": 10_240,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25},
        },
        2_775_208_960,
    ),
    "mistral-7b": (
        "mistral",
        {
            "vocab_size": 32_000,
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 14_336,
            "max_position_embeddings": 32_768,
            "sliding_window": 4096,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
        },
        7_241_732_096,
    ),
    "llama-3.2-1b": (
        "llama",
        LLAMA3_8B
        | {
            "hidden_size": 2048,
            "num_hidden_layers": 16,
            "head_dim": 64,
            "intermediate_size": 8192,
            "tie_word_embeddings": True,
            "rope_parameters": LLAMA3_ROPE | {"factor": 32.0},
        },
        1_235_814_400,
    ),
    "llama-3.1-8b": ("llama", LLAMA3_8B, 8_030_261_248),
    "llama-3.1-70b": (
        "llama",
        LLAMA3_8B
        | {
            "hidden_size": 8192,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "intermediate_size": 28_672,
        },
        70_553_706_496,
    ),
    "qwen3-8b": (
        "qwen3",
        {
            "vocab_size": 151_936,
            "hidden_size": 4096,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 12_288,
            "max_position_embeddings": 40_960,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        },
        8_190_735_360,
    ),
}
"""Family, fields of config.json, and how many parameters the model is published with."""


def model_directory(root: Path, name: str) -> Path:
    """A directory with this model's config.json and nothing else."""
    family, fields, _ = MODELS[name]
    AutoConfig.for_model(family, **fields).save_pretrained(root / name)
    return root / name
