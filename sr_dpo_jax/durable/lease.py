"""One run for each run directory: `lease.json` names the process that writes there, which touches it while it lives.
A file that a command writes for long has a lease too, `.NAME.lease` beside it.

The clocks of two machines are never compared. A lease of this machine is stale when its process is gone. A lease of
another machine is stale when its file is not touched while this process watches it for EXPIRY_S seconds: the successor
of a preempted machine waits that long, and a second run sees a touch and is refused.
"""

import contextlib
import json
import logging
import os
import secrets
import socket
import threading
import time
from pathlib import Path
from typing import Any, Self

from sr_dpo_jax.errors import RunError, UsageError

log = logging.getLogger(__name__)

NAME = "lease.json"
BEAT_S = 5.0
EXPIRY_S = 30.0
WATCH_S = 0.5
SETTLE_S = 0.2
"""The time after which two processes that created the lease at once see the same one."""


class Lease(contextlib.AbstractContextManager):
    """Holds `root/lease.json` from `take` to the end of the block.

    `filelock` has a lease too, but takes a living one over at once where two machines share a host name.

    Args:
      root: the directory.
      remedy: the other choice of one who is refused.
    """

    def __init__(self, root: Path, *, remedy: str = "choose another output_dir"):
        self._file, self._needed, self._remedy = root / NAME, True, remedy
        self._where, self._doing, self._what = self._file, "is running in this directory", "directory"
        self._content = json.dumps({**_this_process(), "token": secrets.token_hex(8)})
        self._stop, self._lost, self._gone, self._made_root = threading.Event(), False, False, not root.exists()
        self._thread: threading.Thread | None = None

    @classmethod
    def of_file(cls, output: Path, *, remedy: str = "name another --output") -> Self:
        """Makes the lease of a file that a command writes; a pipe or a device such as /dev/stdout needs none."""
        file = output.resolve()
        lease = cls(file.parent, remedy=remedy)
        lease._file, lease._needed = file.with_name(f".{file.name}.lease"), file.is_file() or not file.exists()
        lease._where, lease._doing, lease._what = output, f"is writing this file (says {lease._file})", "file"
        return lease

    def take(self) -> None:
        """Takes the lease; the directory exists.

        Raises:
          UsageError: another living process holds it.
        """
        if not self._needed:
            return
        while not self._created():
            self._displace()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join()
        if self._read() == self._content:
            self._file.unlink(missing_ok=True)
        if self._made_root:
            with contextlib.suppress(OSError):  # the directory is not empty: the run was started
                self._file.parent.rmdir()

    def check(self) -> None:
        """Raises RunError where this process stood still so long that another one took over."""
        if self._lost:
            reason = f"another run has taken this {self._what} over"
            if self._gone:
                reason = f"was removed while this run was writing to its {self._what}; start it again, and leave it be"
            raise RunError(f"{self._file}: {reason}; stopped without writing more")

    def _created(self) -> bool:
        """Writes the lease where there is none; False where there is one already, or another process came first.

        Mounted buckets have no links, and may let two processes create one name: the last to close it wins there. So
        the lease is read again after a while.
        """
        if not _create(self._file, self._content):
            return False
        time.sleep(SETTLE_S)
        return self._read() == self._content

    def _displace(self) -> None:
        """Moves a stale lease out of the way, returns where the lease is gone, and refuses a living one."""
        before = self._read()
        if before is None or not self._is_stale(before):
            return
        aside = self._file.with_name(f".{self._file.name.lstrip('.')}.{secrets.token_hex(8)}")
        try:
            self._file.rename(aside)
        except FileNotFoundError:
            return
        moved = aside.read_text(encoding="utf-8", errors="replace")
        if moved != before:  # another process took the stale lease over first, and this is its own: put it back
            _create(self._file, moved)
        aside.unlink()

    def _is_stale(self, content: str) -> bool:
        """Tells whether the process of a lease is dead; watches for EXPIRY_S where only the heartbeat can show it.

        Raises:
          UsageError: the process lives.
        """
        host, pid, started = _holder(content) or ("an unreadable lease", 0, "")
        process = f"process {pid} on {host.split()[0]}"
        alive = UsageError(f"{self._where}: {process} {self._doing}; wait for it, stop it, or {self._remedy}")
        this = _this_process()
        if host == this["host"]:
            if _started(pid) != started or pid == this["pid"]:
                return True
            raise alive
        log.info("%s: held by %s; waiting up to %.0f s for a sign of life", self._file, process, EXPIRY_S)
        watched_since = time.monotonic()
        try:
            touched = self._file.stat().st_mtime_ns
            while time.monotonic() - watched_since < EXPIRY_S:
                time.sleep(WATCH_S)
                if self._file.stat().st_mtime_ns != touched:
                    raise alive
        except FileNotFoundError:
            return False
        return True

    def _read(self) -> str | None:
        try:
            return self._file.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return None

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_S):
            try:
                if (found := self._read()) != self._content:
                    self._gone, self._lost = found is None, True
                    return
                os.utime(self._file)
            except OSError:  # the file system is away; if it stays so, another run takes over, which `_read` will show
                continue


def _create(file: Path, content: str) -> bool:
    """Writes a file that does not exist; False where it does."""
    try:
        with file.open("x", encoding="utf-8") as opened:
            opened.write(content)
    except FileExistsError:
        return False
    return True


def this_process() -> str:
    """Gives JSON by which `is_alive` knows this process again."""
    return json.dumps(_this_process())


def is_alive(content: str) -> bool | None:
    """Tells whether the process that wrote `this_process()` lives; None where that cannot be seen from here."""
    holder = _holder(content)
    if holder is None:
        return False
    host, pid, started = holder
    return _started(pid) == started if host == _this_process()["host"] else None


def _holder(content: str) -> tuple[str, int, str | None] | None:
    """Reads host, process id and start of a process that wrote them; None where they cannot be read."""
    try:
        holder: dict[str, Any] = json.loads(content)
        host, pid = str(holder["host"]), holder["pid"]
        # `in range` asks whatever is no integer to equal each of 2³¹ numbers, which takes minutes.
        possible = isinstance(pid, int) and pid in range(2**31)
        return (host, pid, holder["started"]) if host.split() and possible else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _this_process() -> dict[str, Any]:
    """Gives host, process id and start of this process.

    A host is a name, a boot id and a PID namespace: two machines may have one name, and a process of another container
    cannot be seen from here.
    """
    boot, space = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    marks = [boot.read_text().strip(), os.readlink(space)] if boot.exists() and space.exists() else []
    return {"host": " ".join([socket.gethostname(), *marks]), "pid": os.getpid(), "started": _started(os.getpid())}


def _started(pid: int) -> str | None:
    """Gives the start of a process of this machine, in ticks; "" where the system does not tell; None if it is gone."""
    stat = Path(f"/proc/{pid}/stat")
    if Path("/proc/self/stat").exists():
        try:
            state, *fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return None
        return None if state == "Z" else fields[18]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return ""
