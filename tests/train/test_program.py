"""The plan of training, the schedule that its length decides, and what its pairs cost."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from runs import model_directory, preference_file, tiny_setup

from sr_dpo_jax.commands.compile.typical import typical_pairs
from sr_dpo_jax.data.plan import Limits
from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.model.kernels.splash import LONGEST_ROW
from sr_dpo_jax.train.program import COARSE_RATES, plan_training, require_short_rows, warn_of_no_learning, work_of
from sr_dpo_jax.train.state import first_state

pytestmark = pytest.mark.usefixtures("same_programs")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    model, data = model_directory(root / "model"), preference_file(root / "train.jsonl", 40, seed=1)
    optimizer = {"name": "adamw", "schedule": "linear", "learning_rate": 1.0, "warmup_steps": 2}
    return tiny_setup(root, model, data, optimizer=optimizer)


def test_a_plan_has_whole_steps_of_distinct_pairs(made):
    setup, pairs, _ = made
    plan = setup.plan(pairs, ())
    assert len(plan) == 5 and plan.pair.shape == (5, 8)
    assert sorted(plan.pair.flat) == list(range(40))


def test_rows_have_room_for_every_held_out_pair(made, tmp_path):
    setup, pairs, _ = made
    longer = dataclasses.replace(pairs, offsets=pairs.offsets + np.array([0, 0, 0, 30]))
    assert setup.plan(pairs, (longer,)).shape.row_length > setup.plan(pairs, ()).shape.row_length
    too_long = dataclasses.replace(pairs, offsets=pairs.offsets + np.array([0, 0, 0, 500]))
    with pytest.raises(UsageError, match="row_length"):
        setup.plan(pairs, (too_long,))


def test_rows_longer_than_splash_attention_takes_are_refused_before_anything_is_loaded(made):
    setup, _, _ = made
    require_short_rows(setup.packing.limits, LONGEST_ROW - 16, 16)
    with pytest.raises(UsageError, match=r"batch\.row_length=128: .*splash attention takes at most"):
        require_short_rows(setup.packing.limits, LONGEST_ROW, 16)


def rates_of(setup, pairs):
    """The learning rate of each step of a run."""
    plan = setup.plan(pairs, ())
    program, params = setup.program(plan), setup.model.base_params()
    feed = setup.packing.feed(
        pairs, plan, augmented=True, with_rejected=True, reference=np.zeros((40, 2, 2), np.float32)
    )
    state = first_state(program.state, params, program.optimizer)
    step, rates = program.compiled(state, None, None, feed), []
    for _, batch in feed.batches(0):
        state, metrics = step(state, None, None, batch)
        rates.append(float(metrics["learning_rate"]))
    assert setup.total_steps(plan) == len(rates)
    return rates


def test_the_schedule_ends_with_the_plan(made):
    """Linear: up over two updates of warm-up, the whole rate at the third, and 0 behind the fifth and last."""
    setup, pairs, _ = made
    np.testing.assert_allclose(rates_of(setup, pairs), [1 / 3, 2 / 3, 1, 2 / 3, 1 / 3], rtol=1e-6)


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        (
            (1e-5, 150, 2, "float32"),
            "optimizer.warmup_steps=150, and the run takes 2 steps: the learning rate ends",
        ),
        ((5e-7, 0, 9, "bfloat16"), "optimizer.learning_rate=5e-07 with model.param_dtype=bfloat16"),
        ((5e-7, 0, 9, "float32"), None),
        ((1e-12, 0, 9, "float32"), "optimizer.learning_rate=1e-12 with model.param_dtype=float32"),
        ((1e-3, 0, 9, "bfloat16"), None),
    ],
)
def test_a_run_that_cannot_learn_is_warned_of(caplog, numbers, said):
    rate, warmup, steps, dtype = numbers
    optimizer = {"learning_rate": rate, "warmup_steps": warmup, "warmup_ratio": None}
    warn_of_no_learning(optimizer, steps, jnp.dtype(dtype))
    assert [record.getMessage().startswith(said or "") for record in caplog.records] == ([True] if said else [])


@pytest.mark.parametrize("dtype", COARSE_RATES)
def test_the_rate_that_is_warned_of_changes_no_parameter(dtype):
    """Weights of 0.01 and updates of the learning rate's size, as RMSprop and Adam make them."""
    weight, less, more = (jnp.asarray(value, dtype) for value in (0.01, *(COARSE_RATES[dtype] * s for s in (0.9, 2))))
    assert weight - less == weight != weight - more


def test_a_warm_up_by_ratio_is_a_share_of_all_steps(made, tmp_path):
    setup, pairs, _ = made
    section = setup.config.optimizer.model_copy(update={"warmup_ratio": 0.4, "warmup_steps": 150})
    by_ratio = dataclasses.replace(setup, config=setup.config.model_copy(update={"optimizer": section}))
    assert by_ratio.config.optimizer.warmup_ratio == 0.4
    rates = [rates_of(one, pairs) for one in (setup, by_ratio)]
    np.testing.assert_array_equal(*rates)


def test_the_flops_of_a_refined_pair_are_a_third_more(made):
    """Forward and backward are three forwards, p's forward one more, and an online reference runs both once."""
    setup, pairs, _ = made
    without_p = dataclasses.replace(pairs, augmentation=pairs.augmentation[:0])
    refined, online = (
        work_of(setup.model.architecture, setup.packing, setup.objective, without_p, online=online).flops
        for online in (False, True)
    )
    plain = dataclasses.replace(setup.objective, name="dpo")
    dpo = work_of(setup.model.architecture, setup.packing, plain, without_p, online=False).flops
    np.testing.assert_allclose(refined / dpo, 4 / 3)
    np.testing.assert_allclose(online / dpo, 6 / 3)


def test_a_plan_is_the_same_for_the_same_lengths_and_seed(made):
    setup, pairs, _ = made
    plans = [
        plan_training(setup.packing.limits, setup.objective, pairs, (), seed=seed, epochs=2, attention="dense")
        for seed in (0, 0, 1)
    ]
    assert plans[0].digest == plans[1].digest != plans[2].digest and len(plans[0]) == 10


@pytest.mark.parametrize(
    ("given", "said", "remedies"),
    [
        # Two pairs for each of 32 shards: one of them is the longest, and the others' rows are as long.
        (Limits(64, 1024, 16, 32), "mesh.tensor", [{"pairs_per_step": 256}, {"rows_multiple": 8}]),
        # 16 rows of 860 tokens would do, and 784 are allowed: so there are 32.
        (Limits(72, 784, 16, 16), "batch.row_length=", [{"row_length": "said"}]),
    ],
)
def test_rows_that_are_mostly_padding_name_what_fills_them(made, caplog, given, said, remedies):
    setup, *_ = made
    numbers = {"head_tokens": 0, "augmentation_tokens": 0, "max_length": 512, "max_prompt_length": 256}
    pairs = dataclasses.replace(typical_pairs("hh_rlhf", least_pairs=0, **numbers), tokens=np.zeros(0, np.int32))

    def warning_of(limits):
        caplog.clear()
        plan_training(limits, setup.objective, pairs, (), seed=0, epochs=1, attention="dense")
        return "".join(record.message for record in caplog.records if record.levelname == "WARNING")

    warning = warning_of(given)
    assert "of the rows is padding" in warning and said in warning
    for remedy in remedies:
        changed = {
            name: int(warning.split(said)[1].split()[0]) if value == "said" else value for name, value in remedy.items()
        }
        assert warning_of(dataclasses.replace(given, **changed)) == ""
