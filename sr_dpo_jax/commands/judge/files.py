"""Reads files of questions and of answers, and checks that both models answer every turn of every question.

questions   JSON lines with `question_id` or `id`, and `turns` (one or two texts, as MT-Bench has them), `text` (as
            Vicuna-Bench has it) or `prompt`; besides, if you like, `category` and `reference` (text or a list)
answers     JSON lines with `question_id` or `id`, and `response` (as `sr-dpo generate` writes it), `turns` (a list)
            or `choices`, the first of which has `turns` (as MT-Bench has it, and `sr-dpo generate` for `turns`)
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from sr_dpo_jax.commands.prompts import LISTED, usable_lines
from sr_dpo_jax.data.messages import checked_id, checked_text
from sr_dpo_jax.data.records import UnusableError
from sr_dpo_jax.errors import UsageError

IDS = ("question_id", "id")
MOST_TURNS = 2

Row = TypeVar("Row")


@dataclasses.dataclass(frozen=True)
class Question:
    """One question, of one or two turns."""

    id: str
    category: str | None
    turns: tuple[str, ...]
    reference: tuple[str, ...]
    """Known good answers to the turns; empty where there is none."""


def read_questions(path: Path) -> list[Question]:
    """Reads the questions in the order of the file.

    Raises:
      UsageError: the file cannot be read, is empty, or lines cannot be used, with each line and reason.
    """
    return list(_by_id(path, "question", _question).values())


def read_answers(path: Path, questions: list[Question]) -> dict[str, tuple[str, ...]]:
    """Reads the answers to each turn of each question, by id; those to other questions are left out.

    Raises:
      UsageError: as for questions; or a question has no answer, or fewer answers than turns.
    """
    answers = _by_id(path, "answer", _answer)
    missing = [question.id for question in questions if question.id not in answers]
    short = [q.id for q in questions if q.id in answers and len(answers[q.id]) < len(q.turns)]
    for ids, problem in ((missing, "has no answer"), (short, "has fewer answers than turns")):
        if ids:
            listed = ", ".join(ids[:LISTED]) + (", ..." if len(ids) > LISTED else "")
            raise UsageError(f"{path}: {len(ids)} of {len(questions)} questions: {problem}: id {listed}; generate them")
    return {question.id: answers[question.id][: len(question.turns)] for question in questions}


def _by_id(path: Path, what: str, parse: Callable[[str, dict[str, Any]], Row]) -> dict[str, Row]:
    rows: dict[str, Row] = {}

    def add(row: dict[str, Any], number: int) -> None:
        id = checked_id(row, IDS, number)
        if id in rows:
            raise UnusableError(f"id {id} again")
        rows[id] = parse(id, row)

    usable_lines(str(path), what, add)
    return rows


def _question(id: str, row: dict[str, Any]) -> Question:
    key = next((key for key in ("turns", "text", "prompt") if key in row), None)
    if key is None:
        raise UnusableError("missing key 'turns' (a list of texts), 'text' or 'prompt'")
    turns = _texts(row[key], key)
    if not 0 < len(turns) <= MOST_TURNS or not all(turns):
        raise UnusableError(f"{key}: expected one or two texts that are not empty, got {len(turns)}")
    category, reference = row.get("category"), row.get("reference")
    category = None if category is None else checked_text(category, "category")
    return Question(id, category, turns, () if reference is None else _texts(reference, "reference"))


def _answer(_id: str, row: dict[str, Any]) -> tuple[str, ...]:
    if "choices" in row:
        choices = row["choices"]
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise UnusableError("choices: expected a list of objects")
        return _texts(choices[0].get("turns"), "choices[0].turns")
    key = "response" if "response" in row else "turns"
    if key not in row:
        raise UnusableError("missing key 'response', 'turns' or 'choices'")
    return _texts(row[key], key)


def _texts(value: Any, key: str) -> tuple[str, ...]:
    if isinstance(value, list):
        return tuple(checked_text(text, f"{key}[{number}]") for number, text in enumerate(value))
    return (checked_text(value, key),)
