"""The table of objectives against the functions in `losses.py`, the configuration's keys and values at zero."""

import inspect
import math
from typing import get_args

import jax.numpy as jnp
import numpy as np
import pytest

from sr_dpo_jax import losses
from sr_dpo_jax.config import schema
from sr_dpo_jax.train.objective import OBJECTIVES, Objective
from sr_dpo_jax.train.train_step import Scores, pair_losses, pair_metrics

SECTIONS = [schema.SftObjective, schema.DpoObjective, schema.IpoObjective, schema.RefinedObjective]
SECTION_OF = {name: kind for kind in SECTIONS for name in get_args(kind.model_fields["name"].annotation)}
AT_ZERO = {"dpo": math.log(2), "sr_dpo": math.log(2), "ipo": 25.0, "sr_ipo": 25.0, "ipo_mean": 25.0}
"""With β = 0.1: ln 2, and 1/(4β²)."""


def objective(name: str) -> Objective:
    given = {"beta": 0.1, "lam": 0.5}
    section = SECTION_OF[name]
    return Objective.of(section(name=name, **{key: given[key] for key in given if key in section.model_fields}))


def test_the_table_and_the_configuration_know_the_same_objectives():
    assert OBJECTIVES.keys() == SECTION_OF.keys()
    for name, kind in OBJECTIVES.items():
        assert kind.refined == issubclass(SECTION_OF[name], schema.RefinedObjective), name
        assert (kind.needs_rejected and kind.needs_reference) == issubclass(SECTION_OF[name], schema.PairObjective)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_row_calls_its_function_with_all_that_it_takes(name):
    parameters = inspect.signature(getattr(losses, name)).parameters.values()
    arrays = [parameter for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    numbers = {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
    assert len(OBJECTIVES[name].arguments) == len(arrays)
    assert numbers == objective(name).numbers.keys() == SECTION_OF[name].model_fields.keys() - {"name"}


@pytest.mark.parametrize("name", AT_ZERO)
def test_the_loss_where_policy_and_reference_are_the_same(name):
    scores = Scores(jnp.array([[-3.0, -5.0]]), jnp.array([[-2.0, -9.0]]), jnp.array([[4, 2]]))
    metrics = pair_metrics(objective(name), scores, scores)
    assert OBJECTIVES[name].loss_at_zero(0.1) == pytest.approx(AT_ZERO[name])
    np.testing.assert_allclose(metrics["loss"], AT_ZERO[name], rtol=1e-6)
    assert ("refinement" in metrics) == OBJECTIVES[name].refined


def test_arrays_reach_their_arguments_in_order():
    """Chosen and rejected differ in log-ratio and length, so that an exchange of two arguments shows."""
    arrays = {
        "chosen_log_ratio": jnp.array([6.0]),
        "rejected_log_ratio": jnp.array([-4.0]),
        "chosen_tokens": jnp.array([3]),
        "rejected_tokens": jnp.array([8]),
    }
    assert float(pair_losses(objective("ipo_mean"), arrays)[0]) == pytest.approx((6 / 3 + 4 / 8 - 5) ** 2)
    shifted = {"margin": jnp.array([2.0]), "augmented_margin": jnp.array([1.0])}
    expected = -math.log(1 / (1 + math.exp(-(0.1 * 2.0 - 0.5 * 0.1 * 1.0))))
    assert float(pair_losses(objective("sr_dpo"), shifted)[0]) == pytest.approx(expected, rel=1e-6)
