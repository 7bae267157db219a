"""The documented script of every command, run as it is."""

import json
import os
import subprocess
import sys

import pytest
from runs import REPOSITORY, metrics_of

pytestmark = pytest.mark.slow


def test_every_command_end_to_end(tmp_path):
    environment = {**os.environ, "SR_DPO": f"{sys.executable} -m sr_dpo_jax.cli", "PYTHON": sys.executable}
    environment |= {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
    environment = {name: value for name, value in environment.items() if not name.startswith("OPENAI_")}
    script = REPOSITORY / "tests" / "every_command.sh"
    result = subprocess.run(
        ["bash", str(script), str(tmp_path)], env=environment, capture_output=True, text=True, check=False, timeout=1500
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]

    steps = [line["step"] for line in metrics_of(tmp_path / "runs" / "sr_dpo") if "loss" in line]
    assert steps == list(range(1, len(steps) + 1)), "killed twice, every step stands there once"
    assert len((tmp_path / "scores.jsonl").read_text().splitlines()) > 150
    judged = json.loads((tmp_path / "judged.json").read_text())["total"]["shares"]
    assert sum(judged[outcome]["value"] for outcome in ("win", "tie", "lose")) == pytest.approx(1)
    assert 0 <= json.loads((tmp_path / "harness.json").read_text())["results"]["held_out"]["acc,none"] <= 1
    page = (tmp_path / "report.html").read_text()
    assert all(f"runs/{name}" in page or f">{name}<" in page for name in ("sft", "dpo", "sr_dpo"))
    assert (tmp_path / "sr_dpo-model" / "model.safetensors").is_file()
