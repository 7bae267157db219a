"""Turns the verdicts of both orders into win, tie or lose, and sums them up as shares with intervals."""

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
    shown_second: Verdict
    """The verdicts where our model's answer was shown as A, and as B."""

    @property
    def outcome(self) -> str:
        """Our model's outcome: `win` or `lose` where both orders say so, else `tie`; `unusable` without a verdict."""
        first, second = self.shown_first.choice, self.shown_second.choice
        if first is None or second is None:
            return "unusable"
        return {("A", "B"): "win", ("B", "A"): "lose"}.get((first, second), "tie")

    @property
    def position(self) -> str | None:
        """The place, `A` or `B`, that won in both orders, whichever answer stood there; else None."""
        first, second = self.shown_first.choice, self.shown_second.choice
        return first if first == second != "tie" else None


def summary(comparisons: Sequence[Comparison], bootstrap: Bootstrap) -> dict[str, Any]:
    """Counts outcomes and positions, and gives each outcome's share of the usable comparisons with an interval.

    `score` is the share of wins plus half that of ties. A share is None where nothing is usable, an interval where
    fewer than two questions are.
    """
    usable = [comparison for comparison in comparisons if comparison.outcome != "unusable"]
    by_question: dict[str, Counter[str]] = {}
    for comparison in usable:
        by_question.setdefault(comparison.question, Counter())[comparison.outcome] += 1
    values = {name: np.array([counts[name] for counts in by_question.values()], float) for name in OUTCOMES}
    comparisons_of = sum(values.values())
    values["score"] = values["win"] + values["tie"] / 2
    positions = Counter(comparison.position for comparison in usable)
    problems = [v.problem for c in comparisons for v in (c.shown_first, c.shown_second) if v.problem is not None]
    return {
        "comparisons": len(comparisons),
        "questions": len({comparison.question for comparison in comparisons}),
        "unusable": len(comparisons) - len(usable),
        "unusable_reasons": dict(Counter(problems)),
        **{name: int(values[name].sum()) for name in OUTCOMES},
        "shares": {name: share(value, comparisons_of, bootstrap) for name, value in values.items()},
        "position_bias_rate": (positions["A"] + positions["B"]) / len(usable) if usable else None,
        "always_first": positions["A"],
        "always_second": positions["B"],
    }


def share(values: np.ndarray, comparisons: np.ndarray, bootstrap: Bootstrap) -> dict[str, float | None]:
    """Gives Σ values / Σ comparisons, with the percentile interval of drawing the questions anew.

    Questions are drawn, not comparisons: the two turns of one question are no independent evidence.

    Args:
      values: `[Q]`, each question's part of the sum.
      comparisons: `[Q]`, the number of usable comparisons of each question, at least one.
      bootstrap: the resampling.
    """
    value = float(values.sum() / comparisons.sum()) if len(values) else None
    if len(values) < 2:
        return {"value": value, "low": None, "high": None}
    low, high = scipy.stats.bootstrap(
        (values, comparisons),
        lambda drawn, of, axis: drawn.sum(axis=axis) / of.sum(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=bootstrap.resamples,
        confidence_level=bootstrap.confidence,
        method="percentile",
        batch=1000,
        rng=np.random.default_rng(bootstrap.seed),
    ).confidence_interval
    return {"value": value, "low": float(low), "high": float(high)}
