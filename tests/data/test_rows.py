"""Files -> pairs: what is read, what is refused and in which words."""

import datetime
import gzip
import json
from collections import Counter
from pathlib import Path
from typing import get_args

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sr_dpo_jax.config.schema import Column
from sr_dpo_jax.data.messages import Message
from sr_dpo_jax.data.records import BadRow, content_digest
from sr_dpo_jax.data.rows import COLUMNS, FORMATS, Naming, Pair, read_rows
from sr_dpo_jax.errors import UsageError

REAL_FILE = Path(__file__).resolve().parents[3] / "shared" / "data" / "hh_rlhf_harmless_base_test.jsonl.gz"
SECRET = "sesame"  # stands in every malformed row, and must stand in no reason


def read(path: Path, format: str) -> list:
    return list(read_rows(str(path), format=format, split="train"))


def read_row(tmp_path: Path, format: str, row: object) -> Pair | BadRow:
    path = tmp_path / "row.jsonl"
    path.write_bytes(row if isinstance(row, bytes) else json.dumps(row).encode())
    (only,) = read(path, format)
    return only


def user(content: str = "Hi") -> dict:
    return {"role": "user", "content": content}


def assistant(content: str = "Yo") -> dict:
    return {"role": "assistant", "content": content}


def hh(prompt: str, chosen: str, rejected: str) -> dict:
    return {"chosen": prompt + chosen, "rejected": prompt + rejected}


HI = "\n\nHuman: hi\n\nAssistant:"


class TestHH:
    def test_prompt_ends_at_the_last_assistant(self, tmp_path):
        prompt = "\n\nHuman: hi\n\nAssistant: yo\n\nHuman: bye\n\nAssistant:"
        pair = read_row(tmp_path, "hh_rlhf", hh(prompt, " cya", " no"))
        assert pair == Pair("0", str(tmp_path / "row.jsonl"), 1, prompt, " cya", " no", None, None)

    def test_the_real_file(self):
        if not REAL_FILE.exists():
            pytest.skip(f"the real HH-RLHF file is not at {REAL_FILE}")
        rows = read(REAL_FILE, "hh_rlhf")
        bad = Counter(row.reason for row in rows if isinstance(row, BadRow))
        assert len(rows) == 2312
        assert bad.pop("the prompts of chosen and rejected differ") == 5
        assert sum(bad.values()) == 4
        assert set(bad) <= {"empty chosen response", "empty rejected response"}

    def test_own_id_else_number_of_the_line(self, tmp_path):
        path = tmp_path / "a.jsonl"
        lines = [hh(HI, " a", " b"), {**hh(HI, " a", " b"), "id": "x-1"}, {**hh(HI, " a", " b"), "id": 7}]
        path.write_text("\n".join(map(json.dumps, lines)))
        assert [(row.id, row.line) for row in read(path, "hh_rlhf")] == [("0", 1), ("x-1", 2), ("7", 3)]


class TestUltraFeedback:
    ROW = {  # noqa: RUF012
        "prompt": "Hi",
        "prompt_id": "abc",
        "chosen": [user(), assistant("Yo")],
        "rejected": [user(), assistant("Go")],
        "score_chosen": 8.5,
        "score_rejected": 3,
    }

    def test_a_row(self, tmp_path):
        pair = read_row(tmp_path, "ultrafeedback", self.ROW)
        assert (pair.id, pair.prompt, pair.chosen, pair.rejected) == ("abc", (Message("user", "Hi"),), "Yo", "Go")
        assert (pair.chosen_score, pair.rejected_score) == (8.5, 3.0)

    def test_own_id_goes_before_prompt_id(self, tmp_path):
        assert read_row(tmp_path, "ultrafeedback", {**self.ROW, "id": "mine"}).id == "mine"

    def test_prompt_id_is_not_an_id_elsewhere(self, tmp_path):
        assert (
            read_row(tmp_path, "preference", {"prompt": "A", "chosen": "b", "rejected": "c", "prompt_id": "p"}).id
            == "0"
        )

    def test_scores_are_not_needed(self, tmp_path):
        row = {name: value for name, value in self.ROW.items() if not name.startswith("score")}
        pair = read_row(tmp_path, "ultrafeedback", row)
        assert (pair.chosen, pair.chosen_score, pair.rejected_score) == ("Yo", None, None)

    @pytest.mark.parametrize("key", ["prompt", "chosen", "rejected"])
    def test_every_key_is_needed(self, tmp_path, key):
        row = {name: value for name, value in self.ROW.items() if name != key}
        assert read_row(tmp_path, "ultrafeedback", row).reason == f"missing key '{key}'"


