"""Reads the settings of the judge, a user's keys in place of those of judge.yaml, and makes its prompts."""

import importlib.resources
import re
from pathlib import Path
from string import Template
from typing import Annotated, Any

import pydantic
from pydantic import Field

from sr_dpo_jax.commands.judge.files import Question
from sr_dpo_jax.config.section import NonNegative, Positive, Rate, Section
from sr_dpo_jax.config.yaml_text import parse
from sr_dpo_jax.durable.files import json_digest
from sr_dpo_jax.errors import UsageError

FIELDS = {
    "one_turn": {"question", "answer_a", "answer_b", "reference"},
    "two_turns": {"question_1", "question_2", "answer_a_1", "answer_a_2", "answer_b_1", "answer_b_2", "reference"},
    "reference": {"reference"},
}
"""The fields of each prompt; all of them must stand in it, and no other."""
OURS = ("model", "messages", "stream", "n")
"""Parameters of a request that are not the user's to set."""


class Bootstrap(Section):
    """The resampling of questions that gives intervals."""

    resamples: Annotated[int, Field(ge=100)]
    confidence: Annotated[float, Field(gt=0, lt=1)]
    seed: NonNegative


class Prompts(Section):
    """The texts that the judge is sent, with fields for questions and answers."""

    system: str
    one_turn: str
    two_turns: str
    reference: str


class Settings(Section):
    """The keys of judge.yaml, which explains each of them."""

    model: str | None
    base_url: str | None
    api_key_variable: str
    request: dict[str, Any]
    timeout_s: Rate
    retries: NonNegative
    malformed_retries: NonNegative
    malformed_wait_s: Rate
    concurrency: Positive
    bootstrap: Bootstrap
    verdict_pattern: str
    prompts: Prompts

    @property
    def prompts_digest(self) -> str:
        """The sha256 of the prompts, for the result: other prompts make another judge."""
        return json_digest(self.prompts.model_dump())


def load(path: Path | None, *, model: str | None, base_url: str | None) -> Settings:
    """Reads judge.yaml, then the keys of `path` in place of its own, then those of the command line.

    Raises:
      UsageError: the file cannot be read, a key is unknown or has a bad value, a prompt lacks a field, or no judge is
        named.
    """
    ours = importlib.resources.files("sr_dpo_jax.commands.judge").joinpath("judge.yaml").read_text(encoding="utf-8")
    raw = parse(ours, where="judge.yaml")
    for key, value in ({} if path is None else _read(path)).items():
        nested = isinstance(raw.get(key), dict) and isinstance(value, dict) and key != "request"
        raw[key] = raw[key] | value if nested else value
    raw |= {key: value for key, value in (("model", model), ("base_url", base_url)) if value is not None}
    try:
        settings = Settings.model_validate(raw)
        problems = _problems(settings)
    except pydantic.ValidationError as error:
        problems = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
    if problems:
        raise UsageError("\n  ".join([f"{path or 'judge.yaml'}: {len(problems)} problem(s)", *problems]))
    return settings


def messages(
    prompts: Prompts, question: Question, turn: int, first: tuple[str, ...], second: tuple[str, ...]
) -> list[dict[str, str]]:
    """Makes the messages that ask the endpoint for a verdict on turn 1 or 2.

    `first` are the answers to each turn of the model that is shown as A, `second` of the one that is shown as B.
    """
    known = "\n\n".join(question.reference[:turn])
    reference = Template(prompts.reference).substitute(reference=known) if question.reference else ""
    texts = {"question": question.turns, "answer_a": first, "answer_b": second}
    fields = {name: values[0] for name, values in texts.items()}
    fields |= {f"{name}_{number}": text for name, values in texts.items() for number, text in enumerate(values, 1)}
    template = prompts.one_turn if turn == 1 else prompts.two_turns
    content = Template(template).substitute(fields, reference=reference)
    return [{"role": "system", "content": prompts.system}, {"role": "user", "content": content}]


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = parse(path.read_text(encoding="utf-8"), where=f"--judge-config {path}")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--judge-config {path}: cannot be read ({error}); name an existing YAML file") from error
    if not isinstance(raw, dict) or not all(isinstance(key, str) for key in raw):
        raise UsageError(f"--judge-config {path}: holds no mapping of keys; see judge.yaml in the package")
    return raw


def _problems(settings: Settings) -> list[str]:
    problems = []
    if settings.model is None:
        problems.append("model=null: no judge is named; give --model NAME, or the key in the file")
    for name, fields in FIELDS.items():
        template = Template(getattr(settings.prompts, name))
        if not template.is_valid():
            problems.append(f"prompts.{name}: a $ that starts no field; write $$ for the character")
        elif set(template.get_identifiers()) != fields:
            problems.append(
                f"prompts.{name}: must hold ${', $'.join(sorted(fields))} and no other field, "
                f"has {', '.join(sorted(template.get_identifiers())) or 'none'}"
            )
    try:
        groups = re.compile(settings.verdict_pattern).groups
        if groups != 1:
            problems.append(f"verdict_pattern: has {groups} groups; one must hold A, B or tie")
    except re.error as error:
        problems.append(f"verdict_pattern: not a regular expression ({error})")
    problems += [f"request.{key}: is set by sr-dpo itself; remove it" for key in OURS if key in settings.request]
    return problems
