"""Attention in tiles, and the kernels for TPUs and GPUs run as plain JAX operations, against the dense path."""

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import tokamax
from benchmarks import hh_run
from jax.experimental import pallas
from runs import HH_FILE, REPOSITORY, make_config, metrics_of, model_directory, preference_file

from sr_dpo_jax.commands.compile.programs import first_step
from sr_dpo_jax.config.schema import PAPER_INSTRUCTION
from sr_dpo_jax.data.pipeline import HostStep
from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.model import paths
from sr_dpo_jax.model.attention import DENSE, Visible, visible_mask
from sr_dpo_jax.model.decoder import REMAT_POLICIES
from sr_dpo_jax.model.kernels import splash, triton
from sr_dpo_jax.model.kernels.tiled import TILED
from sr_dpo_jax.parallel.mesh import jit_on, replicated
from sr_dpo_jax.train.loop import train
from sr_dpo_jax.train.setup import read_model, read_training, set_up_on

HEADS, KEY_HEADS, HEAD_DIM = 4, 2, 16


def packed_rows(prefix_tokens: int, length: int = 300) -> tuple[Visible, np.ndarray]:
    """Three rows of pairs of HH's lengths and one empty row, `[R, T]`, and which tokens are used."""
    rng = np.random.default_rng(1)
    lengths = [(40, 30, 50), (1, 1, 1), (60, 20, 9), (90, 40, 60), (5, 70, 3), (30, 25, 35)]
    prefix = rng.integers(0, 9, prefix_tokens).astype(np.int32)
    pairs = tiny.random_pairs(rng, lengths)
    rows = tiny.pack(pairs, [0, 0, 0, 1, 1, 2], micro_batches=1, rows=4, row_length=length, scored=240, prefix=prefix)
    rows = jax.tree.map(lambda array: jnp.asarray(array[0]), rows)
    return Visible(rows.key_start, rows.key_end, rows.positions, prefix_tokens, None)


def inputs(length: int, dtype=jnp.float32) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(2)
    shapes = [(4, length, heads, HEAD_DIM) for heads in (HEADS, KEY_HEADS, KEY_HEADS, HEADS)]
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def both(path, visible, *, scale: float, cap: float | None, length: int = 300, shape=(1, 1, 1)):
    """Output and gradients of a weighted sum, by the kernel and densely."""
    query, key, value, weight = inputs(length)

    def run(path):
        def values(visible, *given):
            mixed, pull_back = jax.vjp(path.on_rows(visible, scale=scale, cap=cap).attend, *given)
            return mixed, *pull_back(weight)

        mesh = tiny.make_mesh(*shape)
        return jit_on(mesh, values)(*jax.device_put((visible, query, key, value), replicated(mesh)))

    return run(path), run(DENSE)


def assert_same(ours, dense) -> None:
    for name, mine, theirs in zip(("output", "query", "key", "value"), ours, dense, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5 * max(1.0, np.abs(theirs).max()), rtol=0, err_msg=name)


@pytest.fixture
def on_a_cpu(monkeypatch, request):
    """Runs tokamax's kernels as plain JAX operations, on any device; leaves tests of other paths alone."""
    if getattr(request.node, "callspec", None) and request.node.callspec.params.get("name", "triton") != "triton":
        yield
        return
    compiled, program_id = pallas.pallas_call, pallas.program_id

    def pallas_call(kernel, out_shape, *, grid_spec, **kwargs):
        def hoisted(*refs):
            # Interpreted kernels know their place in the grid outside of branches and loops only.
            place = [program_id(axis) for axis in range(len(grid_spec.grid))]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(pallas, "program_id", lambda axis: place[axis] if axis < len(place) else program_id(axis))
                return kernel(*refs)

        return compiled(hoisted, out_shape, grid_spec=grid_spec, **kwargs, interpret=True)

    monkeypatch.setattr(pallas, "pallas_call", pallas_call)
    with tokamax.config.cross_compile(True):
        yield


PATHS = {
    "splash": partial(splash.splash_path, interpret=True),
    "tiled": lambda: TILED,
    "triton": triton.triton_path,
}
MESHES = {"one device": (1, 1, 1), "rows and heads sharded": (1, 2, 2)}
QUICK = {
    "one device": [(0, None, None), (20, None, 3.0), (20, 7, None), (0, 64, 3.0)],
    "rows and heads sharded": [(20, None, 3.0), (20, 7, None)],
}
"""The cases of prefix, window and cap that the quick loop runs; each shard of a mesh computes as one device does."""
SLOW = {
    "one device": [(20, 1, None), (0, 1, 3.0), (0, 7, 3.0), (20, 64, None)],
    "rows and heads sharded": [(0, 64, None)],
}
"""With the quick cases, every two of prefix, window and cap meet."""
CASES = [
    *(pytest.param(mesh, *case) for mesh in MESHES for case in QUICK[mesh]),
    *(pytest.param(mesh, *case, marks=pytest.mark.slow) for mesh in MESHES for case in SLOW[mesh]),
]


