"""Sources -> `TokenizedPairs`: reads, checks and tokenises every row before a run starts, and caches the result.

Every source is read whole first and all its unusable rows are named at once, so that no run dies of row 1,203,344 at
night. The cache key is a digest of data, tokenizer and settings: the same content is tokenised once, whatever the paths
are called.

Next: `data/plan.py`, which decides which pairs stand in which row of step n.
"""

import array
import dataclasses
import hashlib
import itertools
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy
from transformers import PreTrainedTokenizerBase

from sr_dpo_jax.data.chat_template import UNPLACED, UnplacedError
from sr_dpo_jax.data.model_ends import end_tokens
from sr_dpo_jax.data.records import BadRow, digest_of, files_of, kind_of_file
from sr_dpo_jax.data.rows import OUR_NAMES, Naming, Pair, read_rows
from sr_dpo_jax.data.tokens import PairEncoder, PairTokens, tokenizer_digest, truncate
from sr_dpo_jax.data.turns import fitted
from sr_dpo_jax.durable import files
from sr_dpo_jax.errors import UsageError

LOG = logging.getLogger(__name__)
CODE_VERSION = 6
"""Part of every cache key: raise it with any change that gives other tokens, other bad rows or another file layout."""
LISTED_BAD_ROWS = 50
ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Source:
    """One file, glob pattern, directory or hub data set; see `records.py` for what a path may be."""

    path: str
    weight: float = 1.0
    """The times that an epoch draws each pair; `plan.training_plan` uses it."""
    revision: str | None = None


@dataclass(frozen=True)
class Report:
    """The outcome of reading the rows; numbers count pairs, except `rows`."""

    rows: int
    """Rows read: pairs + bad rows."""
    pairs: int
    bad_rows: tuple[BadRow, ...]
    """All unusable rows, in the order of the sources."""
    truncated_prompts: int
    truncated_responses: int
    """Pairs with at least one response that was cut and so lost its EOS."""
    identical_pairs: int
    """Pairs whose two responses have the same ids; they train nothing."""
    duplicate_pairs: int
    """Pairs whose prompt, chosen and rejected ids equal those of an earlier pair."""
    text_prompts: int = 0
    """Pairs whose prompt is text and no conversation."""
    dropped_turns: int = 0
    """Messages that were left out of conversations which were too long."""


COUNTED = ("truncated_prompts", "truncated_responses", "identical_pairs", "duplicate_pairs")
"""Counts of a report that a run's manifest keeps: pairs that were cut, and pairs that train nothing or twice."""


@dataclass(frozen=True, eq=False)
class TokenizedPairs:
    """N pairs as ids, in the order of the sources and their rows. The arrays are read-only."""

    tokens: np.ndarray
    """int32 `[total]`: prompt, chosen, rejected of each pair, one after the other. A prompt is head + rest."""
    offsets: np.ndarray
    """int64 `[N, 4]`: the start of prompt, chosen and rejected of each pair, and the pair's end, in `tokens`."""
    head: np.ndarray
    """int32 `[H]`: the ids that every prompt starts with, before p. Empty where prompts differ there."""
    augmentation: np.ndarray
    """int32 `[I]`: the ids of p, which stand between head and rest; empty without p."""
    ids: tuple[str, ...]
    """N row ids, or 0-based numbers of rows that have none; two sources may have the same ids."""
    chosen_score: np.ndarray
    rejected_score: np.ndarray
    """float32 `[N]`, NaN where a row has none."""
    source: np.ndarray
    """int32 `[N]`: the index of the pair's source."""
    line: np.ndarray
    """int64 `[N]`: the 1-based line in its file, or the row where there are no lines."""
    files: tuple[str, ...]
    """S paths or hub names as given."""
    source_weights: np.ndarray
    """float64 `[S]`."""
    content_digest: str
    """The sha256 (hex) of the raw data, for the manifest."""
    report: Report
    against: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    """int32 `[J]`: the ids of a second instruction, which takes the place of p; empty without one."""
    head_tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    """int32 `[N]`: the tokens of each prompt's own head, where heads differ and p follows each; else empty."""

    def __len__(self) -> int:
        return len(self.offsets)

    @cached_property
    def digest(self) -> str:
        """The sha256 (hex) of all ids and of the places of p alone: equal ids have equal digests."""
        names = ["tokens", "offsets", "head", "augmentation", *["head_tokens"] * (len(self.head_tokens) > 0)]
        return _digest_of_arrays({name: getattr(self, name) for name in names})

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 (hex) of all that a run takes from the pairs: ids, names of rows, ratings, weights of sources."""
        names = ("chosen_score", "rejected_score", "source", "source_weights")
        others = _digest_of_arrays({name: getattr(self, name) for name in names})
        return files.json_digest([self.digest, list(self.ids), others])

    @property
    def prompt_tokens(self) -> np.ndarray:
        """int64 `[N]`: tokens of each prompt, with its head, without p."""
        return self.offsets[:, 1] - self.offsets[:, 0]

    @property
    def chosen_tokens(self) -> np.ndarray:
        """int64 `[N]`: tokens of each chosen response, EOS included."""
        return self.offsets[:, 2] - self.offsets[:, 1]

    @property
    def rejected_tokens(self) -> np.ndarray:
        """int64 `[N]`: tokens of each rejected response, EOS included."""
        return self.offsets[:, 3] - self.offsets[:, 2]

    def place(self, index: int) -> str:
        """Gives `file:line` of a pair, for messages."""
        return f"{self.files[self.source[index]]}:{self.line[index]}"

    def pair(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Gives the ids of prompt, chosen and rejected of one pair, as int32 views."""
        prompt, chosen, rejected, end = self.offsets[index]
        return self.tokens[prompt:chosen], self.tokens[chosen:rejected], self.tokens[rejected:end]


