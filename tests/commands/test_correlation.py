"""Correlation with ratings against ranks and counts done by hand in NumPy, intervals of known truth, gap buckets."""

import json

import numpy as np
import pytest
import yaml
from runs import model_directory, preference_file, raw_config

from sr_dpo_jax.cli import main
from sr_dpo_jax.commands.correlation import rating_metrics

NAMES = ("pearson", "spearman", "kendall")


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """A thousand take seconds a call, and no test here needs the ends of an interval so exactly."""
    monkeypatch.setattr("sr_dpo_jax.commands.correlation.RESAMPLES", 200)


def ranks(values):
    """Mean ranks of ties, by counting."""
    return (values[:, None] > values).sum(axis=1) + ((values[:, None] == values).sum(axis=1) + 1) / 2


def linear(x, y):
    x, y = x - x.mean(), y - y.mean()
    return (x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum())


def tau_b(x, y):
    """Concordant minus discordant pairs of pairs, over those that are no ties."""
    a, b = np.sign(x[:, None] - x), np.sign(y[:, None] - y)
    return (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())


def test_values_are_those_of_an_independent_computation():
    rng = np.random.default_rng(0)
    difference = rng.integers(0, 6, 60) / 2  # many ties
    margin = difference + rng.normal(size=60)
    augmented = np.round(difference**3 + rng.normal(size=60), 1)
    found = rating_metrics({"margin": margin, "augmented_margin": augmented}, difference, seed=0, name="eval")
    for name, values in (("margin", margin), ("augmented_margin", augmented)):
        assert found[f"eval/{name}/pearson"] == pytest.approx(linear(values, difference), abs=1e-12)
        assert found[f"eval/{name}/spearman"] == pytest.approx(linear(ranks(values), ranks(difference)), abs=1e-12)
        assert found[f"eval/{name}/kendall"] == pytest.approx(tau_b(values, difference), abs=1e-12)


def test_known_truth():
    """A margin that is the rating, one that is its reverse, and one of another scale: 1, −1, and ranks that agree."""
    difference = np.arange(1.0, 21.0)
    found = rating_metrics({"margin": 3 * difference, "augmented_margin": -difference}, difference, seed=0, name="eval")
    for name in NAMES:
        assert found[f"eval/margin/{name}"] == pytest.approx(1) == found[f"eval/margin/{name}/low"]
        assert found[f"eval/augmented_margin/{name}"] == pytest.approx(-1)
    found = rating_metrics({"margin": np.exp(difference)}, difference, seed=0, name="eval")
    assert found["eval/margin/pearson"] < 0.8
    assert found["eval/margin/spearman"] == found["eval/margin/kendall"] == pytest.approx(1)


def test_intervals_hold_the_truth_as_often_as_they_claim():
    """For normal pairs Fisher's transform says how wide Pearson's interval is, and it covers the true 0.5."""
    rng, covered = np.random.default_rng(1), 0
    for repeat in range(20):
        x = rng.normal(size=150)
        y = 0.5 * x + np.sqrt(0.75) * rng.normal(size=150)
        found = rating_metrics({"margin": x}, y, seed=repeat, name="eval")
        low, value, high = (found[f"eval/margin/pearson{end}"] for end in ("/low", "", "/high"))
        covered += low < 0.5 < high
        assert np.arctanh(high) - np.arctanh(low) == pytest.approx(2 * 1.96 / np.sqrt(147), rel=0.4)
        assert low < value < high
    assert covered >= 16  # of 20 at 95 %: fewer has a probability of 0.3 %


def test_the_seed_decides_the_interval_and_nothing_else():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(2, 40))
    first, again, other = (rating_metrics({"margin": x}, y, seed=seed, name="eval") for seed in (0, 0, 1))
    assert first == again
    assert first["eval/margin/kendall"] == other["eval/margin/kendall"]
    assert first["eval/margin/kendall/low"] != other["eval/margin/kendall/low"]


def test_accuracy_by_rating_gap():
    difference = np.array([0.0, 0.5, 1, 1, 1, 2, 3, 4])
    margin = np.array([-1.0, 1, 1, -1, 1, 1, 1, 1])
    found = rating_metrics({"margin": margin, "augmented_margin": -margin}, difference, seed=0, name="eval")
    buckets = [
        tuple(found[f"eval/rating_gap/{number}/{name}"] for name in ("low", "high", "pairs", "accuracy"))
        for number in (1, 2, 3, 4)
    ]
    assert buckets == [(0, 0.5, 2, 0.5), (1, 1, 3, pytest.approx(2 / 3)), (2, 2, 1, 1), (3, 4, 2, 1)]
    assert found["eval/rating_gap/4/augmented_accuracy"] == 0
    alike = rating_metrics({"margin": margin}, np.array([1.0] * 7 + [2]), seed=0, name="eval")
    assert (alike["eval/rating_gap/1/pairs"], alike["eval/rating_gap/2/pairs"]) == (7, 1)
    assert "eval/rating_gap/3/pairs" not in alike


