"""The best evaluation of a run so far, and early stopping: whether `patience` evaluations brought no improvement.

    best            the evaluation with the highest metric (or the lowest, by `mode`); the first of equal ones
    counted_from    the metric that an evaluation must beat by more than `min_delta` to be an improvement: that of the
                    last improvement
    waited          the evaluations since the last improvement

A `Selection` is a pure function of the evaluations in their order. Each checkpoint keeps its record, so a run that
resumes at any checkpoint counts on from there. The module imports no jax.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Selection:
    """The rule, and the outcome of the evaluations so far."""

    metric: str | None
    """The metric's name in metrics.jsonl; None selects nothing."""
    mode: str
    """`max` or `min`."""
    min_delta: float
    patience: int | None
    """The evaluations without improvement after which the run ends; None never ends it."""
    data: str = ""
    """The digest of the held-out pairs that are measured: numbers of other pairs are not compared."""
    step: int | None = None
    """The step of the best evaluation; None before the first finite one."""
    value: float | None = None
    """The metric of the best evaluation."""
    counted_from: float | None = None
    """The metric of the last improvement; None before the first finite evaluation."""
    waited: int = 0

    def after(self, step: int, value: float) -> "Selection":
        """Returns the selection after one more evaluation; a value that is not finite is no improvement."""
        changed: dict[str, Any] = {"waited": self.waited + 1}
        if math.isfinite(value):
            if self.value is None or self._gain(value, self.value) > 0:
                changed |= {"step": step, "value": value}
            if self.counted_from is None or self._gain(value, self.counted_from) > self.min_delta:
                changed |= {"counted_from": value, "waited": 0}
        return dataclasses.replace(self, **changed)

    @property
    def over(self) -> bool:
        """Tells whether the run is to end."""
        return self.patience is not None and self.waited >= self.patience

    @property
    def summary(self) -> str:
        """Describes the best evaluation, for the log."""
        if self.step is None:
            return f"no evaluation gave a finite {self.metric}"
        return f"best {self.metric}: {self.value:.6g} at step {self.step}"

    def record(self) -> dict[str, Any] | None:
        """Gives what a checkpoint keeps of it; JSON keeps every bit of a float. None where nothing is selected."""
        if self.metric is None:
            return None
        return {name: getattr(self, name) for name in ("metric", "mode", "data", *COUNTED)}

    def resumed(self, record: Mapping[str, Any]) -> "Selection | None":
        """Returns this rule with the counts of a checkpoint's record; None where that is of another metric or data."""
        then = (record["metric"], record["mode"], record.get("data", self.data))  # earlier versions wrote no digest
        if then != (self.metric, self.mode, self.data):
            return None
        return dataclasses.replace(self, **{name: record[name] for name in COUNTED})

    def _gain(self, value: float, before: float) -> float:
        return value - before if self.mode == "max" else before - value


COUNTED = ("step", "value", "counted_from", "waited")
"""The fields that a checkpoint keeps."""
