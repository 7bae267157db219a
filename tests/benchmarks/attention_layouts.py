"""Two exact ways to run the TPU's splash attention on rows that share prompts, weighed by the TPU compiler.

Purpose: the choice behind `sr_dpo_jax/model/splash.py`, in figures.

What is compared: one layer's attention, forward and backward, on the rows that one chip of v5e:2x4 holds of a step of
64 HH-RLHF pairs (Llama-3.2-1B: 32 query heads, 8 key heads of 64; bfloat16), plain rows and rows with p.

    ranges      the packed row as it is; one int32 a query says what it sees, and blocks in which nothing is seen are
                skipped by tables made from the rows. A window needs the mask itself.
    segments    q, k and v gathered to an unshared view, in which each response follows a copy of its prompt (and of
                p), then the public causal mask and segment ids, and the result gathered back. Blocks are skipped by
                the causal mask alone: segment ids are compared inside the kernel.

Command, from the repository root (needs the `tpu` extra, no TPU). Expect a minute on two cores:

    python tests/benchmarks/attention_layouts.py [--data FILE.jsonl.gz] [--window 128]

How to read the output: `tokens` is the length of a row as the kernel sees it; `blocks` the share of its blocks of
512 × 512 that run. `outside` are the compiler's estimated cycles of everything but the kernels (gathers, tables,
padding), `kernels` their matmuls at the peak of the matrix unit, since the compiler has no estimate for kernels: a
lower bound, and the same one for both. `MiB` are temporaries of the chip. Before compiling, both run as plain JAX
operations on the same rows, and the largest difference of output and gradients between them is printed.

With jax 0.10.2 and libtpu 0.0.42, HH pairs: the sums of cycles are 1.83 by ranges against 3.71 million by segments on
plain rows, 2.10 against 4.76 with p; with a window of 128, 2.03 against 2.98 and 2.32 against 3.66. Temporaries: under
0.1 MiB against 56 and 68; with the window, 21 against 56 and 68. Differences: 8e-7 at most.
"""

import argparse
import dataclasses
import os
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests"), str(REPOSITORY / "tests" / "benchmarks")]
os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu"}
os.environ |= {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5p-16"}

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import known_models  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel  # noqa: E402
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks  # noqa: E402
from jax.sharding import SingleDeviceSharding  # noqa: E402
from runs import HH_FILE  # noqa: E402
from tpu_compiler import PAIRS, config_of, pairs_of  # noqa: E402

from sr_dpo_jax.commands.compile import hlo as aot_hlo  # noqa: E402
from sr_dpo_jax.commands.compile.machine import devices_of, only_one  # noqa: E402
from sr_dpo_jax.commands.compile.programs import first_step  # noqa: E402
from sr_dpo_jax.model.attention import Visible, visible_mask  # noqa: E402
from sr_dpo_jax.model.kernels.splash import LARGEST_BLOCK, splash_path, tables_of  # noqa: E402
from sr_dpo_jax.parallel import mesh as meshes  # noqa: E402
from sr_dpo_jax.parallel.chips import chip_of  # noqa: E402
from sr_dpo_jax.train.setup import set_up_on  # noqa: E402
from sr_dpo_jax.weights.directory import open_directory  # noqa: E402

CHIPS_OF_THE_STEP, HEADS, KEY_HEADS, HEAD_DIM = 8, 32, 8, 64
SCALE = HEAD_DIM**-0.5


@dataclasses.dataclass(frozen=True)
class Unshared:
    """`[R, U]`: which token of its row stands where and in which sequence; `back` `[R, T]` finds each token again."""

    index: np.ndarray
    segment: np.ndarray
    back: np.ndarray


def unshare(visible: Visible) -> Unshared:
    """Every token that no other sees ends a response: the sequence before it is all that it sees, by position."""
    seen, positions = np.asarray(visible_mask(visible)), np.asarray(visible.positions)
    rows = []
    for of_row, position in zip(seen, positions, strict=True):
        unseen = of_row.sum(axis=0) == 1
        last = np.flatnonzero(unseen & (position > 0))  # what fills a row up is at position 0
        rows.append([np.flatnonzero(of_row[end])[np.argsort(position[of_row[end]])] for end in last])
    longest = max(sum(map(len, sequences)) for sequences in rows)
    length = -(-longest // LARGEST_BLOCK) * LARGEST_BLOCK
    index = np.zeros((len(rows), length), np.int32)
    segment, back = np.zeros_like(index), np.zeros(positions.shape, np.int32)
    for row, sequences in enumerate(rows):
        order = np.concatenate(sequences)
        index[row, : len(order)] = order
        segment[row, : len(order)] = np.repeat(np.arange(1, len(sequences) + 1), [len(each) for each in sequences])
        back[row, order[::-1]] = np.arange(len(order))[::-1]  # the first copy of each
    return Unshared(index, segment, back)


def by_segments(length: int, window: int | None, *, interpret: bool):
    """Attention on the unshared view, with the kernel's public interface alone."""
    shape = (length, length)
    mask = masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), 0)
    block = min(LARGEST_BLOCK, length)

    def attend(query, key, value, index, segment, back):
        made = kernel.make_splash_mha(
            masks.MultiHeadMask([mask] * query.shape[2]),
            block_sizes=kernel.BlockSizes(*[block] * 8),
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )

        def of_row(query, key, value, index, segment, back):
            query, key, value = (array[index].swapaxes(0, 1) for array in (query, key, value))
            return made(query, key, value, kernel.SegmentIds(segment, segment)).swapaxes(0, 1)[back]

        scaled = (query.astype(jnp.float32) * SCALE).astype(query.dtype)
        return jax.vmap(of_row)(scaled, key, value, index, segment, back)

    return attend


