"""Damaged, half-written and foreign checkpoints: the promises P2, P3, P4 and P5 of the README, bit by bit."""

import contextlib
import os
import random
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from runs import make_config, metrics_of, model_directory, preference_file, raw_config, state_of, verified_steps

from sr_dpo_jax.cli import main
from sr_dpo_jax.durable import integrity
from sr_dpo_jax.durable.checkpoint import Checkpoints
from sr_dpo_jax.errors import RunError, UsageError
from sr_dpo_jax.train import identity as manifest
from sr_dpo_jax.train.loop import train
from sr_dpo_jax.train.program import make_program
from sr_dpo_jax.train.setup import read_model, set_up

pytestmark = [pytest.mark.faults, pytest.mark.usefixtures("same_programs")]

FLIPS, TRUNCATIONS = 30, 5


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    return model_directory(root / "model"), preference_file(root / "train.jsonl", 50, seed=1)


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """A run on eight devices with verified checkpoints at steps 2, 4 and 6."""
    root = tmp_path_factory.mktemp("finished")
    config = make_config(root, *world, checkpoint={"every_steps": 2, "keep": 3})
    assert train(config) == 0
    assert verified_steps(config.output_dir) == [2, 4, 6]
    return root


@pytest.fixture
def run(finished, tmp_path):
    """A copy that a test may damage."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path / "run"


def files_of(step_directory: Path) -> list[Path]:
    return sorted(file for file in step_directory.rglob("*") if file.is_file() and file.stat().st_size)


def largest_file(directory: Path) -> Path:
    """Where most of the arrays are."""
    return max(files_of(directory), key=lambda file: (file.stat().st_size, file))


def newest_good(run, **options):
    checkpoints = Checkpoints(run, **options)
    try:
        return checkpoints.newest_good()
    finally:
        checkpoints.close()


def flip(file: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def test_p2_flipped_bits_never_pass(run):
    """30 bits, half of them where most of the arrays are: each is detected, and without it the step is good again."""
    rng = random.Random(0)
    step = run / "checkpoints" / "6"
    for _ in range(FLIPS):
        file = rng.choice(files_of(step)) if rng.random() < 0.5 else largest_file(step)
        before = file.read_bytes()
        flip(file, rng)
        with pytest.raises((integrity.Damaged, integrity.Unverified)):
            integrity.check(step)
        file.write_bytes(before)
    integrity.check(step)


def test_p2_a_flipped_bit_of_an_array_is_found_by_the_array_alone(run):
    """As evaluation and export read: parameters only, without the digests of the files that hold them."""
    rng = random.Random(1)
    step = run / "checkpoints" / "6"
    found, values = 0, state_of(run)
    # Which file holds the parameters, and how they are packed, differs from run to run, so any byte may be hit.
    files = files_of(step / "state")
    for flips in range(10 * FLIPS):
        if flips >= FLIPS and found:
            break
        (data,) = rng.choices(files, [file.stat().st_size for file in files])
        whole = data.read_bytes()
        flip(data, rng)
        try:
            integrity.check(step, prefix="params.")
        except integrity.Damaged:
            found += 1
        else:  # it hit the optimizer's state, or bytes that nothing reads
            now = values
            with contextlib.suppress(Exception):  # Orbax raises what it likes of bytes that it cannot unpack
                now = state_of(run)
            assert all(now[name].tobytes() == values[name].tobytes() for name in now if "params" in name)
        data.write_bytes(whole)
    assert found


@pytest.mark.parametrize("damage", ["truncated", "zeroed", "deleted"])
def test_p2_truncated_zeroed_and_deleted_files_are_walked_back_from(run, damage, caplog):
    rng = random.Random(damage)
    step = run / "checkpoints" / "6"
    large = sorted(files_of(step / "state"), key=lambda file: file.stat().st_size)[-TRUNCATIONS:]
    for file in large:
        before = file.read_bytes()
        if damage == "truncated":
            file.write_bytes(before[: rng.randrange(len(before))])
        elif damage == "zeroed":
            file.write_bytes(b"\0" * len(before))
        else:
            file.unlink()
        with pytest.raises(integrity.Damaged):
            integrity.check(step)
        file.write_bytes(before)
    integrity.check(step)
    large[-1].unlink()
    assert newest_good(run) == 4
    assert "passed over" in caplog.text and "checkpoints/6" in caplog.text
    assert (run / "checkpoints" / "6.damaged").is_dir(), "never deleted, and never counted as a checkpoint again"


def test_p2_the_same_command_goes_on_from_the_newest_good_step(run, world, finished):
    flip(
        sorted(files_of(run / "checkpoints" / "6" / "state"), key=lambda file: file.stat().st_size)[-1],
        random.Random(2),
    )
    assert train(make_config(run.parent, *world, checkpoint={"every_steps": 2, "keep": 3})) == 0
    assert verified_steps(run) == [2, 4, 6]
    ours, theirs = state_of(run), state_of(finished / "run")
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in theirs), "P3: bitwise, damage or not"


def test_p2_no_good_step_left_is_refused_and_nothing_is_overwritten(run, world):
    for step in (2, 4, 6):
        flip(
            sorted(files_of(run / "checkpoints" / str(step) / "state"), key=lambda f: f.stat().st_size)[-1],
            random.Random(3),
        )
    config = make_config(run.parent, *world, checkpoint={"every_steps": 2, "keep": 3})
    for _ in range(2):
        with pytest.raises(UsageError, match="none of the checkpoints"):
            train(config)
    assert {path.name for path in (run / "checkpoints").iterdir()} == {
        "last_verified",
        *(f"{step}.damaged" for step in (2, 4, 6)),
    }


def test_p2_strict_refuses_at_once(run, world):
    next(iter(files_of(run / "checkpoints" / "6" / "position"))).write_text("{}")
    with pytest.raises(UsageError, match=r"checkpoint\.strict"):
        train(make_config(run.parent, *world, checkpoint={"every_steps": 2, "strict": True}))
    assert (run / "checkpoints" / "6").is_dir()


def test_p2_half_written_and_foreign_directories_are_ignored(run, world, caplog):
    """An empty step, a copied half, a step without digests, Orbax's leavings; and step 8 can be saved all the same."""
    checkpoints = run / "checkpoints"
    (checkpoints / "8").mkdir()
    shutil.copytree(checkpoints / "6" / "state", checkpoints / "9" / "state")
    shutil.copytree(checkpoints / "6", checkpoints / "10")
    shutil.rmtree(checkpoints / "10" / "digests")
    (checkpoints / "11.orbax-checkpoint-tmp").mkdir()
    (checkpoints / "notes").mkdir()
    assert newest_good(run) == 6
    ignored = [record.message for record in caplog.records if "ignored" in record.message]
    assert len(ignored) == 1 and "notes" in ignored[0] and "11.orbax-checkpoint-tmp" in ignored[0]
    for step in (8, 9, 10):
        assert len([record for record in caplog.records if f"checkpoints/{step}: passed over" in record.message]) == 1
    longer = make_config(run.parent, *world, train={"epochs": 2}, checkpoint={"every_steps": 2, "keep": 9})
    assert train(longer, allowed_changes=["train.epochs"]) == 0
    assert verified_steps(run) == [2, 4, 6, 8, 10, 12]
    assert {"8.unverified", "9", "10.unverified", "notes"} <= {path.name for path in checkpoints.iterdir()}


