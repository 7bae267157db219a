"""The best evaluation and the end of a run, compared with definitions over the whole list of values."""

import dataclasses
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sr_dpo_jax.durable.selection import Selection

VALUES = st.lists(
    st.sampled_from([0.25, 0.5, 0.5000001, 0.75, -1.0, math.nan, math.inf]) | st.floats(-2, 2), max_size=12
)


def selection_of(values, *, mode="max", min_delta=0.0, patience=None):
    found = Selection("eval/loss", mode, min_delta, patience)
    for number, value in enumerate(values, 1):
        found = found.after(10 * number, value)
    return found


@settings(max_examples=400, deadline=None, derandomize=True)
@given(values=VALUES, mode=st.sampled_from(["max", "min"]))
def test_the_best_is_the_first_of_the_highest_or_lowest(values, mode):
    found = selection_of(values, mode=mode)
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        assert (found.step, found.value, found.waited) == (None, None, len(values))
        return
    best = max(finite) if mode == "max" else min(finite)
    assert found.value == best and found.step == 10 * (values.index(best) + 1)
    assert found.waited == len(values) - 1 - values.index(best)


@pytest.mark.parametrize(
    ("values", "mode", "min_delta", "waited", "best"),
    [
        ([0.5, 0.5, 0.5], "max", 0.0, 2, 10),  # equal is not better
        ([0.5, 0.59, 0.61], "max", 0.1, 0, 30),  # counted from 0.5 until 0.61 is better by more than 0.1
        ([0.5, 0.55, 0.6], "max", 0.125, 2, 30),  # the best checkpoint moves on all the same
        ([0.5, 0.59, 0.68], "max", 0.1, 0, 30),
        ([3.0, 2.0, 2.5, 1.5], "min", 0.5, 2, 40),  # better by exactly min_delta is not enough
        ([3.0, 2.0, 2.5, 1.25], "min", 0.5, 0, 40),
        ([math.nan, 1.0, math.nan], "min", 0.0, 1, 20),
        ([], "max", 0.0, 0, None),
    ],
)
def test_what_is_waited_for(values, mode, min_delta, waited, best):
    found = selection_of(values, mode=mode, min_delta=min_delta)
    assert (found.waited, found.step) == (waited, best)


def test_over_after_so_many_in_a_row():
    values = [1.0, 2.0, 1.5, 1.5, 2.5, 2.0, 2.0, 2.0]
    over = [selection_of(values[:count], patience=3).over for count in range(len(values) + 1)]
    assert over == [False] * 8 + [True]
    assert not selection_of(values).over


@settings(max_examples=200, deadline=None, derandomize=True)
@given(values=VALUES, cut=st.integers(0, 12), min_delta=st.floats(0, 0.5))
def test_a_checkpoint_holds_all_that_counts(values, cut, min_delta):
    """Written as JSON after any evaluation and gone on from: the same as never stopped, to the bit."""
    whole = selection_of(values, min_delta=min_delta)
    record = json.loads(json.dumps(selection_of(values[:cut], min_delta=min_delta).record()))
    again = Selection("eval/loss", "max", min_delta, None).resumed(record)
    for number, value in enumerate(values[cut:], cut + 1):
        again = again.after(10 * number, value)
    assert again == whole


def test_numbers_of_other_pairs_are_not_compared():
    rule = Selection("eval/loss", "min", 0.0, 2, data="a").after(2, 1.0)
    assert rule.resumed(rule.record()) == rule
    assert dataclasses.replace(rule, data="b").resumed(rule.record()) is None
    earlier = {name: value for name, value in rule.record().items() if name != "data"}
    assert rule.resumed(earlier) == rule, "an earlier version wrote no digest"


def test_another_metric_or_mode_starts_anew():
    record = selection_of([1.0]).record()
    assert Selection("eval/loss", "min", 0.0, None).resumed(record) is None
    assert Selection("eval/margin", "max", 0.0, None).resumed(record) is None
    assert Selection(None, "max", 0.0, None).record() is None
