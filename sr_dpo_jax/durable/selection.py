"""Which evaluation of a run is best so far, and whether so many have passed without a better one that the run ends.

    best      the evaluation whose metric is highest, or lowest; of equal ones the first
    waited    evaluations since the last one that was better, by more than min_delta, than the one counted from

A pure function of the evaluations in their order. Every checkpoint holds it as of its step, so a run that goes on from
one, whichever it is, counts as the run counted that reached it. Imports no jax.

Next: `loop.py`, which asks after every evaluation.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Selection:
    """The rule, and what the evaluations so far have given."""

    metric: str | None
    """Its name in metrics.jsonl; None where nothing is chosen."""
    mode: str
    """`max` or `min`."""
    min_delta: float
    patience: int | None
    """Evaluations; None never ends a run."""
    step: int | None = None
    """Of the best evaluation; None before the first one that is finite."""
    value: float | None = None
    """The metric there."""
    counted_from: float | None = None
    """The metric that the next evaluation must better by more than `min_delta`, or else it is waited for."""
    waited: int = 0

    def after(self, step: int, value: float) -> "Selection":
        """This with one more evaluation. A value that is not finite is never better."""
        changed: dict[str, Any] = {"waited": self.waited + 1}
        if math.isfinite(value):
            if self.value is None or self._gain(value, self.value) > 0:
                changed |= {"step": step, "value": value}
            if self.counted_from is None or self._gain(value, self.counted_from) > self.min_delta:
                changed |= {"counted_from": value, "waited": 0}
        return dataclasses.replace(self, **changed)

    @property
    def over(self) -> bool:
        return self.patience is not None and self.waited >= self.patience

    @property
    def said(self) -> str:
        """For the log."""
        if self.step is None:
            return f"no evaluation gave a finite {self.metric}"
        return f"best {self.metric}: {self.value:.6g} at step {self.step}"

    def record(self) -> dict[str, Any] | None:
        """For a checkpoint; JSON keeps every bit of a float."""
        if self.metric is None:
            return None
        return {"metric": self.metric, "mode": self.mode, **{name: getattr(self, name) for name in COUNTED}}

    def resumed(self, record: Mapping[str, Any]) -> "Selection | None":
        """This rule with what a checkpoint has counted; None where it counted another metric."""
        if (record["metric"], record["mode"]) != (self.metric, self.mode):
            return None
        return dataclasses.replace(self, **{name: record[name] for name in COUNTED})

    def _gain(self, value: float, before: float) -> float:
        return value - before if self.mode == "max" else before - value


COUNTED = ("step", "value", "counted_from", "waited")
