"""`import sr_dpo_jax` as a user's program does it: what is there, what it loads, and how it is typed."""

import subprocess
import sys

import pytest
from runs import REPOSITORY, make_config, model_directory, preference_file

import sr_dpo_jax

pytestmark = pytest.mark.usefixtures("same_programs")

USER = """
from pathlib import Path

import sr_dpo_jax
from sr_dpo_jax.config.schema import Config

config: Config = sr_dpo_jax.load_config("run.yaml", ["seed=1"])
code: int = sr_dpo_jax.train(config, allowed_changes=["seed"])
metrics: dict[str, float] = sr_dpo_jax.evaluate(config, best=True)
pairs: int = sr_dpo_jax.score(config, Path("scores.jsonl"))
sr_dpo_jax.export(Path("run"), Path("model"), dtype="bfloat16")
"""
WRONG = """
import sr_dpo_jax

sr_dpo_jax.load_config(3)
sr_dpo_jax.train("run.yaml")
sr_dpo_jax.losses.dpo(1.0, 0.1)
"""


def run(code: str) -> str:
    environment = {"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout


def test_importing_loads_no_jax():
    code = """if True:
        import sys
        import sr_dpo_jax
        assert set(sr_dpo_jax.__all__) <= set(dir(sr_dpo_jax))
        sr_dpo_jax.load_config
        assert callable(sr_dpo_jax.train)
        print("jax" in sys.modules, "flax" in sys.modules)
    """
    assert run(code) == "False False\n"


def test_every_name_is_the_function_that_the_command_calls(tmp_path):
    """`train` stays the function when the package of its name is imported, and the package stays a package."""
    from sr_dpo_jax.commands.evaluate import evaluate_command, score_command
    from sr_dpo_jax.commands.export import export
    from sr_dpo_jax.config.load import load_config
    from sr_dpo_jax.train import loop

    found = (sr_dpo_jax.evaluate, sr_dpo_jax.score, sr_dpo_jax.export, sr_dpo_jax.load_config)
    assert found == (evaluate_command, score_command, export, load_config)
    assert sr_dpo_jax.train.loop is loop and sr_dpo_jax.losses.__name__ == "sr_dpo_jax.losses"
    model, data = model_directory(tmp_path / "model"), preference_file(tmp_path / "pairs.jsonl", 16)
    sections = {"train": {"max_steps": 1}, "data": {"eval_path": str(data)}, "objective": {"name": "sft", "lam": None}}
    config = make_config(tmp_path, model, data, **sections)
    assert sr_dpo_jax.train(config) == 0
    assert sr_dpo_jax.evaluate(config)["step"] == 1
    assert sr_dpo_jax.score(config, tmp_path / "scores.jsonl") == 16


@pytest.mark.slow
def test_a_users_program_is_typed(tmp_path):
    for name, code in (("right.py", USER), ("wrong.py", WRONG)):
        (tmp_path / name).write_text(code, encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", str(tmp_path / "right.py")]
    # The cache of the lint step serves here too: libraries are not read again.
    done = subprocess.run(
        [*command, str(tmp_path / "wrong.py")], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "right.py" not in done.stdout, done.stdout
    assert done.stdout.count("wrong.py:") >= 3, done.stdout
