"""The same run on one device, on eight in three meshes, and in two and four real processes: the same five steps."""

import socket

import pytest
import yaml
from runs import metrics_of, model_directory, preference_file, raw_config, run_process

pytestmark = pytest.mark.slow
STEPS = 5
LAYOUTS = {
    "8 devices": (1, 8, {"fsdp": 8}),
    "4 x 2": (1, 8, {"fsdp": 4, "tensor": 2}),
    "2 x 2 x 2": (1, 8, {"replica": 2, "fsdp": 2, "tensor": 2}),
    "2 processes": (2, 2, {"fsdp": 4}),
    "4 processes": (4, 1, {"replica": 2, "fsdp": 2}),
}


def losses(root, model, data, processes, devices, mesh):
    """Losses and learning rates of a run of real processes with this many CPU devices each."""
    raw = raw_config(
        root,
        model,
        data,
        mesh={"replica": 1, "fsdp": 1, "tensor": 1, **mesh},
        train={"max_steps": STEPS},
        optimizer={"name": "adamw", "learning_rate": 1e-4, "warmup_steps": 2},
    )
    root.mkdir()
    (root / "config.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    arguments = ["train", str(root / "config.yaml")]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        arguments += [f"distributed.processes={processes}", f"distributed.coordinator_address={address}"]
    started = [
        run_process([*arguments, *([f"distributed.process_id={n}"] if processes > 1 else [])], devices=devices)
        for n in range(processes)
    ]
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
