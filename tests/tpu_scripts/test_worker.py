"""worker.sh for real, in a home directory for each worker."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from cloud_scripts import PLACE, SCRIPTS, Cloud

SR_DPO = """#!/bin/bash
echo "step $*"
trap 'echo saved; exit 75' TERM
while [ ! -f ~/go_on ]; do /bin/sleep 0.05; done
exit "$(cat ~/go_on)"
"""


NEEDED_ON_A_WORKER = ("flock", "setsid", "pkill", "mountpoint")


class Workers:
    """Two workers whose `sr-dpo` waits until a test gives it an exit code or it gets SIGTERM."""

    def __init__(self, cloud: Cloud):
        self.cloud, self.started = cloud, []
        cloud.has("pod", execute=True)
        self.homes = [cloud.root / f"pod-{index}" for index in range(2)]
        for home in self.homes:
            home.mkdir()
        cloud.run("setup.sh", *PLACE, f"--package={cloud.package}", f"--token-file={cloud.config}")
        for home in self.homes:
            (home / "sr_dpo" / "venv" / "bin").mkdir(parents=True)
            (home / "sr_dpo" / "venv" / "bin" / "sr-dpo").write_text(SR_DPO)
            (home / "sr_dpo" / "venv" / "bin" / "sr-dpo").chmod(0o755)
            (home / "sr_dpo" / "mount").write_text("")

    def launch(self, *overrides: str) -> subprocess.Popen:
        command = [SCRIPTS / "launch.sh", *PLACE, self.cloud.config, *overrides]
        process = subprocess.Popen(command, env=self.cloud.environment(), stderr=subprocess.PIPE, text=True)
        self.started.append(process)
        return process

    def wait_for_log(self, times: int = 1) -> None:
        deadline = time.monotonic() + 30
        while any(self.log(home).count("step") < times for home in self.homes):
            assert time.monotonic() < deadline, [self.log(home) for home in self.homes]
            time.sleep(0.02)

    def wait_for_watchers(self, number: int) -> None:
        """Returns once `number` commands wait on each worker for the end of its run."""
        deadline = time.monotonic() + 30
        while min(watchers(home) for home in self.homes) < number:
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def end(self, *codes: int) -> None:
        for home, code in zip(self.homes, codes, strict=True):
            (home / "go_on").write_text(str(code))

    def log(self, home: Path) -> str:
        file = home / "sr_dpo" / "run" / "log"
        return file.read_text() if file.exists() else ""


def watchers(home: Path) -> int:
    """Counts the commands that wait on this worker for the end of its run."""
    found = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            waits = (process / "cmdline").read_bytes() == b"flock\0sr_dpo/run/lock\0true\0"
            found += waits and (process / "cwd").readlink() == home
        except OSError:  # it has ended
            continue
    return found


@pytest.fixture
def workers(cloud):
    missing = [tool for tool in NEEDED_ON_A_WORKER if not shutil.which(tool)]
    if missing:
        pytest.skip(f"this machine lacks {missing}, which workers have")
    workers = Workers(cloud)
    yield workers
    workers.end(0, 0)
    for process in workers.started:
        process.communicate(timeout=30)


def test_setup_puts_the_scripts_there(workers):
    for home in workers.homes:
        assert (home / "sr_dpo" / "worker.sh").read_text() == (SCRIPTS / "worker.sh").read_text()
        assert (home / "sr_dpo" / workers.cloud.package.name).exists()
        assert (home / ".cache" / "huggingface" / "token").read_text() == workers.cloud.config.read_text()


def test_launch_ends_as_the_run_does(workers):
    launched = workers.launch("a.b=it's $HOME")
    workers.wait_for_log()
    workers.end(0, 75)
    _, said = launched.communicate(timeout=30)
    assert launched.returncode == 75 and "step" in said  # the end of the log of the worker that did not end well
    for home in workers.homes:
        (copy,) = (home / "sr_dpo").glob("config-*.yaml")
        assert copy.read_text() == workers.cloud.config.read_text()
        assert workers.log(home) == f"step train sr_dpo/{copy.name} distributed.processes=2 a.b=it's $HOME\n"


def test_a_broken_connection_leaves_the_run_alone_and_finds_it_again(workers):
    launched = workers.launch()
    workers.wait_for_log()
    call = workers.cloud.call("ssh run")
    launched.kill()
    for worker in range(2):  # what gcloud does when a connection breaks: the same command once more
        again = [*call[1:6], f"--worker={worker}", *[word for word in call[6:] if word != "--worker=all"]]
        again = subprocess.Popen(["gcloud", *again], env=workers.cloud.environment())
        workers.started.append(again)
    assert "running" in workers.cloud.run("status.sh", *PLACE).stdout
    other = workers.launch()  # and a new launch of the same command, as keep_running.sh does
    workers.wait_for_watchers(3)
    workers.end(75, 75)
    for process in workers.started[1:]:
        process.communicate(timeout=30)
        assert process.returncode == 75
    assert other.returncode == 75
    assert [workers.log(home).count("step") for home in workers.homes] == [1, 1]  # started once


def test_what_has_ended_is_not_started_by_a_late_repetition(workers):
    launched = workers.launch()
    workers.wait_for_log()
    workers.end(3, 3)
    launched.communicate(timeout=30)
    assert subprocess.run(workers.cloud.call("ssh run"), env=workers.cloud.environment()).returncode == 3
    assert [workers.log(home).count("step") for home in workers.homes] == [1, 1]


def test_the_next_launch_is_a_new_run(workers):
    for times, code in ((1, 75), (2, 0)):
        launched = workers.launch()
        workers.wait_for_log(times)
        workers.end(code, code)
        launched.communicate(timeout=30)
        assert launched.returncode == code
        for home in workers.homes:
            (home / "go_on").unlink()


def test_another_run_is_refused_while_one_is_alive(workers):
    workers.launch()
    workers.wait_for_log()
    other = workers.launch("seed=1")
    _, said = other.communicate(timeout=30)
    assert other.returncode == 1 and "another run is alive: sr_dpo/venv/bin/sr-dpo train" in said
    workers.cloud.config.write_text(workers.cloud.config.read_text() + "seed: 2\n")  # the same words, another content
    changed = workers.launch()
    changed.communicate(timeout=30)
    assert changed.returncode == 1


def test_stop_lets_it_save(workers):
    launched = workers.launch()
    workers.wait_for_log()
    assert workers.cloud.run("stop.sh", *PLACE).stdout.count("ended with 75  saved") == 2
    launched.communicate(timeout=30)
    assert launched.returncode == 75
    assert workers.cloud.run("status.sh", *PLACE).stdout.count("ended with 75  saved") == 2
    assert workers.cloud.run("stop.sh", *PLACE).stdout.count("ended with 75") == 2  # and nothing more to stop


def test_a_machine_that_goes_down_signals_everything(workers):
    """The process that records the exit code gets SIGTERM too, and records it all the same."""
    launched = workers.launch()
    workers.wait_for_log()
    for home in workers.homes:
        os.killpg(int((home / "sr_dpo" / "run" / "pid").read_text()), signal.SIGTERM)
    launched.communicate(timeout=30)
    assert launched.returncode == 75


def test_what_a_run_leaves_behind_does_not_hold_the_launch(workers):
    for home in workers.homes:
        command = home / "sr_dpo" / "venv" / "bin" / "sr-dpo"
        command.write_text("#!/bin/bash\necho step\n/bin/sleep 60 > /dev/null 2>&1 &\necho $! > ~/left_behind\n")
    launched = workers.launch()
    launched.communicate(timeout=50)
    assert launched.returncode == 0
    for home in workers.homes:
        os.kill(int((home / "left_behind").read_text()), signal.SIGKILL)  # raises if it has ended


def test_a_killed_run_is_an_error(workers):
    launched = workers.launch()
    workers.wait_for_log()
    for home in workers.homes:
        os.killpg(int((home / "sr_dpo" / "run" / "pid").read_text()), signal.SIGKILL)
    _, said = launched.communicate(timeout=30)
    assert launched.returncode == 1 and "the run was killed, and left no exit code" in said


def test_status_and_logs(workers):
    assert workers.cloud.run("status.sh", *PLACE).stdout.count("has run nothing") == 2
    workers.launch()
    workers.wait_for_log()
    assert workers.cloud.run("status.sh", *PLACE).stdout.count("running  step train") == 2
    assert workers.cloud.run("logs.sh", *PLACE, "--worker=1").stdout.startswith("step train")


def test_nothing_starts_while_the_shared_disk_is_missing(workers):
    (workers.homes[1] / "sr_dpo" / "mount").write_text(str(workers.homes[1]))  # a directory, and no mount
    for home in workers.homes[:1]:
        (home / "sr_dpo" / "mount").write_text("/proc")  # mounted
    workers.end(0, 0)
    launched = workers.launch()
    _, said = launched.communicate(timeout=30)
    assert launched.returncode == 1 and f"{workers.homes[1]}: is not mounted; run setup.sh again" in said
    assert workers.log(workers.homes[1]) == ""
