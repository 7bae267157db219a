"""From a configuration to the objects of a run: what is read where."""

import shutil

import jax
import numpy as np
import pytest
from runs import make_config, model_directory, preference_file, tiny_setup

from sr_dpo_jax.durable import checkpoint
from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.train import setup
from sr_dpo_jax.train.loop import train

pytestmark = pytest.mark.usefixtures("same_programs")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    preference_file(root / "train.jsonl", 24, seed=5)
    model_directory(root / "model")
    return root


def test_parameters_are_those_of_the_latest_checkpoint_else_the_base(world, tmp_path):
    made, _, _ = tiny_setup(tmp_path, world / "model", world / "train.jsonl")
    base, step = made.latest_params()
    assert step == 0
    with pytest.raises(UsageError, match="there are"):
        made.latest_params(best=True)
    config = make_config(tmp_path, world / "model", world / "train.jsonl", train={"max_steps": 1})
    assert train(config) == 0
    trained, step = made.latest_params()
    assert step == 1
    moved = jax.tree.map(lambda one, other: np.abs(np.asarray(one) - np.asarray(other)).max(), base, trained)
    assert max(jax.tree.leaves(moved)) > 0


def test_processes_agree_on_the_checkpoint_that_they_read(world, tmp_path, monkeypatch):
    """Each may have an output_dir of its own: on one there is no checkpoint, or one of another run."""
    made, compared = tiny_setup(tmp_path, world / "model", world / "train.jsonl")[0], []
    config = make_config(tmp_path, world / "model", world / "train.jsonl", train={"max_steps": 1})
    assert train(config) == 0
    monkeypatch.setattr(setup, "require_same", compared.append)
    made.latest_params()
    ((name, _),) = compared[0].items()
    assert name == str(tmp_path / "run" / "checkpoints" / "1")
    shutil.rmtree(tmp_path / "run")
    monkeypatch.setattr(setup, "largest", lambda value: True)  # as where process 0 has checkpoints
    monkeypatch.setattr(checkpoint, "largest", lambda value: True)
    with pytest.raises(UsageError, match="none of the checkpoints"):
        made.latest_params()


def test_p_is_read_where_two_responses_are_compared(world, tmp_path):
    for objective, has_p in (({"name": "dpo", "lam": None}, True), ({"name": "sft", "lam": None}, False)):
        _, pairs, _ = tiny_setup(tmp_path, world / "model", world / "train.jsonl", objective=objective)
        assert bool(len(pairs.augmentation)) == has_p
