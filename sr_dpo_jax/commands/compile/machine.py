"""Gives libtpu's description of chips that are not there, to one process of this machine at a time."""

import contextlib
import fcntl
import logging
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.parallel.chips import chip_of

log = logging.getLogger(__name__)

WAIT_S = 5.0
LONGEST_WAIT_S = 3600.0
"""The longest wait for libtpu: a process that holds it for longer trains and does not compile."""
LIBTPU_LOCK = Path("/tmp/libtpu_lockfile")
"""The lock that libtpu makes, which its owner alone may open, and which it leaves behind."""
LIBTPU_IN_USE = threading.Event()
"""Set once this process has loaded libtpu."""
_kept: list[int] = []
"""The open lock file of a process that has loaded libtpu, until it ends."""


@contextlib.contextmanager
def only_one() -> Iterator[None]:
    """Waits until no other process of this machine compiles for TPUs: libtpu serves one process at a time.

    A trap: a process has libtpu until it ends. Did it let go of this lock before, another could take the lock and wait
    for libtpu, while this one waits for the lock to compile again.
    """
    if _kept:
        yield
        return
    path = Path(tempfile.gettempdir()) / "sr_dpo_jax_compile.lock"
    descriptor = _lock_file(path)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("another sr-dpo compile runs on this machine (%s); waiting for it", path)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        if LIBTPU_IN_USE.is_set():
            _kept.append(descriptor)
        else:
            os.close(descriptor)


def _lock_file(path: Path) -> int:
    """Opens the file, or makes it so that every user may read it: a lock needs no right to write.

    A trap: in a directory such as /tmp, Linux refuses O_CREAT on another user's file (`fs.protected_regular`), also
    where the file is there and could be opened without.
    """
    try:
        try:
            return os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            descriptor = os.open(path, os.O_RDONLY | os.O_CREAT, 0o644)
    except OSError as error:
        raise UsageError(f"{path}: cannot be opened ({error.strerror}); remove it, or set TMPDIR") from error
    with contextlib.suppress(PermissionError):  # another user was faster
        os.fchmod(descriptor, 0o644)  # whatever the umask
    return descriptor


def devices_of(topology: str, slices: int) -> Sequence[jax.Device]:
    """Describes the chips of a topology; waits while another process uses libtpu.

    Args:
      topology: one slice as jax names it, such as `v5p:4x4x4`.
      slices: the number of such slices.

    Returns:
      The devices of all slices together.

    Raises:
      UsageError: there is no such topology, or no libtpu, or it stays in use.
    """
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if topology.startswith("v4:"):
        options["chip_config_name"] = "megacore"  # one device a chip, as on pods; the default shows its two cores
    until = None
    while True:
        try:
            devices = topologies.get_topology_desc(topology_name=topology, platform="tpu", **options).devices
            LIBTPU_IN_USE.set()
            return devices
        except (jax.errors.JaxRuntimeError, RuntimeError, NotImplementedError, ValueError, ImportError) as error:
            text = str(error)
            if "already in use" not in text and "lockfile" not in text:
                if "libtpu" in text.lower() and "INVALID_ARGUMENT" not in text:
                    raise UsageError(f"libtpu cannot be loaded ({text}); pip install 'jax[tpu]'") from error
                raise UsageError(
                    f"--topology {topology}: {text}; give one as jax names them: v5e:4x4, v6e:2x4, v4:2x2x2, v5p:2x2x2"
                ) from error
            # "Internal error when accessing ... lockfile" comes too where another process is just letting go of it.
            if not _may_open(LIBTPU_LOCK):
                raise UsageError(
                    f"libtpu cannot take its lock, {LIBTPU_LOCK}, and waiting would not help: another user's process "
                    f"has it or has left it behind. Once none uses libtpu, remove the file. libtpu says: {text}"
                ) from error
            if until is None:
                until = time.monotonic() + LONGEST_WAIT_S
                log.warning(
                    f"another process on this machine uses libtpu; waiting for it, {LONGEST_WAIT_S / 60:.0f} minutes "
                    f"at most. libtpu says: {text}"
                )
            elif time.monotonic() > until:
                raise UsageError(
                    f"another process on this machine has used libtpu for {LONGEST_WAIT_S / 60:.0f} minutes; end it "
                    f"and try again. libtpu says: {text}"
                ) from error
        time.sleep(WAIT_S)


def _may_open(path: Path) -> bool:
    """Says whether this user can open a file as libtpu does; where there is none, libtpu makes it."""
    try:
        os.close(os.open(path, os.O_RDWR))
    except OSError as error:
        return isinstance(error, FileNotFoundError)
    return True


def hosts_of(devices: Sequence[jax.Device]) -> int:
    """Counts the machines that hold these chips on Cloud TPU, and so the processes of a run on them.

    A trap: libtpu describes every slice as hosts of four chips, but the TPU API gives a slice of eight chips of v5e or
    v6e (v5litepod-8 and v6e-8, topology 2x4) as one machine of eight, where a run that waited for a second process
    would wait for ever. GKE also has 2x4 of two machines with four chips each; there jobset.sh counts by --chips.
    """
    hosts: dict[int, set[int]] = {}
    for device in devices:
        hosts.setdefault(getattr(device, "slice_index", 0), set()).add(device.process_index)
    chips_a_slice = len(devices) // len(hosts)
    if chips_a_slice == chip_of(devices[0].device_kind).chips_a_host:
        return len(hosts)
    return sum(map(len, hosts.values()))
