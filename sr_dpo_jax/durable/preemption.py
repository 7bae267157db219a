"""Notes SIGTERM, which a preempted machine gets, so that `train/loop.py` ends the step, saves and returns 75."""

import ctypes
import os
import signal
import threading
from types import FrameType
from typing import Self

import jax
from jax.experimental import multihost_utils

EXIT_KILLED = 128 + signal.SIGTERM


class Preempted(BaseException):
    """SIGTERM came before the first step, when there is nothing to save."""


class StopSignal:
    """Stops the run at the first SIGTERM after a step that all processes agree on, and at the second one at once.

    Before the first step, Preempted is raised in the main thread of a run of one process; several processes stop
    together at the next `requested`. As a context manager it gives SIGTERM its former handler back at the end.

    A trap: Python runs signal handlers in the main thread, which may compile or wait for a device for minutes. So a
    thread that reads the interpreter's wake-up pipe counts the signals.

    Another: where Preempted is raised within a callback of a library's C code, it may come out as another exception, as
    NumPy makes a SystemError of it. Once it was raised, whatever ends the block is Preempted.
    """

    def __init__(self) -> None:
        self._stepping, self._received, self._raised, self._polls = False, False, False, 0
        self._tell_jax: ctypes._CFuncPtr | None = None

    def __enter__(self) -> Self:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._before = signal.signal(signal.SIGTERM, self._raise)
        self._thread = threading.Thread(target=self._count, name="SIGTERM", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        signal.signal(signal.SIGTERM, self._before)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._writer)  # ends the thread, which reads the end of the pipe
        self._thread.join()
        os.close(self._reader)
        if self._raised and error is not None and not isinstance(error, Preempted):
            raise Preempted from error

    def joined(self) -> None:
        """Takes SIGTERM back from jax.distributed, whose handler replaced ours and would swallow a second signal."""
        if jax.process_count() > 1:
            libc = ctypes.CDLL(None)
            libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
            theirs = libc.signal(signal.SIGTERM, None)
            self._tell_jax = ctypes.CFUNCTYPE(None, ctypes.c_int)(theirs)  # sets a flag that a thread of jax polls
            signal.signal(signal.SIGTERM, self._raise)

    def requested(self) -> bool:
        """Tells whether to stop now; every process must call it equally often, and all get the same answer."""
        self._polls += 1
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(self._polls)
        return self._received

    def meet(self) -> None:
        """Raises Preempted on all processes if one of them got SIGTERM; for the time before the first step."""
        if self.requested():
            raise Preempted

    def stepping(self) -> None:
        """Marks the first step: from now on a stop waits for the end of a step."""
        self._stepping = True

    def _count(self) -> None:
        while signals := os.read(self._reader, 64):
            for number in signals:
                if number == signal.SIGTERM:
                    if self._received:
                        os._exit(EXIT_KILLED)
                    self._received = True
                    if self._tell_jax is not None:
                        self._tell_jax(signal.SIGTERM)

    def _raise(self, _number: int, _frame: FrameType | None) -> None:
        if not self._stepping and self._tell_jax is None:
            self._raised = True
            raise Preempted
