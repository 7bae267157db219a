"""Kinds of files and directories -> numbered records: the same rows in whatever form they come."""

import bz2
import gzip
import json

import datasets
import pyarrow
import pytest

from sr_dpo_jax.data.records import BadRow, content_digest, files_of, json_records, records_of
from sr_dpo_jax.errors import UsageError

ROWS = [{"chosen": "Größe\n1", "rejected": "b, “c”"}, {"chosen": "d", "rejected": "e"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
CSV = 'chosen,rejected\n"Größe\n1","b, “c”"\nd,e\n'.encode()
BOM = b"\xef\xbb\xbf"


def zstd(data):
    return pyarrow.compress(data, codec="zstd", asbytes=True)


def records(path, columns=list, split="train"):
    return list(records_of(str(path), split=split, columns=columns))


@pytest.mark.parametrize(
    ("name", "content", "lines"),
    [
        ("a.jsonl", LINES, (1, 2)),
        ("a.jsonl", BOM + LINES, (1, 2)),
        ("a.json", LINES, (1, 2)),
        ("a.json", json.dumps(ROWS, indent=1).encode(), (1, 2)),
        ("a.json", BOM + b"\n " + json.dumps(ROWS).encode(), (1, 2)),
        ("a.jsonl.gz", gzip.compress(LINES), (1, 2)),
        ("a.jsonl.bz2", bz2.compress(LINES), (1, 2)),
        ("a.jsonl.zst", zstd(LINES), (1, 2)),
        ("a.json.gz", gzip.compress(BOM + json.dumps(ROWS).encode()), (1, 2)),
        ("a.csv", CSV, (3, 4)),
        ("a.csv", BOM + CSV.replace(b"\n", b"\r\n").replace("ße\r\n1".encode(), "ße\n1".encode()), (3, 4)),
    ],
    ids=["lines", "BOM", "json", "array", "BOM, array", "gz", "bz2", "zst", "array gz", "csv", "BOM, csv"],
)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name, content, lines):
    (tmp_path / name).write_bytes(content)
    assert records(tmp_path / name) == list(zip(lines, ROWS, strict=True))


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, zstd], ids=["gz", "bz2", "zst"])
@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"no" + data])
def test_a_compressed_file_that_is_cut_short_is_no_end(tmp_path, pack, damage):
    end = {gzip.compress: "gz", bz2.compress: "bz2"}.get(pack, "zst")
    noise = "".join(json.dumps({"chosen": str(number**9), "rejected": "x"}) + "\n" for number in range(3000))
    (tmp_path / f"a.jsonl.{end}").write_bytes(damage(pack(noise.encode())))
    with pytest.raises(UsageError, match="truncated or corrupt"):
        list(json_records(str(tmp_path / f"a.jsonl.{end}")))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", b'[{"chosen": "sesame"', "bad JSON: Expecting ',' delimiter .* in an array"),
        ("a.csv", b'chosen,rejected\n"sesame,b\n', "not a sound CSV file near line"),
        ("a.csv", b"chosen,rejected\nsesame,\xff\n", r"not a sound CSV file .*bad UTF-8"),
    ],
)
def test_a_file_that_cannot_be_read_to_its_end_is_one_error(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=said) as refused:
        records(tmp_path / name)
    assert "sesame" not in str(refused.value)


def test_a_csv_row_of_other_fields_is_named_by_its_line(tmp_path):
    (tmp_path / "a.csv").write_text("chosen,rejected\na,b\nc\n,d\n")
    path = str(tmp_path / "a.csv")
    bad = BadRow(path, 3, "1 fields under 2 names")
    assert records(path) == [(2, {"chosen": "a", "rejected": "b"}), (3, bad), (4, {"chosen": None, "rejected": "d"})]


def test_blank_lines_at_the_end_of_a_csv_file_are_ignored(tmp_path):
    (tmp_path / "a.csv").write_text("chosen,rejected\na,b\n\nc,d\n\n\n")
    blank = BadRow(str(tmp_path / "a.csv"), 3, "blank line")
    first, last = ({"chosen": "a", "rejected": "b"}, {"chosen": "c", "rejected": "d"})
    assert records(tmp_path / "a.csv") == [(2, first), (3, blank), (4, last)]


