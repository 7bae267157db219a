"""Sources -> `TokenizedPairs`: every row read, checked and tokenised before a run starts, and kept on disk by content.

A long run must not die at night of row 1,203,344, so the whole of every source is read first, and all its unusable
rows are named at once. The result is stored under a digest of what decides it: the same data, tokenizer and settings
are tokenised once, whatever the paths are called.

Next: `data/plan.py`, which decides which pairs stand in which row of step n.
"""

import array
import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import os
import secrets
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy
from transformers import PreTrainedTokenizerBase

from sr_dpo_jax.data.rows import BadRow, Pair, content_digest, read_rows
from sr_dpo_jax.data.tokens import PairEncoder, PairTokens, tokenizer_digest, truncate
from sr_dpo_jax.errors import UsageError

LOG = logging.getLogger(__name__)
CODE_VERSION = 4
"""Part of every cache key: raise it with any change that gives other tokens, other bad rows or another file layout."""
LISTED_BAD_ROWS = 50
ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Source:
    """One file or hub data set; see `rows.read_rows` for what a path may be."""

    path: str
    weight: float = 1.0
    """How often an epoch draws each pair; only carried along here."""
    revision: str | None = None


@dataclass(frozen=True)
class Report:
    """What became of the rows. Counts of pairs, unless said otherwise."""

    rows: int
    """Rows read: pairs + bad rows."""
    pairs: int
    bad_rows: tuple[BadRow, ...]
    """All unusable rows, in the order of the sources."""
    truncated_prompts: int
    truncated_responses: int
    """Pairs with at least one response cut, which lost its EOS."""
    identical_pairs: int
    """Pairs whose two responses are the same ids: they train nothing."""
    duplicate_pairs: int
    """Pairs whose three id sequences, as stored, have all stood in an earlier pair."""


