"""On the real HH-RLHF pairs: the analytic first loss in every mode, and a whole epoch."""

import gzip
import json
import math

import pytest
from benchmarks import hh_run
from runs import HH_FILE, make_config, metrics_of, model_directory

from sr_dpo_jax.config.schema import PAPER_INSTRUCTION
from sr_dpo_jax.train.loop import train

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not HH_FILE.exists(), reason=f"REAL DATA IS ABSENT: {HH_FILE}"),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("hh")
    model = model_directory(root / "model", vocabulary_tokens=600, hidden_size=64)
    data = root / "pairs.jsonl"
    with gzip.open(HH_FILE) as rows:
        data.write_bytes(b"".join(row for _, row in zip(range(70), rows, strict=False)))
    return root, model, data


@pytest.mark.parametrize(("name", "mode", "dtype"), [("sr_dpo", "online", "float32"), ("sr_ipo", "cached", "bfloat16")])
def test_the_first_loss_is_analytic(world, tmp_path, name, mode, dtype):
    """ln 2 for Sr-DPO, 1/(4β²) = 25 for Sr-IPO, to six digits."""
    root, model, data = world
    config = make_config(
        tmp_path,
        model,
        data,
        cache_dir=str(root / "cache"),
        model={"dtype": dtype},
        data={"format": "hh_rlhf", "max_length": 256, "max_prompt_length": 128, "max_bad_rows": 2},
        objective={"name": name, "lam": 0.5},
        refinement={"prompt": PAPER_INSTRUCTION},
        reference={"mode": mode},
        batch={"pairs_per_step": 64, "row_length": 512},
        mesh={"fsdp": 8},
        train={"max_steps": 1},
    )
    assert train(config) == 0
    expected = math.log(2) if name == "sr_dpo" else 25.0
    assert metrics_of(config.output_dir)[0]["loss"] == pytest.approx(expected, rel=5e-6)


@pytest.mark.longest
def test_an_epoch_of_sr_dpo(tmp_path):
    """The benchmark's run at a smaller size: what the full size must show, without its 20 minutes."""
    result = hh_run.run(tmp_path, hidden=64, layers=2, overrides=("data.max_length=256", "data.max_prompt_length=128"))
    assert result.returncode == 0, result.stderr[-2000:]
    lines = metrics_of(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, 36))
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert sum(line["loss"] for line in lines[-5:]) / 5 < math.log(2)
    assert max(line["padding_fraction"] for line in lines) < 0.03
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert result.stderr.count("Finished XLA compilation of jit(step)") >= 1, "the count below can see compilations"
    assert hh_run.compiled_after_start(result.stderr) == 0
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert (manifest["pairs"], manifest["bad_rows"]) == (2303, 9)
