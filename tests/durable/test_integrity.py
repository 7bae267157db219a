"""Digests of a checkpoint: every damaged byte is found, and a step counts only when all processes have verified it."""

import json
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from sr_dpo_jax.durable import integrity
from sr_dpo_jax.durable.integrity import Damaged, Shard, Unverified


def tree():
    mesh = jax.make_mesh((8,), ("fsdp",))
    sharded = jax.device_put(np.arange(4096, dtype=np.float32), jax.NamedSharding(mesh, jax.P("fsdp")))
    everywhere = jax.device_put(np.arange(300, dtype=np.float32), jax.NamedSharding(mesh, jax.P()))
    return {"params": {"matrix": sharded}, "moments": (everywhere,)}


@pytest.fixture(scope="module")
def verified(tmp_path_factory):
    """A step as the checkpointer writes it, with its digests."""
    step = tmp_path_factory.mktemp("saved") / "6"
    arguments = ocp.args.Composite(state=ocp.args.StandardSave(tree()), position=ocp.args.JsonSave({"next_step": 6}))
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(step, args=arguments)
    shards = integrity.digest_shards(integrity.host_shards(tree()))
    integrity.check_shards(step, shards)
    integrity.write(step, shards, process=0, processes=1)
    return step


@pytest.fixture
def step(verified, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(verified, tmp_path / "6")


def files_of(step):
    return sorted(path for path in step.rglob("*") if path.is_file() and path.stat().st_size)


def test_what_was_saved_is_verified(verified):
    assert integrity.is_verified(verified)
    integrity.check(verified)
    for prefix in ("params.", "moments.", "no such array"):
        integrity.check(verified, prefix=prefix)


def test_a_flipped_bit_of_any_file_is_found(step):
    for path in files_of(step):
        content = path.read_bytes()
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(Damaged):
            integrity.check(step)
        path.write_bytes(content)
    integrity.check(step)


def test_a_file_that_is_gone_is_named(step):
    file = next(path for path in files_of(step) if path.parent.name == "position")
    file.unlink()
    with pytest.raises(Damaged, match=rf"position/{file.name} cannot be read \(No such file"):
        integrity.check(step)


def test_digests_that_are_damaged_themselves_vouch_for_nothing(step):
    (path,) = (step / "digests").iterdir()
    path.write_text(json.dumps(json.loads(path.read_text()) | {"content": '{"shards": [], "files": {}}'}))
    with pytest.raises(Damaged, match=r"0-of-1\.json does not match its own digest"):
        integrity.check(step)
    path.write_text("{half")
    with pytest.raises(Damaged, match="cannot be read"):
        integrity.check(step)


def test_an_array_is_checked_by_itself_without_the_others(step):
    """The digest of one array is wrong: a prefix that leaves it out passes, and one that holds it names it."""
    (path,) = (step / "digests").iterdir()
    content = json.loads(json.loads(path.read_text())["content"])
    for shard in content["shards"]:
        if shard[0].startswith("moments."):
            shard[2] = "0" * 32
    text = json.dumps(content)
    path.write_text(json.dumps({"digest": integrity._digest_of_text(text), "content": text}))
    integrity.check(step, prefix="params.")
    with pytest.raises(Damaged, match=r"moments\.0\[\(0, 300\)\] does not match its digest"):
        integrity.check(step, prefix="moments.")


def test_shares_divide_the_reading_and_cover_all(step, monkeypatch):
    read = []
    monkeypatch.setattr(integrity, "check_shards", lambda directory, shards: read.append(list(shards)))
    integrity.check(step)
    for part in range(3):
        integrity.check(step, share=(part, 3))
    whole, *parts = read
    assert len(whole) == 9 and [len(part) for part in parts] == [3, 3, 3]
    assert {shard for part in parts for shard in part} == set(whole)
    monkeypatch.undo()
    position = next(path for path in files_of(step) if path.parent.name == "position")
    position.write_text("{}")
    found = 0
    for part in range(3):
        try:
            integrity.check(step, share=(part, 3))
        except Damaged:
            found += 1
    assert found == 1, "each file is read by one process"


def test_a_step_is_verified_when_every_process_has_written_its_digests(step):
    shards = integrity.digest_shards(integrity.host_shards(tree()))
    shutil.rmtree(step / "digests")
    theirs = step / "state" / "ocdbt.process_1" / "d" / "abc"
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"what process 1 wrote")
    for process in (0, 1):
        assert not integrity.is_verified(step)
        with pytest.raises(Unverified, match="never verified"):
            integrity.check(step)
        integrity.write(step, shards[process::2], process=process, processes=2)
    assert integrity.is_verified(step)
    integrity.check(step)
    ours, other = sorted((step / "digests").iterdir())
    assert (ours.name, other.name) == ("0-of-2.json", "1-of-2.json")
    files = [set(json.loads(json.loads(path.read_text())["content"])["files"]) for path in (ours, other)]
    assert files[1] == {"state/ocdbt.process_1/d/abc"} and len(files[0]) > 3, "each digests the files that it wrote"
    assert not files[0] & files[1]
    with pytest.raises(Unverified):
        integrity.check(step.parent / "no such step")


def test_what_the_disk_gives_back_is_compared_with_what_was_on_the_devices(step):
    right = integrity.digest_shards(integrity.host_shards(tree()))
    integrity.check_shards(step, right)
    for wrong, message in (
        (Shard(right[0].name, right[0].ranges, "0" * 32), "does not match its digest"),
        (Shard("params.other", ((0, 1),), "0" * 32), "cannot be opened"),
    ):
        with pytest.raises(Damaged, match=message):
            integrity.check_shards(step, [*right, wrong])


def test_a_shard_is_named_by_its_place_and_digested_by_type_shape_and_bytes():
    array = np.arange(12, dtype=np.float32)
    assert integrity.digest_of(array) != integrity.digest_of(array.reshape(3, 4))
    assert integrity.digest_of(array) != integrity.digest_of(array.view(np.int32))
    mesh = jax.make_mesh((8,), ("fsdp",))
    sharded = jax.device_put(np.arange(32.0), jax.NamedSharding(mesh, jax.P("fsdp")))
    everywhere = jax.device_put(np.arange(3.0), jax.NamedSharding(mesh, jax.P()))
    shards = integrity.host_shards({"a": {"b": sharded}, "c": (everywhere,)})
    assert [(name, ranges) for name, ranges, _ in shards] == [
        *(("a.b", ((4 * part, 4 * part + 4),)) for part in range(8)),
        ("c.0", ((0, 3),)),
    ]


def test_p5_values_that_are_not_finite_are_never_verified():
    for bad in (np.nan, np.inf):
        with pytest.raises(FloatingPointError, match="params"):
            integrity.digest_shards([("params", ((0, 2),), np.array([1.0, bad], np.float32))])
