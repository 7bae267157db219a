"""What the GPU compiler makes of our attention kernels, and of Sr-DPO's steps with them: memory, without a GPU.

Purpose: the numbers behind `sr_dpo_jax/model/triton.py` and the choice of `model.attention=auto` on GPUs, and a check
that XLA, Triton and ptxas take these programs at all.

What is compiled, from shapes alone, for cards that are described and not there:

    attention   its projections and nothing else, in a scan over the layers of Llama-3.2-1B as the decoder has it,
                with its gradient: 16 layers, 32 query and 8 key heads of 64, bfloat16, 2 rows of 4,096 tokens
    steps       the train step and the scoring step of Sr-DPO, Llama-3.2-1B, 64 HH-RLHF pairs in packed rows, plain
                and with p, bfloat16 compute, float32 parameters, RMSprop, reference cached, on one card. Attention is
                auto, which must come out as triton, against dense.

The lengths are those of the HH-RLHF file beside the checkout, as in tpu_compiler.py; without it, typical lengths.

Command, from the repository root (needs the `cuda` extra, no GPU). Expect five minutes on two cores, under two for one
card; lines about missing CUDA drivers are to be expected:

    python tests/benchmarks/gpu_compiler.py [--data FILE.jsonl.gz] [--cards h100 a100 l4] [--remat none dots full]
        [--devices 1] [--json FILE]

How to read the output: `kernels` are the places in the program that call an attention kernel, a loop over layers
counted once: forward over plain rows, forward over augmented rows, backward; one more where the backward pass runs the
forward again. `GiB in all` are arguments, temporaries and new outputs of one card, without what the driver and the
libraries take. The compiler does not refuse what is too large: it warns (hlo_rematerialization) and gives the figure.
H100 and A100 have 79 GiB, L4 has 22, and jax takes 75 % of them unless told otherwise. Nothing here says how fast
anything is, or that the numbers are right: of the latter, tests/model/test_attention_paths.py checks what can be
checked without a GPU.

With jax 0.10.2, tokamax 0.0.12 and CUDA 12.9, H100, HH pairs in 12 rows of 1,152 tokens (kernels; MiB or GiB):

    remat    layers: temporaries, MiB        train step: GiB in all          scoring step: GiB in all
             triton        dense             triton        dense             triton        dense
    none     2;   2,099    166,432           3; 50.93      122.70            2;  5.38      8.31
    dots     2;   2,099     12,552           3; 25.57       29.27            2;  5.38      8.31
    full     3;     831     11,784           4; 15.82       20.20            2;  5.38      8.31

The dense path has no kernels. On A100 and L4 the attention is the same to the MiB, and the steps to within 3 %: in 75 %
of an L4 the train step fits with triton and full alone. On eight H100 (fsdp 8), full: 2.54 against 3.57 GiB a card.
"""

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests"), str(REPOSITORY / "tests" / "benchmarks")]
os.environ |= {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "1"}

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import known_models  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from runs import HH_FILE  # noqa: E402
from tpu_compiler import PAIRS, config_of, pairs_of  # noqa: E402

from sr_dpo_jax.commands.compile.programs import first_step, train_step_of  # noqa: E402
from sr_dpo_jax.data.dataset import TokenizedPairs  # noqa: E402
from sr_dpo_jax.data.plan import Shape  # noqa: E402
from sr_dpo_jax.model.architecture import Architecture  # noqa: E402
from sr_dpo_jax.model.attention import AttentionPath, Visible  # noqa: E402
from sr_dpo_jax.model.decoder import REMAT_POLICIES  # noqa: E402
from sr_dpo_jax.model.paths import attention_path  # noqa: E402
from sr_dpo_jax.parallel import mesh as meshes  # noqa: E402
from sr_dpo_jax.parallel.chips import GIB  # noqa: E402
from sr_dpo_jax.train.setup import Setup, set_up_on  # noqa: E402
from sr_dpo_jax.train.train_step import make_score_step  # noqa: E402
from sr_dpo_jax.weights.directory import ModelDirectory, open_directory  # noqa: E402

