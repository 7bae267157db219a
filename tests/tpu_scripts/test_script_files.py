"""The scripts as files, and their page: form, --help, and commands of README.md that work."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cloud_scripts import ALL, PLACE, ROOT, SCRIPTS, SHELL_FILES


def test_every_script_is_in_these_tests():
    assert set(SHELL_FILES) == set(ALL) | {"common.sh", "worker.sh", "worker_setup.sh"}


@pytest.mark.parametrize("dialect", [["--shell=bash"], ["--shell=sh", "--exclude=SC3040"]], ids=["bash", "sh"])
def test_shellcheck(dialect):
    """The scripts pass as bash, and as plain sh except for pipefail."""
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


def test_the_overrides_of_the_page_are_what_the_configurations_need(cloud):
    page = (SCRIPTS / "README.md").read_text(encoding="utf-8")
    overrides = re.search(r"```text\n(.*?)```", page, re.DOTALL)[1].split()
    config = ROOT / "configs" / "pythia_2.8b_hh_sr_dpo.yaml"
    cloud.run("launch.sh", *PLACE, config, *overrides, "--dry-run")
    for override in overrides:
        others = [word for word in overrides if word != override]
        assert override.split("=")[0] in cloud.run("launch.sh", *PLACE, config, *others, code=2).stderr


def test_the_commands_of_the_page_work(cloud):
    """Every call of a script in README.md passes with --dry-run."""
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
