"""SIGTERM to this process itself: when it stops a run at once, when after a step, and what the second one does."""

import os
import signal
import time

import pytest

from sr_dpo_jax.durable import preemption
from sr_dpo_jax.durable.preemption import EXIT_KILLED, Preempted, StopSignal


def terminate(stop=None):
    os.kill(os.getpid(), signal.SIGTERM)
    deadline = time.monotonic() + 5
    while stop is not None and not stop.requested() and time.monotonic() < deadline:
        time.sleep(0.01)


def test_before_the_first_step_it_stops_at_once():
    with pytest.raises(Preempted), StopSignal():
        terminate()
        time.sleep(5)
        pytest.fail("the signal was lost")
    assert not issubclass(Preempted, Exception), "no handler of errors may swallow it"


def test_a_library_that_makes_another_exception_of_it_does_not_hide_it():
    """NumPy makes a SystemError of what is raised within a callback of its C code."""
    with pytest.raises(Preempted) as stopped, StopSignal():
        try:
            terminate()
            time.sleep(5)
        except Preempted as error:
            raise SystemError("returned a result with an exception set") from error
    assert isinstance(stopped.value.__cause__, SystemError)
    with pytest.raises(SystemError), StopSignal():
        raise SystemError("without a signal")


def test_after_the_first_step_it_waits_to_be_asked():
    with StopSignal() as stop:
        assert not stop.requested()
        stop.meet()
        stop.stepping()
        terminate(stop)
        assert stop.requested() and stop.requested()
        with pytest.raises(Preempted):
            stop.meet()


def test_the_second_signal_ends_the_process(monkeypatch):
    codes = []
    monkeypatch.setattr(preemption.os, "_exit", codes.append)
    with StopSignal() as stop:
        stop.stepping()
        terminate(stop)
        assert codes == []
        terminate()
        deadline = time.monotonic() + 5
        while not codes and time.monotonic() < deadline:
            time.sleep(0.01)
    assert codes == [EXIT_KILLED] == [143]


def test_other_signals_do_not_count(monkeypatch):
    monkeypatch.setattr(preemption.os, "_exit", lambda code: pytest.fail("ended"))
    before = signal.signal(signal.SIGUSR1, lambda number, frame: None)
    try:
        with StopSignal() as stop:
            stop.stepping()
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.1)
            assert not stop.requested()
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_afterwards_sigterm_does_what_it_did_before():
    received = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        with StopSignal() as stop:
            stop.stepping()
            terminate(stop)
        assert received == []
        terminate()
        assert received == [signal.SIGTERM]
        assert signal.set_wakeup_fd(-1) == -1, "the wake-up pipe is given back"
    finally:
        signal.signal(signal.SIGTERM, before)