MODEL = "llama-3.2-1b"
ROWS, ROW_LENGTH, PREFIX_TOKENS = 2, 4096, 50
NEEDED = {
    "jax_plugins.xla_cuda12": "jax-cuda12-pjrt",
    "jax_cuda12_plugin": "jax-cuda12-plugin",
    "nvidia.cuda_nvcc": "nvidia-cuda-nvcc-cu12",
    "tokamax": "tokamax",
}
"""Modules and the wheels that they are in; all come with the `cuda` extra. jax finds ptxas in the third by itself."""
REMATS = ("none", *REMAT_POLICIES)
KERNEL = 'custom_call_target="__gpu$xla.gpu.triton"'


@dataclasses.dataclass(frozen=True)
class Card:
    """What XLA's compiler asks of a GPU, from its maker's data sheet and CUDA's table of compute capabilities."""

    name: str
    """As the driver calls it: tokamax looks tuned block sizes up by it."""
    capability: tuple[int, int]
    features: str
    """ACCELERATED_FEATURES compiles for sm_90a, as XLA does on the real one; NONE where there are no such."""
    multiprocessors: int
    threads: int
    """Of one multiprocessor, as are the lanes and the shared memory."""
    float32_lanes: int
    shared_memory_bytes: int
    clock_ghz: float
    cache_bytes: int
    memory_bytes: int
    """What the driver leaves a program, in whole GiB; beyond it the compiler recomputes what it can."""
    memory_bytes_a_second: float


CARDS = {
    "h100": Card(
        name="NVIDIA H100 80GB HBM3",
        capability=(9, 0),
        features="ACCELERATED_FEATURES",
        multiprocessors=132,
        threads=2048,
        float32_lanes=128,
        shared_memory_bytes=228 << 10,
        clock_ghz=1.98,
        cache_bytes=50 << 20,
        memory_bytes=79 * GIB,
        memory_bytes_a_second=3.35e12,
    ),
    "a100": Card(
        name="NVIDIA A100-SXM4-80GB",
        capability=(8, 0),
        features="NONE",
        multiprocessors=108,
        threads=2048,
        float32_lanes=64,
        shared_memory_bytes=164 << 10,
        clock_ghz=1.41,
        cache_bytes=40 << 20,
        memory_bytes=79 * GIB,
        memory_bytes_a_second=2.04e12,
    ),
    "l4": Card(
        name="NVIDIA L4",
        capability=(8, 9),
        features="NONE",
        multiprocessors=58,
        threads=1536,
        float32_lanes=128,
        shared_memory_bytes=100 << 10,
        clock_ghz=2.04,
        cache_bytes=48 << 20,
        memory_bytes=22 * GIB,
        memory_bytes_a_second=3.0e11,
    ),
}


def description_of(card: Card) -> str:
    """XLA's GpuTargetConfigProto as text: the card's own facts, and what all cards since Ampere have in common."""
    major, minor = card.capability
    return f"""
        platform_name: "CUDA"
        device_description_str: "{card.name}"
        dnn_version_info {{ major: 9 minor: 10 }}
        gpu_device_info {{
          cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {card.features} }}
          core_count: {card.multiprocessors} fpus_per_core: {card.float32_lanes} clock_rate_ghz: {card.clock_ghz}
          shared_memory_per_core: {card.shared_memory_bytes}
          shared_memory_per_block: {48 << 10} shared_memory_per_block_optin: {card.shared_memory_bytes - 1024}
          registers_per_core_limit: {1 << 16} registers_per_block_limit: {1 << 16}
          threads_per_warp: 32 threads_per_block_limit: 1024
          threads_per_core_limit: {card.threads}
          thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
          block_dim_limit_x: {2**31 - 1} block_dim_limit_y: {2**16 - 1} block_dim_limit_z: {2**16 - 1}
          l2_cache_size: {card.cache_bytes} device_memory_size: {card.memory_bytes}
          memory_bandwidth: {card.memory_bytes_a_second:.0f}
        }}
    """


