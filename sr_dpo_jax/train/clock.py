"""Adds up where the time of a run goes, over all its starts, in clock.jsonl beside metrics.jsonl.

    load         before the first step, apart from the two that follow: reading, joining, restoring a checkpoint
    compile      tracing, lowering and compiling the programs
    reference    scoring the reference
    data         the loop waiting for its next batch
    steps        the loop's steps
    evaluation   scoring held-out sets and generating samples
    save         the loop waiting for a checkpoint
    redone       steps of earlier starts that a later start took again
    between      from the last sign of life of one start to the beginning of the next

    goodput      seconds of steps that are not redone / seconds of the run's life, which are the sum of all the others

These are the definitions of ml-goodput-measurement, where a step is the only productive time and what a restart takes
again is lost. The start of Python, before this module is asked, belongs to `between`, or to no start where it is the
first. One phase is on at a time; compilation within the scoring of the reference counts as compilation.
"""

import contextlib
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from sr_dpo_jax.durable.files import kept_lines

log = logging.getLogger(__name__)

Given, Gives = ParamSpec("Given"), TypeVar("Gives")

NAME = "clock.jsonl"
PHASES = ("steps", "load", "compile", "reference", "data", "evaluation", "save", "redone", "between")
MARK_S = 10.0
"""Seconds between two lines of the file at least, where no save asks for one."""


class Clock:
    """Attributes each second of this process to one phase; `load` until the loop begins."""

    def __init__(self) -> None:
        self._began, self._since, self._phase = time.time(), time.monotonic(), "load"
        self._seconds: Counter[str] = Counter()
        self._before: Counter[str] = Counter()
        self.begun = False
        self._file: Path | None = None
        self._first, self._marked = 0, 0.0

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Counts the block as `phase`, and what follows as the phase before."""
        outer = self.turn_to(phase)
        try:
            yield
        finally:
            self.turn_to(outer)

    def turn_to(self, phase: str) -> str:
        """Counts what follows as `phase`; returns the phase that ends here."""
        now, ended = time.monotonic(), self._phase
        self._seconds[ended] += now - self._since
        self._since, self._phase = now, phase
        return ended

    def timed(self, phase: str, function: Callable[Given, Gives]) -> Callable[Given, Gives]:
        """Gives a function that does the same and is counted as `phase`."""

        def counted(*arguments: Given.args, **named: Given.kwargs) -> Gives:
            with self(phase):
                return function(*arguments, **named)

        return counted

    def begin(self, root: Path, *, first_step: int) -> None:
        """Takes up what earlier starts have written, and counts as `steps` from here on. One process does.

        Args:
          root: the run directory.
          first_step: the step that this start goes on from; later steps of earlier starts are `redone`.
        """
        self.begun, self._first, self._file = True, first_step, root / NAME
        earlier = _starts(kept_lines(self._file, _is_sound))
        self._before = _seconds_before(earlier, first_step=first_step, began=self._began)
        self.turn_to("steps")
        self.mark(first_step, now=True)

    def mark(self, step: int, *, now: bool = False) -> None:
        """Writes a line after `step`, at most one in MARK_S seconds unless `now`: what a kill leaves behind."""
        self.turn_to(self._phase)
        if self._file is None or (not now and time.monotonic() - self._marked < MARK_S):
            return
        self._marked = time.monotonic()
        seconds = {phase: round(value, 3) for phase, value in self._seconds.items()}
        line = {"began": round(self._began, 3), "first": self._first, "step": step, **seconds}
        try:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:  # a side file stops no run
            log.warning("%s: cannot be written (%s); a later start will not know this one", self._file, error.strerror)
            self._file = None

    @property
    def life(self) -> dict[str, float]:
        """Seconds of each phase over the run's life so far."""
        self.turn_to(self._phase)
        total = self._before + self._seconds
        return {phase: total[phase] for phase in PHASES}


def goodput(life: Mapping[str, float]) -> float:
    """Share of a run's life that went into steps that count; 0 where it has not begun."""
    return life["steps"] / max(sum(life.values()), 1e-9)


def sentence(life: Mapping[str, float]) -> str:
    """Tells a run's life in one line, the longest part first."""
    parts = sorted(((seconds, phase) for phase, seconds in life.items() if seconds >= 0.05), reverse=True)
    told = ", ".join(f"{phase} {seconds:.1f}" for seconds, phase in parts)
    return f"goodput {100 * goodput(life):.1f} % of {sum(life.values()):.1f} s: {told}"


def life_of(lines: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Adds up the seconds of each phase that the lines of a clock.jsonl tell; {} where there are none."""
    starts = _starts(lines)
    total = _seconds_before(starts, first_step=starts[-1][-1]["step"], began=0.0) if starts else Counter()
    return {phase: total[phase] for phase in PHASES} if starts else {}


def _starts(lines: Iterable[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Groups the lines by start, in order, without those that are none of the clock's."""
    starts: dict[float, list[Mapping[str, Any]]] = {}
    for line in lines:
        with contextlib.suppress(KeyError, TypeError, ValueError):
            if _is_sound(line):
                starts.setdefault(line["began"], []).append(line)
    return list(starts.values())


def _seconds(line: Mapping[str, Any]) -> Counter[str]:
    return Counter({phase: line[phase] for phase in PHASES if phase in line})


def _is_sound(line: Mapping[str, Any]) -> bool:
    """Raises KeyError, TypeError or ValueError where a line is none of the clock's."""
    for number in (line["began"], line["first"], line["step"], *_seconds(line).values()):
        if not 0 <= number < float("inf"):
            raise ValueError("no time and no step")
    return True


def _seconds_before(starts: Sequence[Sequence[Mapping[str, Any]]], *, first_step: int, began: float) -> Counter[str]:
    """Adds up earlier starts, as one that goes on from `first_step` and began at `began` (Unix seconds) sees them.

    A step counts where no later start went on from before it.
    """
    total: Counter[str] = Counter()
    next_began, reached = began, first_step
    for lines in reversed(starts):
        last = _seconds(lines[-1])
        kept = [_seconds(line)["steps"] for line in lines if line["step"] <= reached]
        redone = last["steps"] - max(kept, default=0.0)
        ended = lines[-1]["began"] + sum(last.values())
        total += last
        total["steps"] -= redone
        total["redone"] += redone
        total["between"] += max(next_began - ended, 0.0)
        next_began, reached = lines[-1]["began"], min(reached, lines[0]["first"])
    return total
