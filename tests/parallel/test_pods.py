"""The same run on one device, on eight in a mesh of three axes, and in four real processes: the same five steps.

`test_loop.test_two_processes_equal_one` compares two processes with one, `test_mesh.py` other meshes of eight devices.
"""

import jax
import pytest
from runs import metrics_of, model_directory, preference_file, raw_config, run_process, run_processes, written

from sr_dpo_jax.cli import main

pytestmark = pytest.mark.slow
STEPS = 5
LAYOUTS = {
    "2 x 2 x 2": (1, 8, {"replica": 2, "fsdp": 2, "tensor": 2}),
    "4 processes": (4, 1, {"replica": 2, "fsdp": 2}),
}


def losses(root, model, data, processes, devices, mesh):
    """Gives loss, margin and augmented margin of each step of a run of processes with `devices` CPU devices each.

    One process with as many devices as this one has runs in it.
    """
    raw = raw_config(
        root,
        model,
        data,
        mesh={"replica": 1, "fsdp": 1, "tensor": 1, **mesh},
        train={"max_steps": STEPS},
        optimizer={"name": "adamw", "learning_rate": 1e-4, "warmup_steps": 2},
    )
    root.mkdir()
    arguments = ["train", written(root, raw)]
    if (processes, devices) == (1, jax.device_count()):
        assert main(arguments) == 0
    else:
        alone = processes == 1
        started = [run_process(arguments, devices=devices)] if alone else run_processes(arguments, processes=processes)
        outputs = [process.communicate(timeout=500)[0] for process in started]
        assert [process.returncode for process in started] == [0] * processes, "\n".join(outputs)
    return [(line["loss"], line["margin"], line["augmented/margin"]) for line in metrics_of(root / "run")]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Model, data, and the run on one device."""
    root = tmp_path_factory.mktemp("pods")
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 64}
    model = model_directory(root / "model", "llama", num_key_value_heads=2, head_dim=16, **sizes)
    data = preference_file(root / "pairs.jsonl", 60, seed=1)
    return root, model, data, losses(root / "one", model, data, 1, 1, {})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_changes_no_loss(world, layout):
    root, model, data, one = world
    many = losses(root / layout.replace(" ", "_"), model, data, *LAYOUTS[layout])
    assert len(one) == len(many) == STEPS and len({loss for loss, _, _ in one}) == STEPS
    for ours, theirs in zip(many, one, strict=True):
        assert ours[0] == pytest.approx(theirs[0], rel=1e-5)
        for mine, other in zip(ours[1:], theirs[1:], strict=True):
            assert mine == pytest.approx(other, rel=1e-3, abs=2e-4)
