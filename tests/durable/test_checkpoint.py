"""Checkpoints of a tiny state: saved, verified, kept, passed over when damaged, and restored bit by bit on any mesh."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sr_dpo_jax.durable import integrity
from sr_dpo_jax.durable.checkpoint import Checkpoints
from sr_dpo_jax.errors import RunError, UsageError

METRIC = {"metric": "eval/loss", "mode": "min", "counted_from": 1.0, "waited": 0}


def state_of(step, *, devices=8, size=64):
    """A state whose every value tells its step, sharded over so many devices."""
    mesh = jax.make_mesh((devices,), ("fsdp",), devices=jax.devices()[:devices])
    sharding = jax.NamedSharding(mesh, jax.P("fsdp"))
    matrix = jax.device_put(jnp.arange(size, dtype=jnp.float32) + step, sharding)
    return {
        "step": jnp.int32(step),
        "params": {"layer": {"matrix": matrix}},
        "optimizer_state": {"moment": matrix * 0.5},
    }


def shapes_of(state):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


@pytest.fixture
def checkpoints(tmp_path):
    opened = []

    def open_them(**options):
        opened.append(Checkpoints(tmp_path / "run", **options))
        return opened[-1]

    yield open_them
    for one in opened:
        one.close()


def save(checkpoints, *steps, best=None):
    """Saves and verifies steps; the position of each names the best of the run so far."""
    for step in steps:
        position = {"next_step": step, "selection": None if best is None else {**METRIC, "step": best, "value": 1.0}}
        checkpoints.save(step, state_of(step), position=position, config={"seed": 0}, best=best)
        assert not checkpoints.await_save()


def damage(checkpoints, step):
    files = [path for path in (checkpoints.directory / str(step) / "state").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)


def names_in(checkpoints):
    return {path.name for path in checkpoints.directory.iterdir()}


def test_a_state_comes_back_bit_by_bit_on_another_mesh(checkpoints):
    with checkpoints() as writer:
        save(writer, 3)
    reader = checkpoints(read_only=True)
    assert reader.newest_good() == 3
    restored = reader.restore(shapes_of(state_of(0, devices=2)), step=3)
    assert reader.restore_position(3) == {"next_step": 3, "selection": None}
    for ours, saved in zip(jax.tree.leaves(restored), jax.tree.leaves(state_of(3)), strict=True):
        assert np.asarray(ours).tobytes() == np.asarray(saved).tobytes() and ours.dtype == saved.dtype
    assert len(restored["params"]["layer"]["matrix"].sharding.device_set) == 2


def test_another_model_is_refused(checkpoints):
    writer = checkpoints()
    save(writer, 1)
    with pytest.raises(UsageError, match="does not fit the configured model"):
        writer.restore(shapes_of(state_of(0, size=128)), step=1)
    writer.check_params({"layer.matrix": (64,)}, step=1)
    with pytest.raises(UsageError, match=r"layer\.matrix: \(64,\), the model has \(128,\)"):
        writer.check_params({"layer.matrix": (128,)}, step=1)


def test_a_good_step_is_read_without_a_word_of_warning(checkpoints, caplog):
    writer = checkpoints()
    save(writer, 1)
    reader = checkpoints(read_only=True)
    step = reader.existing(None)
    reader.check_params({"layer.matrix": (64,)}, step=step)
    reader.read_params(["layer.matrix"], step=step)
    assert not [record.message for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


def test_nothing_saved_is_no_checkpoint_and_reading_makes_no_directory(checkpoints):
    reader = checkpoints(read_only=True)
    assert reader.newest_good() is None and not reader.directory.exists()
    with pytest.raises(UsageError, match="no checkpoint"):
        reader.existing(None)
    with pytest.raises(UsageError, match="no checkpoint of step 4"):
        reader.existing(4)


def test_a_damaged_step_is_passed_over_kept_and_said(checkpoints, caplog):
    writer = checkpoints()
    save(writer, 1, 2)
    damage(writer, 2)
    with pytest.raises(UsageError, match=r"checkpoint\.strict"):
        checkpoints(strict=True).newest_good()
    assert names_in(writer) == {"1", "2", "last_verified"}
    assert writer.newest_good() == 1 and "2: passed over" in caplog.text
    assert names_in(writer) == {"1", "2.damaged", "last_verified"}
    damage(writer, 1)
    (writer.directory / "last_verified").rename(writer.directory / "hidden")
    with pytest.raises(UsageError, match="none of the checkpoints"):
        writer.newest_good()
    (writer.directory / "hidden").rename(writer.directory / "last_verified")
    assert names_in(writer) == {"1.damaged", "2.damaged", "last_verified"}
    with pytest.raises(UsageError, match="none of the checkpoints"):
        writer.newest_good()  # there was one: to start from step 0 would hide the loss


def test_older_ones_are_deleted_but_never_the_best(checkpoints):
    writer = checkpoints(keep=2)
    save(writer, 1, 2, 3, best=1)
    assert writer.verified_steps() == [1, 2, 3]
    save(writer, 4, best=1)
    assert writer.verified_steps() == [1, 3, 4]
    assert writer.best() == 1
    save(writer, 5, best=5)
    assert writer.verified_steps() == [4, 5], "an older best goes when its successor is verified"


def test_a_run_without_a_best_says_so(checkpoints):
    writer = checkpoints()
    save(writer, 1)
    with pytest.raises(UsageError, match=r"checkpoint\.best_metric was not set"):
        writer.best()
    position = {"next_step": 2, "selection": {**METRIC, "step": None, "value": None}}
    writer.save(2, state_of(2), position=position, config={})
    writer.await_save()
    with pytest.raises(UsageError, match="eval/loss was never measured"):
        writer.best()


def test_a_save_that_fails_is_tried_once_more_and_then_fatal(checkpoints, monkeypatch):
    writer = checkpoints(keep=1)
    save(writer, 1)

    def dishonest(step_directory, shards):
        raise integrity.Damaged("the disk gives back something else")

    monkeypatch.setattr(integrity, "check_shards", dishonest)
    writer.save(2, state_of(2), position={}, config={})
    assert writer.await_save(), "save it again"
    writer.save(3, state_of(3), position={}, config={})
    with pytest.raises(RunError, match=r"saving step 3 failed .*something else.* before it are untouched"):
        writer.await_save()
    monkeypatch.undo()
    assert writer.verified_steps() == [1], "nothing is deleted before its successor is verified"
    assert writer.newest_good() == 1
    save(writer, 2)
    assert "2.unverified" in names_in(writer) and writer.verified_steps() == [2]


def test_what_cannot_be_mended_is_fatal_at_once(checkpoints, monkeypatch):
    writer = checkpoints()
    state = state_of(1)
    state["params"]["layer"]["matrix"] = jnp.full(64, jnp.nan)
    writer.save(1, state, position={}, config={})
    with pytest.raises(RunError, match="not finite"):
        writer.await_save()
    monkeypatch.setattr(integrity, "check_shards", lambda *arguments: 1 / 0)
    again = checkpoints()
    again.save(2, state_of(2), position={}, config={}, best=2)
    with pytest.raises(RunError, match="saving step 2 failed"):
        again.await_save()  # the best one, whose state is gone at the next step


def test_finishing_asks_for_a_verified_last_step(checkpoints):
    writer = checkpoints(keep=1)
    save(writer, 1, 2)
    writer.finish(2)
    assert writer.verified_steps() == [2]
    with pytest.raises(RunError, match="step 3 was not verified"):
        writer.finish(3)


def test_a_second_save_waits_to_be_asked_about_the_first(checkpoints):
    writer = checkpoints()
    writer.save(1, state_of(1), position={}, config={})
    with pytest.raises(RuntimeError, match="await_save"):
        writer.save(2, state_of(2), position={}, config={})
    assert not writer.await_save() and not writer.await_save()


def test_half_deleted_directories_are_deleted_at_the_next_start(checkpoints):
    writer = checkpoints()
    save(writer, 1)
    (writer.directory / "0.deleting").mkdir()
    checkpoints(read_only=True)
    assert "0.deleting" in names_in(writer), "reading changes nothing"
    checkpoints()
    assert names_in(writer) == {"1", "last_verified"}


def test_files_with_the_names_of_directories_stop_no_run(checkpoints, tmp_path, caplog):
    """Nor a directory with the name of a file; what is in the way is kept, what is not in the way is left alone."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("x")
    first = checkpoints()
    for name in ("2.deleting", "2.replaced"):
        (first.directory / name).write_text("x")
    (first.directory / "odd.replaced").mkdir()
    (first.directory / "last_verified").mkdir()
    second = checkpoints()
    save(second, 4)
    assert second.newest_good() == 4 and (second.directory / "last_verified").read_text() == "4\n"
    assert {"2.deleting", "2.replaced", "odd.replaced"} <= {path.name for path in second.directory.iterdir()}
    assert len(list((tmp_path / "run").glob("checkpoints.damaged-*"))) == 1 and "is no directory" in caplog.text