class TestPreference:
    def test_the_text_forms_agree(self, tmp_path):
        explicit = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}
        implicit = {"chosen": "The sky is blue.", "rejected": "The sky is green."}
        assert read_row(tmp_path, "preference", explicit) == read_row(tmp_path, "preference", implicit)

    def test_the_message_forms_agree(self, tmp_path):
        prompt = [{"role": "system", "content": "Be brief."}, user("a"), assistant("b"), user("c")]
        explicit = {"prompt": prompt, "chosen": [assistant("x")], "rejected": [assistant("y")]}
        implicit = {"chosen": [*prompt, assistant("x")], "rejected": [*prompt, assistant("y")]}
        pair = read_row(tmp_path, "preference", explicit)
        assert pair == read_row(tmp_path, "preference", implicit)
        assert [message.role for message in pair.prompt] == ["system", "user", "assistant", "user"]

    def test_each_row_has_its_own_form(self, tmp_path):
        path = tmp_path / "a.jsonl"
        rows = [
            {"prompt": "A", "chosen": " b", "rejected": " c"},
            {"prompt": None, "chosen": "A b", "rejected": "A c"},
            {"prompt": [user()], "chosen": [assistant("b")], "rejected": [assistant("c")]},
            {"chosen": [user(), assistant("b")], "rejected": [user(), assistant("c")], "score_chosen": 1},
        ]
        path.write_text("\n".join(map(json.dumps, rows)))
        pairs = read(path, "preference")
        message = (Message("user", "Hi"),)
        assert [(p.prompt, p.chosen) for p in pairs] == [("A", " b"), ("A", " b"), (message, "b"), (message, "b")]
        assert [(p.chosen_score, p.rejected_score) for p in pairs] == [(None, None)] * 3 + [(1.0, None)]

    @pytest.mark.parametrize(
        ("chosen", "rejected", "split"),
        [
            ("The sky is blue.", "The sky is green.", ("The sky is", " blue.", " green.")),
            ("A cat", "A car", ("A", " cat", " car")),
            ("The sky", "The sky is blue", ("The", " sky", " sky is blue")),
            ("The sky is blue", "The sky", ("The", " sky is blue", " sky")),
            ("A cat", "A cat", ("A", " cat", " cat")),
            ("A  cat", "A car", ("A", "  cat", " car")),
            ("A\tcat", "A car", ("A", "\tcat", " car")),
            ("a b ", "a b c", ("a", " b ", " b c")),
            (" a b", " a c", (" a", " b", " c")),
            ("a b", "ab", None),
            ("cat", "dog", None),
            ("cat", "cat", None),
            (" cat", " dog", None),
            ("a b ", "x", None),
            ("A cat", "A", None),
        ],
    )
    def test_implicit_text_is_cut_at_a_word(self, tmp_path, chosen, rejected, split):
        row = read_row(tmp_path, "preference", {"chosen": chosen, "rejected": rejected})
        if split is None:
            assert row.reason == "chosen and rejected share no first word: give an explicit prompt"
        else:
            assert (row.prompt, row.chosen, row.rejected) == split

    @given(st.text("ab \n", max_size=12), st.text("ab \n", max_size=12))
    @settings(max_examples=150, deadline=None)
    def test_implicit_text_loses_nothing(self, tmp_path_factory, chosen, rejected):
        row = read_row(tmp_path_factory.mktemp("x"), "preference", {"chosen": chosen, "rejected": rejected})
        if isinstance(row, Pair):
            assert (row.prompt + row.chosen, row.prompt + row.rejected) == (chosen, rejected)
            assert row.prompt == row.prompt.rstrip() != ""
            assert row.chosen.strip() and row.rejected.strip() and row.chosen[0].isspace() and row.rejected[0].isspace()

    def test_null_extras_are_nothing(self, tmp_path):
        message = {**assistant(), "tool_calls": None, "name": None}
        row = {"prompt": [user()], "chosen": [message], "rejected": [message], "score_chosen": None}
        assert read_row(tmp_path, "preference", row).chosen_score is None