@pytest.mark.parametrize(("mesh", "prefix_tokens", "window", "cap"), CASES)
@pytest.mark.parametrize("name", PATHS)
def test_kernels_are_the_dense_path(monkeypatch, on_a_cpu, name, mesh, prefix_tokens, window, cap):
    monkeypatch.setattr(splash, "LARGEST_BLOCK", 128)  # three blocks of a row, so that some are skipped
    path = PATHS[name]()
    visible = dataclasses.replace(packed_rows(prefix_tokens), window=window)
    if name == "triton" and cap is not None:
        with pytest.raises(UsageError, match=r"model.attention=triton: .* capped at 3"):
            both(path, visible, scale=0.7, cap=cap, shape=MESHES[mesh])
        return
    ours, dense = both(path, visible, scale=0.7, cap=cap, shape=MESHES[mesh])
    assert_same(ours, dense)
    assert np.abs(dense[1]).max() > 0.1 or window == 1


@pytest.fixture(scope="module")
def hh_step(tmp_path_factory) -> HostStep:
    """A step of 32 pairs of the HH file: rows of 1,024 tokens, and the same with the paper's p."""
    if not HH_FILE.exists():
        pytest.skip(f"REAL DATA IS ABSENT: {HH_FILE}")
    root = tmp_path_factory.mktemp("hh")
    model = hh_run.make_model(root / "model", hidden=64, layers=1)
    config = make_config(
        root,
        model,
        HH_FILE,
        model={"init": "random"},
        data={"format": "hh_rlhf", "max_length": 512, "max_prompt_length": 256, "max_bad_rows": 9},
        refinement={"prompt": PAPER_INSTRUCTION},
        batch={"pairs_per_step": 32, "row_length": 1024},
    )
    directory, tokenizer = read_model(config)
    pairs = read_training(config, tokenizer, directory.architecture)
    setup = set_up_on(tiny.make_mesh(), config, directory)
    return first_step(setup, pairs, setup.plan(pairs, ()), augmented=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("augmented", "window", "cap"),
    [(False, 64, None), (True, None, None), (True, 200, 3.0)],
    ids=["plain", "with p", "with p, window and cap"],
)
@pytest.mark.parametrize("name", PATHS)
def test_kernels_are_the_dense_path_on_rows_of_hh(hh_step, on_a_cpu, name, augmented, window, cap):
    """Blocks as large as on a TPU; output and gradients within 1e-5 of the largest entry."""
    fields = hh_step.augmented if augmented else hh_step.plain
    start, end, positions = (
        jnp.asarray(fields[field].reshape(-1, fields[field].shape[-1])[:4])
        for field in ("key_start", "key_end", "positions")
    )
    assert start.shape[0] == 4 and start.shape[1] > 2 * splash.LARGEST_BLOCK - 64
    visible = Visible(start, end, positions, hh_step.prefix_tokens if augmented else 0, window)
    path = PATHS[name]()
    if name == "triton" and cap is not None:
        pytest.skip("refused: paths.py takes no such model there")
    assert_same(*both(path, visible, scale=0.7, cap=cap, length=start.shape[1]))


def test_blocks_in_which_nothing_is_seen_are_skipped(monkeypatch):
    monkeypatch.setattr(splash, "LARGEST_BLOCK", 128)
    visible = packed_rows(20)
    tables = splash.tables_of(visible)
    seen = np.zeros((4, 384, 384), bool)
    seen[:, :300, :300] = visible_mask(visible)
    seen[:, range(300, 384), range(300, 384)] = True
    needed = seen.reshape(4, 3, 128, 3, 128).any(axis=(2, 4))
    np.testing.assert_array_equal(tables.runs[:, 0], needed)
    assert not needed.all()
    windowed = splash.tables_of(dataclasses.replace(visible, window=1))
    assert windowed.runs.sum() < tables.runs.sum()


LOWERS_WITHOUT_DEVICE = pytest.mark.skipif(
    jax.__version_info__ >= (0, 11),
    reason="jax 0.11 lowers for a GPU from a described one only, as tests/benchmarks/gpu_compiler.py does",
)


