"""The first step prepared: what is scored and compiled before it."""

import logging

import jax
import pytest
from runs import model_directory, preference_file, tiny_setup

from sr_dpo_jax.durable.preemption import StopSignal
from sr_dpo_jax.train.clock import Clock
from sr_dpo_jax.train.prepare import prepare
from sr_dpo_jax.train.setup import read_held_out

pytestmark = pytest.mark.usefixtures("same_programs")


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


def test_the_reference_is_scored_and_held_out_sets_evaluated_with_one_program(world, tmp_path, caplog, programs_anew):
    """Two programs: the train step, and the scoring step for training pairs and two held-out sets."""
    setup, pairs, tokenizer = tiny_setup(tmp_path, world / "model", world / "train.jsonl", **sections(world))
    held_out = read_held_out(setup.config, tokenizer, setup.model.architecture)
    with StopSignal() as stop, jax.log_compiles(True), caplog.at_level(logging.WARNING, "jax"):
        job, state = prepare(setup, pairs, held_out, tokenizer=tokenizer, stop=stop, clock=Clock(), allowed_changes=())
        for held in job.held_out:
            held.scores(state.params)
    job.checkpoints.close()
    assert [held.name for held in job.held_out] == ["eval", "eval/other"]
    assert sum("Compiling jit(step)" in record.getMessage() for record in caplog.records) == 2
    assert int(state.step) == 0 and job.total_steps == 3
