"""`sr-dpo generate`: responses to a file of prompts, many at a time, with finished slots refilled at once.

    prompts    JSON lines with `prompt` (text, or a list of messages), `messages`, or `turns`: texts of the user, each
               of which is answered before the next; an `id`, else the 0-based number
    output     the same lines in the same order, each with `response`, `response_tokens` and `finish_reason`:
               `end` (an end-of-sequence token), `stop` (a stop string) or `length`. For `turns`, lists of the latter
               two, and in place of `response` what MT-Bench has: `choices`, of which the first has the list `turns`

While it runs, finished lines are in OUTPUT.partial; the same command goes on from there.
"""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from transformers import PreTrainedTokenizerBase

from sr_dpo_jax.commands.prompts import PromptLine, read_prompts
from sr_dpo_jax.config.schema import Config
from sr_dpo_jax.data.rows import BadRow, Message
from sr_dpo_jax.data.tokenizer_fit import end_tokens
from sr_dpo_jax.data.tokens import PairEncoder
from sr_dpo_jax.durable.files import lines_of
from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.generation.decode import Sampling, State, make_programs, make_state
from sr_dpo_jax.model.architecture import Architecture
from sr_dpo_jax.parallel import mesh as meshes
from sr_dpo_jax.train.evaluate import latest_params
from sr_dpo_jax.train.metrics import Progress
from sr_dpo_jax.train.train_step import Params
from sr_dpo_jax.weights.placement import Assembly, assemble, read_model, require_exact_positions

log = logging.getLogger(__name__)

Finished = dict[tuple[int, int], dict[str, Any]]
"""Responses that are done, by place in the file of prompts and turn."""
TOKENS_A_CALL = 16
"""Between two looks at what has finished: a slot idles for half of this, and the host is asked a sixteenth as often."""
PROMPT_MULTIPLE = 64
LIMIT_KEY = "generation.max_new_tokens"


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt to respond to."""

    index: int
    """Its place in the file."""
    turn: int
    """0 for the first one of a conversation."""
    ids: list[int]
    seed: int


@dataclasses.dataclass(frozen=True)
class Response:
    ids: list[int]
    """Without the end-of-sequence token."""
    text: str
    finish_reason: str


class Generator:
    """Continues prompts on the mesh, S at a time.

    Args:
      assembly: model and mesh.
      tokenizer: decodes the responses.
      sampling: how tokens are drawn.
      slots: S.
      longest_prompt_tokens: no prompt is longer.
      max_new_tokens: most tokens of a response, end-of-sequence included.
      stop: strings that end a response.
      limit_key: what sets `max_new_tokens`, for errors.

    Raises:
      UsageError: the slots do not divide over the devices, or responses may be longer than the model's rotary embedding
        is known for.
    """

    def __init__(
        self,
        assembly: Assembly,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        *,
        slots: int,
        longest_prompt_tokens: int,
        max_new_tokens: int,
        stop: tuple[str, ...],
        limit_key: str = LIMIT_KEY,
    ):
        _require_room(assembly.directory.architecture, longest_prompt_tokens, max_new_tokens, limit_key)
        self._tokenizer, self._sampling, self._stop = tokenizer, sampling, stop
        self._max_new_tokens, self._slots = max_new_tokens, slots
        self._prompt_tokens = -(-longest_prompt_tokens // PROMPT_MULTIPLE) * PROMPT_MULTIPLE
        # Prompts are read a few at a time: a slot that comes free must not make all the others wait for a full batch.
        shards = meshes.row_shards(assembly.mesh)
        self._read_batch = max(shards, slots // 4 // shards * shards)
        positions = self._prompt_tokens + max_new_tokens
        self._free: Callable[[], State] = partial(
            make_state, assembly.graph, assembly.param_shapes, slots=slots, positions=positions, mesh=assembly.mesh
        )
        self._read, self._proceed = make_programs(
            assembly.graph, sampling, self._free(), tokens_a_call=TOKENS_A_CALL, mesh=assembly.mesh
        )

    def compile(self, params: Params) -> None:
        """Compiles both programs now: from here on, what has another shape raises instead of compiling again."""
        state = self._free()
        read = self._read.lower(params, state, *self._batch([]))
        self._read, self._proceed = read.compile(), self._proceed.lower(params, state).compile()

    def respond(self, params: Params, prompts: list[Prompt]) -> Iterator[tuple[Prompt, Response]]:
        """Responses in the order in which they finish. All processes see the same.

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
        """Prompts with the slots that they go to, filled up to the number of prompts that are read at once."""
        size = self._read_batch
        ids, lengths = np.zeros((size, self._prompt_tokens), np.int32), np.ones(size, np.int32)
        slots, limits = np.full(size, self._slots, np.int32), np.zeros(size, np.int32)
        seeds = np.zeros(size, np.uint32)
        for place, (slot, prompt) in enumerate(batch):
            ids[place, : len(prompt.ids)] = prompt.ids
            lengths[place], slots[place], seeds[place] = len(prompt.ids), slot, prompt.seed
            limits[place] = len(prompt.ids) + self._max_new_tokens - 1
        return ids, lengths, slots, limits, seeds

    def _collect(self, held: dict[int, tuple[Prompt, list[int]]]) -> Iterator[tuple[Prompt, Response]]:
        """Takes what has finished out of the slots."""
        for slot in sorted(held):
            prompt, ids = held[slot]
            response = self._finished(ids)
            if response is not None:
                del held[slot]
                yield prompt, response

    def _finished(self, ids: list[int]) -> Response | None:
        ends = [place for place, token in enumerate(ids) if token in self._sampling.end_tokens]
        kept = ids[: ends[0]] if ends else ids[: self._max_new_tokens]
        text = self._tokenizer.decode(kept, skip_special_tokens=True)
        stops = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if stops:
            return Response(kept, text[: min(stops)], "stop")
        if ends and ends[0] < self._max_new_tokens:
            return Response(kept, text, "end")
        return Response(kept, text, "length") if len(ids) >= self._max_new_tokens else None


