"""What a model knows of the labels: against hand counts, scipy's own minimiser, and sets where the answer is known."""

import numpy as np
import pytest
from scipy import optimize, stats

from sr_dpo_jax.train.knowledge import LARGEST_SLOPE, knowledge_of, lines_of, settled_lam, verdict_of


def table_of(contrast, plain=None, tokens=None):
    contrast = np.asarray(contrast, np.float32)
    plain = np.zeros_like(contrast) if plain is None else np.asarray(plain, np.float32)
    tokens = np.full((len(contrast), 2), 10) if tokens is None else np.asarray(tokens)
    return knowledge_of(plain, plain + contrast, contrast, tokens)


def labelled(slope: float, count: int, seed: int = 0) -> np.ndarray:
    """Draws contrasts, each turned so that the first response is the one that the label chose, by P = σ(slope·c)."""
    rng = np.random.default_rng(seed)
    contrast = rng.normal(0, 1.5, count)
    return np.where(rng.random(count) < 1 / (1 + np.exp(-slope * contrast)), contrast, -contrast)


def test_accuracies_are_counted_with_ties_as_half():
    tokens = [[5, 20], [20, 5], [10, 10], [10, 10]]
    table = table_of([1.0, -2.0, 0.0, 3.0], plain=[-1.0, -1.0, 1.0, 2.0], tokens=tokens)
    assert (table["d"]["accuracy"], table["contrast"]["accuracy"]) == (0.5, 0.625)
    assert table["contrast"]["mean"] == pytest.approx(0.5)
    by_length = table["contrast"]["by_length"]
    assert [by_length[name]["accuracy"] for name in by_length] == [1.0, 0.75, 0.0]
    assert [by_length[name]["pairs"] for name in by_length] == [1, 2, 1]
    assert "1.000 of 1" in lines_of(table)[3]


def test_intervals_are_wilsons():
    values = np.where(np.arange(40) < 22, 1.0, -1.0)
    low, high = stats.binomtest(22, 40).proportion_ci(method="wilson")
    assert table_of(values)["contrast"]["interval"] == pytest.approx([low, high])


def test_the_slope_is_that_of_a_logistic_regression():
    contrast = labelled(0.7, 400).astype(np.float32)
    least = optimize.minimize_scalar(lambda slope: np.logaddexp(0, -slope * contrast.astype(np.float64)).sum())
    table = table_of(contrast)
    assert table["slope"]["value"] == pytest.approx(least.x, abs=1e-5)
    assert settled_lam(table) == table["slope"]["value"]
    assert "knows something" in verdict_of(table)


def test_the_interval_holds_the_true_slope_as_often_as_it_says():
    """95 % of 200 draws, within four standard errors of a binomial count."""
    intervals = [table_of(labelled(0.5, 300, seed))["slope"]["interval"] for seed in range(200)]
    held = sum(low <= 0.5 <= high for low, high in intervals)
    assert 0.95 * 200 - 4 * np.sqrt(200 * 0.95 * 0.05) <= held


def test_a_model_that_does_not_know_gets_no_weight():
    table = table_of(labelled(0.0, 300))
    low, high = table["slope"]["interval"]
    assert low < 0 < high
    assert settled_lam(table) == 0.0
    assert "does not know" in verdict_of(table)
    assert table["gain"]["interval"][0] < 0


def test_a_model_that_is_wrong_gets_no_weight_and_is_told():
    table = table_of(-labelled(0.8, 300))
    assert table["slope"]["value"] < 0
    assert settled_lam(table) == 0.0
    assert "will hurt" in verdict_of(table)


@pytest.mark.parametrize("contrast", [[0.0, 0.0], [1.0], [1.0, 2.0]])
def test_pairs_that_fix_no_slope_settle_nothing(contrast):
    """Two pairs that are right are no evidence, ln 2 each, and contrasts of 0 say nothing."""
    assert settled_lam(table_of(contrast)) == 0.0


def test_a_model_that_is_always_right_gets_the_weight_that_is_certain():
    """Such contrasts have no finite slope; of 20 pairs with c = 1 every λ with 20·log(1 + e^−λ) < 1.92 is as good."""
    table = table_of(np.ones(20))
    assert table["slope"]["value"] == LARGEST_SLOPE and not table["slope"]["finite"]
    assert settled_lam(table) == pytest.approx(-np.log(np.exp(stats.chi2.ppf(0.95, 1) / 40) - 1), rel=1e-6)


@pytest.mark.parametrize("unit", [1 / 400, 400])
def test_the_slope_has_the_unit_of_the_contrast(unit):
    """Contrasts per token are a hundred times smaller: their slope is as much larger, whatever the bound."""
    contrast = labelled(0.7, 300)
    one, other = table_of(contrast)["slope"], table_of(unit * contrast)["slope"]
    assert other["value"] * unit == pytest.approx(one["value"], rel=1e-5)
    assert [end * unit for end in other["interval"]] == pytest.approx(one["interval"], rel=1e-5)


def test_the_gain_is_on_pairs_that_the_slope_has_not_seen():
    """Where c is right for all pairs but one huge mistake, a slope fitted with the mistake differs from one without."""
    table = table_of(labelled(1.0, 500))
    assert table["gain"]["interval"][0] > 0
    rng = np.random.default_rng(1)
    assert table_of(rng.normal(0, 30, 20))["gain"]["value"] < 0.1