TURNS = {"prompt": [user(SECRET)], "chosen": [assistant(SECRET)], "rejected": [assistant(SECRET)]}
TEXTS = {"prompt": SECRET, "chosen": SECRET, "rejected": SECRET}
HH_ROW = hh(HI + SECRET + HI, " a", " b")
NO_TRANSCRIPT = 'holds no "\\n\\nAssistant:"; text without it needs data.format=preference'
MALFORMED = [
    ("hh_rlhf", b'{"chosen": "\xff' + SECRET.encode(), "bad UTF-8 at byte 13 of the line"),
    ("hh_rlhf", b'{"chosen": "\0' + SECRET.encode(), "NUL byte at byte 13 of the line"),
    ("hh_rlhf", b'{"chosen": "sesame" "rejected": 1}', "bad JSON: Expecting ',' delimiter at column 21"),
    ("hh_rlhf", b'{"chosen": "sesame"', "bad JSON: Expecting ',' delimiter at column 20"),
    ("hh_rlhf", b'{"chosen": "ses\\qame"}', "bad JSON: Invalid \\escape at column 16"),
    ("hh_rlhf", b"sesame", "bad JSON: Expecting value at column 1"),
    ("hh_rlhf", b'"sesame" 1', "bad JSON: Extra data at column 10"),
    ("hh_rlhf", b'{"score": NaN, "chosen": "sesame"}', "bad JSON: NaN is not JSON"),
    ("hh_rlhf", b'{"chosen": "sesame", "rejected": "b", "chosen": "c"}', "bad JSON: an object has a key twice"),
    ("hh_rlhf", b'{"chosen": [{"sesame": 1, "sesame": 1}]}', "bad JSON: an object has a key twice"),
    ("hh_rlhf", b'{"score": -Infinity, "chosen": "sesame"}', "bad JSON: -Infinity is not JSON"),
    ("hh_rlhf", b'{"sesame": ' + b"7" * 5000 + b"}", "bad JSON: a number has too many digits"),
    ("hh_rlhf", b"[" * 200_000, "bad JSON: nested too deeply"),
    ("hh_rlhf", [SECRET], "expected an object, got a list"),
    ("hh_rlhf", SECRET, "expected an object, got text"),
    ("hh_rlhf", None, "expected an object, got null"),
    ("hh_rlhf", {"chosen": SECRET}, f"chosen {NO_TRANSCRIPT}"),
    ("hh_rlhf", {"rejected": SECRET}, "missing key 'chosen'"),
    ("hh_rlhf", {"chosen": HI + SECRET}, "missing key 'rejected'"),
    (
        "hh_rlhf",
        {"chosen": [SECRET], "rejected": SECRET},
        "chosen: expected a transcript, got a list; messages need data.format=preference",
    ),
    ("hh_rlhf", {"chosen": HI + SECRET, "rejected": 3.5}, "rejected: expected text, got a number"),
    ("hh_rlhf", {"chosen": HI + SECRET, "rejected": SECRET}, f"rejected {NO_TRANSCRIPT}"),
    ("hh_rlhf", {"chosen": HI + SECRET, "rejected": SECRET + HI + " a"}, "the prompts of chosen and rejected differ"),
    ("hh_rlhf", {"chosen": SECRET + HI, "rejected": HI + " a"}, "the prompts of chosen and rejected differ"),
    ("hh_rlhf", hh(HI, " \n", SECRET), "empty chosen response"),
    ("hh_rlhf", hh(HI, SECRET, ""), "empty rejected response"),
    ("hh_rlhf", hh(HI, SECRET, "\0"), "rejected: holds a NUL character"),
    ("hh_rlhf", hh(HI, SECRET, "\ud800"), "rejected: holds a lone surrogate, which is not valid Unicode"),
    ("hh_rlhf", {**HH_ROW, "id": [SECRET]}, "id: expected text or an integer, got a list"),
    ("hh_rlhf", {**HH_ROW, "id": True}, "id: expected text or an integer, got true or false"),
    ("preference", {**TEXTS, "rejected": [assistant(SECRET)]}, "chosen is text but rejected is a list"),
    ("preference", {**TEXTS, "prompt": [user(SECRET)]}, "prompt: expected text, got a list"),
    ("preference", {**TEXTS, "prompt": {"a": SECRET}}, "prompt: expected text, got an object"),
    ("preference", {**TEXTS, "chosen": ""}, "empty chosen response"),
    ("preference", {**TEXTS, "score_chosen": SECRET}, "score_chosen: expected a number, got text"),
    ("preference", {**TEXTS, "score_chosen": True}, "score_chosen: expected a number, got true or false"),
    ("preference", {**TEXTS, "score_rejected": 10**400}, "score_rejected: not a finite number of ordinary size"),
    (
        "preference",
        {**TURNS, "prompt": "other", "chosen": [user(SECRET), assistant()], "rejected": [user(SECRET), assistant()]},
        "prompt: is no user message of the conversations in chosen and rejected",
    ),
    ("preference", {**TURNS, "prompt": 3}, "prompt: expected a list of messages, got a number"),
    ("preference", {**TURNS, "prompt": []}, "the prompt holds no user message"),
    ("preference", {**TURNS, "prompt": [assistant(SECRET)]}, "the prompt holds no user message"),
    (
        "preference",
        {**TURNS, "prompt": [user(), assistant(SECRET)]},
        "the prompt must end with a user or tool message",
    ),
    (
        "preference",
        {**TURNS, "prompt": [user(), {"role": "system", "content": SECRET}, user()]},
        "a system message stands after the first message",
    ),
    ("preference", {**TURNS, "chosen": [SECRET]}, "chosen, message 1: expected an object, got text"),
    ("preference", {**TURNS, "chosen": [{"content": SECRET}]}, "chosen, message 1: missing key 'role'"),
    ("preference", {**TURNS, "chosen": [{"role": "assistant"}]}, "chosen, message 1: missing key 'content'"),
    (
        "preference",
        {**TURNS, "chosen": [{"role": SECRET, "content": ""}]},
        "chosen, message 1: the role must be one of system, developer, user, assistant, tool",
    ),
    (
        "preference",
        {**TURNS, "rejected": [{"role": "assistant", "content": [{"text": SECRET}]}]},
        "rejected, message 1, content: holds parts that are no text, which is not supported",
    ),
    (
        "preference",
        {**TURNS, "rejected": [{**assistant(SECRET), "tool_calls": [{"name": SECRET}]}]},
        "rejected: a response that calls tools, or has a name, is not supported",
    ),
    (
        "preference",
        {**TURNS, "rejected": [user(SECRET)]},
        "rejected: expected exactly one assistant message after an explicit prompt",
    ),
    ("preference", {**TURNS, "rejected": [assistant(" ")]}, "empty rejected response"),
    (
        "preference",
        {"chosen": [user(SECRET), assistant()], "rejected": [user(), assistant()]},
        "the prompts of chosen and rejected differ",
    ),
    (
        "preference",
        {"chosen": [user(SECRET)], "rejected": [user(SECRET), assistant()]},
        "chosen: the last message must be the assistant's",
    ),
    ("preference", {"chosen": [assistant(SECRET)], "rejected": [assistant()]}, "the prompt holds no user message"),
    ("ultrafeedback", {**TestUltraFeedback.ROW, "prompt": [SECRET]}, "prompt: expected text, got a list"),
    ("ultrafeedback", {**TestUltraFeedback.ROW, "score_chosen": {}}, "score_chosen: expected a number, got an object"),
    (
        "preference",
        {**TURNS, "rejected": [{**assistant(), "audio": 1}]},
        "rejected, message 1: holds 'audio', which is not supported",
    ),
    (
        "preference",
        {**TEXTS, "tools": [{"name": SECRET}]},
        "tools: a prompt of plain text goes through no chat template; give messages",
    ),
    ("preference", {**TURNS, "tools": "{" + SECRET}, "tools: is text, and no JSON"),
    ("preference", {**TURNS, "tools": "[" * 900 + "]" * 900}, "tools: nested too deeply"),
    (
        "preference",
        {**TURNS, "prompt": [user(), {"role": "assistant", "tool_calls": 5}, user()]},
        "prompt, message 2, tool_calls: expected a list, got a number",
    ),
    (
        "preference",
        {"messages": [user()], "chosen": "Sure, a", "rejected": "Sure, b"},
        "messages: is not read beside two texts; give prompt, chosen and rejected as messages, or set "
        "data.ignored_columns=[messages] where it says nothing",
    ),
    ("preference", {**TURNS, "chat_template_kwargs": [1]}, "chat_template_kwargs: expected an object, got a list"),
    (
        "preference",
        {**TEXTS, "system": SECRET},
        "system: a prompt of plain text has no place for it; give messages, or set data.ignored_columns=[system]",
    ),
    (
        "preference",
        {**TURNS, "system": SECRET, "prompt": [{"role": "system", "content": "other"}, user()]},
        "system: the conversation has another system message of its own",
    ),
    (
        "preference",
        {"question": SECRET, "chosen": "Sure, yes", "rejected": "Sure, no"},
        "holds 'question', which is not read: set data.columns={prompt: question}, or data.ignored_columns=[question] "
        "where it says nothing",
    ),
    ("sft", {"messages": [user(SECRET)]}, "messages: the last message must be the assistant's"),
    (
        "sft",
        {"messages": [user(SECRET), assistant()], "completion": SECRET},
        "messages: stands beside prompt or completion; give one form",
    ),
    ("sft", {"prompt": SECRET}, "missing key 'completion'"),
    ("sft", TEXTS, "holds two responses: set data.format=preference, of which sft takes the chosen one"),
    ("ultrafeedback", {**TestUltraFeedback.ROW, "chosen": []}, "chosen: the last message must be the assistant's"),
    ("ultrafeedback", {**TestUltraFeedback.ROW, "chosen": SECRET}, "chosen: expected a list of messages, got text"),
]


