"""Verdicts of both orders -> win, tie or lose; shares with intervals; how often the judge went by position."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.stats

from sr_dpo_jax.commands.judge.endpoint import Verdict
from sr_dpo_jax.commands.judge.settings import Bootstrap

OUTCOMES = ("win", "tie", "lose")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One turn of one question, judged in both orders."""

    question: str
    turn: int
    category: str | None
    shown_first: Verdict
    """Our model's answer stood as A."""
    shown_second: Verdict
    """Our model's answer stood as B."""

    @property
    def outcome(self) -> str:
        """Of our model: `win` and `lose` only where both orders say so, else `tie`; `unusable` without a verdict."""
        first, second = self.shown_first.choice, self.shown_second.choice
        if first is None or second is None:
            return "unusable"
        return {("A", "B"): "win", ("B", "A"): "lose"}.get((first, second), "tie")

    @property
    def position(self) -> str | None:
        """`A` or `B` where the answer in that place won in both orders, whichever it was; else None."""
        first, second = self.shown_first.choice, self.shown_second.choice
        return first if first == second and first in ("A", "B") else None


def summary(comparisons: Sequence[Comparison], bootstrap: Bootstrap) -> dict[str, Any]:
    """Counts of outcomes, their shares of the usable comparisons with intervals, and the position-bias rate.

    `score` is the share of wins plus half that of ties. A share is None where nothing is usable, an interval where
    fewer than two questions are.
    """
    usable = [comparison for comparison in comparisons if comparison.outcome != "unusable"]
    by_question: dict[str, Counter[str]] = {}
    for comparison in usable:
        by_question.setdefault(comparison.question, Counter())[comparison.outcome] += 1
    counts = np.array([[c[name] for name in OUTCOMES] for c in by_question.values()], float).reshape(-1, 3)
    wins, ties, losses = counts.T
    values = {"win": wins, "tie": ties, "lose": losses, "score": wins + ties / 2}
    positions = Counter(comparison.position for comparison in usable)
    problems = [v.problem for c in comparisons for v in (c.shown_first, c.shown_second) if v.problem is not None]
    return {
        "comparisons": len(comparisons),
        "questions": len({comparison.question for comparison in comparisons}),
        "unusable": len(comparisons) - len(usable),
        "unusable_reasons": dict(Counter(problems)),
        **{name: int(values[name].sum()) for name in OUTCOMES},
        "shares": {name: share(value, counts.sum(axis=1), bootstrap) for name, value in values.items()},
        "position_bias_rate": (positions["A"] + positions["B"]) / len(usable) if usable else None,
        "always_first": positions["A"],
        "always_second": positions["B"],
    }


def share(values: np.ndarray, comparisons: np.ndarray, bootstrap: Bootstrap) -> dict[str, float | None]:
    """Σ values / Σ comparisons, with the percentile interval of drawing the questions anew.

    Questions are drawn, not comparisons: the two turns of one question are no independent evidence.

    Args:
      values: `[Q]`, what each question adds.
      comparisons: `[Q]`, how many usable comparisons each question has, at least one.
      bootstrap: how often to draw, and the interval's confidence.
    """
    if not len(values):
        return {"value": None, "low": None, "high": None}
    value = float(values.sum() / comparisons.sum())
    if len(values) == 1:
        return {"value": value, "low": None, "high": None}
    found = scipy.stats.bootstrap(
        (values, comparisons),
        lambda drawn, of, axis: drawn.sum(axis=axis) / of.sum(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=bootstrap.resamples,
        confidence_level=bootstrap.confidence,
        method="percentile",
        batch=1000,
        rng=np.random.default_rng(bootstrap.seed),
    )
    return {"value": value, "low": float(found.confidence_interval.low), "high": float(found.confidence_interval.high)}
