"""Compares two files of answers with a judge, each pair in both orders: a table for people, JSON for programs."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sr_dpo_jax.commands import console
from sr_dpo_jax.commands.judge.endpoint import Judge, Replies
from sr_dpo_jax.commands.judge.files import Question, read_answers, read_questions
from sr_dpo_jax.commands.judge.outcomes import OUTCOMES, Comparison, summary
from sr_dpo_jax.commands.judge.settings import Settings, load, messages
from sr_dpo_jax.durable.files import require_output, write_json
from sr_dpo_jax.durable.lease import Lease
from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.train.metrics import Progress


def judge_command(
    first: Path,
    second: Path,
    *,
    questions: Path,
    output: Path,
    judge_config: Path | None,
    model: str | None,
    base_url: str | None,
) -> None:
    """Compares the answers of `first` with those of `second`, prints the result and writes it to `output`.

    Replies are kept in OUTPUT.replies.jsonl: the same command again asks only for what is missing there.

    `judge_config`, a YAML file, replaces keys of judge.yaml; `model` and `base_url` of the judge replace those of both.

    Raises:
      UsageError: files or settings cannot be used, another judge is writing `output`, the endpoint refuses, or no
        comparison has a verdict.
      RuntimeError: the endpoint does not answer.
    """
    require_output(output)
    settings = load(judge_config, model=model, base_url=base_url)
    asked = read_questions(questions)
    answers = [read_answers(path, asked) for path in (first, second)]
    with Lease.of_file(output) as lease:
        lease.take()
        replies = Replies(output.with_name(output.name + ".replies.jsonl"))
        comparisons = compare(asked, *answers, settings=settings, replies=replies)
        result = _result(first, second, questions, settings, comparisons)
        lease.check()
        write_json(output, result)
    print_result(result)
    if result["total"]["unusable"] == len(comparisons):
        raise UsageError(
            f"not one of {len(comparisons)} comparisons has a verdict ({result['total']['unusable_reasons']}); does "
            f"the judge {settings.model!r} follow the prompts, and does verdict_pattern find what it writes?"
        )


def _result(
    first: Path, second: Path, questions: Path, settings: Settings, comparisons: Sequence[Comparison]
) -> dict[str, Any]:
    return {
        "a": first.name,
        "b": second.name,
        "questions": questions.name,
        "judge": {"model": settings.model, "request": settings.request, "prompts_sha256": settings.prompts_digest},
        "bootstrap": settings.bootstrap.model_dump(),
        **summaries(comparisons, settings),
        "comparisons": [{**dataclasses.asdict(each), "outcome": each.outcome} for each in comparisons],
    }


def compare(
    questions: Sequence[Question],
    first: dict[str, tuple[str, ...]],
    second: dict[str, tuple[str, ...]],
    *,
    settings: Settings,
    replies: Replies,
) -> list[Comparison]:
    """Asks for a verdict on every turn of every question, in both orders."""
    turns = [(question, turn) for question in questions for turn in range(1, 1 + len(question.turns))]
    conversations = [
        messages(settings.prompts, question, turn, shown_as_a[question.id], shown_as_b[question.id])
        for question, turn in turns
        for shown_as_a, shown_as_b in ((first, second), (second, first))
    ]
    with Progress("judge", total=len(conversations), active=True) as progress:
        verdicts = Judge(settings, replies).verdicts(conversations, progress.update)
    return [
        Comparison(question.id, turn, question.category, *verdicts[2 * number : 2 * number + 2])
        for number, (question, turn) in enumerate(turns)
    ]


def summaries(comparisons: Sequence[Comparison], settings: Settings) -> dict[str, Any]:
    """Sums up all comparisons, those of each category, and those of each turn where there are two."""

    def summaries_by(field: str) -> dict[str, Any]:
        keys = dict.fromkeys(getattr(each, field) for each in comparisons)
        groups = {key: [each for each in comparisons if getattr(each, field) == key] for key in keys if key is not None}
        return {str(key): summary(group, settings.bootstrap) for key, group in groups.items()}

    turns = summaries_by("turn")
    return {
        "total": summary(comparisons, settings.bootstrap),
        "categories": summaries_by("category"),
        "turns": turns if len(turns) > 1 else {},
    }


def print_result(result: dict[str, Any]) -> None:
    """Prints the shares with their intervals, one row a category, and how often the judge went by position."""
    outcomes = (*OUTCOMES, "score")
    table = console.table("", *(f">{outcome}" for outcome in outcomes))
    turns = [(f"turn {turn}", part) for turn, part in result["turns"].items()]
    for name, part in (*result["categories"].items(), *turns, ("total", result["total"])):
        console.row(table, name, *(_share(part["shares"][outcome]) for outcome in outcomes))
    console.section(f"{result['a']} against {result['b']}, judged by {result['judge']['model']}", table)
    total, confidence = result["total"], result["bootstrap"]["confidence"]
    console.say(
        f"{total['comparisons']} comparisons of {total['questions']} questions, each in both orders. In brackets: "
        f"{confidence:.0%} intervals over questions. score = win + tie / 2."
    )
    if total["position_bias_rate"] is not None:
        console.say(
            f"Position bias: in {total['position_bias_rate']:.1%} the same place won both orders "
            f"(first {total['always_first']}, second {total['always_second']}); these count as ties."
        )
    for reason, count in total["unusable_reasons"].items():
        console.say(f"{count} of {2 * total['comparisons']} requests gave no verdict: {reason}.")
    if total["unusable"]:
        console.say(f"{total['unusable']} comparisons are unusable for that, and in no share.")


def _share(share: dict[str, float | None]) -> str:
    if share["value"] is None:
        return ""
    interval = "" if share["low"] is None else f" [{100 * share['low']:.0f}, {100 * share['high']:.0f}]"
    return f"{share['value']:.0%}{interval}"
