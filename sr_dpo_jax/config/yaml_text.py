"""The YAML of configurations and `section.key=value` overrides -> a nested mapping, of which nothing is checked.

Scalars are those of YAML 1.2's core schema: `yes` is text, `010` is ten, `1:30` is text, `5e-7` is a number. PyYAML
follows YAML 1.1, where they are true, eight, ninety and text.
"""

import re
from collections.abc import Iterator
from typing import Any

import yaml

from sr_dpo_jax.errors import UsageError

MOST_VALUES = 10_000
"""The most values that a file may stand for once its aliases are followed: nine lines can stand for a billion."""
CORE_SCHEMA = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    "merge": (r"<<", ["<"]),  # of YAML 1.1; kept, as a section may be shared so
}
"""The pattern of each type of plain scalar and the characters that it may begin with; the first that fits counts."""
TAG, CONTAINERS = "tag:yaml.org,2002:", ("map", "seq", "str")
MOST_DIGITS = 1000
"""The most characters of a number; Python refuses to convert thousands of digits."""
PLAIN_KEY = re.compile(r"[\w-]{1,60}")
"""A key that a message may show; another may be anything."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (PyYAML's own name)


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would take for something else."""


for _type, (_pattern, _first) in CORE_SCHEMA.items():
    _Loader.add_implicit_resolver(f"{TAG}{_type}", re.compile(rf"^(?:{_pattern})$"), _first)
    _Dumper.add_implicit_resolver(f"{TAG}{_type}", re.compile(rf"^(?:{_pattern})$"), _first)
_Loader.add_constructor(
    f"{TAG}int",
    lambda loader, node: int(node.value, 0 if node.value.startswith(("0o", "0x")) else 10),
)


def parse(text: str, *, where: str) -> Any:
    """Reads a YAML text.

    Raises:
      UsageError: it is no YAML, a key stands twice in a mapping, aliases stand for too much or for themselves, or a
        text holds what no file or path can; names the place and quotes no value.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _Check(where).size_of(node, "")
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:  # its own text quotes the line, which may hold what nobody should see
        mark = error.problem_mark or error.context_mark
        place = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UsageError(f"{where}: not valid YAML{place}: {error.problem or error.context}") from None
    except yaml.reader.ReaderError as error:
        raise UsageError(
            f"{where}: not valid YAML: character {error.position + 1} (#x{error.character:04x}) is not allowed"
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{where}: not valid YAML: {error}") from error


def dump(value: Any) -> str:
    """Writes a nested mapping so that `parse` gives an equal one."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Check:
    """Walks the nodes of a file, aliases followed, and refuses what no configuration can be."""

    def __init__(self, where: str):
        self._where, self._above = where, set[int]()
        self._sizes: dict[int, int] = {}

    def size_of(self, node: yaml.Node, path: str) -> int:
        """Counts the values that a node stands for; `path` names it in messages."""
        place = f"{self._where}: {path}" if path else self._where
        if id(node) in self._above:
            raise UsageError(f"{place} is an alias of what it stands in; write its value")
        if id(node) not in self._sizes:
            self._above.add(id(node))
            self._sizes[id(node)] = size = 1 + sum(self.size_of(*child) for child in self._children(node, path))
            self._above.remove(id(node))
            if size > MOST_VALUES:
                raise UsageError(f"{place}: stands for more than {MOST_VALUES:,} values, aliases followed; write less")
            self._require_schema(node, place)
            bad = re.search(r"[\0\ud800-\udfff]", node.value) if isinstance(node, yaml.ScalarNode) else None
            if bad:
                raise UsageError(f"{place}: holds U+{ord(bad[0]):04X}, which no file or path can; remove it")
        return self._sizes[id(node)]

    def _require_schema(self, node: yaml.Node, place: str) -> None:
        """Refuses a tag, such as `!!set`, that is not of the core schema, and a scalar that is not of its type."""
        kind = node.tag.removeprefix(TAG)
        if kind in CONTAINERS:
            return
        if kind not in CORE_SCHEMA:
            raise UsageError(f"{place}: not valid YAML here: a tag that no configuration needs; remove it")
        pattern, _ = CORE_SCHEMA[kind]
        if not isinstance(node, yaml.ScalarNode) or not re.fullmatch(pattern, node.value):
            raise UsageError(f"{place}: is not of the type that its tag says, {kind}; correct it")
        if kind in ("int", "float") and len(node.value) > MOST_DIGITS:
            raise UsageError(f"{place}: a number of {len(node.value)} characters; write less")

    def _children(self, node: yaml.Node, path: str) -> Iterator[tuple[yaml.Node, str]]:
        if isinstance(node, yaml.SequenceNode):
            yield from ((entry, f"{path}.{number}") for number, entry in enumerate(node.value))
        elif isinstance(node, yaml.MappingNode):
            seen = set()
            for key, value in node.value:
                shown = key.value if isinstance(key.value, str) and PLAIN_KEY.fullmatch(key.value) else "a key"
                here = f"{path}.{shown}".lstrip(".")
                if isinstance(key, yaml.ScalarNode):
                    if key.value in seen:
                        line = key.start_mark.line + 1
                        raise UsageError(f"{self._where}: {here} stands twice, again in line {line}; remove one")
                    seen.add(key.value)
                yield key, here
                yield value, here


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