def by_ranges(mesh, prefix_tokens: int, window: int | None, *, interpret: bool):
    path = splash_path(interpret=interpret)

    def attend(query, key, value, start, end, positions):
        visible = Visible(start, end, positions, prefix_tokens, window)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return path.on_rows(visible, scale=SCALE, cap=None).attend(query, key, value)

    return attend


def with_gradients(attend):
    def run(query, key, value, weight, *masks):
        mixed, pull_back = jax.vjp(lambda *qkv: attend(*qkv, *masks), query, key, value)
        return mixed, *pull_back(weight)

    return run


def share_of_blocks(visible: Visible) -> float:
    return float(tables_of(visible).runs.mean())


def share_of_causal_blocks(length: int, window: int | None) -> float:
    block = np.arange(length // LARGEST_BLOCK)
    runs = block[:, None] >= block
    if window is not None:
        runs &= (block[:, None] - block - 1) * LARGEST_BLOCK + 1 < window
    return float(runs.mean())


def difference(visible: Visible, unshared: Unshared, mesh, window: int | None) -> float:
    """Largest difference between the two on real tokens, relative to the largest entry, of one row and few heads."""
    rng = np.random.default_rng(0)
    length = visible.key_start.shape[1]
    used = np.zeros(length, bool)
    used[unshared.index[0][unshared.segment[0] > 0]] = True
    query, key, value, weight = (
        jnp.asarray(rng.normal(size=(1, length, heads, HEAD_DIM)), jnp.float32) * used[:, None, None]
        for heads in (2, 1, 1, 2)
    )
    one = [jnp.asarray(array[:1]) for array in (visible.key_start, visible.key_end, visible.positions)]
    ranges = with_gradients(by_ranges(mesh, visible.prefix_tokens, window, interpret=True))
    segments = with_gradients(by_segments(unshared.index.shape[1], window, interpret=True))
    ours = jax.jit(ranges)(query, key, value, weight, *one)
    view = [jnp.asarray(array[:1]) for array in (unshared.index, unshared.segment, unshared.back)]
    theirs = jax.jit(segments)(query, key, value, weight, *view)
    return max(
        float(np.abs((mine - other) * used[:, None, None]).max() / np.abs(other).max())
        for mine, other in zip(ours, theirs, strict=True)
    )


def compiled(device: jax.Device, attend, length: int, rows: int, masks: list[np.ndarray], blocks: float) -> str:
    on = SingleDeviceSharding(device)
    arrays = [
        jax.ShapeDtypeStruct((rows, length, heads, HEAD_DIM), jnp.bfloat16, sharding=on)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS, HEADS)
    ]
    arrays += [jax.ShapeDtypeStruct(mask.shape, jnp.int32, sharding=on) for mask in masks]
    program = jax.jit(with_gradients(attend)).lower(*arrays).compile()
    tally = aot_hlo.read(program.as_text())
    if tally.unknown_kernels or tally.unknown_loops:
        raise SystemExit(f"not all is known of the program: {tally}")
    chip = chip_of(device.device_kind)
    kernels = blocks * tally.kernel_flops * chip.clock_hz / chip.bfloat16_flops
    mebibytes = program.memory_analysis().temp_size_in_bytes / 2**20
    return f"{tally.cycles / 1e6:9.2f} {kernels / 1e6:9.2f} {(tally.cycles + kernels) / 1e6:9.2f} {mebibytes:8.1f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HH_FILE, help="HH-RLHF transcripts, .jsonl.gz")
    parser.add_argument("--window", type=int, default=128, help="a sliding window to weigh beside none")
    options = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    with tempfile.TemporaryDirectory() as work, only_one():
        root = Path(work)
        directory = open_directory(str(known_models.model_directory(root, "llama-3.2-1b")))
        devices = list(devices_of("v5e:2x4", 1))
        config = config_of(directory, options.data, root, step="sr_dpo", attention="splash")
        pairs = pairs_of(config, directory, root)
        mesh = meshes.make_mesh(replica=1, fsdp=-1, tensor=1, devices=devices)
        setup = set_up_on(mesh, config, directory)
        plan = setup.plan(pairs, ())
        step = first_step(setup, pairs, plan, augmented=True)
    here = meshes.make_mesh(replica=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
    there = meshes.make_mesh(replica=1, fsdp=1, tensor=1, devices=devices[:1])
    print(f"{PAIRS} pairs in {plan.shape.rows} rows over {CHIPS_OF_THE_STEP} chips; millions of cycles of one chip")
    print(f"{'':28} tokens   blocks   outside   kernels       sum      MiB   difference")
    for name, fields, prefix_tokens in (("plain", step.plain, 0), ("with p", step.augmented, step.prefix_tokens)):
        rows = plan.shape.rows // CHIPS_OF_THE_STEP
        of_chip = {key: array.reshape(-1, array.shape[-1])[:rows] for key, array in fields.items()}
        masks_of_chip = [of_chip[key] for key in ("key_start", "key_end", "positions")]
        length = masks_of_chip[0].shape[1]
        unshared = unshare(Visible(*map(jnp.asarray, masks_of_chip), prefix_tokens, None))
        view, unshared_length = [unshared.index, unshared.segment, unshared.back], unshared.index.shape[1]
        for window in (None, options.window):
            label = f"{name}, window {window}" if window else name
            visible = Visible(*map(jnp.asarray, masks_of_chip), prefix_tokens, window)
            blocks = share_of_blocks(visible)
            attend = by_ranges(there, prefix_tokens, window, interpret=False)
            figures = compiled(
                devices[0],
                by_ranges(there, prefix_tokens, window, interpret=False),
                length,
                rows,
                masks_of_chip,
                blocks,
            )
            apart = difference(visible, unshared, here, window)
            print(f"{label + ', ranges':28} {length:6} {blocks:8.2f} {figures} {apart:12.1e}", flush=True)
            blocks = share_of_causal_blocks(unshared_length, window)
            attend = by_segments(unshared_length, window, interpret=False)
            figures = compiled(devices[0], attend, length, rows, view, blocks)
            print(f"{label + ', segments':28} {unshared_length:6} {blocks:8.2f} {figures}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
