"""Draws the texts of the small world from seeds: base text, preference pairs and held-out pairs.

    base text    a share of it (`rated_share`) has the instruction with a rating k before the task, and a response of
                 quality k, except that a share of these ratings (`rating_noise`) is drawn by chance; the rest has no
                 instruction and responses of any quality. The model learns from it what quality is
    pairs        a better and a worse response to one task; `gaps` weighs how far apart they are, and a share of them
                 (`label_noise`) is labelled the wrong way round; SFT learns the chosen responses
    held out     pairs without label noise, on tasks that are in no seed's pairs (some are in the base text)

Rows have the format `preference`; their scores are the true qualities, also where the labels are wrong.
"""

import dataclasses
import json
import random
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from sr_dpo_jax.commands.demo.tasks import RATINGS, Task, corrupt, draw_task, instruction, quality, rating_of
from sr_dpo_jax.durable.files import write_text
from sr_dpo_jax.errors import UsageError

GAP_KINDS = ("close", "clear", "far")
"""Pairs up to a third of the scale apart, up to two thirds, and more."""
RIGHT_SHARE = 0.5
"""The share of the base text's responses that are right; the others have between one and all words wrong."""


@dataclasses.dataclass(frozen=True)
class Knobs:
    """The settings that a researcher may change."""

    rated_share: float = 0.5
    """The share of the base text with the instruction and a rating: how well the base model knows quality."""
    rating_noise: float = 0.4
    """The share of the rated text whose rating is drawn by chance. At 0 the instruction alone decides how good a
    response is, and what is learned without it need not change responses with it."""
    label_noise: float | None = None
    """The share of preference pairs that are labelled the wrong way round; None for that of the setting."""
    gaps: tuple[float, float, float] = (1.0, 1.0, 1.0)
    """The weights of close, clear and far pairs."""
    pairs: int = 2048
    """The size of the preference set."""
    beta: float = 0.5
    """β of every objective. The paper's 0.1 is for responses of a hundred tokens; margins of five tokens stay below
    1/0.1, where the weight of a pair is about one half whatever its margin is, so that a shift changes nothing."""

    def check(self) -> None:
        """Refuses values out of their range with a UsageError that names the option and its value."""
        for name in ("rated_share", "rating_noise", "label_noise"):
            share = getattr(self, name)
            if share is not None and not 0 <= share <= 1:
                raise UsageError(f"--{name.replace('_', '-')} {share}: is a share, 0 to 1")
        if min(self.gaps) < 0 or not 0 < sum(self.gaps) < float("inf"):
            raise UsageError(f"--gaps {','.join(map(str, self.gaps))}: weights are 0 or more, and one of them is not 0")
        if not 0 < self.beta < float("inf"):
            raise UsageError(f"--beta {self.beta}: must be above 0")
        if self.pairs < 1:
            raise UsageError(f"--pairs {self.pairs}: must be 1 or more")


def parse_gaps(text: str) -> tuple[float, float, float]:
    """Reads the weights of `--gaps`; raises UsageError where they are not three numbers."""
    try:
        close, clear, far = map(float, text.split(","))
    except ValueError as error:
        raise UsageError(f"--gaps {text}: is not of the form 1,1,1, the weights of {', '.join(GAP_KINDS)}") from error
    return close, clear, far


def base_rows(
    count: int, *, kinds: Sequence[str], rated_share: float, rating_noise: float, seed: int
) -> list[dict[str, Any]]:
    """Draws texts for the base model. `rejected` is a spoiled response, which SFT does not read."""
    rng = random.Random(f"base {seed}")
    rows = []
    for _ in range(count):
        task = draw_task(rng, kinds)
        edits = 0 if rng.random() < RIGHT_SHARE else rng.randint(1, len(task.answer))
        response = corrupt(task.answer, edits, rng)
        prompt = task.prompt
        if rng.random() < rated_share:
            rating = rating_of(quality(" ".join(response), task.answer))
            if rng.random() < rating_noise:
                rating = rng.choice(RATINGS)
            prompt = instruction(rating) + prompt
        rows.append(_row(task, response, corrupt(task.answer, len(task.answer), rng), prompt=prompt))
    return rows


def preference_rows(
    count: int,
    *,
    kinds: Sequence[str],
    gaps: tuple[float, float, float],
    label_noise: float,
    seed: str,
    without: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Draws pairs of responses to tasks of these kinds, but for the prompts `without`; the rest as in `Knobs`."""
    rng = random.Random(f"pairs {seed}")
    rows: list[dict[str, Any]] = []
    while len(rows) < count:
        task = draw_task(rng, kinds)
        words = len(task.answer)
        (kind,) = rng.choices(range(len(GAP_KINDS)), gaps)
        gap = rng.choice([edits for edits in range(1, words + 1) if gap_kind(edits, words) == kind])
        fewer = rng.randint(0, words - gap)
        better, worse = corrupt(task.answer, fewer, rng), corrupt(task.answer, fewer + gap, rng)
        if rng.random() < label_noise:
            better, worse = worse, better
        if task.prompt not in without:
            rows.append(_row(task, better, worse, prompt=task.prompt))
    return rows


def gap_kind(edits: int, words: int) -> int:
    """Gives the kind of a gap of `edits` words in an answer of `words` words, as an index into `GAP_KINDS`."""
    return (edits * 3 - 1) // words


def _row(task: Task, chosen: tuple[str, ...], rejected: tuple[str, ...], *, prompt: str) -> dict[str, Any]:
    responses = {"chosen": " ".join(chosen), "rejected": " ".join(rejected)}
    return {
        "prompt": prompt,
        **{side: " " + text for side, text in responses.items()},
        **{f"score_{side}": quality(text, task.answer) for side, text in responses.items()},
        "kind": task.kind,
        "answer": " ".join(task.answer),
    }


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes rows as JSON lines, whole."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
