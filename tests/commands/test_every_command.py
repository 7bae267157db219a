"""The documented script of every command, run as it is."""

import importlib.util
import json
import os
import subprocess
import sys

import every_command_world
import pytest
from benchmarks import hh_run
from runs import REPOSITORY, metrics_of

from sr_dpo_jax.data.rows import Pair, read_rows
from sr_dpo_jax.data.tokens import load_tokenizer


def test_the_world_is_made_without_the_real_pairs(tmp_path, monkeypatch):
    for module in (every_command_world, hh_run):
        monkeypatch.setattr(module, "HH_FILE", tmp_path / "absent.jsonl.gz")
    monkeypatch.setattr(sys, "argv", ["every_command_world.py", str(tmp_path)])
    every_command_world.main()
    tokenizer = load_tokenizer(str(tmp_path / "base"))
    for name, count in (("train", 96), ("held_out", 24), ("other", 24)):
        pairs = list(read_rows(str(tmp_path / f"{name}.jsonl"), format="hh_rlhf", split="train"))
        assert len(pairs) == count and all(isinstance(pair, Pair) for pair in pairs)
    vocabulary = json.loads((tmp_path / "base" / "config.json").read_text())["vocab_size"]
    assert max(tokenizer.encode(pairs[0].prompt)) < len(tokenizer) <= vocabulary


@pytest.mark.slow
@pytest.mark.longest
def test_every_command_end_to_end(tmp_path):
    environment = {**os.environ, "SR_DPO": f"{sys.executable} -m sr_dpo_jax.cli", "PYTHON": sys.executable}
    environment |= {"PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
    # Another process may have libtpu loaded: CI compiles for TPUs beside this test.
    environment |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TMPDIR": str(tmp_path)}
    environment["XLA_FLAGS"] = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")  # as on a laptop
    environment = {name: value for name, value in environment.items() if not name.startswith("OPENAI_")}
    script = REPOSITORY / "tests" / "every_command.sh"
    result = subprocess.run(
        ["bash", str(script), str(tmp_path)], env=environment, capture_output=True, text=True, check=False, timeout=1500
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]

    steps = [line["step"] for line in metrics_of(tmp_path / "runs" / "sr_dpo") if "loss" in line]
    assert steps == list(range(1, len(steps) + 1)), "killed twice, every step stands there once"
    assert len((tmp_path / "scores.jsonl").read_text().splitlines()) > 80
    judged = json.loads((tmp_path / "judged.json").read_text())["total"]["shares"]
    assert sum(judged[outcome]["value"] for outcome in ("win", "tie", "lose")) == pytest.approx(1)
    if importlib.util.find_spec("lm_eval"):
        assert 0 <= json.loads((tmp_path / "harness.json").read_text())["results"]["held_out"]["acc,none"] <= 1
    else:
        assert "LEFT OUT: the extra eval is not installed" in result.stdout
    assert "the slope of the labels on the contrast is" in result.stdout
    compared = (tmp_path / "runs" / "compare" / "compare" / "compare.md").read_text()
    assert "refinement.judge=reference | 0.1 | auto: " in compared
    page = (tmp_path / "report.html").read_text()
    assert all(f"runs/{name}" in page or f">{name}<" in page for name in ("sft", "dpo", "sr_dpo"))
    assert (tmp_path / "sr_dpo-model" / "model.safetensors").is_file()
