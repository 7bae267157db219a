"""tpu_scripts/ against a fake cloud (fake_cloud.py): what they call, in which order, and how they end."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "tpu_scripts"
SHELL_FILES = sorted(path.name for path in SCRIPTS.glob("*.sh"))
PLACE = ["--name=pod", "--zone=test-zone1-a", "--project=test-project"]
TPU = ["--accelerator-type=v5p-16", "--runtime-version=v2-alpha-tpuv5"]
GKE = ["--name=pod", "--image=an/image:1", "--accelerator=tpu-v6e-slice", "--topology=4x4", "--claim=a-claim"]
ROUND = ["create", "ssh mkdir", "scp", "ssh worker_setup", "scp", "ssh run"]


class Cloud:
    """A fake gcloud and kubectl, first on PATH, and what they have seen; and a sleep that takes no time."""

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
        self.sees()

    def sees(self, **world) -> None:
        plain = {"requests": [["ACTIVE"]], "launches": [], "fail": {}, "lost": {}, "gone": [], "hosts": 2}
        plain["node_state"] = "READY"
        (self.root / "world.json").write_text(json.dumps(plain | {"execute": False} | world))

    def has(self, *nodes: str, **world) -> None:
        """A queued resource is there already, and given."""
        self.sees(resource={"states": ["ACTIVE"], "nodes": nodes}, **world)

    def environment(self, **variables: str) -> dict[str, str]:
        path = f"{self.root}/bin{os.pathsep}{os.environ['PATH']}"
        return {**os.environ, "PATH": path, "FAKE_CLOUD": str(self.root), **variables}

    def run(self, script: str, *arguments, code: int = 0, **variables: str) -> subprocess.CompletedProcess:
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
        needed = [*PLACE, *TPU, "--tries=3", f"--package={self.package}", self.config]
        return self.run("keep_running.sh", *needed, *arguments, code=code)

    @property
    def calls(self) -> list[list[str]]:
        file = self.root / "calls.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    @property
    def steps(self) -> list[str]:
        """What was asked for, in order, without the questions."""
        return [step_of(call) for call in self.calls if "describe" not in call]

    @property
    def pauses(self) -> list[int]:
        """Seconds."""
        return [int(line) for line in (self.root / "pauses").read_text().splitlines()]

    def call(self, step: str) -> list[str]:
        """The first call of this kind."""
        return next(call for call in self.calls if step_of(call) == step)


def step_of(call: list[str]) -> str:
    if call[0] == "kubectl":
        return call[1]
    if call[4] != "ssh":
        return call[4]
    words = command_of(call)
    return "ssh " + (words[2] if words[1] == "sr_dpo/worker.sh" else Path(words[words[0] == "bash"]).stem)


def command_of(call: list[str]) -> list[str]:
    """The remote command, as the worker's shell understands it."""
    (command,) = [word.removeprefix("--command=") for word in call if word.startswith("--command=")]
    return shlex.split(command)


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path / "cloud")


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
    places = {"PACKAGE": str(cloud.package), "CONFIG": str(cloud.config)}
    return [re.sub("PACKAGE|CONFIG", lambda match: places[match[0]], argument) for argument in ALL[script]]


# The files


def test_every_script_is_in_these_tests():
    assert set(SHELL_FILES) == set(ALL) | {"common.sh", "worker.sh", "worker_setup.sh"}


