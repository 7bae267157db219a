"""Sources -> TokenizedPairs: the whole-file check, what it refuses, the counts, and the cache on disk."""

import concurrent.futures
import dataclasses
import gzip
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import toy_tokenizers as toy

from sr_dpo_jax.data.chat_template import UnplacedError
from sr_dpo_jax.data.dataset import Source, TokenizedPairs, first, prepare
from sr_dpo_jax.data.tokens import load_tokenizer
from sr_dpo_jax.errors import UsageError

REAL_FILE = Path(__file__).resolve().parents[3] / "shared" / "data" / "hh_rlhf_harmless_base_test.jsonl.gz"
WORDS = {
    word: number for number, word in enumerate(["</s>", "<s>", "<unk>", "what", "is", "it", "a", "cat", "be", "good"])
}
ROW = {"prompt": "what is it", "chosen": "a cat", "rejected": "it"}
LIMITS = {"max_length": 12, "max_prompt_length": 8, "prompt_truncation": "keep_end"}
ARRAYS = ("tokens", "offsets", "head", "augmentation", "chosen_score", "rejected_score", "source", "source_weights")


class CountingTokenizer:
    """Stands before a tokenizer and counts how often it is asked for ids or a rendering."""

    def __init__(self, tokenizer):
        self.tokenizer, self.calls = tokenizer, 0

    def __call__(self, *args, **options):
        self.calls += 1
        return self.tokenizer(*args, **options)

    def apply_chat_template(self, *args, **options):
        self.calls += 1
        return self.tokenizer.apply_chat_template(*args, **options)

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return load_tokenizer(str(toy.word_tokenizer(tmp_path_factory.mktemp("words"), WORDS, bos=True)))


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return load_tokenizer(str(toy.byte_level_tokenizer(tmp_path_factory.mktemp("chat"), chat_template=toy.ZEPHYR)))


def write(path: Path, rows: list) -> Source:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return Source(str(path))


def run(tmp_path: Path, tokenizer, *sources: Source, **options) -> TokenizedPairs:
    defaults = {"format": "preference", "split": "train", "augmentation_prompt": "be good", "max_bad_rows": 0, **LIMITS}
    return prepare(sources, tokenizer, cache_dir=tmp_path / "cache", **{**defaults, **options})


def assert_same(one: TokenizedPairs, other: TokenizedPairs) -> None:
    for name in ARRAYS:
        first, second = getattr(one, name), getattr(other, name)
        assert first.dtype == second.dtype, name
        np.testing.assert_array_equal(first, second, err_msg=name)
    assert (one.ids, one.digest, one.content_digest, one.report) == (
        other.ids,
        other.digest,
        other.content_digest,
        other.report,
    )


def cache_file(tmp_path: Path) -> Path:
    (only,) = (tmp_path / "cache").glob("tokens-*.safetensors")
    return only


