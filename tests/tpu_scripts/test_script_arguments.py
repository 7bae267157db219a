"""What the scripts take and refuse, and --dry-run."""

import json
import re
import shlex
from pathlib import Path

import pytest
from cloud_scripts import ALL, PLACE, arguments_of


@pytest.mark.parametrize("script", ALL)
def test_dry_run_calls_nothing_and_prints_what_it_would(cloud, script):
    done = cloud.run(script, *arguments_of(cloud, script), "--dry-run")
    printed = [shlex.split(line[2:]) for line in done.stdout.splitlines() if line.startswith("+ ")]
    assert cloud.calls == []
    assert printed and {command[0] for command in printed} <= {"gcloud", "kubectl"}


@pytest.mark.parametrize("script", [script for script in ALL if script not in ("keep_running.sh", "jobset.sh")])
def test_dry_run_prints_the_real_commands(cloud, script):
    """They differ only in the number of workers and in the time; a real run may make further calls after them."""
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
