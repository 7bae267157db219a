"""The compiled step: its metrics by hand, accumulation, and the reference cached or online."""

import jax
import numpy as np
import pytest
import tiny
from tiny_steps import (
    OPTIMIZER,
    PAIRS,
    assert_same_training,
    compile_step,
    make_batch,
    pairs_and_rows,
    reference_scores,
    two_steps,
)

from sr_dpo_jax.config.load import config_from_dict
from sr_dpo_jax.train.objective import OBJECTIVES, Objective
from sr_dpo_jax.train.train_step import make_score_step


@pytest.mark.parametrize("micro_batches", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_accumulation_changes_nothing(micro_batches):
    assert_same_training(two_steps("llama", (1, 1, 1), micro_batches), two_steps("llama", (1, 1, 1)))


def test_metrics_by_hand():
    """Those of the first step, from the scores of the score step and a mean over pairs in NumPy."""
    model = tiny.build(tiny.LLAMA, tiny.make_mesh())
    scores = make_score_step(model.graph, pairs=PAIRS, mesh=model.mesh)(model.params(), make_batch())
    reference, (metrics, *_) = reference_scores().astype(np.float64), two_steps("llama", (1, 1, 1))[0]
    pairs, _, _ = pairs_and_rows()
    assert scores.tokens.tolist() == [[len(chosen), len(rejected)] for _, chosen, rejected in pairs]
    plain, augmented = np.asarray(scores.plain, np.float64), np.asarray(scores.augmented, np.float64)
    ratio, augmented_ratio = plain - reference[..., 0], augmented - reference[..., 1]
    margin, judged = ratio[:, 0] - ratio[:, 1], augmented_ratio[:, 0] - augmented_ratio[:, 1]
    expected = {
        "loss": np.logaddexp(0, -0.1 * margin + 0.3 * 0.1 * judged),
        "rewards/chosen": 0.1 * ratio[:, 0],
        "rewards/rejected": 0.1 * ratio[:, 1],
        "rewards/margins": 0.1 * margin,
        "rewards/accuracies": margin > 0,
        "logps/chosen": plain[:, 0],
        "logps/rejected": plain[:, 1],
        "margin": margin,
        "augmented/margin": judged,
        "augmented/accuracies": judged > 0,
        "refinement": 0.1 * judged,
    }
    assert metrics.keys() == expected.keys() | {"grad_norm", "learning_rate", "skipped"}
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value.mean(), rtol=2e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["robust", "exo_pair", "aot_unpaired", "apo_zero", "orpo", "sr_hinge", "mixed"])
def test_an_objective_of_a_configuration_takes_steps(name):
    """From a name of the table, over the configuration, to two updates: each moves the weights and the loss.

    `test_loop.py` trains five others in whole runs, and `test_objective.py` takes every one without a model.
    """
    raw = {"output_dir": "x", "model": {"path": "x"}, "data": {"path": "x"}}
    section = {"name": name, "lam": 0.5 if OBJECTIVES[name].refined else None}
    if not OBJECTIVES[name].function:
        section["terms"] = [{"name": "hinge", "weight": 0.5}, {"name": "nca_pair", "weight": 2.0}]
    objective = Objective.of(**config_from_dict(raw | {"objective": section}, where="x").objective.model_dump())
    model = tiny.build(tiny.LLAMA, tiny.make_mesh())
    state, batch = model.state(OPTIMIZER), tiny.place(make_batch(1, reference_scores()), model.mesh)
    step, metrics = compile_step(model, objective=objective), []
    for _ in range(3):
        state, of_step = step(state, None, None, batch)
        metrics.append(jax.device_get(of_step))
    assert all(line["skipped"] == 0 and line["grad_norm"] > 0 for line in metrics), metrics
    assert len({float(line["loss"]) for line in metrics}) == 3
    assert ("refinement" in metrics[0]) == OBJECTIVES[name].refined


def test_online_and_cached_reference_and_one_compilation():
    """The reference is another model: its scores cached or made in the step are the same, and it never changes."""
    mesh = tiny.make_mesh(1, 4, 2)
    model = tiny.build(tiny.LLAMA, mesh)
    reference = model.params(seed=9)
    before = jax.device_get(reference)
    batch = tiny.place(make_batch(), mesh)
    scores = jax.device_get(make_score_step(model.graph, pairs=PAIRS, mesh=mesh)(reference, batch))
    cached_batch = tiny.place(make_batch(reference=np.stack([scores.plain, scores.augmented], axis=-1)), mesh)
    online_step, cached_step = compile_step(model), compile_step(model)
    online, cached = model.state(OPTIMIZER), model.state(OPTIMIZER)
    for _ in range(3):
        online, online_metrics = online_step(online, None, reference, batch)
        cached, cached_metrics = cached_step(cached, None, None, cached_batch)
        for name, value in cached_metrics.items():
            np.testing.assert_allclose(online_metrics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    assert online_step._cache_size() == cached_step._cache_size() == 1
    assert int(online.step) == 3
    for mine, theirs in zip(jax.tree.leaves(online.params), jax.tree.leaves(cached.params), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(jax.tree.leaves(jax.device_get(reference)), jax.tree.leaves(before), strict=True):
        assert mine.tobytes() == theirs.tobytes()