def prepare(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    *,
    format: str,
    split: str,
    augmentation_prompt: str | None,
    max_length: int,
    max_prompt_length: int,
    prompt_truncation: str,
    max_bad_rows: int,
    cache_dir: str | os.PathLike,
    naming: Naming = OUR_NAMES,
) -> TokenizedPairs:
    """Reads, checks and tokenises the whole of every source, or loads the cached result.

    `format`, `split` and `naming` are as for `rows.read_rows`, lengths and `prompt_truncation` as for
    `tokens.truncate`. Up to `max_bad_rows` unusable rows, over all sources, are skipped. Many processes may use one
    `cache_dir` at once.

    Raises:
      UsageError: a source cannot be read or has no rows, more than `max_bad_rows` rows are unusable (every one is
        named), no pair is usable, or `cache_dir` cannot be written. It is an UnplacedError where p is at fault.
    """
    sources = [  # the files of a pattern or directory are sources of the same weight, so that rows have their file
        dataclasses.replace(source, path=path)
        for source in sources
        for path in files_of(source.path, split=split, revision=source.revision)
    ]
    contents = [digest_of(source.path, split=split, revision=source.revision) for source in sources]
    limits = {"max_length": max_length, "max_prompt_length": max_prompt_length, "prompt_truncation": prompt_truncation}
    settings = {"format": format, "split": split, "augmentation_prompt": augmentation_prompt, **limits}
    renamed = [sorted(naming.columns.items()), list(naming.ignored)]
    ends = end_tokens(tokenizer, Path(tokenizer.name_or_path))
    kinds = [kind_of_file(source.path) for source in sources]  # the same bytes are other rows in another kind of file
    key = files.json_digest([CODE_VERSION, contents, kinds, tokenizer_digest(tokenizer), ends, settings, renamed])
    cached = Path(cache_dir) / f"tokens-{key}.safetensors"
    content = _load(cached)
    if content is None:
        encoder = PairEncoder(tokenizer, augmentation_prompt=augmentation_prompt)
        content = _tokenize(sources, encoder, naming=naming, **settings)
        arrays, report = content
        metadata = {"report": report, "sha256": _digest_of_arrays(arrays, report)}
        _write(cached, lambda path: safetensors.numpy.save_file(arrays, path, metadata))
    pairs = _assemble(content, sources, files.json_digest(contents))
    _refuse(pairs.report, max_bad_rows, cached.parent / f"bad_rows-{key[:16]}.jsonl")
    return pairs


def first(pairs: TokenizedPairs, count: int) -> TokenizedPairs:
    """Gives the first `count` pairs, or all where there are fewer; `report` and `content_digest` are kept."""
    if count >= len(pairs):
        return pairs
    names = ("offsets", "ids", "chosen_score", "rejected_score", "source", "line", "head_tokens")
    kept = {name: getattr(pairs, name)[:count] for name in names}
    return dataclasses.replace(pairs, **kept, tokens=pairs.tokens[: kept["offsets"][-1, 3]])


