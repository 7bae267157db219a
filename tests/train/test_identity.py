"""A checkpoint goes on only as the run that it was: what is refused, what is allowed, what is only said."""

import logging

import pytest

from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.train import identity

BEFORE = {"objective.beta": 0.1, "seed": 3, "plan": "a1", "checkpoint.best_metric": None}


def same(now, *allowed):
    identity.require_same_run(BEFORE, BEFORE | now, where="run: step 4", allowed_changes=allowed)


def test_a_change_is_refused_by_key_with_the_flag_that_allows_it():
    same({})
    with pytest.raises(UsageError, match=r"objective\.beta: 0\.1 -> 0\.2\n.*--allow-change objective\.beta"):
        same({"objective.beta": 0.2})


def test_an_allowed_change_is_said(caplog):
    same({"objective.beta": 0.2}, "objective.beta")
    assert "objective.beta: 0.1 -> 0.2" in caplog.text
    with pytest.raises(UsageError, match=r"no such key; known: objective\.beta, seed"):
        same({}, "objective.bta")


def test_the_plan_is_named_only_where_nothing_else_explains_it():
    with pytest.raises(UsageError) as both:
        same({"seed": 4, "plan": "b2"})
    assert "seed: 3 -> 4" in str(both.value) and "plan" not in str(both.value)
    with pytest.raises(UsageError, match="plan: a1 -> b2"):
        same({"plan": "b2"})


def test_the_keys_of_another_objective_come_and_go_with_its_name():
    """λ and β₁ are of Sr-DPO and AdamW alone: the name's flag allows them, and all are shown."""
    refined = {"objective.name": "sr_dpo", "objective.beta": 0.1, "objective.lam": 0.5, "seed": 0}
    plain = {"objective.name": "dpo", "objective.beta": 0.1, "objective.label_smoothing": 0.0, "seed": 0}

    def require(*allowed, **other):
        identity.require_same_run(refined, plain | other, where="run: step 4", allowed_changes=allowed)

    with pytest.raises(UsageError) as refusal:
        require()
    text = str(refusal.value)
    assert "objective.lam: 0.5 -> none\n" in text and "objective.label_smoothing: (not recorded) -> 0.0\n" in text
    assert text.endswith("go on with --allow-change objective.name")
    require("objective.name")
    require("objective.name", "objective.lam")
    with pytest.raises(UsageError, match=r"go on with --allow-change objective\.name --allow-change objective\.beta$"):
        require("objective.name", **{"objective.beta": 0.2})


def test_keys_that_an_older_record_holds_for_no_use_are_passed_over():
    identity.require_same_run(
        {"objective.name": "sft", "objective.beta": 0.1}, {"objective.name": "sft"}, where="run", allowed_changes=()
    )


def test_a_metric_that_is_new_gives_nothing_up():
    same({"checkpoint.best_metric": "eval/loss, min"})


def test_other_software_is_said_and_with_strict_refused(caplog):
    now = identity.software()
    before = now | {"jax": "0.1"}
    identity.report_drift(before, now, where="run: step 4", strict=False)
    assert f"jax: 0.1 -> {now['jax']}" in caplog.text
    with pytest.raises(UsageError, match=r"checkpoint\.strict=true asks for the same versions"):
        identity.report_drift(before, now, where="run: step 4", strict=True)
    with caplog.at_level(logging.WARNING):
        identity.report_drift(now | {"processes": 2}, now | {"processes": 1}, where="run", strict=True)
    assert "processes: 2 -> 1" in caplog.text


def test_the_end_of_a_schedule_counts_where_the_rate_follows_from_it():
    """Raising train.max_steps puts the learning rate back up; an earlier version did not write it."""
    before = {"optimizer.schedule": "cosine", "train.max_steps": 100}
    now = before | {"train.max_steps": 200}
    with pytest.raises(UsageError, match=r"train\.max_steps: 100 -> 200\n.*--allow-change train\.max_steps"):
        identity.require_same_run(before, now, where="run", allowed_changes=())
    identity.require_same_run(before, now, where="run", allowed_changes=["train.max_steps"])
    identity.require_same_run({"optimizer.schedule": "cosine"}, now, where="run", allowed_changes=())
