"""Host memory, measured: what importing and exporting keep beside the parameters, and what two real processes read."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from runs import REPOSITORY, model_directory
from safetensors.numpy import save_file

from sr_dpo_jax.weights.directory import open_directory, weights_digest
from sr_dpo_jax.weights.read import load_params

MIB = 2**20
SLACK = 2 * MIB
"""The room for the allocator and for jax's bookkeeping of arrays; 0.8 MiB were measured."""
SIZES = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 8}
SMALL = SIZES | {"num_hidden_layers": 1, "hidden_size": 64}

MEASURE = """
import json, sys, threading, time
import jax, numpy as np

def resident():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

class Peak:
    def __enter__(self):
        self.base = self.most = resident()
        self.stop = False
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while not self.stop:
            self.most = max(self.most, resident())
            time.sleep(0.001)

    def __exit__(self, *_):
        self.stop = True
        self.thread.join()
"""


def run(program, *arguments, devices=1, processes=1, **environment):
    """Runs a program in each of the processes and returns the `result` that each printed, from JSON."""
    environment |= {"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'tests'}"}
    environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program, *map(str, arguments), str(number)],
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(processes)
    ]
    outputs = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0] * processes, "\n".join(error for _, error in outputs)
    lines = [[line for line in output.splitlines() if line.startswith("result ")] for output, _ in outputs]
    return [json.loads(line.removeprefix("result ")) for (line,) in lines]


