"""The promises with LoRA adapters: the core of the fault suite, on runs whose checkpoints hold adapters alone."""

import random
import signal

import jax
import numpy as np
import pytest
import test_faults_checkpoints as whole
import test_faults_processes as processes
from flax.traverse_util import flatten_dict
from runs import (
    make_config,
    metrics_of,
    model_directory,
    preference_file,
    run_processes,
    state_of,
    verified_steps,
    without_times,
)

from sr_dpo_jax.durable import integrity
from sr_dpo_jax.model.adapter import join, split
from sr_dpo_jax.train.loop import train
from sr_dpo_jax.train.setup import read_model, set_up

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("same_programs")]

LORA = {"rank": 4, "alpha": 8.0}
run = whole.run


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    return model_directory(root / "model"), preference_file(root / "train.jsonl", 48, seed=1)


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """A run on eight devices with verified checkpoints at steps 2, 4 and 6."""
    root = tmp_path_factory.mktemp("finished")
    assert train(config_of(root, world, checkpoint={"every_steps": 2, "keep": 3})) == 0
    assert verified_steps(root / "run") == [2, 4, 6]
    return root


def config_of(root, world, **sections):
    return make_config(root, *world, lora=LORA, **sections)


def assert_equal_runs(ours, theirs):
    mine, other = state_of(ours), state_of(theirs)
    assert mine.keys() == other.keys() and all(mine[name].tobytes() == other[name].tobytes() for name in mine)
    assert without_times(metrics_of(ours)) == without_times(metrics_of(theirs))


def test_p2_flipped_bits_of_adapters_never_pass_and_the_same_command_goes_on(run, world, finished):
    step, rng = run / "checkpoints" / "6", random.Random(0)
    for _ in range(10):
        file = rng.choice(whole.files_of(step))
        before = file.read_bytes()
        whole.flip(file, rng)
        with pytest.raises((integrity.Damaged, integrity.Unverified)):
            integrity.check(step)
        file.write_bytes(before)
    whole.largest_file(step / "state").unlink()
    assert train(config_of(run.parent, world)) == 0
    assert (run / "checkpoints" / "6.damaged").is_dir()
    assert_equal_runs(run, finished / "run")


@pytest.mark.usefixtures("programs_anew")
def test_p3_any_number_of_interruptions_of_adapters_is_bitwise(world, finished, tmp_path):
    for steps in (1, 3, 4, None):
        assert train(config_of(tmp_path, world, train={"max_steps": steps})) == 0
    assert_equal_runs(tmp_path / "run", finished / "run")


def test_p4_any_mesh_restores_adapters_bitwise_beside_the_same_base(finished, world):
    held = []
    for mesh in ({}, {"replica": 2, "fsdp": 2, "tensor": 2}):
        config = config_of(finished, world, mesh=mesh)
        setup = set_up(config, read_model(config)[0])
        params, step = setup.latest_params()
        assert step == 6
        held.append(jax.device_get(params))
    ours, theirs = (flatten_dict(params, sep=".") for params in held)
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)
    adapters, base = split(held[0])
    saved = state_of(finished / "run")
    kept = sorted(np.asarray(saved[name]).tobytes() for name in saved if name.startswith("['params']"))
    assert kept == sorted(leaf.tobytes() for leaf in jax.tree.leaves(adapters))
    assert jax.tree.structure(join(adapters, base)) == jax.tree.structure(held[0])


def test_p1_sigkill_of_one_of_two_with_adapters_and_p3_resumes_bitwise(world, tmp_path):
    golden = processes.write_config(tmp_path / "golden", world, lora=LORA)
    assert processes.ends(run_processes(["train", golden])) == [0, 0]
    path = processes.write_config(tmp_path / "killed", world, lora=LORA)
    both = run_processes(["train", path], faults=[{"step_s": 0.1}, {"step_s": 0.1}])
    processes.wait_for(lambda: processes.lines(tmp_path / "killed") >= processes.EVERY + 3, both)
    both[1].kill()
    codes = processes.ends(both, 60)
    assert codes[1] == -signal.SIGKILL and codes[0] not in (0, 75)
    assert verified_steps(tmp_path / "killed" / "run")
    assert processes.ends(run_processes(["train", path])) == [0, 0]
    assert_equal_runs(tmp_path / "killed" / "run", tmp_path / "golden" / "run")
