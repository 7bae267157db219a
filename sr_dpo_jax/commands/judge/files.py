"""Files of questions and of answers -> checked questions, each with the answers of both models.

questions   JSON lines with `question_id` or `id`, and `turns` (one or two texts, as MT-Bench has them), `text` (as
            Vicuna-Bench has it) or `prompt`; besides, if you like, `category` and `reference` (text or a list)
answers     JSON lines with `question_id` or `id`, and `response` (as `sr-dpo generate` writes it), `turns` (a list)
            or `choices`, the first of which has `turns` (as MT-Bench has it, and `sr-dpo generate` for `turns`)
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from sr_dpo_jax.data.rows import BadRow, UnusableError, checked_id, checked_text, json_records
from sr_dpo_jax.errors import UsageError

LISTED = 20
IDS = ("question_id", "id")
MOST_TURNS = 2

Row = TypeVar("Row")


@dataclasses.dataclass(frozen=True)
class Question:
    id: str
    category: str | None
    turns: tuple[str, ...]
    """One or two texts of the user."""
    reference: tuple[str, ...]
    """Known good answers to the turns; empty where there is none."""


def read_questions(path: Path) -> list[Question]:
    """The questions in the order of the file.

    Raises:
      UsageError: the file cannot be read, is empty, or lines cannot be used, with each line and reason.
    """
    return list(_rows(path, "question", _question).values())


def read_answers(path: Path, questions: list[Question]) -> dict[str, tuple[str, ...]]:
    """The answers to each turn of each question, by id; those to other questions are left out.

    Raises:
      UsageError: as for questions; or a question has no answer, or fewer answers than turns.
    """
    answers = _rows(path, "answer", _answer)
    missing = [question.id for question in questions if question.id not in answers]
    short = [q.id for q in questions if q.id in answers and len(answers[q.id]) < len(q.turns)]
    for ids, what in ((missing, "has no answer"), (short, "has fewer answers than turns")):
        if ids:
            listed = ", ".join(ids[:LISTED]) + (", ..." if len(ids) > LISTED else "")
            raise UsageError(f"{path}: {len(ids)} of {len(questions)} questions: {what}: id {listed}; generate them")
    return {question.id: answers[question.id][: len(question.turns)] for question in questions}


def _rows(path: Path, what: str, parse: Callable[[dict[str, Any]], Row]) -> dict[str, Row]:
    """The lines of a file by id, all that is wrong with them told at once."""
    rows: dict[str, Row] = {}
    bad = []
    for number, row in json_records(str(path)):
        try:
            if isinstance(row, BadRow):
                raise UnusableError(row.reason)
            if not isinstance(row, dict):
                raise UnusableError("not an object")
            id = checked_id(row, IDS, number)
            if id in rows:
                raise UnusableError(f"id {id} again")
            rows[id] = parse({**row, "id": id})
        except UnusableError as error:
            bad.append(f"line {number}: {error}")
    if bad:
        more = [f"and {len(bad) - LISTED} more"] if len(bad) > LISTED else []
        raise UsageError("\n  ".join([f"{path}: {len(bad)} {what}s cannot be used:", *bad[:LISTED], *more]))
    if not rows:
        raise UsageError(f"{path}: holds no {what}; write one JSON object a line")
    return rows


def _question(row: dict[str, Any]) -> Question:
    key = next((key for key in ("turns", "text", "prompt") if key in row), None)
    if key is None:
        raise UnusableError("missing key 'turns' (a list of texts), 'text' or 'prompt'")
    turns = _texts(row[key], key)
    if not 0 < len(turns) <= MOST_TURNS or not all(turns):
        raise UnusableError(f"{key}: expected one or two texts that are not empty, got {len(turns)}")
    category, reference = row.get("category"), row.get("reference")
    return Question(
        row["id"],
        None if category is None else checked_text(category, "category"),
        turns,
        () if reference is None else _texts(reference, "reference"),
    )


def _answer(row: dict[str, Any]) -> tuple[str, ...]:
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
