"""The lease of a run directory: when it is stale, when it is respected, and that one of many gets it."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sr_dpo_jax.durable import lease as leases
from sr_dpo_jax.durable.lease import Lease
from sr_dpo_jax.errors import RunError, UsageError


class Held:
    """A lease that somebody else holds, as a file."""

    def __init__(self, root, **fields):
        self.file = root / "lease.json"
        content = {"host": "elsewhere boot pid", "pid": 1, "started": "1", "token": "theirs", **fields}
        self.file.write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture
def quick_lease(monkeypatch):
    monkeypatch.setattr(leases, "BEAT_S", 0.05)
    monkeypatch.setattr(leases, "EXPIRY_S", 0.6)
    monkeypatch.setattr(leases, "WATCH_S", 0.05)


def test_p2_the_lease_of_another_host_is_taken_when_nobody_touches_it(tmp_path, quick_lease):
    Held(tmp_path)
    since = time.monotonic()
    with Lease(tmp_path) as lease:
        lease.take()
        assert time.monotonic() - since >= 0.6
        lease.check()
    assert list(tmp_path.iterdir()) == [], "given back"


def test_p2_the_lease_of_another_host_is_respected_while_it_is_touched(tmp_path, quick_lease):
    """Whatever the clocks say: the other host's is a year behind."""
    held, stop = Held(tmp_path), threading.Event()

    def beat():
        now = 1_000_000_000
        while not stop.wait(0.1):
            now += 1
            os.utime(held.file, (now, now))

    beating = threading.Thread(target=beat)
    beating.start()
    try:
        with Lease(tmp_path) as lease, pytest.raises(UsageError, match=r"process 1 on elsewhere is running"):
            lease.take()
    finally:
        stop.set()
        beating.join()
    assert json.loads(held.file.read_text())["token"] == "theirs"


def test_p2_a_lease_of_this_host_tells_by_its_process(tmp_path, quick_lease):
    this = leases._this_process()
    Held(tmp_path, host=this["host"], pid=os.getppid(), started=leases._started(os.getppid()))
    with Lease(tmp_path) as lease, pytest.raises(UsageError, match="is running in this directory"):
        lease.take()
    Held(tmp_path, host=this["host"], pid=os.getppid(), started="a process before it with the same number")
    with Lease(tmp_path) as lease:
        lease.take()
    Held(tmp_path).file.write_text("{half", encoding="utf-8")
    with Lease(tmp_path) as lease:
        lease.take()


def test_p2_a_lease_needs_no_links(tmp_path, quick_lease, monkeypatch):
    """A bucket that is mounted with gcsfuse has none; a stale lease is taken over, a living one respected."""

    def fail(*_, **__):
        raise OSError(95, "Operation not supported")

    for name in ("link", "symlink"):
        monkeypatch.setattr(os, name, fail)
    Held(tmp_path)
    with Lease(tmp_path) as lease:
        lease._content = json.dumps({**json.loads(lease._content), "host": "host2 b p"})
        lease.take()
        with pytest.raises(UsageError, match="on host2 is running in this directory"):
            Lease(tmp_path).take()
    assert list(tmp_path.iterdir()) == []


def test_p2_two_that_a_bucket_lets_create_one_name_agree_on_the_last(tmp_path, quick_lease, monkeypatch):
    """The first has created it; before it looks again the second's content stands there."""
    lease, sleep = Lease(tmp_path), time.sleep

    def overwritten(seconds):
        if seconds == leases.SETTLE_S:
            Held(tmp_path, host=leases._this_process()["host"], pid=os.getppid(), started=leases._started(os.getppid()))
        sleep(seconds)

    monkeypatch.setattr(time, "sleep", overwritten)
    with lease, pytest.raises(UsageError, match="is running in this directory"):
        lease.take()


@pytest.mark.parametrize(
    "content",
    [
        *(b"\xff\xfe{", b"", b'{"host": 7}', b"[" * 100_000, b'{"host": " ", "pid": 1, "started": ""}'),
        *(json.dumps({**leases._this_process(), "pid": pid}).encode() for pid in ("\0", "9" * 5000, 10**40)),
    ],
)
def test_p2_a_damaged_lease_stops_no_run(tmp_path, quick_lease, content):
    (tmp_path / "lease.json").write_bytes(content)
    with Lease(tmp_path) as lease:
        lease.take()
        lease.check()


def test_p2_a_run_whose_lease_was_taken_over_stops(tmp_path, quick_lease):
    with Lease(tmp_path) as lease:
        lease.take()
        Held(tmp_path)
        deadline = time.monotonic() + 5
        with pytest.raises(RunError, match="taken this directory over"):
            while time.monotonic() < deadline:
                lease.check()
                time.sleep(0.02)
    assert (tmp_path / "lease.json").exists(), "it is the other's"


