"""Prints a `Report` of `sr-dpo compile` as tables for people, and writes it as JSON."""

import dataclasses
from pathlib import Path

from rich.table import Table

from sr_dpo_jax.commands import console
from sr_dpo_jax.commands.compile.programs import RUNTIME_SHARE, Program
from sr_dpo_jax.commands.compile.search import LORA, Report, arguments_text
from sr_dpo_jax.parallel.chips import GIB, chip_of

NOTES = (
    "Cycles are the compiler's own estimates, loops multiplied out; they hold no communication, and attention kernels "
    "stand in them at the peak of the matrix unit. So the step time is a lower bound, and its MFU an upper one."
)
QUICK_NOTE = (
    "--quick: the compiler made its least effort. Memory is close to that of a run; cycles are far too many and are "
    "left out."
)
MEMORY = {
    "arguments": "argument_bytes",
    "temporaries": "temporary_bytes",
    "new outputs": "output_bytes",
    "code": "code_bytes",
    "beside it: optimizer state, online reference": "resident_bytes",
    "peak": "peak_bytes",
    "the chip has": "hbm_bytes",
}
"""The rows of the table of memory, and the fields of `Program` that they show."""
WARNINGS = {
    "loops of unknown length, counted once": "unknown_loops",
    "kernels without an estimate": "unknown_kernels",
    "operations repeated to save memory": "repeated_operations",
}
"""Rows that are shown where a program has any, and the fields of `Program` that count them."""


def write_json(path: Path, report: Report) -> None:
    """Writes every field under its name, with `fits` beside `compiled` and in every attempt.

    Raises:
      UsageError: the file cannot be written.
    """
    document = dataclasses.asdict(report)
    document["fits"] = report.compiled.fits
    for written, attempt in zip(document["attempts"], report.attempts, strict=True):
        written["fits"] = attempt.fits
    document["remedy"] = None if report.remedy is None else report.remedy.overrides
    console.write_json(path, document)


def print_report(report: Report) -> None:
    """Prints the report to standard output."""
    compiled = report.compiled
    console.section("What was compiled", _facts(report))
    console.section("Bytes a chip", _memory(compiled.programs))
    if any(program.refusal is None for program in compiled.programs):
        console.section("Work a step", _work(report))
        console.say(QUICK_NOTE if report.quick else NOTES)
    if report.attempts:
        console.section("\nChanges tried", _attempts(report))
    console.say(_verdict(report), "bold green" if compiled.fits else "bold red")


def _facts(report: Report) -> Table:
    compiled, shape = report.compiled, report.compiled.shape
    slices = f" in each of {report.slices} slices" if report.slices > 1 else ""
    hosts = f"{compiled.hosts} host{'s' if compiled.hosts > 1 else ''}"
    if compiled.hosts != report.processes:
        hosts += f" (a run needs distributed.processes={compiled.hosts}, here it is {report.processes})"
    with_p = "" if compiled.augmented_length is None else f", {compiled.augmented_length} with p"
    attention = compiled.attention
    if attention == "splash":
        visited = ", ".join(f"{share:.0%} in {kind} rows" for kind, share in compiled.blocks_visited.items())
        attention += f"; blocks visited: {visited}"
    in_adapters = f", {compiled.adapters:,} of them in LoRA adapters" if compiled.adapters else ""
    rows = {
        "topology": f"{report.topology}{slices}: {compiled.chips} chips {chip_of(compiled.device_kind).name}, {hosts}",
        "mesh": " × ".join(f"{name} {size}" for name, size in compiled.mesh.items()),
        "parameters": f"{compiled.parameters:,}{in_adapters}",
        "attention": attention,
        "step": f"{shape.pairs} pairs in {shape.rows} rows of {shape.row_length} tokens{with_p}, {shape.scored} of "
        f"them scored; {compiled.padding:.1%} padding",
        "lengths": report.lengths,
        "compiled in": ", ".join(f"{program.compile_s:.0f} s" for program in compiled.programs),
        "host memory": f"{report.host_peak_bytes / GIB:.1f} GiB at most",
    }
    return console.facts(rows.items())


def _memory(programs: tuple[Program, ...]) -> Table:
    table = console.table("", *(f">{program.name}" for program in programs))
    for name, field in MEMORY.items():
        sizes = [getattr(program, field) for program in programs]
        if any(sizes):
            console.row(table, name, *(console.size(size) if size else "" for size in sizes))
    console.row(table, "verdict", *map(_fit, programs))
    return table


def _fit(program: Program) -> str:
    share = f"{program.peak_bytes / program.hbm_bytes:.0%}"
    return f"fits, {share} used" if program.fits else f"does not fit, {share}"


def _work(report: Report) -> Table:
    compiled = report.compiled
    programs = [program for program in compiled.programs if program.refusal is None]
    table = console.table("", *(f">{program.name}" for program in programs))
    console.row(table, "matmul flops of the program, all chips", *(f"{each.traced_flops:.3g}" for each in programs))
    if not report.quick:
        console.row(table, "estimated cycles", *(f"{each.estimated_cycles:,.0f}" for each in programs))
        console.row(table, "cycles of attention kernels", *(f"{each.kernel_cycles:,.0f}" for each in programs))
    for kind in sorted({kind for program in programs for kind in program.collectives}):
        runs = (program.collectives.get(kind, (0, 0)) for program in programs)
        cells = (f"{count:,} of {console.size(size)} in all" if count else "" for count, size in runs)
        console.row(table, kind, *cells)
    for name, field in WARNINGS.items():
        counts = [getattr(program, field) for program in programs]
        if any(counts):
            console.row(table, name, *map(str, counts))
    flops = compiled.model_flops_a_pair
    console.row(table, "model flops a step", f"{flops * compiled.shape.pairs:.3g}")
    console.row(table, "model flops a pair", f"{flops:.3g}")
    if compiled.step_s is not None:
        console.row(table, "step time at the chip's clock", f"{compiled.step_s:.3f} s")
        console.row(table, "MFU that it implies", f"{compiled.mfu:.0%}")
    return table


def _attempts(report: Report) -> Table:
    table = console.table("change", "result")
    for attempt in report.attempts:
        if attempt.compiled is None:
            result = f"impossible: {attempt.problem}"
        else:
            result = "; ".join(f"{program.name} {_fit(program)}" for program in attempt.compiled.programs)
        console.row(table, arguments_text(attempt.overrides), result)
    return table


def _verdict(report: Report) -> str:
    if report.compiled.fits:
        return f"Fits, with {RUNTIME_SHARE:.0%} of the memory left to the runtime."
    if report.remedy is not None:
        instead = "; it trains LoRA adapters in place of all weights"
        other = instead if LORA.keys() <= report.remedy.overrides.keys() else ""
        other += "; the base is held in int8" if "lora.base" in report.remedy.overrides else ""
        return f"Does not fit. This does: {arguments_text(report.remedy.overrides)}{other}"
    return "Does not fit, and no change that was tried makes it fit: take more chips, or chips with more memory."
