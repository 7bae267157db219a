"""Prints what a command found: titled tables of at most 100 columns, in plain text where the output is no terminal.

Cells and lines are text, never rich's markup: tokens such as [INST] look like it. Everything goes to standard output.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import rich.console
import rich.table
from rich.table import Table
from rich.text import Text

from sr_dpo_jax.durable import files
from sr_dpo_jax.durable.files import require_output
from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.parallel.chips import GIB

COLUMNS = 100


def say(text: str, style: str = "") -> None:
    """Prints lines of text, wrapped at the width of the console."""
    _print(Text(text, style))


def section(title: str, table: Table | None) -> None:
    """Prints a table below its title and an empty line after it; nothing where there is no table."""
    if table is not None:
        say(title, "bold")
        _print(table)
        say("")


def facts(rows: Iterable[tuple[str, str]]) -> Table:
    """Makes a table of two columns without headings: names, and a text for each."""
    facts = table("", "")
    facts.show_header, facts.columns[0].no_wrap = False, True
    for name, text in rows:
        row(facts, name, text)
    return facts


def table(*headings: str) -> Table:
    """Makes an empty table with these headings; a column whose heading starts with `>` is aligned to the right."""
    made = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for number, heading in enumerate(headings):
        name = Text(heading.removeprefix(">") if number else f"  {heading}")
        made.add_column(name, justify="right" if heading.startswith(">") else "left", overflow="fold")
    return made


def row(table: Table, first: str, *cells: str) -> None:
    """Adds a row to a table; its first cell is indented below the section's title."""
    table.add_row(*map(Text, (f"  {first}", *cells)))


def size(count: float) -> str:
    """Gives a number of bytes in the largest unit of which there is at least one."""
    for unit, size in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Writes to the file of --json what was printed.

    Raises:
      UsageError: the file cannot be written.
    """
    require_output(path, option="--json")
    try:
        files.write_json(path, document)
    except OSError as error:
        raise UsageError(f"--json {path}: cannot be written ({error.strerror}); name another file") from error


def _print(shown: Text | Table) -> None:
    console = rich.console.Console(highlight=False)
    console.width = min(console.width, COLUMNS) if console.is_terminal else COLUMNS
    console.print(shown)
