"""Contexts and continuations as ids -> log-prob of each continuation, and whether it is the greedy one.

Requests lie in packed rows as pairs of one side do: the context as prompt, the continuation as chosen response. One
compiled shape serves all requests of a call, and later calls whose requests fit it.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from sr_dpo_jax.data.pipeline import Packing
from sr_dpo_jax.data.plan import Shape, round_up, scoring_plan, scoring_shape
from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.model.architecture import require_exact_positions
from sr_dpo_jax.model.decoder import Params
from sr_dpo_jax.train.metrics import Progress
from sr_dpo_jax.train.train_step import make_continuation_step
from sr_dpo_jax.weights.placement import PlacedModel


@dataclasses.dataclass(frozen=True)
class Request:
    """A context and its continuation as ids; both have at least one token."""

    context: list[int]
    continuation: list[int]


@dataclasses.dataclass(frozen=True)
class _Packed:
    """Requests in the form of pairs, as the pipeline takes them."""

    requests: Sequence[Request]
    head = augmentation = against = head_tokens = offsets = np.zeros(0, np.int32)

    def pair(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        request = self.requests[index]
        return np.array(request.context, np.int32), np.array(request.continuation, np.int32), self.head


class ContinuationScorer:
    """Scores continuations on the mesh; `packing.pairs_per_step` requests make up a step."""

    def __init__(self, model: PlacedModel, packing: Packing, params: Params):
        self._model, self._packing, self._params = model, packing, params
        self._compiled: list[tuple[Shape, Callable[..., Any]]] = []

    def scores(self, requests: Sequence[Request], *, title: str) -> tuple[np.ndarray, np.ndarray]:
        """Scores each request: its log-prob, `[N]` float32 in nats, and whether every token is the likeliest one, `[N]`
        bool. All processes see the same.

        Raises:
          UsageError: a sequence is longer than the model's rotary embedding is known for.
        """
        if not requests:
            return np.zeros(0, np.float32), np.zeros(0, bool)
        tokens = np.array([len(request.context) + len(request.continuation) for request in requests])
        scored = np.array([len(request.continuation) for request in requests])
        longest = int(tokens.max())
        what, remedy = f"a request has {longest} tokens", "lower the few-shot count"
        require_exact_positions(self._model.architecture, longest, what=what, remedy=remedy)
        shape, step = self._shape_for(tokens, scored)
        plan = scoring_plan(tokens, scored, shape)
        feed = self._packing.feed(_Packed(requests), plan, augmented=False, with_rejected=False)
        logprobs, greedy = np.full(len(requests), np.nan, np.float32), np.zeros(len(requests), bool)
        with Progress(title, total=len(plan), active=jax.process_index() == 0) as progress:
            for done, (pair, (sums, misses)) in enumerate(feed.results(partial(step, self._params)), 1):
                logprobs[pair], greedy[pair] = sums, misses == 0
                progress.update(done)
        if np.isnan(logprobs).any():
            raise UsageError(
                f"{np.isnan(logprobs).sum()} of {len(requests)} continuations have a log-prob of NaN; set "
                "model.dtype=float32, or choose other weights"
            )
        return logprobs, greedy

    def _shape_for(self, tokens: np.ndarray, scored: np.ndarray) -> tuple[Shape, Callable[..., Any]]:
        for shape, step in self._compiled:
            if tokens.max() <= shape.row_length and scored.max() <= shape.scored:
                return shape, step
        limits = self._packing.limits
        longest = round_up(int(tokens.max()), limits.row_multiple)
        limits = dataclasses.replace(limits, row_length=max(limits.row_length, longest))
        shape = scoring_shape(tokens, scored, limits)
        step = make_continuation_step(self._model.graph, pairs=shape.pairs, mesh=self._model.mesh)
        self._compiled.append((shape, step))
        return shape, step
