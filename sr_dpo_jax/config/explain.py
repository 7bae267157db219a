"""Errors of a configuration in words: secrets that it holds, and pydantic's errors as key path, value and remedy."""

import difflib
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel

from sr_dpo_jax.config.section import TWIN
from sr_dpo_jax.redaction import holds_secret, is_secret_name, redact


def secrets_in(node: Any, key_path: tuple[str, ...] = ()) -> Iterator[str]:
    """Names the keys that hold or ask for a secret, without their values: nothing that is written could show them."""
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
    """Turns one of pydantic's errors into key path, value and remedy; `root` is the model that was validated."""
    location, sections = _walk([str(part) for part in item["loc"]], root)
    key_path, parent = ".".join(location), sections[-1]
    match item["type"]:
        case "missing":
            field = parent[0].model_fields.get(location[-1])
            about = " ".join(((field and field.description) or "").split())
            return f"  {key_path}: missing; set it in the file or with {key_path}=... {about}".rstrip()
        case "union_tag_not_found":
            if not isinstance(item["input"], dict):
                names = _names(parent)
                return f"  {key_path}={item['input']!r}: is no section; write {key_path}: {{name: ...}}, one of {names}"
            return f"  {key_path}.name: missing; set it to one of {_names(parent)}"
        case "union_tag_invalid":
            return _unknown_name(f"{key_path}.name", item["ctx"]["tag"], parent)
        case "extra_forbidden":
            name = str(item["loc"][-2]) if len(item["loc"]) > 1 else ""
            return _unknown(key_path, location[-1], item["input"], sections, name)
    return f"  {key_path}={item['input']!r}: {item['msg']}"


def _unknown_name(key_path: str, name: str, kinds: Sequence[type[BaseModel]]) -> str:
    """Says what to do about a name that no kind of its section has."""
    names, plain = [known for kind in kinds for known in _names_of(kind)], name.removeprefix(TWIN)
    if plain != name and plain in names:
        return (
            f"  {key_path}={name!r}: {plain} has no refined form, as its loss has no margin that Δ could shift; choose "
            f"{plain}, or another of {_names(kinds)}"
        )
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"  {key_path}={name!r}: not known; {hint}choose one of {_names(kinds)}"


def _unknown(key_path: str, key: str, value: Any, sections: Sequence[list[type[BaseModel]]], name: str) -> str:
    """Says what to do about a key that its section, of this name if there are several kinds of it, does not have."""
    (section,), alternatives = sections[-1], sections[-2] if len(sections) > 1 else []
    others = [kind for kind in alternatives if key in kind.model_fields]
    if others:  # the section's name decides which keys it has
        names = [other for kind in others for other in _names_of(kind)]
        if TWIN + name in names:  # the same loss, refined
            return f"  {key_path}={value!r}: {name} does not take it; remove it, or choose {TWIN + name}"
        only = f"only {_names(others)} {'takes' if len(names) == 1 else 'take'} it"
        return f"  {key_path}={value!r}: {only}; remove it, or choose {names[0] if len(names) == 1 else 'one of them'}"
    known = list(section.model_fields)
    elsewhere = [name for kind in alternatives for name in kind.model_fields]
    close = difflib.get_close_matches(key, [*known, *elsewhere], n=1)
    hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
    return f"  {key_path}: no such key; {hint}"


def _walk(location: Sequence[str], root: type[BaseModel]) -> tuple[list[str], list[list[type[BaseModel]]]]:
    """Follows pydantic's location from the root.

    Returns:
      The key path, without the names that pydantic puts in to say which kind of a section was tried; and the sections
      on the way, each as the list of its kinds: the last is where the error is, the one before it is what the last was
      chosen from where it was. An entry of a list or mapping of sections is one of those, whatever it is called.
    """
    path, sections, at_value = [], [[root]], False
    for part in location:
        kinds = sections[-1]
        if at_value and not part.isdigit():  # says which type of a value was tried
            continue
        if len(kinds) > 1 and any(part in _names_of(kind) for kind in kinds):
            sections.append([kind for kind in kinds if part in _names_of(kind)])
            continue
        path.append(part)
        if len(kinds) == 1 and part in kinds[0].model_fields:
            inner = list(_sections_in(kinds[0].model_fields[part].annotation))
            at_value = not inner
            if inner:
                sections.append(inner)
    return path, sections


def _names_of(kind: type[BaseModel]) -> tuple[str, ...]:
    """Lists the values of `name` that choose this kind of section."""
    return get_args(kind.model_fields["name"].annotation) if "name" in kind.model_fields else ()


def _names(kinds: Sequence[type[BaseModel]]) -> str:
    """Lists the names of these kinds; [sr_]NAME stands for a loss and its refined twin."""
    names = [name for kind in kinds for name in _names_of(kind)]
    twins = {TWIN + name for name in names} & {*names}
    return ", ".join(f"[{TWIN}]{name}" if TWIN + name in twins else name for name in names if name not in twins)


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _sections_in(part)
