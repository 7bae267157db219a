"""From a configuration to the objects of a run: what is read where, and what is compiled before the first step."""

import logging

import jax
import numpy as np
import pytest
from runs import make_config, model_directory, preference_file, tiny_setup

from sr_dpo_jax.durable.preemption import StopSignal
from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.train.loop import train
from sr_dpo_jax.train.prepare import prepare
from sr_dpo_jax.train.setup import read_held_out


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    for name, pairs in (("train", 24), ("held_out", 5), ("other", 7)):
        preference_file(root / f"{name}.jsonl", pairs, seed=len(name))
    model_directory(root / "model")
    return root


def sections(world):
    sets = {"other": {"path": str(world / "other.jsonl")}}
    return {"data": {"eval_path": str(world / "held_out.jsonl"), "eval_sets": sets}}


def test_the_reference_is_scored_and_held_out_sets_evaluated_with_one_program(world, tmp_path, caplog):
    """Two programs: the train step, and the scoring step for training pairs and two held-out sets."""
    setup, pairs, tokenizer = tiny_setup(tmp_path, world / "model", world / "train.jsonl", **sections(world))
    held_out = read_held_out(setup.config, tokenizer, setup.model.architecture)
    with StopSignal() as stop, jax.log_compiles(True), caplog.at_level(logging.WARNING, "jax"):
        job, state = prepare(setup, pairs, held_out, tokenizer=tokenizer, stop=stop, allowed_changes=())
        for held in job.held_out:
            held.scores(state.params)
    job.checkpoints.close()
    assert [held.name for held in job.held_out] == ["eval", "eval/other"]
    assert sum("Compiling jit(step)" in record.getMessage() for record in caplog.records) == 2
    assert int(state.step) == 0 and job.total_steps == 3


def test_parameters_are_those_of_the_latest_checkpoint_else_the_base(world, tmp_path):
    setup, _, _ = tiny_setup(tmp_path, world / "model", world / "train.jsonl")
    base, step = setup.latest_params()
    assert step == 0
    with pytest.raises(UsageError, match="there are"):
        setup.latest_params(best=True)
    config = make_config(tmp_path, world / "model", world / "train.jsonl", train={"max_steps": 1})
    assert train(config) == 0
    trained, step = setup.latest_params()
    assert step == 1
    moved = jax.tree.map(lambda one, other: np.abs(np.asarray(one) - np.asarray(other)).max(), base, trained)
    assert max(jax.tree.leaves(moved)) > 0


def test_p_is_read_where_two_responses_are_compared(world, tmp_path):
    for objective, has_p in (({"name": "dpo", "lam": None}, True), ({"name": "sft", "lam": None}, False)):
        _, pairs, _ = tiny_setup(tmp_path, world / "model", world / "train.jsonl", objective=objective)
        assert bool(len(pairs.augmentation)) == has_p
