"""Files written whole, JSON lines, and what is refused before any work: outputs, directories and full disks."""

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from runs import REPOSITORY

from sr_dpo_jax.durable import files
from sr_dpo_jax.errors import UsageError


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    with files.whole(path) as temporary:
        temporary.write_text("first")
        assert not path.exists() and temporary.parent == tmp_path, "a rename does not cross file systems"
    with pytest.raises(ZeroDivisionError), files.whole(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path], "nothing is left behind"


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "a.txt"
    with files.whole(path) as one, files.whole(path) as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one", "the last rename stays"


def test_a_directory_appears_whole_or_not_at_all(tmp_path):
    for fails in (True, False):
        try:
            with files.whole(tmp_path / "out") as temporary:
                temporary.mkdir()
                (temporary / "a").write_text("a")
                if fails:
                    raise ZeroDivisionError
        except ZeroDivisionError:
            assert list(tmp_path.iterdir()) == []
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "a"]


def test_json_and_its_lines_keep_every_script(tmp_path):
    value = {"a": "ä日\u2028b", "n": [1, 2.5, None]}
    files.write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == value and "ä日" in text and text.endswith("}\n")
    lines = [json.dumps(value, ensure_ascii=False), '"\u0085"', "3"]
    files.write_text(tmp_path / "a.jsonl", "\n".join(lines))
    assert files.read_lines(tmp_path / "a.jsonl") == [value, "\u0085", 3]
    assert files.lines_of("a\u2028b\nc") == ["a\u2028b\n", "c"] and files.lines_of("") == []


def test_a_line_that_a_kill_cut_short_is_taken_off_the_file(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": "\u2028"}\n2\n{"b', encoding="utf-8")
    assert files.finished_lines(path) == ['{"a": "\u2028"}\n', "2\n"]
    with path.open("a", encoding="utf-8") as file:
        file.write("3\n")
    before = path.stat()
    assert files.finished_lines(path) == ['{"a": "\u2028"}\n', "2\n", "3\n"]
    assert path.stat().st_ino == before.st_ino, "a file that is whole is not written again"


def test_each_held_out_set_has_a_file_of_its_own():
    assert files.pairs_file("eval") == "eval_pairs.jsonl"
    assert files.pairs_file("eval/eval_x") == "eval_pairs_eval_x.jsonl"


def test_an_output_that_cannot_be_written_is_refused_by_its_option(tmp_path, monkeypatch):
    files.require_output(tmp_path / "new.txt")
    with pytest.raises(UsageError, match=r"--page .*is a directory"):
        files.require_output(tmp_path, option="--page")
    with pytest.raises(UsageError, match=r"--output .*nowhere is no directory"):
        files.require_output(tmp_path / "nowhere" / "a.txt")
    monkeypatch.setattr(files.os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(UsageError, match="no permission"):
        files.require_output(tmp_path / "new.txt")


def test_a_directory_is_tried_and_left_empty(tmp_path):
    files.require_writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"cannot be written \(mkdir: Not a directory\).*another output_dir"):
        files.require_writable(tmp_path / "file" / "run")


@pytest.mark.parametrize(
    ("call", "owner", "name"),
    [
        ("create", Path, "open"),
        ("fsync", os, "fsync"),
        ("utime", os, "utime"),
        ("rename", Path, "rename"),
        ("read", Path, "read_bytes"),
    ],
)
def test_a_file_system_that_lacks_a_call_is_found_at_the_start(tmp_path, monkeypatch, call, owner, name):
    def fail(*_, **__):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        with pytest.raises(UsageError, match=rf"cannot be written \({call}: Operation not supported\)"):
            files.require_writable(tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


def test_links_and_locks_are_not_asked_for(tmp_path, monkeypatch):
    """A bucket that is mounted with gcsfuse has none of them."""

    def fail(*_, **__):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    for owner, name in ((os, "link"), (os, "symlink"), (fcntl, "flock"), (fcntl, "lockf"), (Path, "hardlink_to")):
        monkeypatch.setattr(owner, name, fail)
    files.require_writable(tmp_path)


def test_a_disk_that_takes_a_name_but_no_bytes_is_refused(tmp_path):
    script = (
        "import pathlib, resource, sys; from sr_dpo_jax.durable import files; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)); files.require_writable(pathlib.Path(sys.argv[1]))"
    )
    full = tmp_path / "full"
    limited = subprocess.run(
        [sys.executable, "-c", script, str(full)], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    assert limited.returncode == 1 and "cannot be written (write: File too large)" in limited.stderr
    assert list(full.iterdir()) == [], "the probe leaves nothing"


def test_room_for_the_checkpoints_to_come(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage._replace(free=3_000_000_000))
    files.require_room(tmp_path, checkpoint_bytes=1_000_000_000, checkpoints=3)
    with pytest.raises(UsageError, match=r"3\.0 GB are free, and 3 more checkpoints of 1\.1 GB.*checkpoint\.keep"):
        files.require_room(tmp_path, checkpoint_bytes=1_100_000_000, checkpoints=3)
