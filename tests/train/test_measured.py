"""Since when the evaluations of a run are of the held-out pairs that are there now, and when they are done anew."""

import dataclasses

import pytest

from sr_dpo_jax.train.measured import measured_sets


@dataclasses.dataclass
class Pairs:
    fingerprint: str


def since(measured):
    return {name: one["since"] for name, one in measured.items()}


def test_a_new_run_counts_all_of_its_evaluations():
    measured, anew = measured_sets({}, {"eval": Pairs("a")}, step=0, ended=False)
    assert measured == {"eval": {"digest": "a", "since": 0}} and not anew


@pytest.mark.parametrize(("ended", "counts_from"), [(False, 7), (True, 6)])
def test_exchanged_pairs_count_from_where_they_are_measured(ended, counts_from):
    """A run that has ended is measured anew; another one will be, at its next evaluation."""
    before = {"measured": {"eval": {"digest": "a", "since": 0}, "eval/more": {"digest": "b", "since": 4}}}
    sets = {"eval": Pairs("other"), "eval/more": Pairs("b")}
    measured, anew = measured_sets(before, sets, step=6, ended=ended)
    assert since(measured) == {"eval": counts_from, "eval/more": 4} and anew == ended
    assert measured_sets({"measured": measured}, sets, step=6, ended=True) == (measured, False)


def test_a_set_that_was_not_there_and_a_checkpoint_that_does_not_say_are_measured():
    for before in ({"measured": {}}, {"next_step": 6}):
        measured, anew = measured_sets(before, {"eval": Pairs("a")}, step=6, ended=True)
        assert since(measured) == {"eval": 6} and anew
    assert measured_sets({"next_step": 6}, {}, step=6, ended=True) == ({}, False)