def manifest(checkpoints, run_id):
    (checkpoints.directory.parent / "manifest.json").write_text(json.dumps({"run_id": run_id}), encoding="utf-8")


def save_of(checkpoints, run_id, *steps):
    checkpoints.run_id = run_id
    for step in steps:
        checkpoints.save(step, state_of(step), position={"next_step": step, "run_id": run_id}, config={})
        assert not checkpoints.await_save()


def test_a_step_under_another_number_is_named_and_never_counted(checkpoints, caplog):
    """With keep=1 the copy as 9999 would make every new step an older one, to be deleted."""
    one = checkpoints(keep=1)
    save(one, 2)
    shutil.copytree(one.directory / "2", one.directory / "9999")
    save(one, 4)
    assert names_in(one) == {"4", "9999", "last_verified"}
    assert one.verified_steps() == [4] and one.newest_good() == 4
    assert "9999: passed over: it holds step 2: it was copied or renamed" in caplog.text
    with pytest.raises(UsageError, match="9999: it holds step 2"):
        one.existing(9999)
    (one.directory / "4").rename(one.directory / "away")
    (one.directory / "9999").rename(one.directory / "4")
    with pytest.raises(UsageError, match=r"none of the checkpoints \[4\] can be used"):
        one.newest_good()
    assert names_in(one) == {"4", "away", "last_verified"}, "what does not belong is neither deleted nor renamed"