def random_directory(path: Path, **sizes) -> Path:
    """A Llama directory whose tensors are all of the same random numbers, in four files."""
    model_directory(path, "llama", **sizes)
    hidden, mlp, layers = sizes["hidden_size"], sizes["intermediate_size"], sizes["num_hidden_layers"]
    numbers = np.random.default_rng(0).random(hidden * mlp, np.float32)
    shapes = {
        "model.embed_tokens.weight": (320, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (320, hidden),
    }
    for layer in range(layers):
        start = f"model.layers.{layer}."
        shapes |= {f"{start}self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        shapes |= {f"{start}mlp.{name}_proj.weight": (mlp, hidden) for name in ("gate", "up")}
        shapes |= {f"{start}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
        shapes[f"{start}mlp.down_proj.weight"] = (hidden, mlp)
    weight_map = {}
    for number in range(4):
        mine = list(shapes)[number::4]
        file = f"model-{number + 1:05d}-of-00004.safetensors"
        save_file({name: numbers[: np.prod(shapes[name])].reshape(shapes[name]) for name in mine}, path / file)
        weight_map |= dict.fromkeys(mine, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


LOAD = (
    MEASURE
    + """
import tiny
from sr_dpo_jax.weights.directory import open_directory
from sr_dpo_jax.weights.read import load_params

def load(path):
    directory = open_directory(path)
    model = tiny.build(directory.architecture, tiny.make_mesh(fsdp=8))
    params = load_params(directory, model.abstract, model.shapes)
    return jax.block_until_ready(params)

load(sys.argv[1])
with Peak() as peak:
    params = load(sys.argv[2])
shards = sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards)
print("result", json.dumps({"peak": peak.most - peak.base, "shards": shards}))
"""
)


@pytest.mark.slow
def test_importing_needs_the_shards_and_two_tensors(tmp_path):
    """400 MiB on eight devices. A stacked parameter is 24 tensors, so that a second copy of one would show."""
    small = random_directory(tmp_path / "small", **SMALL)
    large = random_directory(tmp_path / "large", **SIZES)
    (measured,) = run(LOAD, small, large, devices=8)
    largest = 2048 * 512 * 4
    assert measured["shards"] > 350 * MIB
    assert measured["peak"] < measured["shards"] + 2 * largest + SLACK
    assert measured["peak"] > 0.9 * measured["shards"], "the measure sees the parameters"


SAVE = """
import sys
import jax.numpy as jnp, numpy as np, tiny
from sr_dpo_jax.durable.checkpoint import Checkpoints
from sr_dpo_jax.weights.directory import open_directory
from sr_dpo_jax.weights.read import load_params

for root in sys.argv[1:3]:
    directory = open_directory(root + "/model")
    model = tiny.build(directory.architecture, tiny.make_mesh(fsdp=8))
    params = load_params(directory, model.abstract, model.shapes)
    checkpoints = Checkpoints(root)
    state = {"step": jnp.int32(3), "params": params, "optimizer_state": {"moments": params}}
    checkpoints.save(3, state, position={"next_step": 3}, config={})
    checkpoints.finish(3)
print("result null")
"""

EXPORT = (
    MEASURE
    + """
from pathlib import Path
from sr_dpo_jax.commands.export import export

def run(root):
    export(Path(root), Path(root) / "out", dtype="bfloat16", shard_bytes=int(sys.argv[3]))

run(sys.argv[1])
with Peak() as peak:
    run(sys.argv[2])
print("result", json.dumps(peak.most - peak.base))
"""
)


def run_directory(root: Path, **sizes) -> Path:
    """A run directory of a random model, but for its checkpoint."""
    model = random_directory(root / "model", **sizes)
    raw = {"output_dir": str(root), "model": {"path": str(model)}, "data": {"path": "x"}, "objective": {"name": "dpo"}}
    (root / "config.yaml").write_text(json.dumps(raw))
    digests = {"weights": "0" * 64, "data": "1" * 64}
    manifest = {"model": {"revision": None}, "versions": {"sr_dpo_jax": "0"}, "digests": digests}
    (root / "manifest.json").write_text(json.dumps(manifest))
    return root


@pytest.mark.slow
def test_exporting_needs_one_stacked_parameter_and_one_file(tmp_path):
    """Exporting 400 MiB (and as much optimizer state) holds one stacked parameter, its shards in flight, and a file."""
    small = run_directory(tmp_path / "small", **SMALL)
    large = run_directory(tmp_path / "large", **SIZES)
    run(SAVE, small, large, devices=8)
    shard_bytes, tensor = 16 * MIB, 2048 * 512 * 4
    stacked = 24 * tensor
    # glibc keeps freed pieces of up to 32 MiB for itself. Those of a large model are larger, so let these go as well.
    peak = run(EXPORT, small, large, shard_bytes, MALLOC_MMAP_THRESHOLD_="65536")[0]
    assert stacked < peak < 2 * stacked + shard_bytes + tensor + 4 * MIB
    assert len(list((large / "out").glob("model-*.safetensors"))) > 350 / 2 / 16


TWO = """
import json, sys
import jax, numpy as np, tiny
from safetensors.numpy import load_file
from counting_reads import Counting
from sr_dpo_jax.weights import read
from sr_dpo_jax.weights.directory import open_directory, weights_digest

path, address, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
jax.distributed.initialize(address, 2, number)
directory = open_directory(path)
model = tiny.build(directory.architecture, tiny.make_mesh(fsdp=8))
read.safe_open = Counting
params = read.load_params(directory, model.abstract, model.shapes)
held = {}
for keys, leaf in jax.tree.leaves_with_path(params):
    for shard in leaf.addressable_shards:
        held[f"{jax.tree_util.keystr(keys)} {shard.index}"] = float(np.asarray(shard.data, np.float64).sum())
print("result", json.dumps({"bytes": Counting.bytes_read, "digest": weights_digest(directory), "held": held}))
"""


@pytest.mark.slow
def test_two_real_processes_read_half_each(tmp_path):
    """jax.distributed, four devices each: the bytes, the shards, and one digest to which each added its files."""
    path = random_directory(tmp_path / "model", **SMALL)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = run(TWO, path, address, devices=4, processes=2)
    directory = open_directory(str(path))
    model = tiny.build(directory.architecture, tiny.make_mesh())
    whole = load_params(directory, model.abstract, model.shapes)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(whole))
    held = {}
    for process in processes:
        assert size / 2 <= process["bytes"] < 0.51 * size
        assert process["digest"] == weights_digest(directory)
        held |= process["held"]
    by_leaf: dict[str, float] = {}
    for name, value in held.items():
        leaf = name.partition(" ")[0]
        by_leaf[leaf] = by_leaf.get(leaf, 0.0) + value
    for keys, leaf in jax.tree.leaves_with_path(whole):
        total = float(np.asarray(leaf, np.float64).sum())
        assert by_leaf[jax.tree_util.keystr(keys)] == pytest.approx(total, rel=1e-9), keys
