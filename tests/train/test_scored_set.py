"""A set that is scored: every pair once and in order, means over pairs, and one program for equal shapes."""

import jax
import numpy as np
import pytest
from runs import model_directory, preference_file, tiny_setup

from sr_dpo_jax.train.objective import Objective
from sr_dpo_jax.train.scored_set import compiled_sets

pytestmark = pytest.mark.usefixtures("same_programs")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    model, data = model_directory(root / "model"), preference_file(root / "train.jsonl", 13, seed=1)
    setup, pairs, _ = tiny_setup(root, model, data)
    held = setup.scored_set("eval", pairs)
    held.fill_reference(setup.model.base_params())
    return setup, pairs, held, setup.model.base_params()


def other_params(params):
    """Gives parameters that another run might have reached."""
    rng = np.random.default_rng(5)
    return jax.tree.map(lambda leaf: leaf + 0.02 * rng.normal(size=leaf.shape).astype(np.float32), params)


def test_metrics_are_those_of_numpy(made):
    """Sr-DPO with β = 0.1 and λ = 0.5, from the scores, in float64."""
    setup, pairs, held, params = made
    policy = held.scores(other_params(params))
    reference = held.reference.scores.astype(np.float64)
    ratio = policy.plain.astype(np.float64) - reference[..., 0]
    judged = policy.augmented.astype(np.float64) - reference[..., 1]
    margin, augmented = ratio[:, 0] - ratio[:, 1], judged[:, 0] - judged[:, 1]
    found = held.metrics(setup.objective, policy)
    expected = {
        "eval/loss": np.logaddexp(0, -0.1 * margin + 0.5 * 0.1 * augmented).mean(),
        "eval/margin": margin.mean(),
        "eval/augmented/margin": augmented.mean(),
        "eval/rewards/accuracies": (margin > 0).mean(),
        "eval/refinement": (0.1 * augmented).mean(),
        "eval/logps/rejected": policy.plain[:, 1].astype(np.float64).mean(),
        "eval/pairs": 13,
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    margins = held.margins(setup.objective, policy)
    np.testing.assert_allclose(margins["margin"], margin, atol=1e-4)
    np.testing.assert_allclose(margins["augmented_margin"], augmented, atol=1e-4)
    alone = held.margins(Objective.of("simpo", beta=2.0, gamma=0.5), policy)["margin"]
    np.testing.assert_allclose(
        alone, policy.plain[:, 0] / policy.tokens[:, 0] - policy.plain[:, 1] / policy.tokens[:, 1]
    )
    np.testing.assert_array_equal(policy.tokens, np.stack([pairs.chosen_tokens, pairs.rejected_tokens], axis=1))


def test_sets_of_one_shape_share_a_program_and_another_shape_is_refused(made):
    setup, pairs, held, params = made
    sets, programs = [held, setup.scored_set("eval/other", pairs)], {}
    first, second = compiled_sets(sets, setup.model.shapes, programs)
    (again,) = compiled_sets([setup.scored_set("eval/third", pairs)], params, programs)
    assert first.score_step is second.score_step is again.score_step
    assert len(programs) == 1
    np.testing.assert_array_equal(first.scores(params).plain, held.scores(params).plain)
    longer = setup.scored_set("eval/longer", pairs, augmented=False)
    with pytest.raises(TypeError):
        first.score_step(params, next(longer.feed.batches(0))[1])