def test_p2_latest_is_the_highest_verified_step_whatever_the_clock_says(run):
    for step, age in ((2, 0), (4, 10), (6, 10_000_000)):
        for file in [*files_of(run / "checkpoints" / str(step)), run / "checkpoints" / str(step)]:
            os.utime(file, (1_000_000_000 - age, 1_000_000_000 - age))
    assert newest_good(run) == 6


def test_p2_nothing_is_deleted_before_its_successor_is_verified(world, tmp_path, monkeypatch):
    """keep=1, and the second save is never verified: the first stays."""
    config = make_config(tmp_path, *world, checkpoint={"every_steps": 2, "keep": 1})
    honest = integrity.check_shards

    def dishonest(step_directory, shards):
        if step_directory.name != "2":
            raise integrity.Damaged("the disk gives back something else")
        honest(step_directory, shards)

    monkeypatch.setattr(integrity, "check_shards", dishonest)
    with pytest.raises(RunError, match="checkpoints before it are untouched"):
        train(config)
    monkeypatch.undo()
    assert verified_steps(config.output_dir) == [2]
    assert train(config) == 0
    assert verified_steps(config.output_dir) == [6], "and is deleted when there is a verified successor"


def test_p2_p5_a_bit_that_flips_while_it_is_written_is_noticed_and_saved_again(world, tmp_path, monkeypatch, caplog):
    """The bytes on the disk are compared with those on the devices, not with what the writer believes."""
    config = make_config(tmp_path, *world, checkpoint={"every_steps": 2})
    honest, flipped = integrity.check_shards, []

    def flip_once(step_directory, shards):
        if step_directory.name == "4" and not flipped:
            data = sorted(
                (step_directory / "state" / "ocdbt.process_0" / "d").iterdir(), key=lambda f: f.stat().st_size
            )[-1]
            whole, rng = data.read_bytes(), random.Random(4)
            while not flipped:
                flip(data, rng)
                try:
                    honest(step_directory, shards)
                    data.write_bytes(whole)  # it hit bytes that nothing reads
                except integrity.Damaged:
                    flipped.append(step_directory)
        honest(step_directory, shards)

    monkeypatch.setattr(integrity, "check_shards", flip_once)
    assert train(config) == 0
    assert flipped and "saving step 4 failed" in caplog.text and "trying once more" in caplog.text
    assert verified_steps(config.output_dir)[-1] == 6
    assert [line["step"] for line in metrics_of(config.output_dir)] == [1, 2, 3, 4, 5, 6]