@dataclass(frozen=True, eq=False)
class TokenizedPairs:
    """N pairs as ids, in the order of the sources and their rows. The arrays are read-only."""

    tokens: np.ndarray
    """int32 `[total]`: prompt, chosen, rejected of each pair, one after the other. A prompt is head + rest."""
    offsets: np.ndarray
    """int64 `[N, 4]`: where the prompt, the chosen and the rejected response of a pair start, and where it ends."""
    head: np.ndarray
    """int32 `[H]`: what every prompt starts with, before p. Empty where prompts start differently (only without p)."""
    augmentation: np.ndarray
    """int32 `[I]`: the ids of p, to stand between head and rest; empty without p."""
    ids: tuple[str, ...]
    """N row ids: the row's own, else its 0-based number in its file. Not unique over sources."""
    chosen_score: np.ndarray
    rejected_score: np.ndarray
    """float32 `[N]`, NaN where a row has none."""
    source: np.ndarray
    """int32 `[N]`: index of the source."""
    line: np.ndarray
    """int64 `[N]`: 1-based line, or row where there are no lines, in its file."""
    files: tuple[str, ...]
    """S paths or hub names as given."""
    source_weights: np.ndarray
    """float64 `[S]`."""
    digest: str
    """sha256 (hex) of tokens, offsets, head and augmentation, and of nothing else: equal ids have equal digests."""
    content_digest: str
    """sha256 (hex) of the raw data, for the manifest."""
    report: Report

    def __len__(self) -> int:
        return len(self.offsets)

    @property
    def prompt_tokens(self) -> np.ndarray:
        """int64 `[N]`: tokens of each prompt, head included, p not."""
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
        """`file:line` of a pair, for messages."""
        return f"{self.files[self.source[index]]}:{self.line[index]}"

    def pair(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The ids of prompt, chosen and rejected: int32 views of one pair."""
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
) -> TokenizedPairs:
    """Reads, checks and tokenises the whole of every source, or loads the stored result of the same.

    Args:
      sources: at least one.
      tokenizer: as `tokens.load_tokenizer` gives it.
      format, split: as for `rows.read_rows`.
      augmentation_prompt: the instruction p, or None.
      max_length, max_prompt_length, prompt_truncation: as for `tokens.truncate`.
      max_bad_rows: how many unusable rows, of all sources together, may be skipped.
      cache_dir: made if need be. Any number of processes may use it at once.

    Raises:
      UsageError: a source that cannot be read or has no rows, more than `max_bad_rows` unusable rows (every one is
        named), no usable pair, prompts that differ before p, or a `cache_dir` that cannot be written.
    """
    contents = [content_digest(source.path, split=split, revision=source.revision) for source in sources]
    settings = {
        "format": format,
        "split": split,
        "augmentation_prompt": augmentation_prompt,
        "max_length": max_length,
        "max_prompt_length": max_prompt_length,
        "prompt_truncation": prompt_truncation,
    }
    key = _digest_of([CODE_VERSION, contents, tokenizer_digest(tokenizer), settings])
    cache_dir = Path(cache_dir)
    cached = cache_dir / f"tokens-{key}.safetensors"
    stored = _load(cached)
    if stored is None:
        stored = _tokenize(sources, PairEncoder(tokenizer, augmentation_prompt=augmentation_prompt), **settings)
        with _writing(cached) as temporary:
            safetensors.numpy.save_file(stored.arrays, temporary, {"report": stored.report, "sha256": stored.sha256()})
    pairs = _assemble(stored, sources, _digest_of(contents))
    _refuse(pairs.report, max_bad_rows, cache_dir)
    return pairs


def first(pairs: TokenizedPairs, count: int) -> TokenizedPairs:
    """The first `count` pairs, or all where there are fewer; `report` and `content_digest` stay those of the whole."""
    if count >= len(pairs):
        return pairs
    offsets = pairs.offsets[:count]
    kept = {
        "tokens": pairs.tokens[: offsets[-1, 3]],
        "offsets": offsets,
        "head": pairs.head,
        "augmentation": pairs.augmentation,
    }
    per_pair = {
        name: getattr(pairs, name)[:count] for name in ("ids", "chosen_score", "rejected_score", "source", "line")
    }
    return dataclasses.replace(pairs, **kept, **per_pair, digest=_digest_of_arrays(kept))


@dataclass(frozen=True)
class _Stored:
    """What one cache file holds. Paths are no part of it: the same content may have another name next time."""

    arrays: dict[str, np.ndarray]
    report: str
    """JSON: the counts of `Report`, and bad rows as [source, line, reason]."""

    def sha256(self) -> str:
        return _digest_of_arrays(self.arrays, self.report)


class _Collector:
    """Grows the arrays and counts pair by pair."""

    def __init__(self) -> None:
        self.tokens, self.lengths, self.source = array.array("i"), array.array("q"), array.array("i")
        self.lines = array.array("q")
        self.scores = array.array("f")
        self.ids: list[str] = []
        self.bad_rows: list[tuple[int, int, str]] = []
        self.counts: Counter[str] = Counter()
        self.heads: dict[tuple[tuple[int, ...], tuple[int, ...]], list] = {}
        self._seen: set[bytes] = set()

    def add(self, pair: Pair, source: int, tokens: PairTokens, **limits) -> None:
        cut = truncate(tokens.prompt, tokens.chosen, tokens.rejected, len(tokens.head), **limits)
        prompt, chosen, rejected = cut
        identical = tokens.chosen == tokens.rejected
        if chosen == rejected and not identical:
            self.bad_rows.append(
                (source, pair.line, f"the two responses are equal after truncation to {len(chosen)} tokens")
            )
            return
        lengths = [len(ids) for ids in cut]
        content = array.array("i", [*lengths, *prompt, *chosen, *rejected])
        fingerprint = hashlib.blake2b(content, digest_size=16).digest()
        self.counts["duplicate_pairs"] += fingerprint in self._seen
        self._seen.add(fingerprint)
        self.counts["identical_pairs"] += identical
        self.counts["truncated_prompts"] += len(prompt) < len(tokens.prompt)
        self.counts["truncated_responses"] += lengths[1:] != [len(tokens.chosen), len(tokens.rejected)]
        self.heads.setdefault((tokens.head, tokens.augmentation), [0, f"{pair.file}:{pair.line}"])[0] += 1
        self.tokens.extend(content[3:])
        self.lengths.extend(lengths)
        self.source.append(source)
        self.lines.append(pair.line)
        self.scores.extend(np.nan if score is None else score for score in (pair.chosen_score, pair.rejected_score))
        self.ids.append(pair.id)

    def stored(self, rows: int) -> _Stored:
        ends = np.cumsum(np.frombuffer(self.lengths, np.int64), dtype=np.int64).reshape(-1, 3)
        starts = np.concatenate([[0], ends[:-1, 2]])[: len(ends), None]
        scores = np.frombuffer(self.scores, np.float32).reshape(-1, 2)
        head, augmentation = next(iter(self.heads)) if len(self.heads) == 1 else ((), ())
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
        names = ("truncated_prompts", "truncated_responses", "identical_pairs", "duplicate_pairs")
        counts = {"rows": rows, "pairs": len(ends), **{name: int(self.counts[name]) for name in names}}
        return _Stored(arrays, json.dumps({**counts, "bad_rows": self.bad_rows}))


def _tokenize(
    sources: Sequence[Source],
    encoder: PairEncoder,
    *,
    format: str,
    split: str,
    augmentation_prompt: str | None,
    **limits,
) -> _Stored:
    collector, rows = _Collector(), 0
    for index, source in enumerate(sources):
        before = rows
        stream = read_rows(source.path, format=format, split=split, revision=source.revision)
        while batch := list(itertools.islice(stream, ROWS_AT_ONCE)):
            rows += len(batch)
            encoded = iter(encoder.encode([row for row in batch if isinstance(row, Pair)]))
            for row in batch:
                result = row if isinstance(row, BadRow) else next(encoded)
                if isinstance(result, BadRow):
                    collector.bad_rows.append((index, result.line, result.reason))
                else:
                    collector.add(row, index, result, **limits)
        if rows == before:
            raise UsageError(f"{source.path}: holds no rows; correct data.path")
        LOG.info("%s: %d rows read and tokenised", source.path, rows - before)
    if augmentation_prompt is not None and len(collector.heads) > 1:
        _refuse_heads(list(collector.heads.values()))
    return collector.stored(rows)


def _refuse_heads(heads: list) -> None:
    """p stands once at the start of a packed row, before it the head: so all prompts must share one."""
    usual = max(heads, key=lambda head: head[0])
    others = [head for head in heads if head is not usual]
    raise UsageError(
        f"{sum(count for count, _ in others)} of {sum(count for count, _ in heads)} pairs, first {others[0][1]}, start "
        "with another system message or template head than the rest, and refinement.prompt can follow only one; give "
        "all rows the same system message, train on them apart, or set refinement.prompt=null where the objective "
        "needs none"
    )


def _assemble(stored: _Stored, sources: Sequence[Source], raw_digest: str) -> TokenizedPairs:
    arrays = dict(stored.arrays)
    ids = tuple(json.loads(arrays.pop("ids").tobytes()))
    for values in arrays.values():
        values.flags.writeable = False
    counts = json.loads(stored.report)
    bad_rows = tuple(BadRow(sources[index].path, line, reason) for index, line, reason in counts.pop("bad_rows"))
    return TokenizedPairs(
        **arrays,
        ids=ids,
        files=tuple(source.path for source in sources),
        source_weights=np.array([source.weight for source in sources], np.float64),
        digest=_digest_of_arrays({name: arrays[name] for name in ("tokens", "offsets", "head", "augmentation")}),
        content_digest=raw_digest,
        report=Report(**counts, bad_rows=bad_rows),
    )


def _refuse(report: Report, max_bad_rows: int, cache_dir: Path) -> None:
    bad = report.bad_rows
    if len(bad) > max_bad_rows:
        everything = cache_dir / "bad_rows.jsonl"
        with _writing(everything) as temporary:
            temporary.write_text("".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in bad))
        listed = [f"  {row.file}:{row.line}: {row.reason}" for row in bad[:LISTED_BAD_ROWS]]
        if len(bad) > LISTED_BAD_ROWS:
            listed.append(f"  and {len(bad) - LISTED_BAD_ROWS} more")
        raise UsageError(
            f"{len(bad)} of {report.rows} rows cannot be used, and data.max_bad_rows={max_bad_rows} allows fewer:\n"
            + "\n".join(listed)
            + f"\nAll of them are written to {everything}. Fix or remove them, or set data.max_bad_rows={len(bad)} to "
            "skip them."
        )
    if report.pairs == 0:
        raise UsageError(f"none of {report.rows} rows can be used; correct data.path or data.format")
    if bad:
        LOG.warning("%d of %d rows cannot be used and are skipped", len(bad), report.rows)


def _load(path: Path) -> _Stored | None:
    """None where there is no file, or a damaged one: a killed disk must cost a minute, not a wrong run."""
    if not path.is_file():
        return None
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            stored = _Stored({name: file.get_tensor(name) for name in file.keys()}, metadata.get("report", ""))  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        LOG.warning("%s is damaged (%s): tokenising again", path, type(error).__name__)
        return None
    if stored.sha256() != metadata.get("sha256"):
        LOG.warning("%s is damaged (its content does not match its digest): tokenising again", path)
        return None
    return stored


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[Path]:
    """Gives a temporary name beside `path`, and moves it there when whole, so that no reader ever sees half a file."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, safetensors.SafetensorError) as error:
        raise UsageError(f"{path.parent}: cannot be written ({error}); free space there or choose another") from error


def _digest_of(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _digest_of_arrays(arrays: dict[str, np.ndarray], text: str = "") -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        values = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {values.dtype.str} {values.shape}\n".encode())
        digest.update(values.data if values.size else b"")
    return digest.hexdigest()