@pytest.mark.parametrize("dialect", [["--shell=bash"], ["--shell=sh", "--exclude=SC3040"]], ids=["bash", "sh"])
def test_shellcheck(dialect):
    """As bash, and as plain sh but for pipefail."""
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert shellcheck, "shellcheck is missing; it comes with: pip install -e '.[test]'"
    command = [shellcheck, "--external-sources", "--source-path=SCRIPTDIR", "--severity=style", *dialect, *SHELL_FILES]
    done = subprocess.run(command, cwd=SCRIPTS, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("file", SHELL_FILES)
def test_form(file):
    source = (SCRIPTS / file).read_text(encoding="utf-8")
    lines = [line.strip() for line in source.splitlines()]
    code = [line for line in lines if line and not line.startswith("#")]
    assert len(code) <= (235 if file == "common.sh" else 50)
    assert max(map(len, source.splitlines())) <= 120
    assert subprocess.run(["bash", "-n", SCRIPTS / file]).returncode == 0
    if file != "common.sh":
        assert lines[0] == "#!/usr/bin/env bash" and os.access(SCRIPTS / file, os.X_OK)
        assert code[0] == "set -euo pipefail"


@pytest.mark.parametrize("script", ALL)
def test_help_names_every_option(cloud, script):
    text = cloud.run(script, "--help").stdout
    source = (SCRIPTS / script).read_text(encoding="utf-8")
    variables = re.search(r'^options ((?:"[^"]*"\s*\\?\s*)+)$', source, re.MULTILINE)[1].split('"')[1:6:2]
    for option in [*" ".join(variables).split(), "dry_run"]:
        assert f"--{option.replace('_', '-')}" in text, option
    assert cloud.calls == []


# Arguments


@pytest.mark.parametrize("script", ALL)
def test_dry_run_calls_nothing_and_prints_what_it_would(cloud, script):
    done = cloud.run(script, *arguments_of(cloud, script), "--dry-run")
    printed = [shlex.split(line[2:]) for line in done.stdout.splitlines() if line.startswith("+ ")]
    assert cloud.calls == []
    assert printed and {command[0] for command in printed} <= {"gcloud", "kubectl"}


@pytest.mark.parametrize("script", [script for script in ALL if script not in ("keep_running.sh", "jobset.sh")])
def test_dry_run_prints_the_real_commands(cloud, script):
    """They differ in the number of workers and in the clock only, and a real run may go on after them."""
    done = cloud.run(script, *arguments_of(cloud, script), "--dry-run")
    printed = [shlex.split(line[2:]) for line in done.stdout.splitlines() if line.startswith("+ ")]
    if script != "create.sh":
        cloud.has("pod", launches=[{"code": 0}])
    cloud.run(script, *arguments_of(cloud, script))

    def comparable(call):
        return [re.sub(r"processes=\w+|run \d+-\d+", "", word) for word in call]

    real = [comparable(call) for call in cloud.calls]
    assert [comparable(command) for command in printed] == real[: len(printed)]


@pytest.mark.parametrize(
    ("script", "argument", "said"),
    [
        ("create.sh", "--name=a pod", "--name: 'a pod'"),
        ("create.sh", "--name=-pod", "--name: '-pod'"),
        ("create.sh", "--name=Pod", "--name: 'Pod'"),
        ("create.sh", "--name=", "--name: ''"),
        ("create.sh", "--zone=$(date)", "--zone: '$(date)'"),
        ("create.sh", "--project=p;q", "--project: 'p;q'"),
        ("create.sh", "--slices=two", "--slices: 'two'"),
        ("create.sh", "--slices=0", "--slices: '0'"),
        ("create.sh", "--slices=08", "--slices: '08'"),
        ("create.sh", "--name zone=x", "--name zone: no such option"),
        ("create.sh", "--best-effort", "--best-effort: has no value, or is no option"),
        ("create.sh", "--bogus=1", "--bogus: no such option"),
        ("create.sh", "--reserved", "--spot, --reserved: exclude each other"),
        ("create.sh", "more", "'more': is not an option"),
        ("create.sh", "--zone=a\nb", "line break"),
        ("setup.sh", "--package=absent.whl", "--package: 'absent.whl'"),
        ("setup.sh", f"--package={__file__}", "is not a wheel"),
        ("setup.sh", "--share=a-bucket", "--share: 'a-bucket'"),
        ("setup.sh", "--share=gs://a/b", "--share: 'gs://a/b'"),
        ("setup.sh", "--mount=relative", "--mount: 'relative'"),
        ("setup.sh", "--mount=/mnt/../tmp", "--mount: '/mnt/../tmp'"),
        ("create.sh", f"--name={'a' * 64}", "is too long; a name has 63 letters at most"),
        ("jobset.sh", f"--name={'a' * 44}", "and -slice-job-0-3-xxxxx is appended to it"),
        ("jobset.sh", f"--namespace={'a' * 64}", "is too long"),
        ("launch.sh", "no_equals", "'no_equals': is not of the form section.key=value"),
        ("launch.sh", "distributed.processes=2", "distributed.processes=2: is set by this script"),
        ("launch.sh", "output_dir=gs://bucket/run", "'gs://bucket/run' is not below /mnt/sr_dpo"),
        ("launch.sh", "output_dir=runs/here", "'runs/here' is not below /mnt/sr_dpo"),
        ("launch.sh", "--mount=/mnt/other", "'/mnt/sr_dpo/run' is not below /mnt/other"),
        ("launch.sh", "output_dir=/mnt/sr_dpo/../../tmp/x", "'/mnt/sr_dpo/../../tmp/x' leads elsewhere"),
        ("launch.sh", "cache_dir=runs/cache", "cache_dir: 'runs/cache' is not below /mnt/sr_dpo"),
        ("launch.sh", "cache_dir=/mnt/sr_dpo/..", "cache_dir: '/mnt/sr_dpo/..' leads elsewhere"),
        ("launch.sh", "model.path=models/pythia", "model.path: 'models/pythia' is a directory"),
        ("launch.sh", "model.path=/home/me/model", "set model.path=/mnt/sr_dpo/MODEL"),
        ("launch.sh", "model.path=/mnt/sr_dpo/../model", "model.path: '/mnt/sr_dpo/../model' is a directory"),
        ("launch.sh", "model.path=./model", "model.path: './model' is a directory"),
        ("keep_running.sh", "cache_dir=runs/cache", "a new TPU would score the reference again"),
        ("jobset.sh", "cache_dir=runs/cache", "cache_dir: 'runs/cache' is not below"),
        ("jobset.sh", "model.path=models/pythia", "model.path: 'models/pythia' is a directory"),
        ("keep_running.sh", "output_dir=gs://bucket/run", "is not below /mnt/sr_dpo"),
        ("jobset.sh", "output_dir=gs://bucket/run", "is not below /mnt/sr_dpo"),
        ("jobset.sh", "--topology=4y4", "--topology: '4y4'"),
        ("jobset.sh", "--topology=16", "--topology: '16'"),
        ("jobset.sh", "--chips=3", "--chips: hosts of 3"),
        ("jobset.sh", "--image=a image", "--image: 'a image'"),
    ],
)
def test_bad_usage_ends_with_2_and_names_the_argument(cloud, script, argument, said):
    done = cloud.run(script, *arguments_of(cloud, script), argument, code=2)
    assert said in done.stderr and done.stderr.startswith(f"{script}: ")
    assert cloud.calls == []


@pytest.mark.parametrize("script", ALL)
def test_nothing_comes_from_the_environment(cloud, script):
    names = {name: "leaked" for name in ("name", "zone", "project", "package", "image", "mount", "dry_run", "words")}
    assert "--name: is missing" in cloud.run(script, code=2, **names).stderr


@pytest.mark.parametrize("script", ["launch.sh", "keep_running.sh", "jobset.sh"])
def test_config_must_be_there_and_on_the_shared_disk(cloud, script):
    *others, config = [word for word in arguments_of(cloud, script) if word != "mesh.replica=2"]
    assert "CONFIG: is missing" in cloud.run(script, *others, code=2).stderr
    assert "CONFIG: 'absent.yaml'" in cloud.run(script, *others, "absent.yaml", code=2).stderr
    Path(config).write_text("output_dir: 'gs://bucket/run'\n")
    assert "'gs://bucket/run' is not below" in cloud.run(script, *others, config, code=2).stderr
    assert cloud.calls == []


@pytest.mark.parametrize("script", ["launch.sh", "keep_running.sh", "jobset.sh"])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"output_dir": "/mnt/sr_dpo/run"}', "output_dir: stands in no plain line 'output_dir: PATH'"),
        ('"output_dir": /mnt/sr_dpo/run', "output_dir: stands in no plain line 'output_dir: PATH'"),
        ("seed: 1", "output_dir: stands in no plain line 'output_dir: PATH'"),
        ("output_dir: /mnt/sr_dpo/run\n'cache_dir': x", "cache_dir: stands in no plain line 'cache_dir: PATH'"),
        ("output_dir: /mnt/sr_dpo/run\ncache_dir: 'x' # of all", "cache_dir: 'x' is not below"),
        (
            "output_dir: /mnt/sr_dpo/run\nmodel:\n  # c\n\n  remat: none\n  path: 'a/b/c'\ndata:",
            "'a/b/c' is a directory",
        ),
        ("output_dir: /mnt/sr_dpo/run\nmodel: {remat: none, path: models/x}", "'models/x' is a directory"),
        ("output_dir: /mnt/sr_dpo/run\nmodel: {path: here}", "'here' is a directory"),
    ],
)
def test_what_the_workers_would_not_find_is_refused(cloud, script, text, said, monkeypatch):
    monkeypatch.chdir(cloud.root)
    (cloud.root / "here").mkdir()
    cloud.config.write_text(f"{text}\n")
    overrides = [word for word in arguments_of(cloud, script) if word != "mesh.replica=2"]
    assert said in cloud.run(script, *overrides, code=2).stderr
    assert cloud.calls == []