def test_p5_exit_code_0_means_the_last_checkpoint_is_verified(world, tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw_config(tmp_path, *world, train={"max_steps": 2})), encoding="utf-8")

    def never(step_directory, shards):
        raise integrity.Damaged("the disk gives back something else")

    with monkeypatch.context() as patched:
        patched.setattr(integrity, "check_shards", never)
        assert main(["train", str(path)]) == 1
    assert verified_steps(tmp_path / "run") == []
    assert main(["train", str(path)]) == 0
    assert verified_steps(tmp_path / "run") == [2]


def test_p2_evaluation_and_export_never_read_damage(run, world, tmp_path, capsys):
    path = run.parent / "config.yaml"
    raw = raw_config(run.parent, *world, data={"eval_path": str(world[1])})
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    for file in files_of(run / "checkpoints" / "6" / "state" / "ocdbt.process_0" / "d"):
        file.write_bytes(b"\0" * file.stat().st_size)
    assert main(["export", str(run), str(tmp_path / "out"), "--step", "6"]) == 2
    assert "checkpoints/6: params." in capsys.readouterr().err
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    assert main(["eval", str(path)]) == 0
    assert "step                         4" in capsys.readouterr().out
    assert (run / "checkpoints" / "6").is_dir(), "reading changes nothing"


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"replica": 2, "fsdp": 2, "tensor": 2}])
def test_p4_any_mesh_restores_every_value_bitwise(finished, world, sizes):
    """Saved on 8 devices, fsdp 8; checked and restored on other meshes."""
    mesh = {"replica": 1, "fsdp": 1, "tensor": 1} | sizes
    config = make_config(finished, *world, mesh=mesh)
    directory, _ = read_model(config)
    setup = set_up(config, directory)
    optimizer = config.optimizer.model_dump()
    wanted = make_program(setup.model, setup.objective, optimizer, pairs=8, total_steps=6).state
    checkpoints = Checkpoints(finished / "run", read_only=True)
    step = checkpoints.newest_good()
    state, position = checkpoints.restore(wanted.tree(), step=step), checkpoints.restore_position(step)
    checkpoints.close()
    assert (step, position["next_step"], int(state["step"])) == (6, 6, 6)
    saved = state_of(finished / "run")
    held = {"['step']": state["step"]}
    for name in ("params", "optimizer_state"):
        held |= {
            f"['{name}']{jax.tree_util.keystr(path)}": leaf for path, leaf in jax.tree.leaves_with_path(state[name])
        }
    params = {name: leaf for name, leaf in held.items() if "optimizer_state" not in name}
    assert len(params) > 10
    for name, leaf in params.items():
        assert np.asarray(leaf).tobytes() == saved[name].tobytes(), name
    moments = sorted(np.asarray(leaf).tobytes() for name, leaf in held.items() if "optimizer_state" in name)
    assert moments == sorted(saved[name].tobytes() for name in saved if "optimizer_state" in name)


