"""`sr-dpo generate`: responses to a file of prompts, many at a time.

    prompts    JSON lines with `prompt` (text, or a list of messages), `messages`, or `turns`: texts of the user, each
               of which is answered before the next; an `id`, else the 0-based number
    output     the same lines in the same order, each with `response`, `response_tokens` and `finish_reason`:
               `end` (an end-of-sequence token), `stop` (a stop string) or `length`. For `turns`, lists of the latter
               two, and in place of `response` what MT-Bench has: `choices`, of which the first has the list `turns`

While it runs, finished lines are in OUTPUT.partial; the same command goes on from there.
"""

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from sr_dpo_jax.commands.prompts import PromptLine, read_prompts
from sr_dpo_jax.config.schema import Config
from sr_dpo_jax.data.messages import Message
from sr_dpo_jax.data.records import BadRow
from sr_dpo_jax.data.tokens import PairEncoder
from sr_dpo_jax.durable.files import finished_lines, json_digest, require_output, whole
from sr_dpo_jax.durable.lease import Lease
from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.generation.generator import Generator, Prompt, require_room
from sr_dpo_jax.parallel.processes import on_leader, text_from_leader
from sr_dpo_jax.train.identity import digests_of
from sr_dpo_jax.train.metrics import Progress
from sr_dpo_jax.train.setup import generation_settings, read_model, set_up
from sr_dpo_jax.weights.placement import PlacedModel

log = logging.getLogger(__name__)

Finished = dict[tuple[int, int], dict[str, Any]]
"""Responses that are done, by place in the file of prompts and turn."""


def generate_command(config: Config, prompts_file: Path, output: Path, *, best: bool = False) -> int:
    """Responds to prompts with the latest (or `best`) checkpoint of output_dir, or model.path; returns the count."""
    require_output(output)
    directory, tokenizer = read_model(config)
    generation = generation_settings(config, directory, tokenizer)
    lines = read_prompts(str(prompts_file))
    encoder = PairEncoder(tokenizer, augmentation_prompt=None)
    vocabulary_tokens = directory.architecture.vocabulary_tokens
    # Refused before any device is touched, or a partial file begun.
    first = _encode(encoder, lines, vocabulary_tokens, turn=0, finished={}, where=prompts_file)
    require_room(directory.architecture, max(map(len, first.values())), generation)
    asked = {"--prompts": json_digest([line.row for line in lines]), "--best": best}
    setup = set_up(config, directory, {**asked, **digests_of(tokenizer)})
    model, (params, step) = setup.model, setup.latest_params(best=best)
    settings = _settings(config, model, lines, step)
    unfinished = output.with_name(output.name + ".partial")
    with Lease.of_file(output) as lease:
        on_leader(lease.take)
        finished = _finished(unfinished, settings)
        leader, total = jax.process_index() == 0, sum(1 + len(line.later_turns) for line in lines)
        with (
            Progress("generate", total=total, active=leader) as progress,
            _appending(unfinished if leader else Path(os.devnull), settings) as append,
        ):
            for turn in range(1 + max(len(line.later_turns) for line in lines)):
                encoded = _encode(encoder, lines, vocabulary_tokens, turn=turn, finished=finished, where=prompts_file)
                prompts = [
                    Prompt(index, ids, seed=(config.seed * 1_000_003 + turn * 7_000_003 + index) % 2**32)
                    for index, ids in encoded.items()
                    if (index, turn) not in finished
                ]
                if prompts:
                    longest = max(map(len, encoded.values()))
                    generator = Generator(model, tokenizer, generation, longest_prompt_tokens=longest)
                    for prompt, response in generator.respond(params, prompts):
                        lease.check()
                        finished[prompt.index, turn] = kept = {
                            "response": response.text,
                            "response_tokens": len(response.ids),
                            "finish_reason": response.finish_reason,
                        }
                        append({"index": prompt.index, "turn": turn, **kept})
                        progress.update(len(finished))
        lease.check()
        if leader:
            _write_all(output, lines, finished)
            unfinished.unlink(missing_ok=True)
    return len(lines)