@pytest.mark.parametrize(
    "text",
    [
        "output_dir: /mnt/sr_dpo/run # no cache_dir\nmodel:\n  path: an-owner/a-model\ndata:\n  path: a/b/c",
        'output_dir: "/mnt/sr_dpo/run"\ncache_dir: null\nmodel: {path: gpt2}\ndata: {path: models/x}',
        "output_dir: /mnt/sr_dpo/run\ncache_dir: /mnt/sr_dpo/c\nmodel:\n  path: /mnt/sr_dpo/a/model # exported",
        "output_dir: /mnt/sr_dpo/run\ncache_dir: # none\nmodel:\n  remat: none",
    ],
)
def test_what_the_workers_find_passes(cloud, text):
    cloud.config.write_text(f"{text}\n")
    cloud.run("launch.sh", *PLACE, cloud.config, "--dry-run")


def test_a_model_in_the_image_passes(cloud):
    cloud.run("jobset.sh", *arguments_of(cloud, "jobset.sh"), "model.path=/models/in_the_image")


def test_the_overrides_of_the_page_are_what_the_configurations_need(cloud):
    page = (SCRIPTS / "README.md").read_text(encoding="utf-8")
    overrides = re.search(r"```text\n(.*?)```", page, re.DOTALL)[1].split()
    config = ROOT / "configs" / "pythia_2.8b_hh_sr_dpo.yaml"
    cloud.run("launch.sh", *PLACE, config, *overrides, "--dry-run")
    for override in overrides:
        others = [word for word in overrides if word != override]
        assert override.split("=")[0] in cloud.run("launch.sh", *PLACE, config, *others, code=2).stderr


def test_the_longest_name_of_a_job_set_passes(cloud):
    """JobSet's pods are NAME-slice-job-SLICE-HOST and five letters."""
    _, job_set = manifest_of(cloud, f"--name={'a' * 43}")
    assert len(f"{job_set['metadata']['name']}-slice-job-0-3-xxxxx") == 63


# Queued resources