@pytest.mark.usefixtures("programs_anew")
def test_p3_any_number_of_interruptions_is_bitwise(finished, world, tmp_path):
    for steps in (1, 2, 3, 4, 5, None):
        assert train(make_config(tmp_path, *world, train={"max_steps": steps})) == 0
    ours, theirs = state_of(tmp_path / "run"), state_of(finished / "run")
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in theirs)


CHANGES = {
    "objective.beta": {"objective": {"beta": 0.2}},
    "objective.lam": {"objective": {"lam": 0.1}},
    "objective.name": {"objective": {"name": "sr_ipo"}},
    "batch.pairs_per_step": {"batch": {"pairs_per_step": 4}},
    "seed": {"seed": 1},
    "train.epochs": {"train": {"epochs": 2}},
    "optimizer.learning_rate": {"optimizer": {"learning_rate": 2e-3}},
    "refinement.prompt": {"refinement": {"prompt": "Another instruction: "}},
}


@pytest.mark.parametrize("key", CHANGES)
def test_p7_a_changed_run_is_refused_with_a_diff(finished, world, key):
    with pytest.raises(UsageError, match="was reached by another run") as refused:
        train(make_config(finished, *world, **CHANGES[key]))
    lines = [line for line in str(refused.value).splitlines() if line.strip().startswith(f"{key}:")]
    assert len(lines) == 1 and " -> " in lines[0] and f"--allow-change {key}" in str(refused.value)
    assert "Another instruction" not in str(refused.value)


def test_p7_one_changed_byte_and_two_swapped_rows_of_the_data_are_refused(run, world, tmp_path):
    rows = world[1].read_text(encoding="utf-8").splitlines(keepends=True)
    for number, changed in enumerate(([rows[1], rows[0], *rows[2:]], [rows[0].replace("Answer", "answer"), *rows[1:]])):
        file = tmp_path / f"changed{number}.jsonl"
        file.write_text("".join(changed), encoding="utf-8")
        with pytest.raises(UsageError, match=r"data\.path: [0-9a-f]{16} -> [0-9a-f]{16}"):
            train(make_config(run.parent, world[0], file))


def test_p7_allow_change_goes_on_and_says_so(run, world, caplog, capsys):
    path = run.parent / "config.yaml"
    raw = raw_config(run.parent, *world, objective={"beta": 0.2, "lam": 0.1}, train={"epochs": 1})
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    assert main(["train", str(path), "--allow-change", "objective.beta"]) == 2
    assert "objective.lam: 0.5 -> 0.1" in capsys.readouterr().err
    assert main(["train", str(path), "--allow-change", "objective.bta"]) == 2
    assert "no such key" in capsys.readouterr().err
    assert main(["train", str(path), "--allow-change", "objective.beta", "--allow-change", "objective.lam"]) == 0
    assert "objective.beta: 0.1 -> 0.2" in caplog.text


def test_p3_other_versions_are_said_and_with_strict_refused(run, world, monkeypatch, caplog):
    now = manifest.software()
    monkeypatch.setattr(manifest, "software", lambda: {**now, "jax": "99.0"})
    assert train(make_config(run.parent, *world)) == 0
    assert f"jax: {now['jax']} -> 99.0" in caplog.text
    with pytest.raises(UsageError, match=r"checkpoint\.strict=true asks for the same versions"):
        train(make_config(run.parent, *world, checkpoint={"strict": True}))