def test_only_rated_pairs_count():
    difference = np.array([np.nan, 1, 2, 3, np.nan])
    found = rating_metrics({"margin": np.array([99.0, 1, 2, 3, -99])}, difference, seed=0, name="eval")
    assert found["eval/rated_pairs"] == 3 and found["eval/margin/pearson"] == pytest.approx(1)
    assert rating_metrics({"margin": np.ones(2)}, np.full(2, np.nan), seed=0, name="eval") == {}


@pytest.mark.parametrize(
    ("margin", "difference", "reason"),
    [
        ([1, 2], [1, 2], "fewer than 3"),
        ([0, 0, 0], [1, 2, 3], "margins are equal"),
        ([1, 2, 3], [2, 2, 2], "differences are equal"),
    ],
)
def test_what_is_not_defined_is_left_out_and_said(margin, difference, reason, caplog):
    found = rating_metrics({"margin": np.array(margin, float)}, np.array(difference, float), seed=0, name="eval")
    assert not [name for name in found if "pearson" in name or "nan" in str(found[name])]
    assert reason in caplog.text
    assert found["eval/rating_gap/1/pairs"] > 0


def test_a_named_set_is_named(caplog):
    """Every key and every warning names the set."""
    difference = np.array([1.0, 2, 3, 4])
    found = rating_metrics({"margin": difference, "augmented_margin": np.ones(4)}, difference, seed=0, name="eval/b")
    assert "eval/b/margin/pearson" in found and "eval/b/rating_gap/1/accuracy" in found
    assert all(name.startswith("eval/b/") for name in found)
    assert "eval/b/augmented_margin: no correlation" in caplog.text
    assert caplog.text.count("eval/") == caplog.text.count("eval/b/")


@pytest.mark.slow
def test_eval_of_rated_pairs(tmp_path, capsys):
    """The print and eval.json agree with the lines of eval_pairs.jsonl; the ratings are made from the margins."""
    data, held_out = preference_file(tmp_path / "train.jsonl", 24), preference_file(tmp_path / "held_out.jsonl", 13)
    sections = {"data": {"eval_path": str(held_out)}, "objective": {"name": "dpo", "lam": None}}
    raw = raw_config(tmp_path, model_directory(tmp_path / "model"), data, **sections)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    assert main(["train", str(path)]) == 0 and main(["eval", str(path)]) == 0
    output = tmp_path / "run" / "eval_pairs.jsonl"
    first = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert "eval/rated_pairs" not in json.loads((tmp_path / "run" / "eval.json").read_text())

    rated = []
    for number, (row, line) in enumerate(zip(held_out.read_text().splitlines(), first, strict=True)):
        scores = {"score_chosen": 10 + 3 * line["margin"], "score_rejected": 10.0} if number < 12 else {}
        rated.append(json.dumps({**json.loads(row), **scores}) + "\n")
    held_out.write_text("".join(rated), encoding="utf-8")
    capsys.readouterr()
    assert main(["eval", str(path)]) == 0
    printed, found = capsys.readouterr().out, json.loads((tmp_path / "run" / "eval.json").read_text())
    assert found["eval/rated_pairs"] == 12 and "eval/margin/kendall/low" in printed
    assert found["eval/margin/pearson"] == pytest.approx(1, abs=1e-5)
    for name in NAMES[1:]:
        assert found[f"eval/margin/{name}"] == pytest.approx(1)

    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert "rating_difference" not in lines[12] and len(lines) == found["eval/pairs"] == 13
    for kind, margin in (("", "margin"), ("_augmented", "augmented_margin")):
        ratio = {
            side: np.array([line[f"logp_{side}{kind}"] - line[f"reference_logp_{side}{kind}"] for line in lines])
            for side in ("chosen", "rejected")
        }
        margins = np.array([line[margin] for line in lines])
        np.testing.assert_allclose(margins, ratio["chosen"] - ratio["rejected"], atol=1e-4)
        mean = found["eval/margin" if margin == "margin" else "eval/augmented/margin"]
        assert mean == pytest.approx(margins.mean(), abs=1e-5)
    difference = np.array([line["rating_difference"] for line in lines[:12]])
    augmented = np.array([line["augmented_margin"] for line in lines[:12]])
    assert found["eval/augmented_margin/kendall"] == pytest.approx(tau_b(augmented, difference), abs=1e-6)

    assert main(["eval", str(path), "data.eval_pairs=4"]) == 0
    assert len(output.read_text(encoding="utf-8").splitlines()) == 4
