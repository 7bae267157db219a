"""Prints an `Inspection` as tables for people."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from rich.table import Table

from sr_dpo_jax.commands import console
from sr_dpo_jax.commands.console import size
from sr_dpo_jax.commands.inspect.inspect import LORA, OPTIMIZERS, Inspection
from sr_dpo_jax.parallel.chips import GIB, TPUS

LISTED = 8
"""A longer sequence is summed up in a few words."""
NOT_COUNTED = (
    "Not counted: activations, the batch, and what compiler and runtime need besides, such as one more copy of the "
    "gradients while micro-batches are added up."
)
NO_TENSORS = {
    True: "see the problems below",
    False: "none in safetensors: a run needs model.init=random",
    None: "not looked at, see below",
}
"""The words for weights that are not described, by `Inspection.has_weights`."""


def print_inspection(inspection: Inspection) -> None:
    """Prints the inspection to standard output."""
    mesh = " × ".join(f"{name} {size}" for name, size in inspection.mesh.items())
    digest = [] if inspection.digest is None else [("sha256", inspection.digest)]
    console.section("Model", console.facts([("path", inspection.path), ("family", inspection.family), *digest]))
    console.section("Parameters", _parameters(inspection))
    console.section("Architecture", console.facts(_flat(inspection.architecture)))
    console.section("Weights", _weights(inspection))
    console.section("Tokenizer", _tokenizer(inspection))
    console.section("The instruction p before a prompt x", _placements(inspection))
    console.section(f"Memory a chip, {mesh}", _memory(inspection))
    console.section("Left for activations, reference.mode=cached", _left(inspection))
    if inspection.memory:
        console.say(NOT_COUNTED)
    for part in inspection.not_looked_at:
        console.say(f"\nNot looked at: {part}")
    if inspection.problems:
        console.say(f"\n{len(inspection.problems)} problem(s), for which a run would refuse:", "bold red")
        for problem in inspection.problems:
            console.say(f"  {problem}")


def _parameters(inspection: Inspection) -> Table:
    total = sum(inspection.parameters.values())
    table = console.table("part", ">parameters", ">share")
    for part, count in inspection.parameters.items():
        shown = "tied to the embedding" if part == "unembedding" and not count else f"{count:,}"
        console.row(table, part, shown, f"{count / total:.1%}")
    console.row(table, "all", f"{total:,}", "")
    return table


def _weights(inspection: Inspection) -> Table:
    weights = inspection.weights
    if weights is None:
        return console.facts([("files", NO_TENSORS[inspection.has_weights])])
    table = console.table("type", ">tensors", ">size")
    for name, count in weights.tensors.items():
        console.row(table, name, f"{count:,}", size(weights.tensor_bytes[name]))
    count, total = sum(weights.tensors.values()), sum(weights.tensor_bytes.values())
    console.row(table, f"all, in {weights.files} file(s)", f"{count:,}", size(total))
    return table


def _tokenizer(inspection: Inspection) -> Table | None:
    facts = inspection.tokenizer
    if facts is None:
        return None
    special = {
        name.upper(): "none" if token is None else f"{token[0]!r}, id {token[1]}"
        for name, token in facts["special_tokens"].items()
    }
    rows = {
        "tokens": f"{facts['tokens']:,}, largest id {facts['largest_id']:,}",
        "rows of the embedding": f"{inspection.architecture['vocabulary_tokens']:,}",
        **special,
        "BOS before text": _text_of(facts["bos_before_text"]),
        "chat template": _text_of(facts["chat_template"]),
    }
    return console.facts(rows.items())


def _placements(inspection: Inspection) -> Table | None:
    rows = []
    for form, placement in inspection.placements.items():
        if placement.reason is not None:
            rows.append((form, f"cannot be placed: {placement.reason}"))
            continue
        rows.append((form, f"{placement.head_tokens} tokens before p, {placement.augmentation_tokens} tokens of p"))
        rows.append(("", f"{placement.head!r} p {placement.rest!r} → {placement.response!r}"))
    if len({placement.head for form, placement in inspection.placements.items() if form != "text"}) > 1:
        rows.append(("chats of different starts", "p stands in each prompt, not once a row"))
    return console.facts(rows) if rows else None


def _memory(inspection: Inspection) -> Table | None:
    if not inspection.memory:
        return None
    table = console.table("", *(f">parameters in {dtype}" for dtype in inspection.memory))
    memories = inspection.memory.values()
    console.row(table, "parameters", *(size(memory.parameters_bytes) for memory in memories))
    console.row(table, "gradients in float32", *(size(memory.gradients_bytes) for memory in memories))
    for name in OPTIMIZERS:
        console.row(table, f"state of {name}", *(size(memory.moments_bytes[name]) for memory in memories))
    console.row(table, "online reference in bfloat16", *(size(memory.online_reference_bytes) for memory in memories))
    for mode in ("cached", "online"):
        for name in OPTIMIZERS:
            totals = (size(memory.total_bytes(name, online=mode == "online")) for memory in memories)
            console.row(table, f"all, {name}, reference {mode}", *totals)
    adapters = (size(memory.lora_bytes) for memory in memories)
    console.row(table, f"all, adamw, LoRA of rank {LORA.rank} beside bfloat16", *adapters)
    return table


def _left(inspection: Inspection) -> Table | None:
    if not inspection.memory:
        return None
    cases = {
        f">{name}, {dtype}": memory.total_bytes(name, online=False)
        for dtype, memory in inspection.memory.items()
        for name in OPTIMIZERS
    }
    cases[">LoRA"] = inspection.memory["float32"].lora_bytes
    table = console.table("chip", *cases)
    for chip in TPUS:
        left = [chip.memory_gib * GIB - needed for needed in cases.values()]
        cells = (size(free) if free > 0 else f"{size(-free)} too much" for free in left)
        console.row(table, f"{chip.name}, {chip.memory_gib} GiB", *cells)
    return table


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Gives name and text of every field, whatever fields there are; nested ones as `outer.inner`."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, list | tuple) and any(isinstance(item, dict) for item in value):
        for number, item in enumerate(value):
            yield from _flat(item, f"{name}[{number}]")
    else:
        yield name, _text_of(value)


def _text_of(value: Any) -> str:
    """Gives a value as a person writes it."""
    match value:
        case None:
            return "none"
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:g}"
        case list() | tuple() if len(value) <= LISTED:
            return ", ".join(map(_text_of, value))
        case list() | tuple() if len(counts := Counter(value)) <= LISTED:
            return ", ".join(f"{_text_of(item)} ({count} times)" for item, count in counts.items())
        case list() | tuple():
            return f"{len(value)} values from {_text_of(value[0])} to {_text_of(value[-1])}"
    return str(value)
