"""A fork of a process that has the imports is to the tests what a process of its own is."""

import os
import signal
import subprocess
import sys

import pytest
import warm

PROGRAM = """
import os, signal, sys, threading, time
if __name__ == "__main__":
    print(sys.argv[1:], os.getpid(), os.environ.get("GIVEN"), os.getcwd(), threading.main_thread().name)
    print("said last", file=sys.stderr)
    if sys.argv[1] == "wait":
        sys.stdout.flush()
        time.sleep(600)
    if sys.argv[1] == "raise":
        raise ValueError("as asked")
    sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def start(tmp_path):
    """`argument -> process`, forked or ordinary."""
    file = tmp_path / "program.py"
    file.write_text(PROGRAM, encoding="utf-8")
    environment = {**os.environ, "GIVEN": "so"}
    parent = warm.Warm(["json"], dict(os.environ))

    def start_program(argument, forked=True):
        if forked:
            return parent.start([str(file), argument], environment, cwd=str(tmp_path))
        return subprocess.Popen(
            [sys.executable, str(file), argument],
            env=environment,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    yield start_program
    parent.close()


@pytest.mark.parametrize(("argument", "code"), [("0", 0), ("7", 7), ("raise", 1)])
def test_a_fork_says_and_ends_as_a_process_does(start, argument, code):
    ordinary, forked = start(argument, forked=False), start(argument)
    expected = ordinary.communicate(timeout=60)[0].replace(str(ordinary.pid), "PID")
    said = forked.communicate(timeout=60)[0].replace(str(forked.pid), "PID")
    assert ordinary.returncode == forked.returncode == forked.poll() == forked.wait() == code
    assert ("raise" in argument) == ("Traceback" in said) == ("ValueError: as asked" in said)
    assert set(expected.splitlines()[:2]) <= set(said.splitlines())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_one_fork_and_not_the_other(start, number):
    first, second = start("wait"), start("wait")
    assert first.pid != second.pid
    for process in (first, second):
        assert str(process.pid) in process.stdout.readline()
    assert first.poll() is None and second.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        first.communicate(timeout=0.05)
    first.send_signal(number)
    assert first.communicate(timeout=60) == ("said last\n", None)
    assert first.returncode == -number and second.poll() is None
    with pytest.raises(ProcessLookupError):
        os.kill(first.pid, 0)
    second.kill()
    assert second.wait(timeout=60) == -signal.SIGKILL


def test_other_variables_need_another_process(start):
    parent = warm.Warm([], {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--a"})
    assert parent.same_imports({"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--b", "PYTEST_CURRENT_TEST": "this"})
    assert not parent.same_imports({"JAX_PLATFORMS": "cpu", "HF_TOKEN": "x"})
    assert not parent.same_imports({})
    parent.close()
