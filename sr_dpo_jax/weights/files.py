"""The files of a model directory: finds the weight files, reads their headers, and refuses links that leave it.

Next: `directory.py`, which compares them with what the architecture asks for.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.weights.hub import Header, blobs_of, unfinished

CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""Every file that transformers may read for a tokenizer of these families, its chat template included."""
TEMPLATES = "additional_chat_templates"
"""The folder of further chat templates, `*.jinja`."""
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
OTHER_WEIGHTS = re.compile(
    r"^(pytorch_model|tf_model|flax_model|model|consolidated).*\.(bin|ptw?|pth|ckpt|h5|msgpack)$|\.gguf$"
)
"""The names of weight files in formats that are never read."""
ONLY_SAFETENSORS = (
    "only safetensors weights are read (no .bin, which can hold code that runs when it is loaded); save the model "
    "again with save_pretrained, which writes safetensors"
)
FLOATS = {"F16": np.float16, "BF16": ml_dtypes.bfloat16, "F32": np.float32, "F64": np.float64}
"""The types of weights that are read, by the names that safetensors gives them."""
LISTED = 40
"""The most problems of a directory that an error names."""


def weight_files(directory: Path) -> tuple[list[Path], dict[str, str] | None]:
    """Lists the files that should hold the weights, with the index's `weight_map`, or None where one file holds all.

    Raises:
      UsageError: the index is damaged, stands beside a single file, or names what is not a file of the directory.
    """
    index = directory / INDEX
    for name in (INDEX, SINGLE):
        refuse_escape(directory, name)
    if not index.exists():
        return [directory / SINGLE], None
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UsageError(f"{index}: damaged index (no weight_map); fetch it again")
    names = {name if isinstance(name, str) else repr(name) for name in weight_map.values()}
    odd = sorted(n for n in names if not (_is_bare_name(n) and n.endswith(".safetensors") and len(n) < 200))
    if odd:
        listed = ", ".join(map(repr, odd[:LISTED]))
        raise UsageError(f"{index}: weight_map names {listed}, no bare name of a safetensors file; nothing was read")
    for name in names:
        refuse_escape(directory, name)
    if SINGLE not in names and (directory / SINGLE).exists():
        raise UsageError(f"{index}: stands beside {SINGLE}, and only one can be meant; delete the other")
    return [directory / name for name in sorted(names)], weight_map


def other_weights(names: Iterable[str]) -> list[str]:
    """Picks the names of weight files in formats that are never read."""
    return sorted(name for name in names if OTHER_WEIGHTS.search(name))


def read_headers(files: Iterable[Path]) -> dict[Path, Header | str]:
    """Reads the header of each file; a file that cannot be read gets the reason in its place."""
    return {path: _header(path) for path in files}


def _header(path: Path) -> Header | str:
    if not path.is_file():
        return f"{path}: missing; {_why_missing(path.parent)}"
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError, ValueError) as error:
        return f"{path}: damaged or unreadable safetensors file ({error}); fetch it again"


def _why_missing(directory: Path) -> str:
    """Says what the directory holds in place of the weights, and what to do."""
    if cut_short := unfinished(directory):
        return f"{cut_short[0]} is a download that was cut short; fetch the model again, to its end"
    names = sorted(path.name for path in directory.iterdir())
    if others := other_weights(names):
        return f"{others[0]} is not read: {ONLY_SAFETENSORS}"
    if any(name.endswith(".safetensors") for name in names):
        return "other files of the weights stand beside it, so they are not whole; fetch the model again, to its end"
    return (
        "only safetensors weights are read (no .bin). To draw the weights from the seed instead, set model.init=random"
    )


def read_json(path: Path) -> Mapping[str, Any]:
    """Reads a file that holds one JSON object; raises UsageError where it does not."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: neither UTF-8 nor JSON
        raise UsageError(f"{path}: damaged, no valid JSON ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise UsageError(f"{path}: damaged, holds {type(value).__name__} instead of an object; fetch it again")
    return value


def _is_bare_name(name: Any) -> bool:
    return isinstance(name, str) and name.isprintable() and not re.search(r"^\.{0,2}$|[/\\]", name)


def refuse_other_tokenizers(directory: Path) -> None:
    """Refuses a `fast_tokenizer_files` that leads out of the directory: transformers would read tokenizers from there.

    Raises:
      UsageError: a name has folders in it, or is a link that leaves the directory.
    """
    path = directory / "tokenizer_config.json"
    named = read_json(path).get("fast_tokenizer_files") if path.is_file() else None
    for name in named if isinstance(named, list) else [] if named is None else [named]:
        if not _is_bare_name(name):
            raise UsageError(f"{path}: fast_tokenizer_files names {name!r}, no bare file name; nothing was read")
        refuse_escape(directory, name)


def refuse_escape(directory: Path, name: str) -> None:
    """Refuses a link that leads out of the directory; the links of a hub snapshot may lead to the cache's blobs.

    Raises:
      UsageError: names the link.
    """
    home = Path(os.path.realpath(directory))
    target = Path(os.path.realpath(directory / name))
    if not any(target.is_relative_to(allowed) for allowed in (home, *blobs_of(home))):
        raise UsageError(f"{directory / name}: is a link that leaves the directory, so it is not read; copy the file")