def generate_command(config: Config, prompts_file: Path, output: Path, *, best: bool = False) -> int:
    """`sr-dpo generate`: responses of the latest (or `best`) checkpoint of output_dir, or of model.path.

    Returns how many.
    """
    if not output.parent.is_dir() or output.is_dir():
        raise UsageError(f"--output {output}: names a directory, or stands in one that does not exist; name a file")
    directory, tokenizer = read_model(config)
    lines = read_prompts(str(prompts_file))
    encoder = PairEncoder(tokenizer, augmentation_prompt=None)
    vocabulary_tokens = directory.architecture.vocabulary_tokens
    # Refused before any device is touched, or a partial file begun.
    first = _encode(encoder, lines, vocabulary_tokens, turn=0, finished={}, where=prompts_file)
    _require_room(directory.architecture, max(map(len, first.values())), config.generation.max_new_tokens)
    assembly = assemble(config, directory)
    params, step = latest_params(assembly, None, best=best)
    settings = _settings(config, assembly, lines, step)
    finished = _read_partial(output, settings)
    leader, total = jax.process_index() == 0, sum(1 + len(line.later_turns) for line in lines)
    with Progress("generate", total=total, active=leader) as progress, _Partial(output, settings, leader) as partial:
        for turn in range(1 + max(len(line.later_turns) for line in lines)):
            encoded = _encode(encoder, lines, vocabulary_tokens, turn=turn, finished=finished, where=prompts_file)
            prompts = [
                Prompt(index, turn, ids, seed=(config.seed * 1_000_003 + turn * 7_000_003 + index) % 2**32)
                for index, ids in encoded.items()
                if (index, turn) not in finished
            ]
            if prompts:
                longest = max(map(len, encoded.values()))
                generator = make_generator(assembly, tokenizer, longest, slots=config.generation.slots)
                for prompt, response in generator.respond(params, prompts):
                    partial.append(_take(finished, prompt, response))
                    progress.update(len(finished))
    if leader:
        _write_all(output, lines, finished)
    return len(lines)


def make_generator(
    assembly: Assembly, tokenizer: PreTrainedTokenizerBase, longest_prompt_tokens: int, *, slots: int
) -> Generator:
    """A generator as the configuration's `generation` section says, apart from its slots."""
    section = assembly.config.generation
    ends = end_tokens(tokenizer, assembly.directory.path)
    return Generator(
        assembly,
        tokenizer,
        Sampling(section.temperature, section.top_k, section.top_p, ends),
        slots=slots,
        longest_prompt_tokens=longest_prompt_tokens,
        max_new_tokens=section.max_new_tokens,
        stop=section.stop,
    )


def _require_room(
    architecture: Architecture, longest_prompt_tokens: int, max_new_tokens: int, limit_key: str = LIMIT_KEY
) -> None:
    longest = longest_prompt_tokens + max_new_tokens
    require_exact_positions(
        architecture,
        longest,
        what=f"{limit_key}={max_new_tokens}: the longest prompt has {longest_prompt_tokens} tokens, both {longest}",
        remedy=f"lower {limit_key}, or shorten the prompts",
    )


