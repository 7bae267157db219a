"""Scores of the frozen reference, computed once before training and cached by content.

A cache entry is one safetensors file of float32 `[N, 2]`, nats, NaN where a pair is not scored yet. Its name is a
digest of all that the numbers depend on: weights, token ids (with p for the augmented scores), compute type, the
weight of tokens beyond the shorter response, and the version of this code; not of other training arguments, so runs
with other objectives share it. A killed scoring run continues where it stopped.
"""

import hashlib
import logging
import secrets
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from sr_dpo_jax.data.dataset import TokenizedPairs
from sr_dpo_jax.data.pipeline import Feed
from sr_dpo_jax.durable.files import clear_way, whole
from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.model.decoder import Params
from sr_dpo_jax.parallel.processes import largest
from sr_dpo_jax.train.train_step import Scores

log = logging.getLogger(__name__)

CHECKED_PAIRS = 8
"""At least this many random pairs of a cache are scored again before it is believed."""
CLOSE = {"float32": (1e-2, 1e-4), "bfloat16": (1.0, 1e-2)}
"""The absolute (nats) and relative difference that float order can make, by the type of the activations; other weights,
ids or code make far more."""
CODE_VERSION = "2"
"""Part of every key; raise it when a change of code changes the numbers by more than float order."""
SAVE_EVERY_S = 60.0
KINDS = ("plain", "augmented", "against")


def cache_files(
    cache_dir: Path,
    pairs: TokenizedPairs,
    *,
    weights_digest: str,
    dtype: str,
    augmented: bool,
    against: bool = False,
    ld_alpha: float | None = None,
) -> tuple[Path, ...]:
    """Names the cache file of the plain scores and, if asked for, those with p and with the second instruction."""
    lengths = "" if ld_alpha is None else f" ld_alpha {ld_alpha!r}"  # without it the key is that of earlier versions
    plain = hashlib.sha256(f"{CODE_VERSION} {weights_digest} {dtype}{lengths}".encode())
    for array in (pairs.tokens, pairs.offsets):
        plain.update(np.ascontiguousarray(array).tobytes())
    digests = [plain.hexdigest()]
    for instruction in (pairs.augmentation,) * augmented + (pairs.against,) * against:
        refined = plain.copy()
        for array in (pairs.head, instruction):
            refined.update(f"{len(array)} ".encode() + np.ascontiguousarray(array).tobytes())
        if len(pairs.head_tokens):  # p stands in each prompt, after these
            refined.update(b"heads " + np.ascontiguousarray(pairs.head_tokens).tobytes())
        digests.append(refined.hexdigest())
    return tuple(
        cache_dir / f"reference-{kind}-{digest[:32]}.safetensors" for kind, digest in zip(KINDS, digests, strict=False)
    )


