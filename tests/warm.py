"""Real processes that need not import jax and transformers anew: forks of one that has, and that does nothing else.

A start costs seconds of imports, and the suites start some hundred processes. A fork has its own pid, signals, files,
environment, standard output and exit code, and ends as Python ends; the backend of jax, which has threads, starts in
the fork. Each of several that join may store what it compiles (`keep_compiled`). What is read from the environment at
import is that of the process that imported: so where a test changes a variable, it gets an ordinary process
(`runs.run_process`).

    python tests/warm.py FD MODULE...    imports the modules; then one fork for each request that the socket FD brings
"""

import atexit
import contextlib
import functools
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

REAP_S = 0.02


class Process:
    """The part of `subprocess.Popen` that the tests use, of a process that is a child of another."""

    def __init__(self, stdout: IO[str], status: int):
        self.stdout, self.returncode = stdout, None
        self._status = os.fdopen(status, "rb", buffering=0)
        self._said: list[str] = []
        self._reader: threading.Thread | None = None
        self.pid = int(self._word())

    def _word(self) -> bytes:
        """Reads what stands before the next line feed; nothing where the other side is gone."""
        word = b""
        while (byte := self._status.read(1)) not in (b"", b"\n"):
            word += byte
        return word

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(timeout=0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
            self.returncode = int(self._word())
            self._status.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """Gives what was said to the end; after a timeout it can be called again, and nothing is lost."""
        deadline = None if timeout is None else time.monotonic() + timeout
        if self._reader is None:
            self._reader = threading.Thread(target=lambda: self._said.append(self.stdout.read()), daemon=True)
            self._reader.start()
        self._reader.join(timeout)
        if self._reader.is_alive():
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0)
        self.wait(None if deadline is None else max(deadline - time.monotonic(), 0))
        return self._said[0], None


class Warm:
    """A process that has imported the modules, and forks."""

    def __init__(self, modules: Sequence[str], environment: dict[str, str]):
        self.environment = environment
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno()), *modules],
                env=environment,
                pass_fds=[theirs.fileno()],
            )
        atexit.register(self.close)

    def same_imports(self, environment: dict[str, str]) -> bool:
        """Whether modules would find, when they are imported, the variables that they found here."""
        # XLA reads its flags when a backend starts, not at import.
        mine, theirs = (
            {name: value for name, value in variables.items() if name not in ("XLA_FLAGS", "PYTEST_CURRENT_TEST")}
            for variables in (self.environment, environment)
        )
        return mine == theirs

    def start(self, program: Sequence[str], environment: dict[str, str], cwd: str | None = None) -> Process:
        """Starts Python with `program`, as its command line has it: `-m MODULE ARGUMENTS` or `FILE ARGUMENTS`."""
        output, their_output = os.pipe()
        status, their_status = os.pipe()
        request = {"program": list(program), "environment": environment, "cwd": cwd or os.getcwd()}
        try:
            socket.send_fds(self._socket, [json.dumps(request).encode()], [their_output, their_status])
        finally:
            os.close(their_output)
            os.close(their_status)
        return Process(open(output, encoding="utf-8"), status)

    def close(self) -> None:
        """Ends the process; forks that still run stay."""
        self._socket.close()
        self._process.wait(timeout=60)


@functools.cache
def warm_process(number: int, modules: tuple[str, ...]) -> Warm:
    """One of several, which differ in the seed of Python's hashes as processes do."""
    repository = str(Path(__file__).resolve().parents[1])
    return Warm(modules, {**os.environ, "PYTHONPATH": repository})


def serve(requests: socket.socket) -> dict[str, Any] | None:
    """Forks for each request and says how the fork ended; gives the request in the fork, and None once none can come.

    What a request brings beside its text: a descriptor for output and errors, and one for the pid and the exit code.
    """
    running: dict[int, int] = {}
    while True:
        if select.select([requests], [], [], REAP_S if running else None)[0]:
            message, descriptors, _, _ = socket.recv_fds(requests, 2**20, 2)
            if not message:
                return None
            output, status = descriptors
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # jax has threads, but not before its backend starts
                pid = os.fork()
            if pid == 0:
                os.dup2(output, 1)
                os.dup2(output, 2)
                for descriptor in (output, status, *running.values()):
                    os.close(descriptor)
                return json.loads(message)
            os.close(output)
            os.write(status, f"{pid}\n".encode())
            running[pid] = status
        for pid, status in list(running.items()):
            ended, code = os.waitpid(pid, os.WNOHANG)
            if ended:
                with contextlib.suppress(BrokenPipeError):  # the test has ended before its process
                    os.write(status, f"{os.waitstatus_to_exitcode(code)}\n".encode())
                os.close(running.pop(pid))


def keep_compiled() -> None:
    """Lets every process of several store the programs that it compiles.

    jax lets process 0 alone write to the compilation cache. On CPUs the key of a program tells the processes apart, so
    the others would find none of theirs there, however often they start.
    """
    from jax._src import compiler, distributed  # jax has no public way

    write = compiler._cache_write

    def written(*given: Any) -> None:
        state = distributed.global_state
        number, state.process_id = state.process_id, 0
        try:
            write(*given)
        finally:
            state.process_id = number

    compiler._cache_write = written


def main() -> None:
    """Returns at the end of the last request; in a fork, ends as the program does."""
    for module in sys.argv[2:]:
        importlib.import_module(module)
    with socket.socket(fileno=int(sys.argv[1])) as requests:
        request = serve(requests)
    if request is None:
        return
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    if "jax" in sys.modules:
        keep_compiled()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()  # Python's own generator does so itself
    place, *arguments = request["program"]
    if place == "-m":
        module, *sys.argv[1:] = arguments
        sys.path[0] = os.getcwd()
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv[:] = request["program"]
        sys.path[0] = str(Path(place).parent)
        runpy.run_path(place, run_name="__main__")


if __name__ == "__main__":
    main()
