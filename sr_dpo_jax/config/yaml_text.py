"""The YAML of configurations and `section.key=value` overrides -> a nested mapping, of which nothing is checked."""

import re
from typing import Any

import yaml

from sr_dpo_jax.errors import UsageError


class _Loader(yaml.SafeLoader):
    """Numbers as in YAML 1.2, and no dates: in YAML 1.1, which PyYAML follows, `5e-7` and `4E-4` are strings."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML's own name; a copy, so that SafeLoader stays as it is)
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse(text: str, *, where: str) -> Any:
    """Reads a YAML text; raises UsageError, which names the place and quotes nothing."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader with one more number format)
    except yaml.MarkedYAMLError as error:  # its own text quotes the line, which may hold what nobody should see
        mark = error.problem_mark or error.context_mark
        place = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UsageError(f"{where}: not valid YAML{place}: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # PyYAML lets the last two through from `!!int abc`
        raise UsageError(f"{where}: not valid YAML: {error}") from error


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Puts the value of `section.key=value`, itself YAML, into a nested mapping; raises UsageError on another form."""
    key_path, equals, value = override.partition("=")
    if not equals or not key_path:
        shown = re.split(r"[^\w.]", override, maxsplit=1)[0]  # not all of it: a value may be a secret
        raise UsageError(f"override {shown!r} is not of the form section.key=value")
    *sections, key = key_path.split(".")
    node: Any = raw
    for depth, section in enumerate(sections):
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise UsageError(f"override {key_path}: {'.'.join(sections[: depth + 1])} is a value, not a section")
    node[key] = parse(value, where=f"override {key_path}")