@pytest.mark.parametrize(("format", "row", "reason"), MALFORMED)
def test_malformed_rows(tmp_path, format, row, reason):
    assert SECRET not in reason
    result = read_row(tmp_path, format, row)
    assert isinstance(result, BadRow)
    assert result.reason == reason
    assert (result.file, result.line) == (str(tmp_path / "row.jsonl"), 1)


class TestFiles:
    GOOD = json.dumps(hh(HI, " a", " b")).encode()

    def test_blank_lines_are_bad_except_at_the_end(self, tmp_path):
        path = tmp_path / "a.jsonl"
        path.write_bytes(self.GOOD + b"\r\n\n \n" + self.GOOD + b"\n\n  \n\n")
        rows = read(path, "hh_rlhf")
        assert [(row.line, getattr(row, "reason", None)) for row in rows] == [
            (1, None),
            (2, "blank line"),
            (3, "blank line"),
            (4, None),
        ]
        assert rows[-1].id == "3"

    def test_an_empty_file_has_no_rows(self, tmp_path):
        (tmp_path / "a.jsonl").write_bytes(b"\n\n")
        assert read(tmp_path / "a.jsonl", "hh_rlhf") == []

    def test_gzip_reads_the_same(self, tmp_path):
        (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(self.GOOD + b"\n" + self.GOOD))
        assert [row.line for row in read(tmp_path / "a.jsonl.gz", "hh_rlhf")] == [1, 2]

    @pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: data[:60], lambda data: b"no" + data])
    def test_damaged_gzip_is_not_the_end_of_the_data(self, tmp_path, damage):
        path = tmp_path / "a.jsonl.gz"
        path.write_bytes(damage(gzip.compress((self.GOOD + b"\n") * 100)))
        with pytest.raises(UsageError, match=r"a\.jsonl\.gz: truncated or corrupt gzip"):
            read(path, "hh_rlhf")

    def test_rows_are_streamed(self, tmp_path):
        path = tmp_path / "a.jsonl.gz"
        path.write_bytes(gzip.compress((self.GOOD + b"\n") * 5000)[:-8])
        rows = read_rows(str(path), format="hh_rlhf", split="train")
        assert next(rows).line == 1  # long before the damage at the end is met

    def test_parquet(self, tmp_path):
        rows = [{**TestUltraFeedback.ROW, "messages": [user()]}, {**TestUltraFeedback.ROW, "chosen": None}]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
        first, second = read(tmp_path / "a.parquet", "ultrafeedback")
        assert (first.id, first.line, first.chosen, first.rejected_score) == ("abc", 1, "Yo", 3.0)
        assert (second.line, second.reason) == (2, "chosen: expected a list of messages, got null")

    def test_damaged_parquet(self, tmp_path):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([TEXTS] * 100), tmp_path / "a.parquet")
        data = (tmp_path / "a.parquet").read_bytes()
        (tmp_path / "a.parquet").write_bytes(data[: len(data) // 2])
        with pytest.raises(UsageError, match=r"a\.parquet: not a sound parquet file"):
            read(tmp_path / "a.parquet", "preference")

    @pytest.mark.parametrize(
        ("chosen", "reason"),
        [
            (pyarrow.array([1]), "chosen: expected text, got a number"),
            (pyarrow.nulls(1), "chosen: expected text, got null"),
            (pyarrow.array([[[[SECRET]]]]), "chosen is a list but rejected is text"),
            (pyarrow.array([[{"role": None, "content": SECRET}]]), "chosen is a list but rejected is text"),
            (pyarrow.array([b"\xff" + SECRET.encode()]), "chosen: expected text, got another type"),
            (pyarrow.array([0], pyarrow.timestamp("ns")), "chosen: expected text, got another type"),
            (pyarrow.array([2**31 - 1], pyarrow.date32()), "not a sound parquet file"),
            (pyarrow.array([2**50], pyarrow.timestamp("s")), "not a sound parquet file"),
            (pyarrow.array([0], pyarrow.timestamp("s", tz="Nowhere/No")), "not a sound parquet file"),
        ],
    )
    def test_parquet_of_other_types(self, tmp_path, chosen, reason):
        """A row that is named, or one error: never a traceback, never the text."""
        table = pyarrow.table({"prompt": [SECRET], "chosen": chosen, "rejected": [SECRET]})
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
        try:
            (row,) = read(tmp_path / "a.parquet", "preference")
            said = row.reason
        except UsageError as error:
            said = str(error)
        assert reason in said and SECRET not in said

    def test_parquet_with_a_column_twice(self, tmp_path):
        columns = [pyarrow.array([SECRET])] * 4
        table = pyarrow.Table.from_arrays(columns, names=["prompt", "chosen", "rejected", "chosen"])
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
        with pytest.raises(UsageError, match="there are 2 columns 'chosen'"):
            read(tmp_path / "a.parquet", "preference")

    def test_parquet_without_the_columns(self, tmp_path):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"text": SECRET}]), tmp_path / "a.parquet")
        with pytest.raises(UsageError, match="no column 'chosen'"):
            read(tmp_path / "a.parquet", "preference")

    @pytest.mark.parametrize(
        ("path", "message"),
        [
            ("/no/such/file.jsonl", "no such file"),
            ("rows.jsonl.gz", "no such file"),
            ("data/rows.parquet", "no such file"),
            ("./rows", "no such file"),
            ("a/b/c", "neither an existing file nor a hub name"),
        ],
    )
    def test_paths_that_are_no_source(self, tmp_path, monkeypatch, path, message):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UsageError, match=message):
            read_rows(path, format="hh_rlhf", split="train")
        with pytest.raises(UsageError, match=message):
            content_digest(path, split="train")

    def test_usage(self, tmp_path):
        (tmp_path / "a.txt").write_bytes(b"")
        (tmp_path / "a.jsonl").write_bytes(b"")
        with pytest.raises(UsageError, match="not a known kind of file"):
            read(tmp_path / "a.txt", "hh_rlhf")
        with pytest.raises(UsageError, match=r"data\.format"):
            read(tmp_path / "a.jsonl", "hh")
        with pytest.raises(UsageError, match="remove the revision"):
            read_rows(str(tmp_path / "a.jsonl"), format="hh_rlhf", split="train", revision="main")

    @given(
        st.binary(max_size=300), st.sampled_from(sorted(FORMATS)), st.sampled_from([".jsonl", ".jsonl.gz", ".parquet"])
    )
    @settings(max_examples=200, deadline=None)
    def test_random_bytes_raise_nothing_else(self, tmp_path_factory, data, format, suffix):
        path = tmp_path_factory.mktemp("x") / f"a{suffix}"
        path.write_bytes(data)
        try:
            rows = read(path, format)
        except UsageError:
            assert suffix != ".jsonl"
        else:
            assert all(isinstance(row, BadRow) for row in rows)

    JSON = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text("\ue123", max_size=2),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["role", "content", "\ue123"]), inner, max_size=3)
        ),
        max_leaves=6,
    )

    @given(
        st.dictionaries(st.sampled_from(["chosen", "rejected", "prompt", "id", "score_chosen"]), JSON),
        st.sampled_from(sorted(FORMATS)),
    )
    @settings(max_examples=200, deadline=None)
    def test_reasons_hold_no_text_of_the_row(self, tmp_path_factory, row, format):
        result = read_row(tmp_path_factory.mktemp("x"), format, row)
        assert isinstance(result, Pair) or "\ue123" not in result.reason


