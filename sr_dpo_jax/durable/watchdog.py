"""Ends a process whose step hangs: the stacks of all threads go to standard error, the exit code is 1."""

import faulthandler
import sys
from types import TracebackType
from typing import Self


class Watchdog:
    """While the block runs, `beat` must be called at least every `timeout_s` seconds.

    The timer is a thread of C that needs no lock of Python, so it fires also where the interpreter itself hangs in a
    compiler or a collective.
    """

    def __init__(self, timeout_s: float):
        self._timeout_s = timeout_s

    def __enter__(self) -> Self:
        self.beat()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        faulthandler.cancel_dump_traceback_later()

    def beat(self, *_: object) -> None:
        """Starts the time again."""
        faulthandler.dump_traceback_later(self._timeout_s, exit=True, file=sys.__stderr__)
