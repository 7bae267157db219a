"""What is wrong with a nested mapping as a configuration, in words: secrets in it, pydantic's errors as remedies."""

import difflib
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel

from sr_dpo_jax.redaction import holds_secret, is_secret_name, redact


def secrets_in(node: Any, key_path: tuple[str, ...] = ()) -> Iterator[str]:
    """Keys that hold or ask for a secret. Values are not shown, and nothing that is written could show them later."""
    if isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            here = (*key_path, str(key))
            if isinstance(node, dict) and is_secret_name(str(key)):
                yield f"  {redact('.'.join(here))}: secrets come from the environment alone (HF_TOKEN); remove the key"
            else:
                yield from secrets_in(value, here)
    elif isinstance(node, str) and holds_secret(node):
        yield f"  {redact('.'.join(key_path))}: its value holds a secret; secrets come from the environment alone"


def explain(item: Any, root: type[BaseModel]) -> str:
    """One of pydantic's errors as key path, value and remedy; `root` is the model that was validated."""
    location = [str(part) for part in item["loc"]]
    key_path = ".".join(location)
    if item["type"] == "missing":
        return f"  {key_path}: missing; set it in the file or with {key_path}=..."
    if item["type"] == "extra_forbidden":
        known = list(_section_at(location[:-1], root).model_fields)
        close = difflib.get_close_matches(location[-1], known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
        return f"  {key_path}: no such key; {hint}"
    return f"  {key_path}={item['input']!r}: {item['msg']}"


def _section_at(location: Sequence[str], section: type[BaseModel]) -> type[BaseModel]:
    """The section at a key path. An entry of a list or mapping of sections is one of those, whatever it is called."""
    for name in location:
        if name in section.model_fields:
            section = next(_sections_in(section.model_fields[name].annotation), section)
    return section


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _sections_in(part)
