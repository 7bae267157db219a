"""worker_setup.sh on a bare worker: installs the wheel and mounts the shared disk."""

import shutil
import subprocess
from pathlib import Path

import pytest
from cloud_scripts import SCRIPTS


class Bare:
    """A bare worker whose installers only record their arguments, and end with the codes given here."""

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
