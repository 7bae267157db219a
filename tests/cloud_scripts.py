"""Runs the scripts of tpu_scripts/ against a fake cloud (fake_cloud.py) and records what they called."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "tpu_scripts"
SHELL_FILES = sorted(path.name for path in SCRIPTS.glob("*.sh"))
PLACE = ["--name=pod", "--zone=test-zone1-a", "--project=test-project"]
TPU = ["--accelerator-type=v5p-16", "--runtime-version=v2-alpha-tpuv5"]
GKE = ["--name=pod", "--image=an/image:1", "--accelerator=tpu-v6e-slice", "--topology=4x4", "--claim=a-claim"]
ROUND = ["create", "ssh mkdir", "scp", "ssh worker_setup", "scp", "ssh run"]


class Cloud:
    """A fake gcloud and kubectl, first on PATH, which record their calls, and a sleep that takes no time.

    `root` is the directory of their state and records.
    """

    def __init__(self, root: Path):
        self.root = root
        (root / "bin").mkdir(parents=True)
        for tool in ("gcloud", "kubectl"):
            shim = root / "bin" / tool
            shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "{ROOT}/tests/fake_cloud.py" {tool} "$@"\n')
            shim.chmod(0o755)
        (root / "bin" / "sleep").write_text('#!/bin/sh\necho "$1" >> "$FAKE_CLOUD/pauses"\n')
        (root / "bin" / "sleep").chmod(0o755)
        self.package, self.config = root / "a package.whl", root / "a config.yaml"
        self.package.write_text("")
        self.config.write_text("output_dir: /mnt/sr_dpo/run\nmodel: {path: m}  # it's\n\ndata:\n  path: d\n")
        self.prepare()

    def prepare(self, **world) -> None:
        """Sets the state of the cloud (the keys are those of fake_cloud.py)."""
        plain = {"requests": [["ACTIVE"]], "launches": [], "fail": {}, "lost": {}, "gone": [], "hosts": 2}
        plain["node_state"] = "READY"
        (self.root / "world.json").write_text(json.dumps(plain | {"execute": False} | world))

    def has(self, *nodes: str, **world) -> None:
        """Sets a state in which a queued resource is there already, with these TPUs."""
        self.prepare(resource={"states": ["ACTIVE"], "nodes": nodes}, **world)

    def environment(self, **variables: str) -> dict[str, str]:
        """Gives the environment in which a script finds the fake tools."""
        path = f"{self.root}/bin{os.pathsep}{os.environ['PATH']}"
        return {**os.environ, "PATH": path, "FAKE_CLOUD": str(self.root), **variables}

    def run(self, script: str, *arguments, code: int = 0, **variables: str) -> subprocess.CompletedProcess:
        """Runs a script of tpu_scripts/ and asserts its exit code."""
        done = subprocess.run(
            [str(SCRIPTS / script), *map(str, arguments)],
            env=self.environment(**variables),
            capture_output=True,
            text=True,
            timeout=60,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done

    def keep_running(self, *arguments, code: int = 0) -> subprocess.CompletedProcess:
        """Runs the supervisor with what it needs and these arguments."""
        needed = [*PLACE, *TPU, "--tries=3", f"--package={self.package}", self.config]
        return self.run("keep_running.sh", *needed, *arguments, code=code)

    @property
    def calls(self) -> list[list[str]]:
        """Every call so far, in order, as its words."""
        file = self.root / "calls.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    @property
    def steps(self) -> list[str]:
        """The steps of all calls that change something, in order."""
        return [step_of(call) for call in self.calls if "describe" not in call]

    @property
    def pauses(self) -> list[int]:
        """The lengths of the pauses so far, in seconds."""
        return [int(line) for line in (self.root / "pauses").read_text().splitlines()]

    def call(self, step: str) -> list[str]:
        """Gives the first call of this step."""
        return next(call for call in self.calls if step_of(call) == step)


def step_of(call: list[str]) -> str:
    """Gives a call's verb; for ssh also the name of the remote command."""
    if call[0] == "kubectl":
        return call[1]
    if call[4] != "ssh":
        return call[4]
    words = command_of(call)
    return "ssh " + (words[2] if words[1] == "sr_dpo/worker.sh" else Path(words[words[0] == "bash"]).stem)


def command_of(call: list[str]) -> list[str]:
    """Gives the words of the remote command as the worker's shell splits them."""
    (command,) = [word.removeprefix("--command=") for word in call if word.startswith("--command=")]
    return shlex.split(command)


ALL = {
    "create.sh": [*PLACE, *TPU, "--spot"],
    "setup.sh": [*PLACE, "--package=PACKAGE", "--share=gs://a-bucket", "--token-file=CONFIG"],
    "launch.sh": [*PLACE, "CONFIG", "mesh.replica=2"],
    "status.sh": PLACE,
    "logs.sh": [*PLACE, "--follow"],
    "stop.sh": PLACE,
    "delete.sh": PLACE,
    "keep_running.sh": [*PLACE, *TPU, "--package=PACKAGE", "--delete-when-done", "CONFIG"],
    "jobset.sh": [*GKE, "--apply", "CONFIG"],
}


def arguments_of(cloud: Cloud, script: str) -> list[str]:
    """Gives arguments with which a script does all it can."""
    places = {"PACKAGE": str(cloud.package), "CONFIG": str(cloud.config)}
    return [re.sub("PACKAGE|CONFIG", lambda match: places[match[0]], argument) for argument in ALL[script]]


def manifest_of(cloud: Cloud, *arguments) -> tuple[dict, dict]:
    """Gives the ConfigMap and the JobSet that jobset.sh prints."""
    text = cloud.run("jobset.sh", *GKE, cloud.config, *arguments).stdout
    config_map, job_set = yaml.safe_load_all(text)
    return config_map, job_set


def job_of(job_set: dict) -> dict:
    """Gives the specification of the JobSet's one Job template."""
    (replicated,) = job_set["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]