class ReferenceScores:
    """The reference's scores of one data set, all of whose pairs `feed` holds, as far as the cache has them.

    `scores` is `[N, 2 sides, kinds]` float32, the kinds being plain, augmented and against; NaN where nothing is
    known. Process 0 reads the cache and tells the others, so that all agree on what is left to do. `key` names the
    model in errors.
    """

    def __init__(self, files: tuple[Path, ...], feed: Feed, *, key: str = "model.path"):
        self._files, self._plan, self._feed, self._key = files, feed.source.plan, feed, key
        self.scores = np.full((len(feed.source.pairs), 2, max(2, len(files))), np.nan, np.float32)
        if jax.process_index() == 0:
            for kind, file in enumerate(files):
                if file.is_file():
                    try:
                        self.scores[..., kind] = _load(file)
                    except (SafetensorError, KeyError, ValueError, OSError) as error:
                        log.warning("%s is damaged (%s) and is computed again", file, error)
        if jax.process_count() > 1:
            self.scores = np.array(multihost_utils.broadcast_one_to_all(self.scores))

    @property
    def complete(self) -> bool:
        return not self._missing().any()

    @property
    def digest(self) -> str:
        """The sha256 (hex) of the scores; a checkpoint remembers it."""
        return hashlib.sha256(self.scores.tobytes()).hexdigest()

    def spot_check(self, score_step: Callable[..., Scores], params: Params, *, dtype: str) -> None:
        """Scores a few random pairs again, and drops all cached scores where one differs by more than float order.

        The files are keyed by content and carry a digest, so this finds what no digest can: code, a compiler or a
        device that gives other numbers than those that wrote the cache.
        """
        if self._missing().all():
            return
        absolute, relative = CLOSE[dtype]
        # One step's pairs are a random draw; all processes take the same steps.
        order = np.random.default_rng(largest(secrets.randbelow(2**31))).permutation(len(self._plan))
        checked = 0
        for step in order:
            host_step, batch = next(self._feed.batches(int(step)))
            result = jax.device_get(score_step(params, batch))
            present = host_step.pair >= 0
            for kind, part in enumerate((result.plain, result.augmented, result.against)[: len(self._files)]):
                known = self.scores[host_step.pair[present], :, kind]
                off = np.abs(part[present] - known) > absolute + relative * np.abs(known)
                if off.any():
                    log.warning(
                        "%s: %d of %d scores differ from the model's own by up to %.3g nats; all are computed again",
                        self._files[kind],
                        off.sum(),
                        off.size,
                        np.abs(part[present] - known).max(),
                    )
                    self.scores[:] = np.nan
                    return
            checked += int(present.sum())
            if checked >= CHECKED_PAIRS:
                break
        log.info("reference cache: %d random pairs scored again, as they were", checked)

    def fill(self, score_step: Callable[..., Scores], params: Params, progress: Callable[[int], None]) -> None:
        """Scores the plan's steps from the first one with a missing pair on, saving about once a minute.

        `progress` is called with the number of steps done.

        Raises:
          UsageError: the weights give a log-prob of NaN.
        """
        unfinished = (self._missing()[self._plan.pair] & (self._plan.pair >= 0)).any(axis=1)
        first = int(np.flatnonzero(unfinished)[0])
        saved_at = time.monotonic()
        try:
            for done, (step, batch) in enumerate(self._feed.batches(first), first + 1):
                self._take(step.pair, jax.device_get(score_step(params, batch)))
                if time.monotonic() - saved_at > SAVE_EVERY_S:
                    _save(self.scores, self._files)
                    saved_at = time.monotonic()
                progress(done)
        finally:
            _save(self.scores, self._files)
        if not self.complete:
            bad = np.flatnonzero(self._missing())
            raise UsageError(
                f"the reference, {self._key}, gives {len(bad)} of {len(self.scores)} pairs a log-prob of NaN, the "
                f"first of them number {bad[0]}, counted from 0; set model.dtype=float32, or choose other weights"
            )

    def _take(self, pair: np.ndarray, result: Scores) -> None:
        """Fills what is missing; known scores stay, so that a resumed run sees what it saw before."""
        pair, present = pair[pair >= 0], pair >= 0
        for kind, part in enumerate((result.plain, result.augmented, result.against)[: len(self._files)]):
            known = self.scores[pair, :, kind]
            self.scores[pair, :, kind] = np.where(np.isnan(known), part[present], known)

    def _missing(self) -> np.ndarray:
        return np.isnan(self.scores[..., : len(self._files)]).any(axis=(1, 2))


def _load(file: Path) -> np.ndarray:
    with safe_open(file, framework="numpy") as opened:
        scores, digest = opened.get_tensor("scores"), opened.metadata()["sha256"]
    if hashlib.sha256(scores.tobytes()).hexdigest() != digest:
        raise ValueError("its scores do not match their digest")
    return scores


def _save(scores: np.ndarray, files: tuple[Path, ...]) -> None:
    if jax.process_index() != 0:
        return
    for kind, file in enumerate(files):
        array = np.ascontiguousarray(scores[..., kind])
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            clear_way(file)
            with whole(file) as temporary:
                save_file({"scores": array}, temporary, {"sha256": hashlib.sha256(array.tobytes()).hexdigest()})
        except (OSError, SafetensorError) as error:
            raise UsageError(
                f"{file.parent}: cannot be written ({error}); free space there, or choose another cache_dir"
            ) from error
