"""An `Inspection` as tables for people, at most 100 columns wide, and as JSON."""

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import rich.console
import rich.table
import rich.text

from sr_dpo_jax.commands.inspect.inspect import OPTIMIZERS, Inspection
from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.parallel.chips import GIB, TPUS

COLUMNS = 100
LISTED = 8
"""Longer sequences are told in a few words."""
NOT_COUNTED = (
    "Not counted: activations, the batch, and what compiler and runtime need besides, such as one more copy of the "
    "gradients while micro-batches are added up."
)


def write_json(path: Path, found: Inspection) -> None:
    """Every field, under its name.

    Raises:
      UsageError: the file cannot be written.
    """
    text = json.dumps(dataclasses.asdict(found), indent=2, ensure_ascii=False) + "\n"
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--json {path}: cannot be written ({error.strerror}); name a file in a directory") from error


def print_inspection(found: Inspection) -> None:
    """Writes to standard output; plain text where that is no terminal."""
    console = rich.console.Console(highlight=False)
    console.width = min(console.width, COLUMNS)
    sections = [
        ("Model", _model(found)),
        ("Parameters", _parameters(found)),
        ("Architecture", _facts(_flat(found.architecture))),
        ("Weights", _weights(found)),
        ("Tokenizer", _tokenizer(found)),
        ("The instruction p before a prompt x", _placements(found)),
        (f"Memory a chip, {_mesh(found)}", _memory(found)),
        ("Left for activations, reference.mode=cached", _left(found)),
    ]
    for title, table in sections:
        if table is not None:
            console.print(rich.text.Text(title, style="bold"))
            console.print(table)
            console.print()
    if found.memory:
        console.print(rich.text.Text(NOT_COUNTED))
    for part in found.not_looked_at:
        console.print(rich.text.Text(f"\nNot looked at: {part}"))
    if found.problems:
        console.print(rich.text.Text(f"\n{len(found.problems)} problem(s), for which a run would refuse:", "bold red"))
        for problem in found.problems:
            console.print(rich.text.Text(f"  {problem}"))


def _model(found: Inspection) -> rich.table.Table:
    digest = [] if found.digest is None else [("sha256", found.digest)]
    return _facts([("path", found.path), ("family", found.family), *digest])


def _parameters(found: Inspection) -> rich.table.Table:
    total = sum(found.parameters.values())
    table = _table("part", ">parameters", ">share")
    for part, count in found.parameters.items():
        shown = "tied to the embedding" if part == "unembedding" and not count else f"{count:,}"
        _row(table, part, shown, f"{count / total:.1%}")
    _row(table, "all", f"{total:,}", "")
    return table


def _weights(found: Inspection) -> rich.table.Table:
    if found.weights is None:
        said = {None: "not looked at, see below", True: "see the problems below"}
        said[False] = "none in safetensors: a run needs model.init=random"
        return _facts([("files", said[found.has_weights])])
    table = _table("type", ">tensors", ">size")
    for name, count in found.weights.tensors.items():
        _row(table, name, f"{count:,}", _size(found.weights.tensor_bytes[name]))
    total = _size(sum(found.weights.tensor_bytes.values()))
    _row(table, f"all, in {found.weights.files} file(s)", f"{sum(found.weights.tensors.values()):,}", total)
    return table


def _tokenizer(found: Inspection) -> rich.table.Table | None:
    facts = found.tokenizer
    if facts is None:
        return None
    rows = [
        ("tokens", f"{facts.tokens:,}, largest id {facts.largest_id:,}"),
        ("rows of the embedding", f"{found.architecture['vocabulary_tokens']:,}"),
    ]
    for name, special in facts.special_tokens.items():
        rows.append((name.upper(), "none" if special is None else f"{special[0]!r}, id {special[1]}"))
    rows.append(("BOS before text", _said(facts.bos_before_text)))
    rows.append(("chat template", _said(facts.chat_template)))
    return _facts(rows)


def _placements(found: Inspection) -> rich.table.Table | None:
    if not found.placements:
        return None
    rows = []
    for form, placement in found.placements.items():
        if placement.reason is not None:
            rows.append((form, f"cannot be placed: {placement.reason}"))
            continue
        rows.append((form, f"{placement.head_tokens} tokens before p, {placement.augmentation_tokens} tokens of p"))
        rows.append(("", f"{placement.head!r} p {placement.rest!r} → {placement.response!r}"))
    return _facts(rows)


def _mesh(found: Inspection) -> str:
    return " × ".join(f"{name} {size}" for name, size in found.mesh.items())


def _memory(found: Inspection) -> rich.table.Table | None:
    if not found.memory:
        return None
    table = _table("", *(f">parameters in {dtype}" for dtype in found.memory))
    memories = list(found.memory.values())
    _row(table, "parameters", *(_size(memory.parameters_bytes) for memory in memories))
    _row(table, "gradients in float32", *(_size(memory.gradients_bytes) for memory in memories))
    for name in OPTIMIZERS:
        _row(table, f"state of {name}", *(_size(memory.moments_bytes[name]) for memory in memories))
    _row(table, "online reference in bfloat16", *(_size(memory.online_reference_bytes) for memory in memories))
    for online in (False, True):
        for name in OPTIMIZERS:
            totals = (_size(memory.total_bytes(name, online=online)) for memory in memories)
            _row(table, f"all, {name}, reference {'online' if online else 'cached'}", *totals)
    return table


def _left(found: Inspection) -> rich.table.Table | None:
    if not found.memory:
        return None
    cases = [(dtype, name) for dtype in found.memory for name in OPTIMIZERS]
    table = _table("chip", *(f">{name}, {dtype}" for dtype, name in cases))
    for chip in TPUS:
        left = [chip.memory_gib * GIB - found.memory[dtype].total_bytes(name, online=False) for dtype, name in cases]
        cells = (_size(free) if free > 0 else f"{_size(-free)} too much" for free in left)
        _row(table, f"{chip.name}, {chip.memory_gib} GiB", *cells)
    return table


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Name and text of every field, whatever fields there are; nested ones as `outer.inner`."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        if any(isinstance(item, dict) for item in value):
            for number, item in enumerate(value):
                yield from _flat(item, f"{name}[{number}]")
        else:
            yield name, _sequence(value)
    else:
        yield name, _said(value)


def _sequence(values: Sequence[Any]) -> str:
    if len(values) <= LISTED:
        return ", ".join(_said(value) for value in values)
    counts = Counter(values)
    if len(counts) <= LISTED:
        return ", ".join(f"{_said(value)} ({count} times)" for value, count in counts.items())
    return f"{len(values)} values from {_said(values[0])} to {_said(values[-1])}"


def _said(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)


def _size(count: int) -> str:
    """Bytes in the largest unit of which there is at least one."""
    for unit, size in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"


def _facts(rows: Any) -> rich.table.Table:
    table = rich.table.Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        _row(table, f"  {name}", value)
    return table


def _table(*headings: str) -> rich.table.Table:
    """Columns under these headings; those that start with `>` are aligned to the right."""
    table = rich.table.Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for number, heading in enumerate(headings):
        justify = "right" if heading.startswith(">") else "left"
        name = heading.removeprefix(">")
        table.add_column(rich.text.Text(name if number else f"  {name}"), justify=justify, overflow="fold")
    return table


def _row(table: rich.table.Table, first: str, *cells: str) -> None:
    """Cells are text, never markup: tokens such as [INST] look like it."""
    own = first if not table.show_header else f"  {first}"
    table.add_row(*(rich.text.Text(cell) for cell in (own, *cells)))
