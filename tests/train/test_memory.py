"""The memory that a train step needs, told before the first step."""

import types

import jax
import numpy as np
import psutil
import pytest
from runs import model_directory, preference_file, tiny_setup

from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.train import memory
from sr_dpo_jax.train.state import first_state

pytestmark = pytest.mark.usefixtures("same_programs")

LAYERS, PAIRS = 4, 16


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    data = preference_file(root / "train.jsonl", PAIRS, seed=1)
    return model_directory(root / "model", "llama", num_key_value_heads=2, num_hidden_layers=LAYERS), data


@pytest.fixture
def program_of(world, tmp_path):
    """`(remat) -> (program, arguments, plan)` of a step whose activations are larger than its parameters."""

    def made(remat):
        batch = {"pairs_per_step": PAIRS, "row_length": 1024}
        setup, pairs, _ = tiny_setup(tmp_path, *world, model={"remat": remat, "attention": "dense"}, batch=batch)
        plan = setup.plan(pairs, ())
        program, reference = setup.program(plan), np.zeros((PAIRS, 2, 2), np.float32)
        feed = setup.packing.feed(pairs, plan, augmented=True, with_rejected=True, reference=reference)
        return (
            program,
            (first_state(program.state, setup.model.base_params(), program.optimizer), None, None, feed),
            plan,
        )

    return made


def traced(program, arguments):
    state, base, reference, feed = arguments
    return program.step.trace(state, base, reference, next(feed.batches(0))[1])


def test_what_a_layer_keeps_is_counted_as_by_hand(program_of):
    """With remat=full a layer keeps its input alone, `[R, T, d]` float32, and gives the gradients of its parameters."""
    program, arguments, plan = program_of("full")
    params = arguments[0].params["layers"]
    gradients = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    inputs = LAYERS * plan.shape.rows * plan.shape.row_length * 32 * 4
    assert memory.kept_bytes(traced(program, arguments).jaxpr.jaxpr, LAYERS) == inputs + gradients


def test_it_is_a_lower_bound_of_what_the_compiler_finds(program_of):
    counted = {}
    for remat in ("none", "dots", "full"):
        program, arguments, _ = program_of(remat)
        step = traced(program, arguments)
        counted[remat] = memory.kept_bytes(step.jaxpr.jaxpr, LAYERS)
        found = step.lower().compile().memory_analysis().temp_size_in_bytes
        assert counted[remat] < found
        assert remat != "none" or found < 2.5 * counted[remat]
    assert counted["none"] > counted["dots"] > counted["full"]


def test_a_step_that_needs_more_than_is_free_is_named_with_a_remedy_that_works(program_of, monkeypatch, caplog):
    program, arguments, _ = program_of("none")
    too_little = memory.kept_bytes(traced(program, arguments).jaxpr.jaxpr, LAYERS) - 1
    monkeypatch.setattr(memory, "free_bytes", lambda devices: too_little)
    program.compiled(*arguments)
    warned = [record.message for record in caplog.records if "the train step" in record.message]
    assert "keeps at least" in warned[0] and "needs" in warned[1]  # before it was compiled, and after
    assert all("model.remat=full" in message for message in warned)
    caplog.clear()
    program, arguments, _ = program_of("full")
    program.compiled(*arguments)
    assert "the train step" not in caplog.text


def test_a_step_that_the_compiler_refuses_is_an_error_with_the_remedy():
    def step_that_says(text):
        def compile():
            raise jax.errors.JaxRuntimeError(text)

        jaxpr = jax.make_jaxpr(lambda x: x)(0.0)
        return types.SimpleNamespace(jaxpr=jaxpr, lower=lambda: types.SimpleNamespace(compile=compile))

    options = {"layers": LAYERS, "devices": jax.devices()}
    with pytest.raises(UsageError, match=r"does not fit a device; set model\.remat=full .*: RESOURCE_EXHAUSTED: 20G"):
        memory.compile_within_memory(step_that_says("RESOURCE_EXHAUSTED: 20G of 16G\nmore"), **options)
    vmem = "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 9M"
    with pytest.raises(UsageError, match=r"set model\.attention=dense or lower batch\.row_length"):
        memory.compile_within_memory(step_that_says(vmem), **options)
    with pytest.raises(jax.errors.JaxRuntimeError, match="another"):
        memory.compile_within_memory(step_that_says("INTERNAL: another"), **options)


def test_free_bytes(monkeypatch, tmp_path):
    """CPUs share the machine's memory, or their container's; other devices tell, or nothing is known."""
    cpus = jax.devices()
    monkeypatch.setattr(memory, "CGROUP", tmp_path / "none")
    free = psutil.virtual_memory().available
    assert memory.free_bytes(cpus[:1]) == pytest.approx(free, rel=0.5)
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    (tmp_path / "memory.current").write_text("1000\n")
    for most, expected in (("9000\n", 8000), ("max\n", None)):
        (tmp_path / "memory.max").write_text(most)
        found = memory.free_bytes(cpus[:4]) * 4
        assert found == expected or (expected is None and found > 8000)

    def device(**stats):
        return types.SimpleNamespace(platform="tpu", memory_stats=lambda: stats or None)

    assert memory.free_bytes([device(bytes_limit=16, bytes_in_use=5), device(bytes_limit=16, bytes_in_use=9)]) == 7
    assert memory.free_bytes([device(bytes_limit=16, bytes_in_use=5), device()]) is None