@LOWERS_WITHOUT_DEVICE
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_kernels_of_gpus_lower_without_one(dtype):
    """Forward and backward, each one Triton kernel; whether it runs as fast as it should only a GPU tells."""
    visible = dataclasses.replace(packed_rows(20), window=64)
    path = triton.triton_path()

    def weighted(query, key, value, weight):
        return (path.on_rows(visible, scale=0.7, cap=None).attend(query, key, value) * weight).sum()

    with tokamax.config.cross_compile(True):
        traced = jit_on(tiny.make_mesh(), jax.grad(weighted, argnums=(0, 1, 2))).trace(*inputs(300, dtype))
        lowered = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert lowered.count("@__gpu$xla.gpu.triton") == 2
    # None of the scores is anywhere but in the kernels.
    assert not re.search(r"tensor<4x(\d+x)?384x384x(bf16|f32)>", lowered)


def device(platform: str, capability: str | None = None) -> SimpleNamespace:
    about = {} if capability is None else {"compute_capability": capability}
    return SimpleNamespace(devices=np.array([SimpleNamespace(platform=platform, device_kind=platform, **about)]))


def model(head_dim: int = 64, cap: float | None = None) -> SimpleNamespace:
    return SimpleNamespace(head_dim=head_dim, attention_cap=cap)


BFLOAT16, FLOAT32 = jnp.dtype("bfloat16"), jnp.dtype("float32")


@pytest.mark.parametrize(
    ("mesh", "architecture", "dtype", "name"),
    [
        (device("tpu"), model(), BFLOAT16, "splash"),
        (device("tpu"), model(cap=50.0), BFLOAT16, "splash"),
        (device("cpu"), model(), FLOAT32, "tiled"),
        (device("gpu", "9.0"), model(), BFLOAT16, "triton"),
        (device("gpu", "8.0"), model(256), BFLOAT16, "triton"),
        (device("gpu", "8.9"), model(128), BFLOAT16, "triton"),
        (device("gpu", "8.9"), model(256), BFLOAT16, "dense"),
        (device("gpu", "9.0"), model(), FLOAT32, "dense"),
        (device("gpu", "9.0"), model(cap=50.0), BFLOAT16, "dense"),
        (device("gpu", "7.5"), model(), BFLOAT16, "dense"),
        (device("gpu", "gfx942"), model(), BFLOAT16, "dense"),
        (device("gpu"), model(), BFLOAT16, "dense"),
    ],
)
def test_auto_goes_by_device_and_model(caplog, mesh, architecture, dtype, name):
    assert paths.attention_name("auto", mesh, architecture, dtype) == name
    assert paths.attention_name("dense", mesh, architecture, dtype) == "dense"
    assert ("model.attention=auto is dense here: " in caplog.text) == (name == "dense")


def test_auto_says_what_the_fused_kernels_need(monkeypatch, caplog):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert paths.attention_name("auto", device("gpu", "9.0"), model(), BFLOAT16) == "dense"
    assert "pip install 'sr_dpo_jax[cuda]'" in caplog.text


@pytest.mark.parametrize(
    ("name", "mesh", "architecture", "why"),
    [
        ("splash", device("cpu"), model(), "a kernel for TPUs, here is cpu"),
        ("triton", device("gpu", "7.5"), model(), "compute capability 8.0 or more, here is gpu"),
        ("triton", device("tpu"), model(), "compute capability 8.0 or more, here is tpu"),
        ("triton", device("gpu", "8.6"), model(80), "heads of up to 64 in float32 here, not 80"),
        ("triton", device("gpu", "8.0"), model(cap=3.0), "no gradient for scores capped at 3"),
    ],
)
def test_a_kernel_that_cannot_be_is_refused(name, mesh, architecture, why):
    with pytest.raises(UsageError, match=f"model.attention={name}: .*{re.escape(why)}; set it to auto"):
        paths.attention_path(name, mesh, architecture, FLOAT32)


def test_kernels_that_are_not_installed_are_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokamax", None)
    monkeypatch.delitem(sys.modules, "sr_dpo_jax.model.kernels.triton")
    with pytest.raises(UsageError, match=r"tokamax is not installed; pip install 'sr_dpo_jax\[cuda\]'"):
        paths.attention_path("triton", device("gpu", "9.0"), model(), BFLOAT16)


def test_masks_that_the_kernels_cannot_reach_are_refused():
    query = jax.ShapeDtypeStruct((33, 8192, 1, 16), jnp.bfloat16)
    mask = jax.ShapeDtypeStruct((33, 8192, 8192), bool)

    def attend(mask, *qkv):
        return triton.TritonAttention(mask, 1.0).attend(*qkv)

    with pytest.raises(UsageError, match=r"33 rows of 8192 tokens .* lower batch.row_length or raise"):
        jit_on(tiny.make_mesh(), attend).trace(mask, query, query, query)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_how_the_kernels_are_asked(monkeypatch, dtype):
    """On a CPU every precision is the same, and so are all of tokamax's implementations."""
    asked = {}

    def attention(query, key, value, **how):
        asked.update(how)
        return query

    monkeypatch.setattr(tokamax, "dot_product_attention", attention)
    path = triton.triton_path()
    query, key, value, _ = inputs(300, dtype)
    attention = path.on_rows(packed_rows(0), scale=0.7, cap=None)
    jit_on(tiny.make_mesh(), attention.attend)(query, key, value)
    assert asked["implementation"] == "triton" and asked["scale"] == 1.0
    assert asked["precision"] == (jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None)


