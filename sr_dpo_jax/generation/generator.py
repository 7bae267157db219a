"""Continues many prompts at a time on the mesh; a slot that finishes is given the next prompt at once."""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
from transformers import PreTrainedTokenizerBase

from sr_dpo_jax.generation.decode import Sampling, State, make_programs, make_state
from sr_dpo_jax.model.architecture import Architecture, require_exact_positions
from sr_dpo_jax.model.decoder import Params
from sr_dpo_jax.parallel.mesh import row_shards
from sr_dpo_jax.weights.placement import PlacedModel

TOKENS_A_CALL = 16
"""Tokens between two looks at what has finished: a slot idles for half of this, the host asks a sixteenth as often."""
PROMPT_MULTIPLE = 64


@dataclasses.dataclass(frozen=True)
class Settings:
    """The way in which responses are drawn."""

    sampling: Sampling
    slots: int
    """S, the sequences that are continued side by side."""
    max_new_tokens: int
    """Most tokens of a response, end-of-sequence included."""
    stop: tuple[str, ...]
    """A response ends before the first of these strings."""
    limit_key: str = "generation.max_new_tokens"
    """The key or option that sets `max_new_tokens`, for errors."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt that waits for a response."""

    index: int
    """Its place in the file."""
    ids: list[int]
    seed: int


@dataclasses.dataclass(frozen=True)
class Response:
    ids: list[int]
    """The response without the end-of-sequence token."""
    text: str
    finish_reason: str
    """`end` (an end-of-sequence token), `stop` (a stop string) or `length`."""


class Generator:
    """Continues prompts on the mesh, S at a time; none is longer than `longest_prompt_tokens`.

    Raises:
      UsageError: the slots do not divide over the devices, or responses may be longer than the model's rotary embedding
        is known for.
    """

    def __init__(
        self,
        model: PlacedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: Settings,
        *,
        longest_prompt_tokens: int,
    ):
        require_room(model.architecture, longest_prompt_tokens, settings)
        self._tokenizer, self._settings, self._slots = tokenizer, settings, settings.slots
        self._prompt_tokens = -(-longest_prompt_tokens // PROMPT_MULTIPLE) * PROMPT_MULTIPLE
        # Prompts are read a few at a time: a slot that comes free must not make all the others wait for a full batch.
        shards = row_shards(model.mesh)
        self._read_batch = max(shards, self._slots // 4 // shards * shards)
        positions = self._prompt_tokens + settings.max_new_tokens
        self._free: Callable[[], State] = partial(
            make_state, model.graph, model.shapes, slots=self._slots, positions=positions, mesh=model.mesh
        )
        self._read, self._proceed = make_programs(
            model.graph, settings.sampling, self._free(), tokens_a_call=TOKENS_A_CALL, mesh=model.mesh
        )

    def compile(self, params: Params) -> None:
        """Compiles both programs now: from then on, another shape raises instead of compiling again."""
        state = self._free()
        read = self._read.lower(params, state, *self._batch([]))
        self._read, self._proceed = read.compile(), self._proceed.lower(params, state).compile()

    def respond(self, params: Params, prompts: list[Prompt]) -> Iterator[tuple[Prompt, Response]]:
        """Yields responses in the order in which they finish. All processes see the same.

        The cache is on the mesh only while this goes on.
        """
        state = self._free()
        waiting = list(reversed(prompts))
        held: dict[int, tuple[Prompt, list[int]]] = {}
        while waiting or held:
            free = [slot for slot in range(self._slots) if slot not in held]
            while waiting and free:
                batch = [(free.pop(0), waiting.pop()) for _ in range(min(len(free), len(waiting), self._read_batch))]
                state, first = self._read(params, state, *self._batch(batch))
                for (slot, prompt), token in zip(batch, np.asarray(first)[: len(batch)], strict=True):
                    held[slot] = (prompt, [int(token)])
            yield from self._collect(held)
            if held:
                state, tokens = self._proceed(params, state)
                for slot, (_, ids) in held.items():
                    ids.extend(np.asarray(tokens)[:, slot].tolist())
                yield from self._collect(held)

    def _batch(self, batch: list[tuple[int, Prompt]]) -> tuple[np.ndarray, ...]:
        """Lays out prompts with the slots that they go to, filled up to the number that is read at once."""
        size = self._read_batch
        ids, lengths = np.zeros((size, self._prompt_tokens), np.int32), np.ones(size, np.int32)
        slots, limits = np.full(size, self._slots, np.int32), np.zeros(size, np.int32)
        seeds = np.zeros(size, np.uint32)
        for place, (slot, prompt) in enumerate(batch):
            ids[place, : len(prompt.ids)] = prompt.ids
            lengths[place], slots[place], seeds[place] = len(prompt.ids), slot, prompt.seed
            limits[place] = len(prompt.ids) + self._settings.max_new_tokens - 1
        return ids, lengths, slots, limits, seeds

    def _collect(self, held: dict[int, tuple[Prompt, list[int]]]) -> Iterator[tuple[Prompt, Response]]:
        """Takes finished responses out of their slots."""
        for slot in sorted(held):
            prompt, ids = held[slot]
            response = self._finished(ids)
            if response is not None:
                del held[slot]
                yield prompt, response

    def _finished(self, ids: list[int]) -> Response | None:
        """Ends a response where it ends; None where it goes on."""
        ends = [place for place, token in enumerate(ids) if token in self._settings.sampling.end_tokens]
        kept = ids[: ends[0]] if ends else ids[: self._settings.max_new_tokens]
        text = self._tokenizer.decode(kept, skip_special_tokens=True)
        stops = [place for place in (text.find(stop) for stop in self._settings.stop) if place >= 0]
        if stops:
            return Response(kept, text[: min(stops)], "stop")
        if ends and ends[0] < self._settings.max_new_tokens:
            return Response(kept, text, "end")
        return Response(kept, text, "length") if len(ids) >= self._settings.max_new_tokens else None


def require_room(architecture: Architecture, longest_prompt_tokens: int, settings: Settings) -> None:
    """Refuses prompts and responses that are together longer than the model's rotary embedding is known for.

    Raises:
      UsageError: they are; names the key that sets the length of responses.
    """
    key, most = settings.limit_key, settings.max_new_tokens
    longest = longest_prompt_tokens + most
    require_exact_positions(
        architecture,
        longest,
        what=f"{key}={most}: the longest prompt has {longest_prompt_tokens} tokens, both {longest}",
        remedy=f"lower {key}, or shorten the prompts",
    )