_Content = tuple[dict[str, np.ndarray], str]
"""The arrays of a cache file, and in JSON the counts of `Report` and the bad rows as [source, line, reason].

It holds no paths, because the same data may have another path next time.
"""


class _Collector:
    """Builds arrays and counts pair by pair."""

    def __init__(self) -> None:
        self.tokens, self.source = array.array("i"), array.array("i")
        self.lengths, self.lines, self.scores = array.array("q"), array.array("q"), array.array("f")
        self.head_tokens = array.array("i")
        self.ids: list[str] = []
        self.bad_rows: list[tuple[int, int, str]] = []
        self.counts: Counter[str] = Counter()
        self.heads: dict[tuple[tuple[int, ...], tuple[int, ...]], str] = {}
        self._seen: set[bytes] = set()

    def add(self, pair: Pair, source: int, tokens: PairTokens, **limits) -> None:
        prompt, chosen, rejected = cut = truncate(
            tokens.prompt, tokens.chosen, tokens.rejected, len(tokens.head), **limits
        )
        identical = tokens.chosen == tokens.rejected
        if chosen == rejected and not identical:
            reason = f"the two responses are equal after truncation to {len(chosen)} tokens"
            self.bad_rows.append((source, pair.line, reason))
            return
        lengths = [len(ids) for ids in cut]
        content = array.array("i", [*lengths, *prompt, *chosen, *rejected])
        fingerprint = hashlib.blake2b(content, digest_size=16).digest()
        self.counts["duplicate_pairs"] += fingerprint in self._seen
        self._seen.add(fingerprint)
        self.counts["identical_pairs"] += identical
        self.counts["text_prompts"] += isinstance(pair.prompt, str)
        self.counts["truncated_prompts"] += len(prompt) < len(tokens.prompt)
        self.counts["truncated_responses"] += lengths[1:] != [len(tokens.chosen), len(tokens.rejected)]
        self.heads.setdefault((tokens.head, tokens.augmentation), f"{pair.file}:{pair.line}")
        self.head_tokens.append(len(tokens.head))
        self.tokens.extend(content[3:])
        self.lengths.extend(lengths)
        self.source.append(source)
        self.lines.append(pair.line)
        self.scores.extend(np.nan if score is None else score for score in (pair.chosen_score, pair.rejected_score))
        self.ids.append(pair.id)

    def content(self, rows: int) -> _Content:
        ends = np.cumsum(np.frombuffer(self.lengths, np.int64), dtype=np.int64).reshape(-1, 3)
        starts = np.concatenate([[0], ends[:-1, 2]])[: len(ends), None]
        scores = np.frombuffer(self.scores, np.float32).reshape(-1, 2)
        heads = list(self.heads)
        head, augmentation = (heads[0][0] if len(heads) == 1 else (), heads[0][1]) if heads else ((), ())
        arrays = {
            "tokens": np.frombuffer(self.tokens, np.int32),
            "offsets": np.concatenate([starts, ends], axis=1, dtype=np.int64),
            "head": np.array(head, np.int32),
            "augmentation": np.array(augmentation, np.int32),
            "ids": np.frombuffer(json.dumps(self.ids).encode(), np.uint8),
            "chosen_score": np.ascontiguousarray(scores[:, 0]),
            "rejected_score": np.ascontiguousarray(scores[:, 1]),
            "source": np.frombuffer(self.source, np.int32),
            "line": np.frombuffer(self.lines, np.int64),
        }
        if len(heads) > 1 and augmentation:
            arrays["head_tokens"] = np.frombuffer(self.head_tokens, np.int32)
        counts = {name: int(self.counts[name]) for name in (*COUNTED, "text_prompts", "dropped_turns")}
        counts |= {"rows": rows, "pairs": len(ends)}
        return arrays, json.dumps({**counts, "bad_rows": self.bad_rows})