def test_a_csv_field_may_be_long(tmp_path):
    (tmp_path / "a.csv").write_text(f"chosen,rejected\n{'a' * 200_000},b\n")
    assert records(tmp_path / "a.csv") == [(2, {"chosen": "a" * 200_000, "rejected": "b"})]


class TestFilesOf:
    @pytest.fixture
    def directory(self, tmp_path):
        for name in ("train-1.jsonl", "train-0.jsonl.gz", "test-0.jsonl"):
            (tmp_path / name).write_bytes(gzip.compress(LINES) if name.endswith("gz") else LINES)
        return tmp_path

    def test_a_pattern(self, directory):
        assert files_of(f"{directory}/train-*", split="test") == [
            str(directory / "train-0.jsonl.gz"),
            str(directory / "train-1.jsonl"),
        ]
        with pytest.raises(UsageError, match="no file matches"):
            files_of(f"{directory}/other-*", split="train")
        (directory / "train-2.txt").write_text("x")
        with pytest.raises(UsageError, match=r"train-2\.txt: not a known kind of file"):
            files_of(f"{directory}/train-*", split="train")

    def test_the_home_directory(self, directory, monkeypatch):
        monkeypatch.setenv("HOME", str(directory))
        assert files_of("~/train-1.jsonl", split="train") == [str(directory / "train-1.jsonl")]
        assert content_digest("~/train-1.jsonl", split="train") == content_digest(
            f"{directory}/test-0.jsonl", split="x"
        )

    @pytest.mark.parametrize(
        ("split", "names"), [("train", ["train-0.jsonl.gz", "train-1.jsonl"]), ("test", ["test-0.jsonl"])]
    )
    def test_a_directory_is_read_file_by_file(self, directory, split, names):
        assert files_of(str(directory), split=split) == [str(directory / name) for name in names]

    def test_a_directory_whose_name_is_a_pattern(self, tmp_path):
        (tmp_path / "run[1]").mkdir()
        (tmp_path / "run[1]" / "a.jsonl").write_bytes(LINES)
        assert files_of(f"{tmp_path}/run[1]", split="train") == [f"{tmp_path}/run[1]/a.jsonl"]

    def test_files_of_other_kinds_are_not_passed_over(self, directory):
        """`datasets` reads one kind of them and leaves the others out: of these three it gave one."""
        (directory / "train-2.csv").write_bytes(CSV)
        (directory / "train-3.txt").write_text("x")
        with pytest.raises(UsageError, match=r"train-3\.txt is not a known kind of file; name those to read, as by "):
            files_of(str(directory), split="train")

    def test_what_a_directory_lacks_is_said_by_datasets(self, directory, tmp_path_factory):
        with pytest.raises(UsageError, match="split 'other': cannot be loaded"):
            (path,) = files_of(str(directory), split="other")
            records(path, split="other")
        empty = tmp_path_factory.mktemp("empty")
        with pytest.raises(UsageError, match="cannot be loaded as a data set"):
            records(*files_of(str(empty), split="train"))


def test_what_datasets_saved_is_read(tmp_path):
    """`save_to_disk` of one data set and of several by split; `load_dataset` reads neither."""
    table = datasets.Dataset.from_list(ROWS)
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(tmp_path / "several")
    for path, split, expected in (("one", "train", ROWS), ("several", "train", ROWS), ("several", "test", ROWS[1:])):
        (only,) = files_of(str(tmp_path / path), split=split)
        assert [row for _, row in records(only, split=split)] == expected
    with pytest.raises(UsageError, match=r"has no split 'other', but train, test; correct data\.split"):
        records(tmp_path / "several", split="other")
    for damage in ("{}", "[]"):
        (tmp_path / "one" / "state.json").write_text(damage)
        with pytest.raises(UsageError, match="is damaged or no data set as `datasets` saves it"):
            records(tmp_path / "one")
