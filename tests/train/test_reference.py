"""The cache of the reference's scores: kept, found again, gone on with, and never believed against the model."""

import numpy as np
import pytest
from runs import model_directory, preference_file, tiny_setup

from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.train.reference import KINDS, _save, cache_files

pytestmark = pytest.mark.usefixtures("same_programs")

PAIRS = 19


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    return model_directory(root / "model"), preference_file(root / "train.jsonl", PAIRS, seed=1)


@pytest.fixture
def scored(world, tmp_path):
    """Makes the scored set anew, as another start does; the cache is the same."""
    setup, pairs, _ = tiny_setup(tmp_path, *world)
    return lambda: (setup, setup.scored_set("training", pairs))


def files_of(held):
    return sorted(held.reference._files[0].parent.glob("reference-*"))


def test_scores_are_found_again_and_equal_those_of_the_model(scored):
    setup, held = scored()
    params = setup.model.base_params()
    assert not held.reference.complete and not files_of(held)
    held.fill_reference(params)
    plain = held.scores(params)
    np.testing.assert_array_equal(held.reference.scores[..., 0], plain.plain)
    np.testing.assert_array_equal(held.reference.scores[..., 1], plain.augmented)
    _, again = scored()
    assert again.reference.complete and again.reference.digest == held.reference.digest
    assert [file.name.split("-")[1] for file in files_of(again)] == ["augmented", "plain"]


def test_a_killed_run_goes_on_with_the_first_missing_pair(scored):
    setup, held = scored()
    params, done = setup.model.base_params(), []

    class Killed(BaseException):
        pass

    def stop():
        done.append(1)
        if len(done) == 2:
            raise Killed

    with pytest.raises(Killed):
        held.fill_reference(params, stop)
    _, again = scored()
    known = np.isfinite(again.reference.scores).all(axis=(1, 2))
    assert 0 < known.sum() < PAIRS and not again.reference.complete
    before, steps = again.reference.scores[known].copy(), []
    again.fill_reference(params, lambda: steps.append(1))
    assert again.reference.complete and len(steps) == len(again.feed.source) - 2
    np.testing.assert_array_equal(again.reference.scores[known], before)


def test_a_flipped_bit_is_a_miss_and_said(scored, caplog):
    setup, held = scored()
    held.fill_reference(setup.model.base_params())
    damaged = files_of(held)[1]
    content = bytearray(damaged.read_bytes())
    content[-3] ^= 0x40
    damaged.write_bytes(content)
    _, again = scored()
    assert not again.reference.complete
    assert f"{damaged} is damaged" in caplog.text


@pytest.mark.parametrize("kind", [0, 1])
def test_numbers_of_another_model_are_found_by_scoring_pairs_again(scored, caplog, kind):
    """Files with a right key and digest: no digest can tell that the code or a device has changed."""
    setup, held = scored()
    params = setup.model.base_params()
    held.fill_reference(params)
    other = held.reference.scores.copy()
    other[..., kind] -= 0.5
    _save(other, held.reference._files)
    _, again = scored()
    again.reference.spot_check(again.score_step, params, dtype="float32")
    assert np.isnan(again.reference.scores).all()
    assert "all are computed again" in caplog.text and KINDS[kind] in caplog.text


def test_the_same_numbers_pass_the_check_and_an_empty_cache_claims_nothing(scored, caplog):
    caplog.set_level("INFO")
    setup, held = scored()
    params = setup.model.base_params()
    held.reference.spot_check(held.score_step, params, dtype="float32")
    assert "scored again" not in caplog.text
    held.fill_reference(params)
    held.reference.spot_check(held.score_step, params, dtype="float32")
    assert held.reference.complete and "random pairs scored again, as they were" in caplog.text


def test_a_key_holds_all_that_the_numbers_depend_on(world, tmp_path):
    _, pairs, _ = tiny_setup(tmp_path, *world)
    _, other_p, _ = tiny_setup(tmp_path, *world, refinement={"prompt": "Be brief. "})

    def names(of=pairs, weights="a", dtype="float32 float32", **options):
        found = cache_files(tmp_path, of, weights_digest=weights, dtype=dtype, augmented=True, **options)
        return [file.name for file in found]

    assert names() == names()
    assert names() == names(ld_alpha=None)
    for changed in (names(weights="b"), names(dtype="bfloat16 float32"), names(ld_alpha=0.0)):
        assert not set(changed) & set(names())
    assert not set(names(ld_alpha=0.0)) & set(names(ld_alpha=0.5))
    plain, augmented = names(other_p)
    assert plain == names()[0] and augmented != names()[1], "p decides the augmented scores alone"


def test_a_cache_that_cannot_be_written_is_named_and_a_directory_in_its_place_is_set_aside(tmp_path):
    scores, file = np.zeros((2, 2, 1), np.float32), tmp_path / "cache" / "reference.safetensors"
    file.mkdir(parents=True)
    _save(scores, (file,))
    assert file.is_file() and len(list(file.parent.iterdir())) == 2
    (tmp_path / "full").write_text("x")
    with pytest.raises(UsageError, match=r"full: cannot be written .*cache_dir"):
        _save(scores, (tmp_path / "full" / "reference.safetensors",))
