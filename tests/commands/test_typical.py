"""Typical lengths: their means and tails, how they are cut, and that they are always the same."""

import numpy as np
import pytest

from sr_dpo_jax.commands.compile.typical import LENGTHS, typical_pairs
from sr_dpo_jax.data.tokens import truncate

UNCUT = {"max_length": 10**6, "max_prompt_length": 10**5}


def pairs_of(format="hh_rlhf", **changed):
    given = {"least_pairs": 0, "head_tokens": 0, "augmentation_tokens": 7, **UNCUT} | changed
    return typical_pairs(format, **given)


@pytest.mark.parametrize("format", sorted(LENGTHS))
def test_the_means_are_those_that_are_stated(format):
    pairs, typical = pairs_of(format), LENGTHS[format]
    assert len(pairs) == typical.pairs
    for name in ("prompt", "chosen", "rejected"):
        assert getattr(pairs, f"{name}_tokens").mean() == pytest.approx(getattr(typical, name)[0], rel=0.03)
    assert (len(pairs.head), len(pairs.augmentation)) == (0, 7)


def test_the_tail_of_hh_prompts():
    assert np.quantile(pairs_of().prompt_tokens, 0.95) == pytest.approx(326, rel=0.03)


def test_they_are_always_the_same():
    np.testing.assert_array_equal(pairs_of().offsets, pairs_of().offsets)


def test_they_are_cut_as_training_cuts():
    limits = {"max_length": 200, "max_prompt_length": 120}
    whole, cut = pairs_of(head_tokens=3), pairs_of(head_tokens=3, **limits)
    changed = 0
    for index in range(2000):
        lengths = [len(ids) for ids in whole.pair(index)]
        expected = truncate(*(list(range(n)) for n in lengths), 3, prompt_truncation="keep_end", **limits)
        assert [len(ids) for ids in cut.pair(index)] == [len(ids) for ids in expected]
        changed += lengths != [len(ids) for ids in expected]
    assert changed > 100


def test_more_pairs_where_a_step_needs_them():
    assert len(pairs_of("ultrafeedback", least_pairs=100_000)) == 100_000