def devices_of(card: Card, count: int) -> list[jax.Device]:
    """That many of the card in one machine, described."""
    topology = topologies.get_topology_desc(
        topology_name="", platform="cuda", target_config=description_of(card), topology=f"1x1x{count}"
    )
    return list(topology.devices)


def refuse_without_compiler() -> None:
    missing = [wheel for module, wheel in NEEDED.items() if not _is_there(module)]
    if missing:
        raise SystemExit(f"not installed: {', '.join(missing)}; pip install -e '.[cuda]' has them, and needs no GPU")


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # what it is in is not there either
        return False


@dataclasses.dataclass(frozen=True)
class Compiled:
    kernels: int
    """Places in the program where attention's Triton kernels are called; one in a loop counts once."""
    temporary_bytes: int
    peak_bytes: int
    compile_s: float


def compiled(device: jax.Device, program: Any, *arguments: Any) -> Compiled:
    # tokamax asks jax's default device which GPU the kernels are for.
    with jax.default_device(device):
        lowered = program.lower(*arguments)
    started = time.monotonic()
    made = lowered.compile()
    memory, compile_s = made.memory_analysis(), time.monotonic() - started
    output = memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes + output
    return Compiled(made.as_text().count(KERNEL), memory.temp_size_in_bytes, peak, compile_s)


def layers_gradient(mesh: jax.sharding.Mesh, path: AttentionPath, architecture: Architecture, remat: str) -> Any:
    """Attention with its projections and nothing else, in a scan over layers as in the decoder, differentiated."""

    def loss(weights: list[jax.Array], x: jax.Array, start: jax.Array, end: jax.Array, positions: jax.Array):
        visible = Visible(start, end, positions, PREFIX_TOKENS, None)
        attention = path.on_rows(visible, scale=architecture.query_scale, cap=None)

        def layer(x: jax.Array, of_layer: list[jax.Array]) -> tuple[jax.Array, None]:
            *inward, outward = of_layer
            query, key, value = (jnp.einsum("rtd,dhk->rthk", x, matrix) for matrix in inward)
            mixed = attention.attend(query, key, value)
            return x + jnp.einsum("rthk,hkd->rtd", mixed, outward), None

        if remat != "none":
            layer = jax.checkpoint(layer, policy=REMAT_POLICIES[remat], prevent_cse=False)
        return jnp.square(jax.lax.scan(layer, x, weights)[0].astype(jnp.float32)).sum()

    return meshes.jit_on(mesh, jax.grad(loss))


def compile_layers(device: jax.Device, architecture: Architecture, attention: str, remat: str) -> Compiled:
    a, dtype = architecture, jnp.dtype("bfloat16")
    mesh = meshes.make_mesh(replica=1, fsdp=1, tensor=1, devices=[device])
    path = attention_path(attention, mesh, a, dtype)

    def of(*shape: int, dtype: jnp.dtype = dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=meshes.replicated(mesh))

    inward = [of(a.layers, a.hidden, heads, a.head_dim) for heads in (a.heads, a.kv_heads, a.kv_heads)]
    weights = [*inward, of(a.layers, a.heads, a.head_dim, a.hidden)]
    masks = [of(ROWS, ROW_LENGTH, dtype=jnp.dtype("int32"))] * 3
    return compiled(device, layers_gradient(mesh, path, a, remat), weights, of(ROWS, ROW_LENGTH, a.hidden), *masks)