class TestArrays:
    def test_worked_example(self, tmp_path, words):
        one = write(tmp_path / "one.jsonl", [{**ROW, "score_chosen": 8, "score_rejected": 2.5, "id": "first"}])
        two = write(tmp_path / "two.jsonl", [{"prompt": "a", "chosen": "cat", "rejected": "what"}])
        pairs = run(tmp_path, words, one, Source(two.path, weight=0.5))
        assert pairs.tokens.tolist() == [1, 3, 4, 5, 6, 7, 0, 5, 0, 1, 6, 7, 0, 3, 0]
        assert pairs.offsets.tolist() == [[0, 4, 7, 9], [9, 11, 13, 15]]
        assert (pairs.head.tolist(), pairs.augmentation.tolist()) == ([1], [8, 9])
        assert pairs.ids == ("first", "0") and len(pairs) == 2
        np.testing.assert_array_equal(pairs.chosen_score, np.array([8, np.nan], np.float32))
        np.testing.assert_array_equal(pairs.rejected_score, np.array([2.5, np.nan], np.float32))
        assert (pairs.source.tolist(), pairs.source_weights.tolist()) == ([0, 1], [1.0, 0.5])
        dtypes = [str(getattr(pairs, name).dtype) for name in ARRAYS]
        assert dtypes == ["int32", "int64", "int32", "int32", "float32", "float32", "int32", "float64"]
        assert pairs.prompt_tokens.tolist() == [4, 2]
        assert pairs.chosen_tokens.tolist() == [3, 2]
        assert pairs.rejected_tokens.tolist() == [2, 2]
        assert [part.tolist() for part in pairs.pair(1)] == [[1, 6], [7, 0], [3, 0]]
        assert not pairs.tokens.flags.writeable

    def test_no_p(self, tmp_path, words):
        pairs = run(tmp_path, words, write(tmp_path / "a.jsonl", [ROW]), augmentation_prompt=None)
        assert (pairs.head.tolist(), pairs.augmentation.tolist(), pairs.augmentation.dtype) == ([1], [], np.int32)

    def test_counts(self, tmp_path, words):
        long = " ".join(["a"] * 20)
        rows = [
            ROW,
            {"prompt": "is", "chosen": "it", "rejected": "it"},
            ROW,
            {**ROW, "prompt": long},
            {**ROW, "rejected": long},
        ]
        report = run(tmp_path, words, write(tmp_path / "a.jsonl", rows)).report
        assert (report.rows, report.pairs, report.bad_rows) == (5, 5, ())
        assert (report.identical_pairs, report.duplicate_pairs) == (1, 1)
        assert (report.truncated_prompts, report.truncated_responses) == (1, 1)

    def test_truncation_keeps_head_and_end(self, tmp_path, words):
        prompt = " ".join(["is"] * 9 + ["cat"])
        pairs = run(tmp_path, words, write(tmp_path / "a.jsonl", [{**ROW, "prompt": prompt}]))
        assert pairs.pair(0)[0].tolist() == [1, *[4] * 6, 7]

    def test_pairs_that_truncation_makes_equal(self, tmp_path, words):
        long = " ".join(["a"] * 20)
        rows = [
            ROW,
            {**ROW, "chosen": long + " cat", "rejected": long + " it"},
            {**ROW, "chosen": long, "rejected": long},
        ]
        pairs = run(tmp_path, words, write(tmp_path / "a.jsonl", rows), max_bad_rows=1)
        (bad,) = pairs.report.bad_rows
        assert (bad.line, bad.reason) == (2, "the two responses are equal after truncation to 4 tokens")
        assert pairs.ids == ("0", "2") and pairs.report.identical_pairs == 1

    def test_digest_is_of_the_ids_alone(self, tmp_path, words):
        base = run(tmp_path, words, write(tmp_path / "a.jsonl", [ROW]))
        same = [
            run(tmp_path, words, write(tmp_path / "renamed.jsonl", [{**ROW, "id": "x"}])),
            run(tmp_path, words, Source(write(tmp_path / "c.jsonl", [ROW]).path, weight=2.0), max_length=13),
        ]
        others = [
            run(tmp_path, words, write(tmp_path / "d.jsonl", [{**ROW, "rejected": "cat"}])),
            run(tmp_path, words, write(tmp_path / "a.jsonl", [ROW]), augmentation_prompt="be"),
            # The same row of ids, cut elsewhere.
            run(tmp_path, words, write(tmp_path / "e.jsonl", [{**ROW, "prompt": "what is", "chosen": "it a cat"}])),
        ]
        assert {pairs.digest for pairs in same} == {base.digest}
        assert len({pairs.digest for pairs in [base, *others]}) == 4


