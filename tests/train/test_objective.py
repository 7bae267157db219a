"""The table of objectives against the functions in `losses.py`, the configuration's keys and values at zero."""

import inspect
import math
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sr_dpo_jax import losses
from sr_dpo_jax.config import schema
from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.train.objective import OBJECTIVES, Kind, Objective
from sr_dpo_jax.train.train_step import Scores, averages, pair_losses, pair_metrics

SECTIONS = get_args(get_args(schema.Objective)[0])
SECTION_OF = {name: kind for kind in SECTIONS for name in get_args(kind.model_fields["name"].annotation)}
AT_ZERO = {"dpo": math.log(2), "sr_dpo": math.log(2), "ipo": 25.0, "sr_ipo": 25.0, "ipo_mean": 25.0}
"""With β = 0.1: ln 2, and 1/(4β²)."""


def objective(name: str) -> Objective:
    given = {"beta": 0.1, "lam": 0.5}
    section = SECTION_OF[name]
    chosen = section(name=name, **{key: given[key] for key in given if key in section.model_fields})
    return Objective.of(**chosen.model_dump())


@pytest.mark.parametrize("name", ["ipo", "sr_ipo", "ipo_mean"])
def test_a_loss_that_begins_beyond_float32_is_refused(name):
    """Every step would be skipped, and a short run would end with 0."""
    numbers = {"beta": 1e-20} | ({"lam": 0.5} if OBJECTIVES[name].refined else {})
    with pytest.raises(UsageError, match=f"objective.beta=1e-20: the loss of {name} begins at 2.5e.39"):
        Objective.of(name, **numbers)
    assert Objective.of(name, **(numbers | {"beta": 1e-15})).numbers["beta"] == 1e-15


def test_the_table_and_the_configuration_know_the_same_objectives():
    assert OBJECTIVES.keys() == SECTION_OF.keys()
    for name, kind in OBJECTIVES.items():
        assert kind.refined == issubclass(SECTION_OF[name], schema.RefinedObjective), name
        assert kind.needs_reference <= issubclass(SECTION_OF[name], schema.PairObjective), "a margin has a β"


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


def test_pairs_and_a_reference_are_two_questions(monkeypatch):
    """A loss on both responses without a reference, as SimPO's, by length; float64 NumPy is its oracle."""

    def simpo(chosen, rejected, chosen_tokens, rejected_tokens, *, beta, gamma):
        return -jax.nn.log_sigmoid(beta * (chosen / chosen_tokens - rejected / rejected_tokens) - gamma)

    arguments = ("chosen_logprob", "rejected_logprob", "chosen_tokens", "rejected_tokens")
    monkeypatch.setattr(losses, "simpo", simpo, raising=False)
    monkeypatch.setitem(OBJECTIVES, "simpo", Kind(arguments, "logistic", needs_reference=False))
    plain, tokens = np.array([[-3.0, -8.0], [-6.0, -2.0]]), np.array([[3, 4], [2, 1]])
    scores = Scores(jnp.array(plain), None, jnp.array(tokens))
    per_pair = pair_metrics(Objective.of("simpo", beta=2.0, gamma=2.0), scores, None)
    mean = plain / tokens
    expected = np.log1p(np.exp(-(2.0 * (mean[:, 0] - mean[:, 1]) - 2.0)))
    np.testing.assert_allclose(per_pair["loss"], expected, rtol=1e-6)
    assert per_pair.keys() == {"loss", "logps/chosen", "logps/rejected"}
    assert "loss_per_token" not in averages(per_pair, jnp.array(tokens))
    sft = pair_metrics(objective("sft"), scores, None)
    assert averages(sft, jnp.array(tokens))["loss_per_token"] == pytest.approx(9 / 5)


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