class TestDirectories:
    """The road of hub data sets, with a directory in place of the hub."""

    def write(self, directory: Path, texts: list[str]) -> Path:
        directory.mkdir(exist_ok=True)
        lines = [json.dumps({**hh(HI, text, " no"), "extra": 1}) for text in texts]
        (directory / "train.jsonl").write_text("\n".join(lines))
        return directory

    @pytest.fixture(autouse=True)
    def cache(self, tmp_path, monkeypatch):
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def test_rows_and_digest(self, tmp_path):
        one, other = self.write(tmp_path / "one", [" a", ""]), self.write(tmp_path / "other", [" a", " c"])
        pair, bad = read(one, "hh_rlhf")
        assert (pair.id, pair.file, pair.line, pair.chosen) == ("0", str(one), 1, " a")
        assert (bad.line, bad.reason) == (2, "empty chosen response")
        digest = content_digest(str(one), split="train")
        assert digest != content_digest(str(other), split="train")
        assert digest == content_digest(str(self.write(tmp_path / "third", [" a", ""])), split="train")

    def test_unknown_split(self, tmp_path):
        directory = self.write(tmp_path / "one", [" a"])
        with pytest.raises(UsageError, match="split 'dev'"):
            list(read_rows(str(directory), format="hh_rlhf", split="dev"))

    def test_unreadable_directory(self, tmp_path):
        directory = self.write(tmp_path / "one", [" a"])
        (directory / "train.jsonl").write_text('{"chosen": "sesame"\n[[[')
        with pytest.raises(UsageError) as caught:
            read(directory, "hh_rlhf")
        assert SECRET not in str(caught.value)

    def test_code_is_never_run(self, tmp_path):
        directory = tmp_path / "evil"
        directory.mkdir()
        (directory / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
        with pytest.raises(UsageError):
            read(directory, "hh_rlhf")
        assert not (tmp_path / "ran").exists()


def test_content_digest_of_a_file_is_of_its_bytes(tmp_path):
    for name, data in (("a.jsonl", b"one"), ("b.jsonl", b"one"), ("c.jsonl", b"two")):
        (tmp_path / name).write_bytes(data)
    one, same, other = (content_digest(str(tmp_path / name), split="x") for name in ("a.jsonl", "b.jsonl", "c.jsonl"))
    assert one == same != other


def test_a_prompt_of_another_name_that_is_not_there_is_not_made_up(tmp_path):
    """The common start of two responses is a prompt only where none has been named."""
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"request": "Hi?", "chosen": "Sure, a", "rejected": "Sure, b"}))
    for name, expected in (("request", "Hi?"), ("requests", None)):
        (row,) = read_rows(str(path), format="preference", split="train", naming=Naming({"prompt": name}))
        assert getattr(row, "prompt", None) == expected
    assert row.reason == "missing key 'requests', which data.columns names as the prompt"


def test_a_value_of_a_table_that_json_lacks_makes_a_bad_row(tmp_path):
    row = {"prompt": [user()], "chosen": [assistant()], "rejected": [assistant("No")]}
    row["chat_template_kwargs"] = {"today": datetime.date(2024, 1, 1)}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    (bad,) = read(tmp_path / "a.parquet", "preference")
    assert bad.reason.startswith("chat_template_kwargs: holds a date, bytes or another value that JSON lacks")


def test_the_columns_that_can_be_renamed_are_those_that_are_read():
    """They stand in the configuration, which imports no reader, and here; prompt_id is ultrafeedback's own."""
    assert {*get_args(Column), "prompt_id"} == set(COLUMNS)