def compile_steps(setup: Setup, pairs: TokenizedPairs) -> tuple[dict[str, Compiled], Shape]:
    """The train step, and the scoring step on the same rows, with p."""
    plan, model = setup.plan(pairs, ()), setup.model
    step = first_step(setup, pairs, plan, augmented=True)
    device = model.mesh.devices.flat[0]
    train_step, arguments = train_step_of(setup, plan, step)
    unscored = dataclasses.replace(arguments[-1], reference=None, reference_augmented=None)
    score_step = make_score_step(model.graph, pairs=plan.shape.pairs, mesh=model.mesh)
    return {
        "train": compiled(device, train_step, *arguments),
        "score": compiled(device, score_step, model.shapes, unscored),
    }, plan.shape


def attention_table(cards: list[str], remats: list[str], directory: ModelDirectory) -> dict[str, Compiled]:
    a, found = directory.architecture, {}
    print(
        f"attention of {a.layers} layers, {a.heads} query and {a.kv_heads} key heads of {a.head_dim}, bfloat16, "
        f"{ROWS} rows of {ROW_LENGTH} tokens, gradient"
    )
    print(f"{'card, remat, attention':28} kernels   MiB of temporaries   compile s")
    for card in cards:
        device = devices_of(CARDS[card], 1)[0]
        for remat in remats:
            for attention in ("triton", "dense"):
                name = f"{card}, {remat}, {attention}"
                found[name] = made = compile_layers(device, a, attention, remat)
                mebibytes = made.temporary_bytes / 2**20
                print(f"{name:28} {made.kernels:7} {mebibytes:20,.0f} {made.compile_s:11.0f}", flush=True)
    return found


def steps_table(
    cards: list[str], remats: list[str], directory: ModelDirectory, root: Path, *, data: Path, devices: int
) -> dict[str, Compiled]:
    config, found = config_of(directory, data, root, step="sr_dpo"), {}
    pairs = pairs_of(config, directory, root)
    print(f"\nSr-DPO on {PAIRS} pairs a step, {MODEL}, {devices} of the card")
    print(f"{'card, remat, attention, step':34} rows × tokens  kernels  GiB of temporaries   GiB in all   compile s")
    for card in cards:
        mesh = meshes.make_mesh(replica=1, fsdp=-1, tensor=1, devices=devices_of(CARDS[card], devices))
        for remat in remats:
            for asked in ("auto", "dense"):
                config = config_of(directory, data, root, step="sr_dpo", attention=asked, remat=remat)
                setup = set_up_on(mesh, config, directory)
                if asked == "auto" and setup.model.attention != "triton":
                    raise SystemExit(f"{card}: model.attention=auto is {setup.model.attention}, not triton")
                steps, shape = compile_steps(setup, pairs)
                for step, made in steps.items():
                    name = f"{card}, {remat}, {setup.model.attention}, {step}"
                    found[name] = made
                    print(
                        f"{name:34} {shape.rows:4} × {shape.row_length:<6} {made.kernels:7} "
                        f"{made.temporary_bytes / GIB:19.2f} {made.peak_bytes / GIB:12.2f} {made.compile_s:11.0f}",
                        flush=True,
                    )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HH_FILE, help="HH-RLHF transcripts, .jsonl.gz")
    parser.add_argument("--cards", nargs="+", choices=CARDS, default=list(CARDS))
    parser.add_argument("--remat", nargs="+", choices=REMATS, default=REMATS)
    parser.add_argument("--devices", type=int, default=1, help="of the card, in one machine; for the steps")
    parser.add_argument("--json", type=Path, help="write all figures here")
    options = parser.parse_args()
    refuse_without_compiler()
    jax.config.update("jax_enable_compilation_cache", False)
    with tempfile.TemporaryDirectory() as work:
        root = Path(work)
        directory = open_directory(str(known_models.model_directory(root, MODEL)))
        layers = attention_table(options.cards, options.remat, directory)
        steps = steps_table(options.cards, options.remat, directory, root, data=options.data, devices=options.devices)
    if options.json:
        found = {
            part: {name: dataclasses.asdict(made) for name, made in of_part.items()}
            for part, of_part in (("layers", layers), ("steps", steps))
        }
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
