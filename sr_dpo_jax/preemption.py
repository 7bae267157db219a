"""SIGTERM, as a machine gets it that is taken away: finish the step in flight, save, and end with exit code 75."""

import signal
from types import FrameType
from typing import Self

import jax
from jax.experimental import multihost_utils


class Preempted(BaseException):
    """SIGTERM came before the first step: there is nothing to save that is not saved."""


class StopSignal:
    """SIGTERM, as a preempted machine gets it: the step in flight is finished, saved, and the run ends with 75.

    Before the first step it raises Preempted where it meets the program. In a run of several processes, jax's own
    handler takes over when they join, and makes all of them stop after the same step. A context manager: afterwards
    SIGTERM does again what it did before.
    """

    def __init__(self) -> None:
        self._stepping, self._received = False, False

    def __enter__(self) -> Self:
        self._before = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def requested(self, step: int) -> bool:
        """Whether to stop after this step; every process must ask at every step."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._received

    def stepping(self) -> None:
        """From here on the signal waits for the end of a step."""
        self._stepping = True

    def _receive(self, _number: int, _frame: FrameType | None) -> None:
        self._received = True
        if not self._stepping:
            raise Preempted