def test_p2_of_many_runs_that_find_a_stale_lease_one_gets_it(tmp_path, quick_lease):
    Held(tmp_path)
    winners, refused, taken = [], [], [Lease(tmp_path) for _ in range(8)]
    for lease in taken:  # in one process they would know each other's process id as their own
        lease._content = json.dumps({**json.loads(lease._content), "host": f"host{id(lease)} b p"})

    def take(lease):
        try:
            lease.take()
            winners.append(lease)
        except UsageError:
            refused.append(lease)

    threads = [threading.Thread(target=take, args=(lease,)) for lease in taken]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(winners), len(refused)) == (1, 7)
    winners[0].check()
    winners[0].__exit__(None, None, None)


def test_p2_a_lease_that_another_run_took_meanwhile_is_put_back(tmp_path, monkeypatch):
    """The stale lease is read, the other run replaces it, and only then is it moved aside."""
    Held(tmp_path)
    seen = []

    def is_stale(_lease, content):
        seen.append(json.loads(content)["token"])
        if seen == ["theirs"]:
            Held(tmp_path, token="another run")
            return True
        raise UsageError("it lives")

    monkeypatch.setattr(Lease, "_is_stale", is_stale)
    with Lease(tmp_path) as lease, pytest.raises(UsageError, match="it lives"):
        lease.take()
    assert seen == ["theirs", "another run"]
    assert json.loads((tmp_path / "lease.json").read_text())["token"] == "another run"
    assert [path.name for path in tmp_path.iterdir()] == ["lease.json"]


def test_p2_a_file_has_a_lease_beside_it(tmp_path, quick_lease):
    """The second is told of file, process and remedy; a process that is gone holds nothing; a device needs none."""
    output = tmp_path / "100% out.jsonl"
    (tmp_path / "link.jsonl").symlink_to(output)
    with Lease.of_file(output) as lease:
        lease.take()
        content = json.loads((tmp_path / ".100% out.jsonl.lease").read_text())
        other = tmp_path / ".100% out.jsonl.lease"
        other.write_text(json.dumps(content | {"pid": os.getppid(), "started": leases._started(os.getppid())}))
        for name in (output, tmp_path / "link.jsonl"):
            with pytest.raises(UsageError) as refused:
                Lease.of_file(name).take()
            said = str(refused.value)
            assert said.startswith(f"{name}: process {os.getppid()} on ") and "is writing this file" in said
            assert "wait for it, stop it, or name another --output" in said
        other.write_text(json.dumps(content | {"pid": os.getppid(), "started": "before"}))
        with Lease.of_file(output) as second:
            second.take()
            deadline = time.monotonic() + 5
            with pytest.raises(RunError, match="taken this file over"):
                while time.monotonic() < deadline:
                    lease.check()
                    time.sleep(0.02)
    with Lease.of_file(Path("/dev/null")) as lease:
        lease.take()
        lease.check()
    assert [path.name for path in tmp_path.iterdir()] == ["link.jsonl"], "given back"


def test_p5_a_lease_that_was_removed_is_told_from_one_that_another_run_took(tmp_path, quick_lease):
    with Lease(tmp_path) as lease:
        lease.take()
        (tmp_path / "lease.json").unlink()
        deadline = time.monotonic() + 5
        with pytest.raises(RunError, match="was removed while this run was writing to its directory"):
            while time.monotonic() < deadline:
                lease.check()
                time.sleep(0.02)


def test_a_directory_that_only_the_lease_made_is_removed_with_it(tmp_path):
    """A start that is refused before the run has written anything leaves nothing behind."""
    root = tmp_path / "run"
    with Lease(root) as lease:
        root.mkdir()
        lease.take()
        assert [path.name for path in root.iterdir()] == ["lease.json"]
    assert not root.exists()
    with Lease(root) as lease:
        root.mkdir()
        lease.take()
        (root / "config.yaml").write_text("a: 1")
    assert [path.name for path in root.iterdir()] == ["config.yaml"]


def test_a_process_that_is_gone_or_a_zombie_holds_nothing():
    process = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    process.stdout.read()  # until it ends; it is not waited for yet
    deadline = time.monotonic() + 5
    while leases._started(process.pid) is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert leases._started(process.pid) is None, "a zombie"
    process.wait()
    assert leases._started(process.pid) is None
    assert leases._started(os.getpid()) == leases._this_process()["started"]


@pytest.mark.parametrize("mark", [1, 2], ids=["another boot", "another container"])
def test_p2_a_machine_of_the_same_name_is_another_one(tmp_path, quick_lease, mark):
    """The process id means nothing here, so only the heartbeat can tell and the lease is watched."""
    host = leases._this_process()["host"].split()
    host[mark] = "other"
    Held(tmp_path, host=" ".join(host), pid=os.getpid(), started="1")
    since = time.monotonic()
    with Lease(tmp_path) as lease:
        lease.take()
    assert time.monotonic() - since >= leases.EXPIRY_S