def _tokenize(
    sources: Sequence[Source],
    encoder: PairEncoder,
    *,
    format: str,
    split: str,
    naming: Naming,
    augmentation_prompt: str | None,
    **limits,
) -> _Content:
    collector, rows = _Collector(), 0
    for index, source in enumerate(sources):
        before = rows
        stream = read_rows(source.path, format=format, split=split, revision=source.revision, naming=naming)
        while batch := list(itertools.islice(stream, ROWS_AT_ONCE)):
            rows += len(batch)
            encoded = iter(encoder.encode([row for row in batch if isinstance(row, Pair)]))
            for row in batch:
                result = row if isinstance(row, BadRow) else next(encoded)
                if isinstance(result, PairTokens):
                    result, dropped = fitted(encoder, row, result, **limits)
                    collector.counts["dropped_turns"] += dropped
                if isinstance(result, BadRow):
                    collector.bad_rows.append((index, result.line, result.reason))
                else:
                    collector.add(row, index, result, **limits)
        if rows == before:
            raise UsageError(f"{source.path}: holds no rows; correct data.path")
        LOG.info("%s: %d rows read and tokenised", source.path, rows - before)
    _require_one_p(collector.heads)
    return collector.content(rows)


def _require_one_p(heads: dict[tuple[tuple[int, ...], tuple[int, ...]], str]) -> None:
    """Refuses an instruction that has other ids after one head than after another: p would not be one instruction."""
    places = {augmentation: place for (_, augmentation), place in reversed(heads.items())}
    if len(places) > 1:
        first, other, *_ = reversed(places.values())
        raise UnplacedError(
            f"{other}: this tokenizer gives refinement.prompt other ids at the start of this prompt than at that of "
            f"{first}, as where text and conversations are mixed; train on them apart, or set refinement.prompt=null "
            "where the objective needs none"
        )


def _assemble(content: _Content, sources: Sequence[Source], raw_digest: str) -> TokenizedPairs:
    arrays, counts = dict(content[0]), json.loads(content[1])
    ids = tuple(json.loads(arrays.pop("ids").tobytes()))
    for values in arrays.values():
        values.flags.writeable = False
    bad_rows = tuple(BadRow(sources[index].path, line, reason) for index, line, reason in counts.pop("bad_rows"))
    return TokenizedPairs(
        **arrays,
        ids=ids,
        files=tuple(source.path for source in sources),
        source_weights=np.array([source.weight for source in sources], np.float64),
        content_digest=raw_digest,
        report=Report(**counts, bad_rows=bad_rows),
    )


def _refuse(report: Report, max_bad_rows: int, everything: Path) -> None:
    """Names all bad rows in the file `everything`; refuses more than are allowed, and data without a usable row."""
    bad = report.bad_rows
    lines = "".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in bad)
    if bad and not (everything.is_file() and everything.read_text(encoding="utf-8") == lines):
        _write(everything, lambda path: path.write_text(lines, encoding="utf-8"))
    listed = [f"  {row.file}:{row.line}: {row.reason}" for row in bad[:LISTED_BAD_ROWS]]
    if len(bad) > LISTED_BAD_ROWS:
        listed.append(f"  and {len(bad) - LISTED_BAD_ROWS} more")
    named = "\n".join(["", *listed, f"All of them are written to {everything}."]) if bad else ""
    kind = UnplacedError if any(row.reason == UNPLACED for row in bad) else UsageError
    if report.pairs == 0:
        raise kind(f"none of {report.rows} rows can be used; correct data.path or data.format{named}")
    if len(bad) > max_bad_rows:
        raise kind(
            f"{len(bad)} of {report.rows} rows cannot be used, and data.max_bad_rows={max_bad_rows} allows fewer:"
            f"{named} Fix or remove them, or set data.max_bad_rows={len(bad)} to skip them."
        )
    if bad:
        LOG.warning("%d of %d rows cannot be used and are skipped; named in %s", len(bad), report.rows, everything)


def _load(path: Path) -> _Content | None:
    """Reads a cache file; gives None where there is none, or a damaged one, which is then made again."""
    if not path.is_file():
        return None
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        LOG.warning("%s is damaged (%s): tokenising again", path, type(error).__name__)
        return None
    report = metadata.get("report", "")
    if _digest_of_arrays(arrays, report) != metadata.get("sha256"):
        LOG.warning("%s is damaged (its content does not match its digest): tokenising again", path)
        return None
    return arrays, report


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file of the cache whole; raises UsageError where that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.whole(path) as temporary:
            write(temporary)
    except (OSError, safetensors.SafetensorError) as error:
        raise UsageError(f"{path.parent}: cannot be written ({error}); free space there or choose another") from error


def _digest_of_arrays(arrays: dict[str, np.ndarray], text: str = "") -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        values = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {values.dtype.str} {values.shape}\n".encode())
        digest.update(values.data if values.size else b"")
    return digest.hexdigest()