class TestRefusal:
    BAD = ["{", {**ROW, "chosen": ""}, {**ROW, "rejected": "a </s> it"}]  # noqa: RUF012

    def test_every_bad_row_of_every_source_is_named(self, tmp_path, words):
        one = write(tmp_path / "one.jsonl", [ROW, *self.BAD[:2]])
        two = write(tmp_path / "two.jsonl", [self.BAD[2], ROW])
        with pytest.raises(UsageError) as caught:
            run(tmp_path, words, one, two, max_bad_rows=2)
        message = str(caught.value)
        assert "3 of 5 rows cannot be used" in message and "data.max_bad_rows=3" in message
        assert f"{one.path}:2: bad JSON: Expecting property name enclosed in double quotes at column 2" in message
        assert f"{one.path}:3: empty chosen response" in message
        assert f"{two.path}:1: the rejected response holds the end-of-sequence token before its end" in message
        (file,) = (tmp_path / "cache").glob("bad_rows-*.jsonl")
        written = file.read_text().splitlines()
        assert [(row["file"], row["line"]) for row in map(json.loads, written)] == [
            (one.path, 2),
            (one.path, 3),
            (two.path, 1),
        ]

    def test_the_allowed_number_is_skipped_and_counted(self, tmp_path, words):
        pairs = run(tmp_path, words, write(tmp_path / "a.jsonl", [ROW, *self.BAD, ROW]), max_bad_rows=3)
        assert (pairs.report.rows, pairs.report.pairs, len(pairs.report.bad_rows)) == (5, 2, 3)
        # Another start writes nothing: the cache may be another user's, who gives it to be read.
        before = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").iterdir()}
        assert any(file.name.startswith("bad_rows-") for file in before)
        run(tmp_path, words, Source(str(tmp_path / "a.jsonl")), max_bad_rows=3)
        assert {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").iterdir()} == before
        assert pairs.ids == ("0", "4")

    def test_long_lists_are_cut(self, tmp_path, words):
        source = write(tmp_path / "a.jsonl", [*["{"] * 60, ROW])
        with pytest.raises(UsageError) as caught:
            run(tmp_path, words, source)
        message = str(caught.value)
        assert message.count("bad JSON") == 50 and "and 10 more" in message
        (file,) = (tmp_path / "cache").glob("bad_rows-*.jsonl")
        assert len(file.read_text().splitlines()) == 60

    def test_nothing_usable(self, tmp_path, words):
        source = write(tmp_path / "a.jsonl", self.BAD)
        for allowed in (0, 3):
            with pytest.raises(UsageError, match="none of 3 rows can be used") as caught:
                run(tmp_path, words, source, max_bad_rows=allowed)
            message = str(caught.value)
            assert all(f"{source.path}:{line}: " in message for line in (1, 2, 3)) and "max_bad_rows" not in message
        (written,) = (tmp_path / "cache").glob("bad_rows-*.jsonl")
        assert str(written) in message and len(written.read_text().splitlines()) == 3
        with pytest.raises(UsageError, match=r"empty\.jsonl: holds no rows"):
            run(tmp_path, words, write(tmp_path / "a.jsonl", [ROW]), write(tmp_path / "empty.jsonl", [""]))

    def test_a_missing_source_is_met_before_any_work(self, tmp_path, words):
        counting = CountingTokenizer(words)
        with pytest.raises(UsageError, match="no such file"):
            run(tmp_path, counting, write(tmp_path / "a.jsonl", [ROW]), Source(str(tmp_path / "none.jsonl")))
        assert counting.calls == 0

    def test_a_cache_that_cannot_be_written(self, tmp_path, words):
        (tmp_path / "cache").write_text("a file")
        with pytest.raises(UsageError, match="cannot be written"):
            run(tmp_path, words, write(tmp_path / "a.jsonl", [ROW]))


def turns(*roles: str) -> dict:
    """A conversation of these roles with two replies."""
    reply = {"role": "assistant"}
    messages = [{"role": role, "content": "x"} for role in roles]
    return {"prompt": messages, "chosen": [{**reply, "content": "yes"}], "rejected": [{**reply, "content": "no"}]}


class TestHeads:
    OPTIONS = {"max_length": 512, "max_prompt_length": 256}  # noqa: RUF012
    ROWS = [turns("user"), turns("system", "user"), turns("user", "assistant", "user")]  # noqa: RUF012
    ROLES = ["<|user|>\n", "<|system|>\nx</s>\n<|user|>\n", "<|user|>\n"]  # noqa: RUF012

    def test_each_prompt_has_its_own_head_where_they_differ(self, tmp_path, chat):
        source = write(tmp_path / "a.jsonl", self.ROWS)
        pairs = run(tmp_path, chat, source, **self.OPTIONS)
        assert pairs.head.tolist() == [] and pairs.head_tokens.dtype == np.int32
        heads = [pairs.pair(index)[0][:tokens] for index, tokens in enumerate(pairs.head_tokens)]
        assert [chat.decode(head) for head in heads] == self.ROLES
        assert chat.decode(pairs.augmentation) == "be good"
        again = run(tmp_path, CountingTokenizer(chat), source, **self.OPTIONS)
        assert_same(again, pairs)
        np.testing.assert_array_equal(again.head_tokens, pairs.head_tokens)
        assert first(pairs, 2).head_tokens.tolist() == pairs.head_tokens[:2].tolist()

    def test_one_head_stands_once_and_so_does_none_without_p(self, tmp_path, chat):
        alike = run(tmp_path, chat, write(tmp_path / "b.jsonl", self.ROWS[::2]), **self.OPTIONS)
        assert chat.decode(alike.head) == "<|user|>\n" and alike.head_tokens.tolist() == []
        without = run(tmp_path, chat, write(tmp_path / "a.jsonl", self.ROWS), augmentation_prompt=None, **self.OPTIONS)
        assert without.report.pairs == 3 and len(without.head) == len(without.head_tokens) == 0

    def test_the_places_of_p_are_in_the_digest(self, tmp_path, chat):
        pairs = run(tmp_path, chat, write(tmp_path / "a.jsonl", self.ROWS), **self.OPTIONS)
        digests = {pairs.digest}
        for tokens in (pairs.head_tokens[:0], pairs.head_tokens + 1):
            digests.add(dataclasses.replace(pairs, head_tokens=tokens).digest)
        assert len(digests) == 3

    def test_a_p_of_two_spellings_is_refused_by_line(self, tmp_path):
        """After the start of a text this tokenizer puts a space before p, within a conversation it does not."""
        directory = toy.dummy_prefix_tokenizer(tmp_path / "two", chat_template=toy.ZEPHYR)
        source = write(tmp_path / "a.jsonl", [self.ROWS[0], {"prompt": "Hm", "chosen": "yes", "rejected": "no"}])
        with pytest.raises(UnplacedError, match=rf"{source.path}:2: .*other ids .* of {source.path}:1, .*set"):
            run(tmp_path, load_tokenizer(str(directory)), source, **self.OPTIONS)


class TestCache:
    def test_a_hit_is_the_same_and_tokenises_nothing(self, tmp_path, words):
        rows = [{**ROW, "score_chosen": 1.5, "id": "é"}, "{", ROW]
        source = write(tmp_path / "a.jsonl", rows)
        counting = CountingTokenizer(words)
        fresh = run(tmp_path, counting, source, max_bad_rows=1)
        assert counting.calls > 0
        counting.calls = 0
        assert_same(run(tmp_path, counting, source, max_bad_rows=1), fresh)
        assert counting.calls == 0

    def test_a_hit_under_another_name_speaks_of_that_name(self, tmp_path, words):
        run(tmp_path, words, write(tmp_path / "a.jsonl", [ROW, "{"]), max_bad_rows=1)
        counting = CountingTokenizer(words)
        with pytest.raises(UsageError, match=r"b\.jsonl:2: bad JSON"):
            run(tmp_path, counting, write(tmp_path / "b.jsonl", [ROW, "{"]))
        assert counting.calls == 0

    def test_the_same_bytes_in_another_kind_of_file_are_other_rows(self, tmp_path, words):
        source = write(tmp_path / "a.jsonl", [json.dumps([ROW, ROW])])
        with pytest.raises(UsageError, match="expected an object, got a list"):
            run(tmp_path, words, source)
        (tmp_path / "a.jsonl").rename(tmp_path / "a.json")
        assert run(tmp_path, words, Source(str(tmp_path / "a.json"))).report.pairs == 2

    def test_a_refusal_is_cached_too(self, tmp_path, words):
        source, counting = write(tmp_path / "a.jsonl", [ROW, "{"]), CountingTokenizer(words)
        messages = []
        for _ in range(2):
            counting.calls = 0
            with pytest.raises(UsageError) as caught:
                run(tmp_path, counting, source)
            messages.append(str(caught.value))
        assert messages[0] == messages[1] and counting.calls == 0
        assert run(tmp_path, counting, source, max_bad_rows=1).report.pairs == 1
        assert counting.calls == 0

    @pytest.mark.parametrize(
        "change",
        [
            {"augmentation_prompt": None},
            {"max_length": 11},
            {"max_prompt_length": 7},
            {"prompt_truncation": "keep_start"},
            {"format": "hh_rlhf"},
        ],
    )
    def test_whatever_decides_ids_is_in_the_key(self, tmp_path, words, change):
        text = "\n\nHuman: what\n\nAssistant:"
        source = write(tmp_path / "a.jsonl", [{"prompt": "what", "chosen": text + " a", "rejected": text + " it"}])
        run(tmp_path, words, source)
        counting = CountingTokenizer(words)
        run(tmp_path, counting, source, **change)
        assert counting.calls > 0

    def test_content_and_tokenizer_are_in_the_key(self, tmp_path, words):
        source = write(tmp_path / "a.jsonl", [ROW])
        first = run(tmp_path, words, source)
        other = load_tokenizer(str(toy.word_tokenizer(tmp_path / "other", WORDS, bos=False)))
        assert run(tmp_path, other, source).head.tolist() == []
        write(tmp_path / "a.jsonl", [{**ROW, "chosen": "cat"}])
        second = run(tmp_path, words, source)
        assert second.digest != first.digest and second.content_digest != first.content_digest

    @pytest.mark.parametrize("damage", ["cut", "flip_token", "flip_report", "empty", "not_one"])
    def test_a_damaged_file_is_a_miss_that_says_so(self, tmp_path, words, caplog, damage):
        source = write(tmp_path / "a.jsonl", [ROW, "{"])
        fresh = run(tmp_path, words, source, max_bad_rows=1)
        path = cache_file(tmp_path)
        data = bytearray(path.read_bytes())
        if damage == "flip_token":
            data[-5] ^= 1
        elif damage == "flip_report":
            at = data.index(b"truncated_prompts")
            data[data.index(b": 0", at) + 2] = ord("7")
        damaged = {"cut": data[:-20], "empty": b"", "not_one": b"x" * 500}.get(damage, data)
        path.write_bytes(damaged)
        with caplog.at_level(logging.WARNING):
            assert_same(run(tmp_path, words, source, max_bad_rows=1), fresh)
        assert "is damaged" in caplog.text
        caplog.clear()
        run(tmp_path, words, source, max_bad_rows=1)
        assert "is damaged" not in caplog.text  # mended

    def test_no_half_file_is_left(self, tmp_path, words):
        run(tmp_path, words, write(tmp_path / "a.jsonl", [ROW]))
        assert list((tmp_path / "cache").iterdir()) == [cache_file(tmp_path)]

    def test_writers_at_once(self, tmp_path):
        directory = toy.word_tokenizer(tmp_path / "words", WORDS, bos=True)
        source = write(tmp_path / "a.jsonl", [ROW] * 500)
        tokenizers = [load_tokenizer(str(directory)) for _ in range(4)]  # one may not be shared by threads
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            digests = {
                pairs.digest for pairs in pool.map(lambda tokenizer: run(tmp_path, tokenizer, source), tokenizers)
            }
        assert len(digests) == 1
        assert list((tmp_path / "cache").iterdir()) == [cache_file(tmp_path)]


def test_the_first_pairs_are_those_of_a_file_that_ends_there(tmp_path, words):
    rows = [
        {"prompt": f"q {n}:", "chosen": " a" * (n + 1), "rejected": " b", "score_chosen": n, "score_rejected": 2}
        for n in range(5)
    ]
    whole = run(tmp_path, words, write(tmp_path / "whole.jsonl", rows))
    short = run(tmp_path, words, write(tmp_path / "short.jsonl", rows[:3]))
    kept = first(whole, 3)
    for name in ("tokens", "offsets", "head", "augmentation", "chosen_score", "rejected_score", "source"):
        np.testing.assert_array_equal(getattr(kept, name), getattr(short, name))
    assert (kept.ids, kept.digest, len(kept)) == (short.ids, short.digest, 3) and kept.digest != whole.digest
    assert first(whole, 5) is whole and first(whole, 99) is whole


def test_a_directory_data_set(tmp_path, words, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "hub"))
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "train.jsonl", [ROW, {**ROW, "chosen": "cat"}])
    pairs = run(tmp_path, words, Source(str(tmp_path / "set")))
    file = run(tmp_path, words, Source(str(tmp_path / "set" / "train.jsonl")))
    assert pairs.digest == file.digest
    assert_same(run(tmp_path, words, Source(str(tmp_path / "set"))), pairs)


