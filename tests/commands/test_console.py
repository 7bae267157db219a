"""The printer of tables: its width, cells that look like markup, sizes, and the file of --json."""

import json
import os
import threading

import pytest

from sr_dpo_jax.commands import console
from sr_dpo_jax.errors import UsageError


def test_cells_are_text_and_no_line_is_too_long(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    table = console.table("name", ">[b]value[/b]")
    console.row(table, "[INST] :smile:", "x" * 250)
    console.section("[red]title[/red]", table)
    console.section("none", None)
    console.section("facts", console.facts([("path", "[/tmp/" + "y" * 200)]))
    console.say("word " * 50)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= console.COLUMNS and "\x1b" not in printed
    for text in ("[red]title[/red]", "[b]value[/b]", "[INST] :smile:", "path  [/tmp/"):
        assert text in printed
    assert (printed.count("x"), printed.count("y")) == (250, 200) and "none" not in printed


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.50 KiB"), (2**20, "1.00 MiB"), (3 * 2**40, "3072.00 GiB")],
)
def test_sizes(count, text):
    assert console.size(count) == text


def test_json_goes_to_files_whole_and_through_pipes_and_links(tmp_path):
    file, link, pipe = tmp_path / "a.json", tmp_path / "link.json", tmp_path / "pipe"
    link.symlink_to(file)
    for path in (file, link):
        console.write_json(path, {"path": str(path)})
        assert json.loads(file.read_text(encoding="utf-8")) == {"path": str(path)}
    assert link.is_symlink()
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    console.write_json(pipe, {"β": 1})
    reader.join(timeout=10)
    assert json.loads(read[0]) == {"β": 1} and pipe.is_fifo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "link.json", "pipe"]
    for path in (tmp_path, tmp_path / "none" / "a.json"):
        with pytest.raises(UsageError, match="cannot be written"):
            console.write_json(path, {})