def _encode(
    encoder: PairEncoder,
    lines: Sequence[PromptLine],
    vocabulary_tokens: int,
    *,
    turn: int,
    finished: Finished,
    where: Path,
) -> dict[int, list[int]]:
    """Encodes the prompts that wait for this turn's response, by place in the file; earlier responses are in them."""
    having = [index for index, line in enumerate(lines) if turn <= len(line.later_turns)]
    prompts: list[str | tuple[Message, ...]] = []
    for index in having:
        prompt = lines[index].prompt
        for earlier, text in enumerate(lines[index].later_turns[:turn]):
            response = finished[index, earlier]["response"]
            prompt = (*prompt, Message("assistant", response), Message("user", text))
        prompts.append(prompt)
    options = [lines[index].template_options for index in having]
    encoded = dict(zip(having, encoder.prompt_ids(prompts, options), strict=True))
    bad = {index: result.reason for index, result in encoded.items() if isinstance(result, BadRow)}
    for index, ids in encoded.items():
        if index not in bad and max(ids) >= vocabulary_tokens:
            bad[index] = f"holds the added token of id {max(ids)}, but the model knows {vocabulary_tokens} ids"
    if bad:
        at = f", turn {turn + 1}" if turn else ""
        reasons = "\n  ".join(f"prompt {index + 1}{at}: {reason}" for index, reason in sorted(bad.items())[:20])
        raise UsageError(f"{where}: {len(bad)} prompts cannot be used:\n  {reasons}")
    return encoded


def _settings(config: Config, model: PlacedModel, lines: Sequence[PromptLine], step: int) -> str:
    """Digests all that the responses depend on: a file begun with other settings is not gone on with."""
    parts = [config.generation.model_dump(), config.seed, config.model.dtype, model.digest, step]
    parts += [] if config.lora is None else [config.lora.model_dump(mode="json")]
    parts += [config.output_dir if step else None, [line.row for line in lines]]
    return json_digest(parts)


@contextlib.contextmanager
def _appending(path: Path, settings: str) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Gives what adds a line to the file of finished responses, whose first line holds the settings."""

    def append(line: dict[str, Any]) -> None:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
        file.flush()

    begun = path.exists()
    with path.open("a", encoding="utf-8") as file:
        if not begun:
            append({"settings": settings})
        yield append


def _finished(unfinished: Path, settings: str) -> Finished:
    """Gives all processes the responses that process 0 finds; the file may lie on its own disk."""
    found: Finished = {}
    on_leader(lambda: found.update(_read_partial(unfinished, settings)))
    shared = text_from_leader(json.dumps([[*place, record] for place, record in found.items()]))
    return {(index, turn): record for index, turn, record in json.loads(shared)}


def _read_partial(path: Path, settings: str) -> Finished:
    """Reads the responses that an interrupted run of the same settings left."""
    if not path.exists():
        return {}
    try:
        head, *records = [json.loads(line) for line in finished_lines(path)] or [{}]
        finished = {(record.pop("index"), record.pop("turn")): record for record in records}
        same = head.get("settings") == settings
    except (ValueError, KeyError, AttributeError) as error:
        raise UsageError(f"{path}: damaged ({type(error).__name__}); delete it, and all is generated again") from error
    if not same:
        raise UsageError(
            f"{path}: was begun with other prompts, weights or generation settings; finish it with those, or delete it"
        )
    log.info("%s: going on after %d responses", path, len(finished))
    return finished


def _write_all(output: Path, lines: Sequence[PromptLine], finished: Finished) -> None:
    with whole(output) as temporary, temporary.open("w", encoding="utf-8") as file:
        for index, line in enumerate(lines):
            answer = finished[index, 0]
            if line.key == "turns":
                turns = [finished[index, turn] for turn in range(1 + len(line.later_turns))]
                answer = {name: [of_turn[name] for of_turn in turns] for name in answer}
                answer["choices"] = [{"index": 0, "turns": answer.pop("response")}]
            file.write(json.dumps({"id": line.id, **line.row, **answer}, ensure_ascii=False) + "\n")
