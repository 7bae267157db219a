"""`sr-dpo judge`: two files of answers, compared pairwise in both orders; a table for people, JSON for programs."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rich.console
import rich.table
import rich.text

from sr_dpo_jax.commands.judge.endpoint import Judge, Replies
from sr_dpo_jax.commands.judge.files import Question, read_answers, read_questions
from sr_dpo_jax.commands.judge.outcomes import Comparison, summary
from sr_dpo_jax.commands.judge.settings import Settings, load, messages
from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.train.metrics import Progress


def judge_command(
    first: Path,
    second: Path,
    *,
    questions_file: Path,
    output: Path,
    config: Path | None,
    model: str | None,
    base_url: str | None,
) -> None:
    """Compares the answers of `first` with those of `second`, prints the result and writes it to `output`.

    Replies are kept in OUTPUT.replies.jsonl: the same command again asks only for what is missing there.

    Raises:
      UsageError: files or settings cannot be used, the endpoint refuses, or no comparison has a verdict.
      RuntimeError: the endpoint does not answer.
    """
    if not output.parent.is_dir() or output.is_dir():
        raise UsageError(f"--output {output}: names a directory, or stands in one that does not exist; name a file")
    settings = load(config, model=model, base_url=base_url)
    questions = read_questions(questions_file)
    answers = [read_answers(path, questions) for path in (first, second)]
    with Replies(output.with_name(output.name + ".replies.jsonl")) as replies:
        comparisons = compare(questions, *answers, settings=settings, replies=replies)
    result = {
        "a": first.name,
        "b": second.name,
        "questions": questions_file.name,
        "judge": {"model": settings.model, "request": settings.request, "prompts_sha256": settings.prompts_digest},
        "bootstrap": settings.bootstrap.model_dump(),
        **summaries(comparisons, settings),
        "comparisons": [
            {**dataclasses.asdict(comparison), "outcome": comparison.outcome} for comparison in comparisons
        ],
    }
    partial = output.with_name(output.name + ".partial")
    partial.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(output)
    print_result(result)
    if result["total"]["unusable"] == len(comparisons):
        raise UsageError(
            f"not one of {len(comparisons)} comparisons has a verdict ({result['total']['unusable_reasons']}); does "
            f"the judge {settings.model!r} follow the prompts, and does verdict_pattern find what it writes?"
        )


def compare(
    questions: Sequence[Question],
    first: dict[str, tuple[str, ...]],
    second: dict[str, tuple[str, ...]],
    *,
    settings: Settings,
    replies: Replies,
) -> list[Comparison]:
    """Every turn of every question, in both orders."""
    turns = [(question, turn) for question in questions for turn in range(1, 1 + len(question.turns))]
    asked = [
        messages(settings.prompts, question, turn, *order)
        for question, turn in turns
        for order in (
            (first[question.id], second[question.id]),
            (second[question.id], first[question.id]),
        )
    ]
    with Progress("judge", total=len(asked), active=True) as progress:
        verdicts = Judge(settings, replies).verdicts(asked, progress.update)
    return [
        Comparison(question.id, turn, question.category, *verdicts[2 * number : 2 * number + 2])
        for number, (question, turn) in enumerate(turns)
    ]


def summaries(comparisons: Sequence[Comparison], settings: Settings) -> dict[str, Any]:
    """The summary of all comparisons, of each category, and of each turn where there are two."""

    def of(chosen: Sequence[Comparison]) -> dict[str, Any]:
        return summary(chosen, settings.bootstrap)

    categories = list(dict.fromkeys(c.category for c in comparisons if c.category is not None))
    turns = sorted({comparison.turn for comparison in comparisons})
    return {
        "total": of(comparisons),
        "categories": {name: of([c for c in comparisons if c.category == name]) for name in categories},
        "turns": {str(turn): of([c for c in comparisons if c.turn == turn]) for turn in turns if len(turns) > 1},
    }


def print_result(result: dict[str, Any]) -> None:
    """The shares with their intervals, one row a category."""
    title = f"{result['a']} against {result['b']}, judged by {result['judge']['model']}"
    table = rich.table.Table(title=rich.text.Text(title))
    for name in ("", "win", "tie", "lose", "score"):
        table.add_column(name, justify="left" if not name else "right")
    parts = [*result["categories"].items(), *((f"turn {turn}", part) for turn, part in result["turns"].items())]
    for name, part in [*parts, ("total", result["total"])]:
        if name == "total":
            table.add_section()
        shares = [_share(part["shares"][outcome]) for outcome in ("win", "tie", "lose", "score")]
        table.add_row(rich.text.Text(name), *shares)
    console = rich.console.Console(highlight=False, markup=False)
    console.print(table)
    total, confidence = result["total"], result["bootstrap"]["confidence"]
    console.print(
        f"{total['comparisons']} comparisons of {total['questions']} questions, each in both orders. In brackets: "
        f"{confidence:.0%} intervals over questions. score = win + tie / 2."
    )
    if total["position_bias_rate"] is not None:
        console.print(
            f"Position bias: in {total['position_bias_rate']:.1%} the same place won both orders "
            f"(first {total['always_first']}, second {total['always_second']}); these count as ties."
        )
    for reason, count in total["unusable_reasons"].items():
        console.print(f"{count} of {2 * total['comparisons']} requests gave no verdict: {reason}.")
    if total["unusable"]:
        console.print(f"{total['unusable']} comparisons are unusable for that, and in no share.")


def _share(share: dict[str, float | None]) -> str:
    if share["value"] is None:
        return ""
    if share["low"] is None:
        return f"{share['value']:.0%}"
    return f"{share['value']:.0%} [{100 * share['low']:.0f}, {100 * share['high']:.0f}]"
