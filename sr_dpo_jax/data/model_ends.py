"""The tokens that end a response, as the model's own files and its tokenizer name them."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from sr_dpo_jax.errors import UsageError


def end_tokens(tokenizer: PreTrainedTokenizerBase, directory: Path) -> tuple[int, ...]:
    """Lists the ids that end a response: the tokenizer's EOS token and those that the model's files name."""
    config, generation = model_files(directory)
    named = as_list(generation.get("eos_token_id")) or as_list(config.get("eos_token_id"))
    return tuple(sorted({tokenizer.eos_token_id, *named}))


def model_files(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads config.json and generation_config.json themselves.

    A trap: transformers fills missing fields with defaults, which the model's authors never stated.
    """
    return _fields(directory / "config.json"), _fields(directory / "generation_config.json")


def _fields(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UsageError(f"{path}: not valid JSON ({error}); restore the file") from error
    if not isinstance(fields, dict):
        raise UsageError(f"{path}: holds {type(fields).__name__}, not an object; restore the file")
    return fields


def as_list(value: Any) -> list[Any]:
    """Gives a field of a model's files that holds one value, several or none as a list."""
    return value if isinstance(value, list) else [] if value is None else [value]