def test_create_waits_until_it_is_given(cloud):
    cloud.sees(requests=[["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]])
    cloud.run("create.sh", *PLACE, *TPU, "--spot")
    assert cloud.steps == ["create"]
    place = ["--project=test-project", "--zone=test-zone1-a", "--quiet"]
    wanted = ["gcloud", "compute", "tpus", "queued-resources", "create", "pod", "--node-id=pod", *TPU, "--spot", *place]
    assert cloud.calls[1] == wanted


def test_create_asks_again_until_it_is_given(cloud):
    cloud.sees(requests=[["PROVISIONING", "FAILED"], ["WAITING_FOR_RESOURCES", "SUSPENDED"], ["ACTIVE"]])
    done = cloud.run("create.sh", *PLACE, *TPU, "--reserved")
    assert cloud.steps == ["create", "delete", "create", "delete", "create"]
    assert "--reserved" in cloud.calls[1] and done.stderr.count("there is no capacity") == 1
    assert re.findall("pod: (.*)", done.stderr) == [
        *("NONE", "PROVISIONING", "FAILED", "NONE", "WAITING_FOR_RESOURCES", "SUSPENDED", "NONE", "ACTIVE")
    ]


def test_create_leaves_alone_what_is_given(cloud):
    cloud.has("pod")
    cloud.run("create.sh", *PLACE, *TPU)
    assert cloud.steps == []


def test_create_gives_back_what_was_preempted_before_the_queue_says_so(cloud):
    cloud.has("pod", node_state="PREEMPTED", requests=[["FAILED"]])
    done = cloud.run("create.sh", *PLACE, *TPU, "--tries=1", code=1)  # the fake has no second request
    assert cloud.steps[:2] == ["delete", "create"]
    assert "pod: PREEMPTED" in done.stderr


def test_a_node_that_is_gone_is_preempted(cloud):
    cloud.has("pod", gone=["pod"])
    assert cloud.run("status.sh", *PLACE).stdout == "pod: PREEMPTED\n"


def test_a_request_whose_answer_was_lost_is_found(cloud):
    cloud.sees(requests=[["ACTIVE"]], lost={"queued-resources create": [1]})
    cloud.run("create.sh", *PLACE, *TPU)
    assert cloud.steps == ["create"]


def test_requests_that_always_fail_end_it(cloud):
    cloud.sees(requests=[["FAILED"]] * 9)
    done = cloud.run("create.sh", *PLACE, *TPU, "--tries=3", code=1)
    assert cloud.steps == ["create", "delete"] * 3
    assert (
        done.stderr.count("has failed: there is no capacity") == 3 and "3 requests in a row have failed" in done.stderr
    )


def test_a_preemption_between_forgives_failed_requests(cloud):
    cloud.sees(requests=[["FAILED"], ["SUSPENDED"], ["FAILED"], ["ACTIVE"]])
    cloud.run("create.sh", *PLACE, *TPU, "--tries=2")


def test_what_is_not_there_counts_as_deleted(cloud):
    done = cloud.run("delete.sh", *PLACE)
    assert done.stdout == "pod is not there\n" and "NOT_FOUND" not in done.stderr


@pytest.mark.parametrize("call", ["queued-resources create", "queued-resources describe", "queued-resources delete"])
def test_a_failing_gcloud_is_tried_again_a_few_times(cloud, call):
    cloud.sees(requests=[["FAILED"], ["ACTIVE"]], fail={call: [1, 1]})
    cloud.run("create.sh", *PLACE, *TPU, "--tries=3")
    cloud.sees(requests=[["FAILED"], ["ACTIVE"]], fail={call: [1, 1, 7]})
    done = cloud.run("create.sh", *PLACE, *TPU, "--tries=3", code=7)
    assert f"ERROR: {call}: told to fail" in done.stderr


def test_pauses_double_up_to_a_limit(cloud):
    cloud.sees(fail={"queued-resources create": [1] * 9})
    cloud.run("create.sh", *PLACE, *TPU, "--tries=8", "--poll-s=3", code=1)
    assert cloud.pauses == [3, 6, 12, 24, 48, 48, 48]


@pytest.mark.parametrize(
    ("script", "call"),
    [
        ("setup.sh", "tpu-vm ssh"),
        ("setup.sh", "tpu-vm scp"),
        ("launch.sh", "tpu-vm describe"),
        ("launch.sh", "tpu-vm scp"),
        ("launch.sh", "tpu-vm ssh"),
        ("status.sh", "queued-resources describe"),
        ("status.sh", "tpu-vm describe"),
        ("status.sh", "tpu-vm ssh"),
        ("logs.sh", "queued-resources describe"),
        ("logs.sh", "tpu-vm ssh"),
        ("stop.sh", "queued-resources describe"),
        ("stop.sh", "tpu-vm ssh"),
        ("delete.sh", "queued-resources delete"),
        ("jobset.sh", "kubectl"),
    ],
)
def test_no_failure_is_swallowed(cloud, script, call):
    cloud.has("pod", launches=[{"code": 0}], fail={call: [5] * 9})
    tries = ["--tries=1"] if script in ("setup.sh", "launch.sh") else []
    cloud.run(script, *arguments_of(cloud, script), *tries, code=5)


def test_several_slices(cloud):
    cloud.run("create.sh", *PLACE, *TPU, "--slices=3")
    assert {"--node-count=3", "--node-prefix=pod"} <= set(cloud.call("create"))
    cloud.has("pod-0", "pod-1", "pod-2", hosts=4, launches=[{"code": {"pod-0": 0, "pod-1": 0, "pod-2": 0}}])
    cloud.run("launch.sh", *PLACE, cloud.config, "mesh.replica=3")
    launched = [call for call in cloud.calls if step_of(call) == "ssh run"]
    assert sorted(call[5] for call in launched) == ["pod-0", "pod-1", "pod-2"]
    assert all("--worker=all" in call for call in launched)
    assert len({tuple(command_of(call)) for call in launched}) == 1  # one attempt, one command
    assert command_of(launched[0])[-2:] == ["distributed.processes=12", "mesh.replica=3"]
    cloud.run("logs.sh", *PLACE, "--slice=2", "--worker=1", "--lines=7")
    assert cloud.calls[-1][5:7] == ["pod-2", "--worker=1"] and command_of(cloud.calls[-1])[:3] == ["tail", "-n", "7"]
    assert "no slice 3" in cloud.run("logs.sh", *PLACE, "--slice=3", code=2).stderr


@pytest.mark.parametrize(
    ("codes", "ends"),
    [((0, 0), 0), ((75, 0), 75), ((1, 75), 75), ((255, 75), 75), ((75, 2), 2), ((2, 1), 2), ((0, 255), 255)],
)
def test_the_gravest_slice_decides(cloud, codes, ends):
    cloud.has("pod-0", "pod-1", launches=[{"code": {"pod-0": codes[0], "pod-1": codes[1]}}])
    cloud.run("launch.sh", *PLACE, cloud.config, code=ends)


def test_overrides_reach_the_worker_as_they_are(cloud):
    cloud.has("pod", launches=[{"code": 0}])
    overrides = ['data.path=[{path: a b, weight: 2}, "c"]', "refinement.prompt=it's $HOME `x` \\ *", "mesh.fsdp=-1"]
    cloud.run("launch.sh", *PLACE, "--processes=2", cloud.config, *overrides)
    assert command_of(cloud.call("ssh run"))[-4:] == ["distributed.processes=2", *overrides]


# The supervisor


def test_preempted_created_again_and_resumed(cloud):
    cloud.sees(
        requests=[["PROVISIONING", "ACTIVE"], ["ACTIVE"]],
        launches=[{"code": 75, "then": ["SUSPENDING", "SUSPENDED"]}, {"code": 0}],
    )
    done = cloud.keep_running("objective.lam=0.3")
    assert cloud.steps == [*ROUND, "delete", *ROUND]
    first, second = [command_of(call) for call in cloud.calls if step_of(call) == "ssh run"]
    assert first[4:] == second[4:] and first[-1] == "objective.lam=0.3"  # the same command
    assert first[3] != second[3]  # another attempt
    assert "preempted: the run ended with 75, pod is SUSPENDING" in done.stderr


def test_a_tpu_that_vanishes_without_75_is_a_preemption(cloud):
    """As often as it likes: more often than failures are borne."""
    gone = [{"code": 255, "then": ["SUSPENDED"]}] * 3
    cloud.sees(requests=[["ACTIVE"]] * 4, launches=[*gone, {"code": 0}])
    cloud.keep_running("--tries=2")
    assert cloud.steps == [*ROUND, *["delete", *ROUND] * 3]


def test_75_of_a_tpu_that_is_still_there_launches_again_on_it(cloud):
    cloud.sees(launches=[{"code": 75}, {"code": 0}])
    cloud.keep_running()
    assert cloud.steps == [*ROUND, *ROUND[1:]]


def test_bad_config_ends_at_once(cloud):
    cloud.sees(launches=[{"code": 2}])
    cloud.keep_running(code=2)
    assert cloud.steps == ROUND


def test_failures_are_borne_only_so_often(cloud):
    cloud.sees(launches=[{"code": 1}] * 9)
    done = cloud.keep_running(code=1)
    assert cloud.steps == [*ROUND, *ROUND[1:], *ROUND[1:]]
    assert "failed with 1, 2 of 3 times" in done.stderr
    assert cloud.pauses == [30, 30, 60]  # until it was given; after the first failure; after the second


def test_a_preemption_between_forgives_failures(cloud):
    cloud.sees(launches=[{"code": 1}, {"code": 75}, {"code": 1}, {"code": 0}])
    cloud.keep_running("--tries=2")


def test_a_tpu_that_is_never_given_ends_it(cloud):
    cloud.sees(fail={"queued-resources create": [1] * 99})
    cloud.keep_running(code=1)
    assert set(cloud.steps) == {"create"} and len(cloud.steps) == 9  # three rounds of three


@pytest.mark.parametrize(("code", "then"), [(0, 0), (2, 2)])
def test_delete_when_done(cloud, code, then):
    cloud.sees(launches=[{"code": code}])
    cloud.keep_running("--delete-when-done", code=then)
    assert cloud.steps == [*ROUND, "delete"]


def test_nothing_to_delete_delays_no_end(cloud):
    cloud.sees(fail={"queued-resources create": [2]})
    cloud.keep_running("--delete-when-done", code=2)
    assert cloud.steps == ["create", "delete"]
    assert not (cloud.root / "pauses").exists()


@pytest.mark.parametrize("code", [0, 2])
def test_a_failing_delete_is_warned_of_and_changes_no_exit_code(cloud, code):
    cloud.sees(launches=[{"code": code}], fail={"queued-resources delete": [1] * 9})
    done = cloud.keep_running("--delete-when-done", code=code)
    assert cloud.steps == [*ROUND, *["delete"] * 3]
    assert "--delete-when-done: pod could not be deleted and may still cost" in done.stderr


def test_a_node_that_is_gone_while_the_queue_says_active_is_a_preemption(cloud):
    """As often as it likes, as every other."""
    cloud.sees(requests=[["ACTIVE"]] * 4, launches=[*[{"code": 255, "gone": ["pod"]}] * 3, {"code": 0}])
    cloud.keep_running("--tries=2")
    assert cloud.steps == [*ROUND, *["delete", *ROUND] * 3]


def test_what_it_is_told_reaches_the_scripts(cloud):
    cloud.sees(launches=[{"code": {"pod-0": 0, "pod-1": 0}}])
    told = ["--slices=2", "--spot", "--service-account=a@b.c", "--valid-until-duration=6h", "--python=3.13"]
    more = ["--share=10.0.0.2:/runs", "--mount=/mnt/disk", f"--token-file={cloud.config}", "output_dir=/mnt/disk/run"]
    cloud.keep_running(*told, *more)
    assert {"--node-count=2", "--spot", *told[2:4]} <= set(cloud.call("create"))
    wheel = cloud.package.name
    assert command_of(cloud.call("ssh worker_setup"))[2:] == [wheel, "3.13", "10.0.0.2:/runs", "/mnt/disk"]
    assert any(call[4:8] == ["scp", str(cloud.config), "pod-1:.cache/huggingface/token", "--worker=all"]
               for call in cloud.calls)  # fmt: skip


def test_no_token_is_seen_anywhere(cloud):
    secret = "hf_" + "s" * 34
    token = cloud.root / "token"
    token.write_text(secret)
    for script in ALL:
        cloud.has("pod", launches=[{"code": 0}])
        extra = {
            "setup.sh": [f"--token-file={token}"],
            "keep_running.sh": [f"--token-file={token}"],
            "jobset.sh": ["--token-secret=a-secret"],
        }.get(script, [])
        for dry in ([], ["--dry-run"]):
            done = cloud.run(script, *arguments_of(cloud, script), *extra, *dry, HF_TOKEN=secret)
            assert secret not in done.stdout + done.stderr
    assert secret not in json.dumps(cloud.calls) + (cloud.root / "kubectl_input").read_text()


# The workers, for real: worker.sh runs in a home directory for each


SR_DPO = """#!/bin/bash
echo "step $*"
trap 'echo saved; exit 75' TERM
while [ ! -f ~/go_on ]; do /bin/sleep 0.05; done
exit "$(cat ~/go_on)"
"""


NEEDED_ON_A_WORKER = ("flock", "setsid", "pkill", "mountpoint")


class Workers:
    """Two workers with an `sr-dpo` that waits, until it is told its exit code or gets SIGTERM."""

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
        """Until so many commands wait on each worker for the end of its run."""
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
    """The keeper of the exit code gets SIGTERM too, and keeps it none the less."""
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


class Bare:
    """A bare worker: its installers only say what they are told, and fail when told to."""

    def __init__(self, root: Path, **codes: int):
        self.root = root
        (root / "sr_dpo").mkdir()
        (root / "bin").mkdir()
        for tool in ("uv", "sudo", "gcsfuse", "mount.nfs", "mountpoint"):
            code = codes.get(tool, int(tool == "mountpoint"))
            (root / "bin" / tool).write_text(f'#!/bin/sh\necho "{tool} $*" >> "$HOME/said"\nexit {code}\n')
            (root / "bin" / tool).chmod(0o755)

    def setup(self, *arguments: str, code: int = 0) -> str:
        environment = {"HOME": str(self.root), "PATH": f"{self.root}/bin:/usr/bin:/bin"}
        command = [SCRIPTS / "worker_setup.sh", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        return done.stderr

    @property
    def said(self) -> list[str]:
        return (self.root / "said").read_text().splitlines()


@pytest.mark.parametrize("failing", [{"uv": 2}, {"sudo": 100}])
def test_a_failing_installation_never_looks_like_bad_usage(tmp_path, failing):
    """uv ends with 2 and apt with 100; worker_setup.sh ends with 1, so that the supervisor tries again."""
    Bare(tmp_path, **failing).setup("x.whl", "3.12", "gs://a-bucket", "/mnt/disk", code=1)


def test_worker_setup_installs_the_wheel(tmp_path):
    bare = Bare(tmp_path)
    (tmp_path / ".cache" / "huggingface").mkdir(parents=True)
    (tmp_path / ".cache" / "huggingface" / "token").write_text("t")
    bare.setup("a b.whl", "3.12")
    assert bare.said == [
        "uv venv --quiet --python 3.12 sr_dpo/venv",
        "uv pip install --quiet --python sr_dpo/venv/bin/python --reinstall-package sr-dpo-jax "
        f"sr_dpo_jax[tpu] @ file://{tmp_path}/sr_dpo/a b.whl",
    ]
    assert (tmp_path / ".cache" / "huggingface" / "token").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "sr_dpo" / "mount").read_text() == ""


@pytest.mark.parametrize(
    ("share", "mounts"),
    [
        ("gs://a-bucket", "gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 "
                          "a-bucket /mnt/disk"),
        ("10.0.0.2:/runs", "sudo mount -t nfs -o lookupcache=positive 10.0.0.2:/runs /mnt/disk"),
    ],
)  # fmt: skip
def test_worker_setup_mounts_the_shared_disk(tmp_path, share, mounts):
    bare = Bare(tmp_path)
    bare.setup("x.whl", "3.12", share, "/mnt/disk")
    assert bare.said[:2] == ["mountpoint -q /mnt/disk", "sudo mkdir -p /mnt/disk"] and mounts in bare.said
    assert (tmp_path / "sr_dpo" / "mount").read_text() == "/mnt/disk"


def test_worker_setup_mounts_once(tmp_path):
    bare = Bare(tmp_path, mountpoint=0)
    bare.setup("x.whl", "3.12", "gs://a-bucket", "/mnt/disk")
    assert [line.split()[0] for line in bare.said] == ["mountpoint", "uv", "uv"]


def test_worker_setup_says_where_gcsfuse_is_missing(tmp_path):
    bare = Bare(tmp_path, sudo=0)
    (tmp_path / "bin" / "gcsfuse").unlink()
    (tmp_path / "bin" / "sudo").write_text('#!/bin/sh\n[ "$1" != apt-get ]\n')
    if shutil.which("gcsfuse", path="/usr/bin:/bin"):
        pytest.skip("gcsfuse is installed here")
    assert "gcsfuse: is not among" in bare.setup("x.whl", "3.12", "gs://a-bucket", "/mnt/disk", code=1)


# GKE


def manifest_of(cloud: Cloud, *arguments) -> tuple[dict, dict]:
    text = cloud.run("jobset.sh", *GKE, cloud.config, *arguments).stdout
    config_map, job_set = yaml.safe_load_all(text)
    return config_map, job_set


def job_of(job_set: dict) -> dict:
    (replicated,) = job_set["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


EVERYTHING = ["--slices=2", "--spot", "--queue=multislice-queue", "--service-account=an-account"]
EVERYTHING += ["--token-secret=a-secret", "--namespace=a-space", "--max-restarts=3"]


def check(document: dict) -> None:
    """Raises unless the document is valid as what it says it is."""
    schema = json.loads((ROOT / "tests" / "jobset_schema.json").read_text(encoding="utf-8"))
    kind = {"ConfigMap": "configMap", "JobSet": "jobSet"}[document["kind"]]
    jsonschema.Draft202012Validator({"$ref": f"#/$defs/{kind}", "$defs": schema["$defs"]}).validate(document)


@pytest.mark.parametrize("arguments", [[], EVERYTHING], ids=["least", "everything"])
def test_manifest_is_valid(cloud, arguments):
    for document in manifest_of(cloud, *arguments):
        check(document)


def test_schema_refuses_what_a_cluster_would(cloud):
    _, job_set = manifest_of(cloud)
    job, pod = job_of(job_set), job_of(job_set)["template"]["spec"]
    for place, key, value in [
        (job_set["spec"]["failurePolicy"], "maxRestart", 3),
        (job_set["spec"]["failurePolicy"]["rules"][0], "action", "RestartAll"),
        (job_set["spec"]["failurePolicy"]["rules"][0], "name", "bad-usage"),
        (job["podFailurePolicy"]["rules"][0]["onExitCodes"], "values", [0]),
        (job, "completions", "4"),
        (pod, "restartPolicy", "Always"),
        (pod["nodeSelector"], "cloud.google.com/gke-spot", True),
    ]:
        before = dict(place)
        place[key] = value
        with pytest.raises(jsonschema.ValidationError):
            check(job_set)
        place.clear()
        place.update(before)
    check(job_set)


def test_manifest_holds_together(cloud):
    """What the API server and the controllers ask for across fields."""
    config_map, job_set = manifest_of(cloud, *EVERYTHING)
    assert config_map["metadata"] == {"name": "pod", "namespace": "a-space"}
    assert job_set["metadata"]["namespace"] == "a-space"
    assert job_set["metadata"]["labels"] == {
        "kueue.x-k8s.io/queue-name": "multislice-queue",
        "xpk.google.com/workload": "pod",
    }
    assert job_set["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }
    assert job_set["spec"]["failurePolicy"]["maxRestarts"] == 3
    assert job_set["spec"]["replicatedJobs"][0]["replicas"] == 2
    job = job_of(job_set)
    assert job["completions"] == job["parallelism"] == 4 and job["completionMode"] == "Indexed"
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy is refused with another
    assert pod["hostNetwork"] and pod["dnsPolicy"] == "ClusterFirstWithHostNet"
    assert pod["serviceAccountName"] == "an-account"
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "4x4",
        "cloud.google.com/gke-spot": "true",
    }
    (main,) = pod["containers"]
    assert main["resources"]["limits"] == {"google.com/tpu": 4}
    assert main["command"] == ["sr-dpo"] and main["args"][-1] == "distributed.processes=8"
    assert {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "a-secret", "key": "token"}}} in main["env"]
    for rule in job["podFailurePolicy"]["rules"]:
        codes = rule.get("onExitCodes", {"values": [], "containerName": "main"})
        assert codes["containerName"] == main["name"] and codes["values"] == sorted(codes["values"])
    mounted = {mount["name"]: mount["mountPath"] for mount in main["volumeMounts"]}
    volumes = {volume.pop("name"): volume for volume in pod["volumes"]}
    assert mounted.keys() == volumes.keys()
    assert volumes["config"]["configMap"]["name"] == config_map["metadata"]["name"]
    assert volumes["share"]["persistentVolumeClaim"]["claimName"] == "a-claim"
    assert main["args"][1] == f"{mounted['config']}/{next(iter(config_map['data']))}"
    assert yaml.safe_load(config_map["data"]["config.yaml"])["output_dir"].startswith(mounted["share"] + "/")


def outcome(job_set: dict, code: int, *, disrupted: bool = False, others: tuple[int, ...] = ()) -> str:
    """What happens when the first pod of a slice ends so, by the rules of the Job and the JobSet controllers.

    The Job: the first podFailurePolicy rule that matches decides; FailJob fails it with reason PodFailurePolicy and a
    message of fixed form, and without a match backoffLimit 0 is exceeded. The JobSet: its rules in order, each over all
    failed Jobs; without a match, RestartJobSet. `others` are the codes of other slices.
    """
    job, failed = job_of(job_set), []
    for number, ended in enumerate((code, *others)):
        reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
        for index, rule in enumerate(job["podFailurePolicy"]["rules"]):
            codes = rule.get("onExitCodes")
            conditions = {(item["type"], item["status"]) for item in rule.get("onPodConditions", [])}
            end = f"matching {rule['action']} rule at index {index}"
            if codes and (ended in codes["values"]) == (codes["operator"] == "In"):
                message = (
                    f"Container main for pod default/pod-slice-job-{number}-0-x1y2z failed with exit code {ended} {end}"
                )
            elif disrupted and number == 0 and ("DisruptionTarget", "True") in conditions:
                message = f"Pod default/pod-slice-job-{number}-0-x1y2z has condition DisruptionTarget {end}"
            else:
                continue
            assert rule["action"] == "FailJob"
            reason = "PodFailurePolicy"
            break
        failed.append((reason, message))
    for rule in job_set["spec"]["failurePolicy"]["rules"]:
        for reason, message in failed:
            patterns = rule.get("onJobFailureMessagePatterns", [""])
            if reason in rule["onJobFailureReasons"] and any(re.search(pattern, message) for pattern in patterns):
                return rule["action"]
    return "RestartJobSet"


def test_restart_policy_understands_the_exit_codes(cloud):
    _, job_set = manifest_of(cloud)
    assert job_of(job_set)["backoffLimit"] == 0
    assert outcome(job_set, 75) == "RestartJobSetAndIgnoreMaxRestarts"
    assert outcome(job_set, 2) == "FailJobSet"
    for code in (1, 12, 22, 42, 127, 134, 137, 139, 143, 255):
        assert outcome(job_set, code) == "RestartJobSet"
    assert outcome(job_set, 137, disrupted=True) == "RestartJobSetAndIgnoreMaxRestarts"
    assert outcome(job_set, 75, disrupted=True) == "RestartJobSetAndIgnoreMaxRestarts"
    assert outcome(job_set, 75, others=(1,)) == "RestartJobSetAndIgnoreMaxRestarts"
    assert outcome(job_set, 75, others=(2,)) == "FailJobSet"


def test_preemptions_that_look_like_failures_do_not_end_it(cloud):
    """A pod whose node dies makes its peers fail, perhaps before it is marked; each such time counts."""
    _, job_set = manifest_of(cloud)
    assert outcome(job_set, 1, others=(1,)) == "RestartJobSet"
    assert job_set["spec"]["failurePolicy"]["maxRestarts"] == 100


def test_config_and_overrides_reach_the_pods_as_they_are(cloud):
    cloud.config.write_text(
        '  # indented, "quoted" and \\ {{NAME}} & |\noutput_dir: /mnt/sr_dpo/run\n\n\nlast: |\n  it\'s\n'
    )
    overrides = ['data.path=[{path: "a b"}]', "refinement.prompt=it's \\ & | {{NAME}} é", "mesh.fsdp=-1"]
    config_map, job_set = manifest_of(cloud, *overrides)
    assert config_map["data"]["config.yaml"] == cloud.config.read_text()
    (main,) = job_of(job_set)["template"]["spec"]["containers"]
    assert main["args"] == ["train", "/etc/sr_dpo/config.yaml", "distributed.processes=4", *overrides]


@pytest.mark.parametrize(
    ("topology", "chips", "hosts"), [("4x4", 4, 4), ("2x4", 8, 1), ("2x2x2", 4, 2), ("4x4x8", 4, 32), ("16x16", 4, 64)]
)
def test_hosts_of_a_slice(cloud, topology, chips, hosts):
    _, job_set = manifest_of(cloud, f"--topology={topology}", f"--chips={chips}")
    assert job_of(job_set)["completions"] == hosts
    assert job_of(job_set)["template"]["spec"]["containers"][0]["args"][2] == f"distributed.processes={hosts}"


def test_apply_hands_the_printed_manifest_to_kubectl(cloud):
    printed = cloud.run("jobset.sh", *GKE, cloud.config).stdout
    assert cloud.calls == []
    cloud.run("jobset.sh", *GKE, cloud.config, "--apply")
    assert cloud.calls == [["kubectl", "apply", "--filename=-"]]
    assert (cloud.root / "kubectl_input").read_text() == printed


# The page


def test_the_commands_of_the_page_work(cloud):
    """Every call of a script in README.md, with --dry-run."""
    page = (SCRIPTS / "README.md").read_text(encoding="utf-8")
    blocks = "".join(re.findall(r"```bash\n(.*?)```", page, re.DOTALL)).replace("\\\n", "")
    calls = [re.sub(r"\s+#.*", "", line) for line in blocks.splitlines() if line.startswith("tpu_scripts/")]
    assert {re.match(r"tpu_scripts/([a-z_]+\.sh)", call)[1] for call in calls} == set(ALL)
    names = re.findall(r"^(?:PROJECT|POD|TRAINER)=.*$", blocks, re.MULTILINE)
    (cloud.root / "tpu_scripts").symlink_to(SCRIPTS)
    for file in ("dist/sr_dpo_jax-0.1.0-py3-none-any.whl", "my_run.yaml"):
        (cloud.root / file).parent.mkdir(exist_ok=True)
        (cloud.root / file).write_text(re.search(r"```yaml\n(.*?)```", page, re.DOTALL)[1])
    for call in calls:
        command = "\n".join(["set -eu", *(name.split("  ")[0] for name in names), f"{call} --dry-run"])
        command = command.replace("IMAGE", "an/image").replace("CLAIM", "a-claim")
        done = subprocess.run(
            ["bash", "-c", command], cwd=cloud.root, env=cloud.environment(), capture_output=True, text=True
        )
        assert done.returncode == 0, call + done.stderr
    assert cloud.calls == []


def test_the_page_is_short():
    assert (SCRIPTS / "README.md").read_text(encoding="utf-8").count("\n") < 150
