"""A `Report` of the ahead-of-time compiler as tables for people, at most 100 columns wide, and as JSON."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import rich.console
import rich.table
import rich.text

from sr_dpo_jax.commands.compile.programs import RUNTIME_SHARE, Program
from sr_dpo_jax.commands.compile.search import Attempt, Report, override_arguments
from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.parallel.chips import GIB, chip_of

COLUMNS = 100
NOTES = (
    "Cycles are the compiler's own estimates, loops multiplied out; they hold no communication, and attention kernels "
    "stand in them at the peak of the matrix unit. So the step time is a lower bound, and its MFU an upper one."
)
QUICK_NOTE = (
    "--quick: the compiler made its least effort. Memory is close to that of a run; cycles are far too many and are "
    "left out."
)


def require_writable(path: Path) -> None:
    """Asked before minutes of compiling, not found out after them.

    Raises:
      UsageError: no file can be written there.
    """
    reason = None
    if path.is_dir():
        reason = "is a directory"
    elif not path.parent.is_dir():
        reason = f"{path.parent} is no directory"
    elif not os.access(path if path.exists() else path.parent, os.W_OK):
        reason = "no permission"
    if reason is not None:
        raise UsageError(f"--json {path}: cannot be written ({reason}); name a file in a directory")


def write_json(path: Path, report: Report) -> None:
    """Every field, under its name, with `fits` beside `compiled` and in every attempt.

    Raises:
      UsageError: the file cannot be written.
    """
    document = dataclasses.asdict(report)
    document["fits"] = report.compiled.fits
    for written, attempt in zip(document["attempts"], report.attempts, strict=True):
        written["fits"] = attempt.fits
    document["remedy"] = None if report.remedy is None else report.remedy.overrides
    try:
        path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--json {path}: cannot be written ({error.strerror}); name a file in a directory") from error


def print_report(report: Report) -> None:
    """Writes to standard output; plain text where that is no terminal."""
    console = rich.console.Console(highlight=False)
    console.width = min(console.width, COLUMNS) if console.is_terminal else COLUMNS

    def section(title: str, table: rich.table.Table) -> None:
        console.print(rich.text.Text(title, style="bold"))
        console.print(table)
        console.print()

    compiled = report.compiled
    section("What was compiled", _facts(report))
    section("Bytes a chip", _memory(compiled.programs))
    if any(program.refusal is None for program in compiled.programs):
        section("Work a step", _work(report))
        console.print(rich.text.Text(QUICK_NOTE if report.quick else NOTES))
    if report.attempts:
        section("\nChanges tried", _attempts(report.attempts))
    console.print(rich.text.Text(_verdict(report), style="bold green" if compiled.fits else "bold red"))


def _facts(report: Report) -> rich.table.Table:
    compiled, shape = report.compiled, report.compiled.shape
    table = _table()
    slices = f" in each of {report.slices} slices" if report.slices > 1 else ""
    hosts = f"{compiled.hosts} host{'s' if compiled.hosts > 1 else ''}"
    if compiled.hosts != report.processes:
        hosts += f" (a run needs distributed.processes={compiled.hosts}, here it is {report.processes})"
    with_p = "" if compiled.augmented_length is None else f", {compiled.augmented_length} with p"
    rows = {
        "topology": f"{report.topology}{slices}: {compiled.chips} chips {chip_of(compiled.device_kind).name}, {hosts}",
        "mesh": " × ".join(f"{name} {size}" for name, size in compiled.mesh.items()),
        "parameters": f"{compiled.parameters:,}",
        "attention": compiled.attention
        if compiled.attention != "splash"
        else f"{compiled.attention}; blocks visited: {_visited(compiled.blocks_visited)}",
        "step": f"{shape.pairs} pairs in {shape.rows} rows of {shape.row_length} tokens{with_p}, {shape.scored} of "
        f"them scored; {compiled.padding:.1%} padding",
        "lengths": report.lengths,
        "compiled in": ", ".join(f"{program.compile_s:.0f} s" for program in compiled.programs),
        "host memory": f"{report.host_peak_bytes / GIB:.1f} GiB at most",
    }
    for name, value in rows.items():
        table.add_row(f"  {name}", rich.text.Text(value))
    return table


def _visited(shares: dict[str, float]) -> str:
    return ", ".join(f"{share:.0%} in {kind} rows" for kind, share in shares.items())


def _memory(programs: tuple[Program, ...]) -> rich.table.Table:
    table = _table("", *(f">{program.name}" for program in programs))

    def row(name: str, field: str) -> None:
        values = [getattr(program, field) for program in programs]
        if any(values):
            table.add_row(f"  {name}", *(_gib(value) if value else "" for value in values))

    row("arguments", "argument_bytes")
    row("temporaries", "temporary_bytes")
    row("new outputs", "output_bytes")
    row("code", "code_bytes")
    row("beside it: optimizer state, online reference", "resident_bytes")
    row("peak", "peak_bytes")
    row("the chip has", "hbm_bytes")
    table.add_row("  verdict", *map(_fit, programs))
    return table


def _fit(program: Program) -> str:
    share = f"{program.peak_bytes / program.hbm_bytes:.0%}"
    return f"fits, {share} used" if program.fits else f"does not fit, {share}"


def _work(report: Report) -> rich.table.Table:
    compiled = report.compiled
    programs = [program for program in compiled.programs if program.refusal is None]
    table = _table("", *(f">{program.name}" for program in programs))

    def row(name: str, *values: str) -> None:
        table.add_row(f"  {name}", *values)

    row("matmul flops of the program, all chips", *(f"{program.traced_flops:.3g}" for program in programs))
    if not report.quick:
        row("estimated cycles", *(f"{program.estimated_cycles:,.0f}" for program in programs))
        row("cycles of attention kernels", *(f"{program.kernel_cycles:,.0f}" for program in programs))
    for kind in sorted({kind for program in programs for kind in program.collectives}):
        row(kind, *(_collective(program.collectives.get(kind, (0, 0))) for program in programs))
    for name, field in (
        ("loops of unknown length, counted once", "unknown_loops"),
        ("kernels without an estimate", "unknown_kernels"),
        ("operations repeated to save memory", "repeated_operations"),
    ):
        if any(getattr(program, field) for program in programs):
            row(name, *(str(getattr(program, field)) for program in programs))
    flops = compiled.model_flops_a_pair
    row("model flops a step", f"{flops * compiled.shape.pairs:.3g}")
    row("model flops a pair", f"{flops:.3g}")
    if compiled.step_s is not None:
        row("step time at the chip's clock", f"{compiled.step_s:.3f} s")
        row("MFU that it implies", f"{compiled.mfu:.0%}")
    return table


def _collective(figures: tuple[int, int]) -> str:
    count, size = figures
    return f"{count:,} of {_gib(size)} in all" if count else ""


def _attempts(attempts: tuple[Attempt, ...]) -> rich.table.Table:
    table = _table("change", "result")
    for attempt in attempts:
        if attempt.compiled is None:
            result = f"impossible: {attempt.problem}"
        else:
            result = "; ".join(f"{program.name} {_fit(program)}" for program in attempt.compiled.programs)
        table.add_row(f"  {' '.join(override_arguments(attempt.overrides))}", rich.text.Text(result))
    return table


def _verdict(report: Report) -> str:
    compiled = report.compiled
    if compiled.fits:
        return f"Fits, with {RUNTIME_SHARE:.0%} of the memory left to the runtime."
    if report.remedy is not None:
        return f"Does not fit. This does: {' '.join(override_arguments(report.remedy.overrides))}"
    return "Does not fit, and no change that was tried makes it fit: take more chips, or chips with more memory."


def _gib(count: float) -> str:
    return f"{count / GIB:.2f} GiB"


def _table(*headings: str) -> rich.table.Table:
    """Columns under these headings; those that start with `>` are aligned to the right. None: two plain columns."""
    table = rich.table.Table(box=None, show_header=bool(headings), padding=(0, 2, 0, 0), pad_edge=False)
    for heading in headings or ("", ""):
        justify: Any = "right" if heading.startswith(">") else "left"
        table.add_column(rich.text.Text(heading.removeprefix(">")), justify=justify, overflow="fold")
    return table
