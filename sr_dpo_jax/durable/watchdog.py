"""Ends a process whose step hangs: it writes the stacks of all threads to standard error and exits with code 1."""

import contextlib
import faulthandler
import sys
from collections.abc import Iterator
from typing import Self


class Watchdog:
    """Ends the process unless `beat` is called at least every `timeout_s` seconds while the block runs.

    The timer is a C thread that needs no lock of Python, so it fires even where the interpreter hangs in a compiler or
    a collective.
    """

    def __init__(self, timeout_s: float):
        self._timeout_s = timeout_s

    @contextlib.contextmanager
    def limit(self, timeout_s: float) -> Iterator[None]:
        """Gives the block a time of its own: waiting for a save is no hanging step."""
        faulthandler.dump_traceback_later(timeout_s, exit=True, file=sys.__stderr__)
        try:
            yield
        finally:
            self.beat()

    def __enter__(self) -> Self:
        self.beat()
        return self

    def __exit__(self, *_: object) -> None:
        faulthandler.cancel_dump_traceback_later()

    def beat(self, *_: object) -> None:
        """Restarts the timer."""
        faulthandler.dump_traceback_later(self._timeout_s, exit=True, file=sys.__stderr__)