@pytest.mark.parametrize("head_dim", [64, 80])
def test_bfloat16_gradients_are_as_good_as_of_other_kernels(on_a_cpu, head_dim):
    """Against float64; scores of up to 30, where a scale that is rounded twice shows."""
    rng = np.random.default_rng(3)
    visible, shape = packed_rows(0), (4, 300, 2, head_dim)
    given = [jnp.asarray(3 * rng.normal(size=shape), jnp.bfloat16) for _ in range(4)]
    path = triton.triton_path()

    def gradients(path, arrays):
        def values(*qkv):
            mixed, pull_back = jax.vjp(path.on_rows(visible, scale=head_dim**-0.5, cap=None).attend, *qkv)
            return mixed, *pull_back(weight)

        *qkv, weight = arrays
        return jit_on(tiny.make_mesh(), values)(*qkv)

    ours = gradients(path, given)
    with jax.enable_x64(True):
        exact = gradients(DENSE, [array.astype(jnp.float64) for array in given])
    for name, mine, true in zip(("output", "query", "key", "value"), ours, exact, strict=True):
        difference = np.asarray(mine, np.float64) - np.asarray(true)
        assert np.linalg.norm(difference) < 0.015 * np.linalg.norm(true), name


@LOWERS_WITHOUT_DEVICE
@pytest.mark.parametrize(("remat", "kernels", "masks"), [("none", 2, 0), ("dots", 2, 0), ("full", 3, 0)])
def test_what_a_scan_over_layers_keeps(caplog, remat, kernels, masks):
    """Masks are never stacked over layers, and only full recomputation runs the forward kernel again."""
    visible, path = packed_rows(0), triton.triton_path()
    policy = REMAT_POLICIES.get(remat)

    def weighted(weights, x):
        attention = path.on_rows(visible, scale=0.25, cap=None)

        def layer(x, weight):
            query = jnp.einsum("rtd,dhk->rthk", x, weight)
            mixed = attention.attend(query, query, query)
            return x + jnp.einsum("rthk,dhk->rtd", mixed, weight), None

        if remat != "none":
            layer = jax.checkpoint(layer, policy=policy, prevent_cse=False)
        return jax.lax.scan(layer, x, weights)[0].sum()

    weights, x = jnp.ones((5, 64, 4, 16), jnp.bfloat16), jnp.ones((4, 300, 64), jnp.bfloat16)
    with tokamax.config.cross_compile(True):
        lowered = (
            jit_on(tiny.make_mesh(), jax.grad(weighted)).trace(weights, x).lower(lowering_platforms=("cuda",)).as_text()
        )
    assert lowered.count("@__gpu$xla.gpu.triton") == kernels
    assert len(re.findall(r"tensor<5x4x(1x)?384x384xi1>", lowered)) == masks
    assert "tensor<4x384x384xi1>" in lowered and "Autotuning" not in caplog.text


def test_the_flags_of_a_command_are_not_taken_for_those_of_the_kernels():
    """tokamax hands `sys.argv` to absl, which ends the process at a flag that it does not know."""
    code = """if True:
        import sys
        import tokamax
        from sr_dpo_jax.model.kernels.triton import triton_path
        triton_path()
        assert tokamax.config.cross_compile.value is False
    """
    command = [sys.executable, "-c", code, "train", "--allow-change", "model.attention"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    subprocess.run(command, env=environment, check=True)


@pytest.mark.slow
def test_a_run_on_the_kernels_of_gpus_is_the_dense_run(tmp_path, on_a_cpu, monkeypatch):
    """Cached reference, p and the gradients, inside the scan over layers and their recomputation."""
    monkeypatch.setattr(paths, "_triton_refuses", lambda *about: None)
    model, data = model_directory(tmp_path / "model"), preference_file(tmp_path / "train.jsonl", 24)
    losses = {}
    for name in ("triton", "dense"):
        root = tmp_path / name
        root.mkdir()
        settings = {"model": {"attention": name, "remat": "full"}, "objective": {"name": "sr_dpo", "lam": 0.5}}
        config = make_config(root, model, data, **settings)
        assert train(config) == 0
        losses[name] = [[line["loss"], line["grad_norm"]] for line in metrics_of(config.output_dir) if "loss" in line]
    assert len(losses["dense"]) > 2 and losses["dense"][0] != losses["dense"][-1]
    np.testing.assert_allclose(losses["triton"], losses["dense"], rtol=1e-5)