def _encode(
    encoder: PairEncoder,
    lines: Sequence[PromptLine],
    vocabulary_tokens: int,
    *,
    turn: int,
    finished: Finished,
    where: Path,
) -> dict[int, list[int]]:
    """Ids of the prompts that wait for this turn's response, by place in the file; earlier responses are in them."""
    having = [index for index, line in enumerate(lines) if turn <= len(line.later_turns)]
    prompts: list[str | tuple[Message, ...]] = []
    for index in having:
        prompt = lines[index].prompt
        for earlier, text in enumerate(lines[index].later_turns[:turn]):
            response = finished[index, earlier]["response"]
            prompt = (*prompt, Message("assistant", response), Message("user", text))
        prompts.append(prompt)
    encoded = dict(zip(having, encoder.prompt_ids(prompts), strict=True))
    bad = {index: result.reason for index, result in encoded.items() if isinstance(result, BadRow)}
    for index, ids in encoded.items():
        if index not in bad and max(ids) >= vocabulary_tokens:
            bad[index] = f"holds the added token of id {max(ids)}, but the model knows {vocabulary_tokens} ids"
    if bad:
        at = f", turn {turn + 1}" if turn else ""
        reasons = "\n  ".join(f"prompt {index + 1}{at}: {reason}" for index, reason in sorted(bad.items())[:20])
        raise UsageError(f"{where}: {len(bad)} prompts cannot be used:\n  {reasons}")
    return encoded


def _take(finished: Finished, prompt: Prompt, response: Response) -> dict[str, Any]:
    """Keeps a response; returns its line of the partial file."""
    finished[prompt.index, prompt.turn] = kept = {
        "response": response.text,
        "response_tokens": len(response.ids),
        "finish_reason": response.finish_reason,
    }
    return {"index": prompt.index, "turn": prompt.turn, **kept}


def _settings(config: Config, assembly: Assembly, lines: Sequence[PromptLine], step: int) -> str:
    """A digest of all that the responses depend on: a file begun with other settings is not gone on with."""
    parts = [config.generation.model_dump(), config.seed, config.model.dtype, assembly.base_digest, step]
    parts += [config.output_dir if step else None, [line.row for line in lines]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _partial_path(output: Path) -> Path:
    return output.with_name(output.name + ".partial")


class _Partial:
    """Lines of responses that are done, behind a first line with the settings. Process 0 writes it."""

    def __init__(self, output: Path, settings: str, active: bool):
        self._path, self._settings, self._active = _partial_path(output), settings, active

    def __enter__(self) -> "_Partial":
        if self._active:
            begun = self._path.exists()
            self._file = self._path.open("a", encoding="utf-8")
            if not begun:
                self.append({"settings": self._settings})
        return self

    def __exit__(self, *_: object) -> None:
        if self._active:
            self._file.close()

    def append(self, line: dict[str, Any]) -> None:
        if self._active:
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
            self._file.flush()


def _read_partial(output: Path, settings: str) -> Finished:
    """Responses that an interrupted run of the same settings left."""
    path = _partial_path(output)
    if not path.exists():
        return {}
    lines = lines_of(path.read_text(encoding="utf-8"))
    if lines and not lines[-1].endswith("\n"):
        lines.pop()  # a kill cut it short
    records = [json.loads(line) for line in lines]
    if not records or records[0].get("settings") != settings:
        raise UsageError(
            f"{path}: was begun with other prompts, weights or generation settings; finish it with those, or delete it"
        )
    path.write_text("".join(lines), encoding="utf-8")
    log.info("%s: going on after %d responses", path, len(records) - 1)
    return {(record.pop("index"), record.pop("turn")): record for record in records[1:]}


def _write_all(output: Path, lines: Sequence[PromptLine], finished: Finished) -> None:
    whole = output.with_name(output.name + ".whole")
    with whole.open("w", encoding="utf-8") as file:
        for index, line in enumerate(lines):
            of_line = finished[index, 0]
            if line.key == "turns":
                turns = [finished[index, turn] for turn in range(1 + len(line.later_turns))]
                of_line = {name: [answer[name] for answer in turns] for name in of_line}
                of_line["choices"] = [{"index": 0, "turns": of_line.pop("response")}]
            file.write(json.dumps({"id": line.id, **line.row, **of_line}, ensure_ascii=False) + "\n")
    whole.replace(output)
    _partial_path(output).unlink(missing_ok=True)