def test_two_steps_that_were_swapped_are_neither_loaded_nor_deleted(checkpoints):
    one = checkpoints(keep=1)
    save(one, 2)
    two = checkpoints(keep=5)
    save(two, 3)
    for source, target in (("2", "a"), ("3", "2"), ("a", "3")):
        (one.directory / source).rename(one.directory / target)
    save(one, 4)
    assert names_in(one) == {"2", "3", "4", "last_verified"}
    assert one.newest_good() == 4


def test_a_step_of_another_run_is_named_and_never_counted(checkpoints, caplog):
    one = checkpoints(keep=1)
    manifest(one, "ours")
    save_of(one, "theirs", 6)
    save_of(one, "ours", 4)
    assert names_in(one) == {"4", "6", "last_verified"}
    again = checkpoints(read_only=True)
    assert again.run_id == "ours" and again.newest_good() == 4
    assert "6: passed over: it is a checkpoint of another run (theirs, this is ours)" in caplog.text
    assert checkpoints().recorded_run_id() == "ours"


def test_a_step_that_is_saved_again_stays_until_its_successor_is_verified(checkpoints, monkeypatch):
    one = checkpoints(keep=2)
    save(one, 2, 4)
    with monkeypatch.context() as patch:
        patch.setattr(integrity, "check_shards", fail)
        one.save(4, state_of(40), position={"next_step": 4, "evaluation_due": False}, config={})
        assert one.await_save(), "it has failed"
    assert names_in(one) == {"2", "4", "4.replaced", "last_verified"}
    again = checkpoints(keep=2)  # another start gives the verified one its place back
    assert again.newest_good() == 4
    restored = again.restore(shapes_of(state_of(4)), step=4)
    np.testing.assert_array_equal(restored["params"]["layer"]["matrix"], np.arange(64) + 4)
    assert {"4", "4.unverified"} <= names_in(again) and "4.replaced" not in names_in(again)
    again.save(4, state_of(41), position={"next_step": 4}, config={})
    assert not again.await_save()
    restored = again.restore(shapes_of(state_of(4)), step=4)
    np.testing.assert_array_equal(restored["params"]["layer"]["matrix"], np.arange(64) + 41)
    assert "4.replaced" not in names_in(again)


def fail(*_):
    raise integrity.Damaged("as a bad disk would give it back")


def test_a_step_that_is_pruned_while_it_is_judged_is_one_error(checkpoints, monkeypatch):
    """Another run keeps one step and has written a newer one: nothing is damaged."""
    writing = checkpoints()
    save(writing, 1)
    check = integrity.check

    def pruned(path, **options):
        shutil.rmtree(path)
        check(path, **options)

    monkeypatch.setattr(integrity, "check", pruned)
    with pytest.raises(UsageError, match=r"1: was deleted while it was read, .*run this again"):
        checkpoints(read_only=True).newest_good()
