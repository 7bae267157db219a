"""LoRA's result does not depend on the mesh: the loss after ten steps on real pairs, over meshes and device orders.

Peers that train B = 0 first stood at 0.66 under FSDP and 0.27 under tensor parallelism at their ninth step.
`pytest -rP` shows the spread.
"""

import gzip

import jax
import numpy as np
import pytest
from runs import HH_FILE, make_config, model_directory

from sr_dpo_jax.durable.preemption import StopSignal
from sr_dpo_jax.parallel.mesh import make_mesh
from sr_dpo_jax.train.clock import Clock
from sr_dpo_jax.train.prepare import prepare
from sr_dpo_jax.train.setup import read_model, read_training, set_up_on

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("same_programs"),  # the start of the adapters is in no program
    pytest.mark.skipif(not HH_FILE.exists(), reason=f"REAL DATA IS ABSENT: {HH_FILE}"),
]

STEPS, PAIRS = 10, 16  # the same pairs in every step, so that the loss falls far
MESHES = {
    "fsdp 8": (1, 8, 1),
    "replica 2 × fsdp 2 × tensor 2": (2, 2, 2),
    "tensor 8": (1, 1, 8),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("mesh")
    model_directory(root / "model", "llama", num_attention_heads=8, num_key_value_heads=8, hidden_size=64)
    with gzip.open(HH_FILE) as rows:
        (root / "pairs.jsonl").write_bytes(b"".join(next(rows) for _ in range(PAIRS + 1)))
    return root


def losses(world, root, mesh, *, init, dtype):
    data = {"format": "hh_rlhf", "max_length": 128, "max_prompt_length": 64, "max_bad_rows": 2}
    config = make_config(
        root,
        world / "model",
        world / "pairs.jsonl",
        cache_dir=str(world / "cache"),
        model={"dtype": dtype},
        data=data,
        objective={"name": "dpo", "lam": None},
        optimizer={"learning_rate": 3e-3 if init == "zero_a" else 5e-3, "warmup_steps": 0},
        batch={"pairs_per_step": PAIRS, "row_length": 512},
        lora={"rank": 8, "alpha": 16.0, "init": init},
        train={"epochs": STEPS},
    )
    directory, tokenizer = read_model(config)
    pairs = read_training(config, tokenizer, directory.architecture)
    setup, found = set_up_on(mesh, config, directory), []
    with StopSignal() as stop:
        job, state = prepare(setup, pairs, {}, tokenizer=tokenizer, stop=stop, clock=Clock(), allowed_changes=())
        for (_, batch), _ in zip(job.feed.batches(0), range(STEPS), strict=False):
            state, metrics = job.train_step(state, job.base, job.reference_params, batch)
            found.append(float(metrics["loss"]))
    job.checkpoints.close()
    return found


@pytest.mark.parametrize(("init", "dtype"), [("zero_a", "float32"), ("zero_b", "bfloat16")])
def test_the_loss_after_ten_steps_is_that_of_one_device(world, tmp_path, init, dtype):
    devices, ended = jax.devices(), {}
    one = losses(
        world, tmp_path / "one", make_mesh(replica=1, fsdp=1, tensor=1, devices=devices[:1]), init=init, dtype=dtype
    )
    orders = {name: (sizes, devices) for name, sizes in MESHES.items()}
    shuffled = [devices[number] for number in np.random.default_rng(0).permutation(len(devices))]
    orders["fsdp 4 × tensor 2, devices reordered"] = ((1, 4, 2), shuffled)
    for name, ((replica, fsdp, tensor), of_mesh) in orders.items():
        mesh = make_mesh(replica=replica, fsdp=fsdp, tensor=tensor, devices=of_mesh)
        ended[name] = losses(world, tmp_path / name, mesh, init=init, dtype=dtype)[-1]
    apart = {name: loss / one[-1] - 1 for name, loss in ended.items()}
    print(
        f"{init}, {dtype}: {one[0]:.4f} -> {one[-1]:.4f} on one device;",
        ", ".join(f"{n} {a:+.1e}" for n, a in apart.items()),
    )
    assert one[-1] < 0.8 * one[0]
    assert max(map(abs, apart.values())) < 0.01