def test_the_real_file(tmp_path):
    if not REAL_FILE.exists():
        pytest.skip(f"the real HH-RLHF file is not at {REAL_FILE}")
    with gzip.open(REAL_FILE, "rt") as lines:
        texts = [json.loads(line)["chosen"] for line, _ in zip(lines, range(200), strict=False)]
    directory = toy.byte_level_tokenizer(tmp_path / "toy", vocabulary_tokens=2000, texts=texts, bos=True)
    tokenizer = load_tokenizer(str(directory))
    options = {"format": "hh_rlhf", "max_length": 512, "max_prompt_length": 256}
    with pytest.raises(UsageError, match="9 of 2312 rows"):
        run(tmp_path, tokenizer, Source(str(REAL_FILE)), **options)
    pairs = run(tmp_path, tokenizer, Source(str(REAL_FILE)), max_bad_rows=9, **options)
    assert len(pairs) == pairs.report.pairs == 2303
    longest = pairs.prompt_tokens + np.maximum(pairs.chosen_tokens, pairs.rejected_tokens)
    assert longest.max() <= 512 and pairs.report.truncated_prompts > 0
    for index in range(0, 2303, 97):
        prompt, chosen, rejected = pairs.pair(index)
        assert (prompt == tokenizer.bos_token_id).sum() == 1 and prompt[0] == tokenizer.bos_token_id
        assert tokenizer.decode(prompt).endswith("\n\nAssistant:")
        assert (chosen == tokenizer.eos_token_id).sum() <= 1 and (rejected == tokenizer.eos_token_id).sum() <= 1
