"""What the TPU compiler makes of DPO as peers run it, of our DPO and of our Sr-DPO: cycles and memory, without a TPU.

Purpose: the numbers behind the claims that Sr-DPO costs at most 1.30 times our DPO, and with splash attention, our path
on TPUs, less than half of padded, duplicated DPO with the reference in the step, in cycles and in memory. With dense
attention that holds for cycles but not for memory: 0.60 times, as the table shows.

What is compared: one train step of a Llama-3.2-1B shape on v5e:2x4 (8 chips, fsdp 8), 64 HH-RLHF pairs, max_length 512,
bfloat16 compute, float32 parameters, RMSprop, by the same model code.

    padded      128 rows of one sequence [prompt | response], padded to 512 tokens; policy and reference run over all
                of them in the step; the reference is kept in bfloat16. All 512 positions go to the vocabulary matrix,
                as in TRL, but through our blocks of it: peers keep logits [rows, 512, 128256] besides, not counted.
    DPO         packed rows that share the prompt, reference cached
    Sr-DPO      the same with the augmented rows

The lengths are those of the HH-RLHF file beside the checkout, with a byte-level BPE of 8,192 tokens trained on it;
without the file, typical lengths (see sr_dpo_jax/data/typical.py).

Command, from the repository root (needs the `tpu` extra, no TPU). Expect 20 minutes on two idle cores:

    python tests/benchmarks/tpu_compiler.py [--data FILE.jsonl.gz] [--remat none,full] [--attention splash,dense]
        [--json FILE]

How to read the output: `Mcycles` are the compiler's estimates for one chip and step, loops multiplied out, with the
attention kernels at the peak of the matrix unit and without communication; `GiB` is the peak of one chip, which has 16.
Where a program does not fit, GiB is what the compiler says that it would need, and there are no cycles. Ratios are
taken between rows of the same attention and remat.

With jax 0.10.2 and libtpu 0.0.42, HH pairs (Mcycles; GiB):

    attention, remat    padded               DPO              Sr-DPO           Sr/DPO   Sr/padded: cycles, GiB
    splash, full        1,680;  5.03         275; 2.47        313; 2.46        1.14     0.19, 0.49
    splash, none        no room; 24.87       279; 7.22        313; 7.42        1.12     –, 0.30
    dense, full         1,793;  5.96         466; 3.64        559; 3.58        1.20     0.31, 0.60
    dense, none         no room; 36.39       no room; 16.95   no room; 16.95
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests"), str(REPOSITORY / "tests" / "benchmarks")]
os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu"}
os.environ |= {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5p-16"}

import jax  # noqa: E402
import known_models  # noqa: E402
import numpy as np  # noqa: E402
from hh_run import make_tokenizer  # noqa: E402
from runs import HH_FILE  # noqa: E402

from sr_dpo_jax.commands.compile.machine import devices_of, only_one  # noqa: E402
from sr_dpo_jax.commands.compile.programs import Program, blocks_visited, first_step, train_program  # noqa: E402
from sr_dpo_jax.commands.compile.typical import typical_pairs  # noqa: E402
from sr_dpo_jax.config.load import config_from_dict  # noqa: E402
from sr_dpo_jax.config.schema import Config  # noqa: E402
from sr_dpo_jax.data.dataset import TokenizedPairs  # noqa: E402
from sr_dpo_jax.data.pipeline import HostStep  # noqa: E402
from sr_dpo_jax.data.plan import Plan, Shape  # noqa: E402
from sr_dpo_jax.data.tokens import load_tokenizer  # noqa: E402
from sr_dpo_jax.parallel import mesh as meshes  # noqa: E402
from sr_dpo_jax.parallel.chips import GIB  # noqa: E402
from sr_dpo_jax.train.setup import read_pairs_of, set_up_on  # noqa: E402
from sr_dpo_jax.weights.directory import ModelDirectory, open_directory  # noqa: E402

MAX_LENGTH, PAIRS = 512, 64
STEPS = ("padded", "dpo", "sr_dpo")


def config_of(
    directory: ModelDirectory, data: Path, root: Path, *, step: str, attention: str = "dense", remat: str = "none"
) -> Config:
    raw = {
        "output_dir": str(root / "run"),
        "model": {"path": str(directory.path), "init": "random", "attention": attention, "remat": remat},
        "data": {"path": str(data), "max_bad_rows": 9, "max_length": MAX_LENGTH},
        "objective": {"name": "sr_dpo", "lam": 0.5} if step == "sr_dpo" else {"name": "dpo"},
        "reference": {"mode": "online" if step == "padded" else "cached"},
        "batch": {"pairs_per_step": PAIRS},
    }
    return config_from_dict(raw, where=step)


def pairs_of(config: Config, directory: ModelDirectory, root: Path) -> TokenizedPairs:
    data = Path(config.data.path[0].path)
    if not data.is_file():
        print(f"{data} is not there: typical lengths")
        return typical_pairs(
            "hh_rlhf",
            least_pairs=0,
            head_tokens=0,
            augmentation_tokens=50,
            max_length=MAX_LENGTH,
            max_prompt_length=config.data.max_prompt_length,
        )
    tokenizer = load_tokenizer(str(make_tokenizer(root / "tokenizer", data)))
    prompt = config.refinement.prompt
    return read_pairs_of(config, config.data.path, "train", tokenizer, directory.architecture, instruction=prompt)


def padded_step() -> tuple[Plan, HostStep]:
    """128 rows of one sequence each, as a causal model sees them; all positions are scored."""
    rows = 2 * PAIRS
    every = np.broadcast_to(np.arange(MAX_LENGTH, dtype=np.int32), (1, rows, MAX_LENGTH))
    slots = np.broadcast_to(np.arange(rows, dtype=np.int32)[:, None], every.shape)
    fields = {"tokens": 0 * every, "positions": every, "key_start": 0 * every, "key_end": every + 1}
    fields |= {"source": every, "target": 0 * every, "slot": slots}
    pair = np.arange(PAIRS, dtype=np.int32)[None]
    plan = Plan(Shape(PAIRS, rows, MAX_LENGTH, MAX_LENGTH), 1, pair, 2 * pair)
    return plan, HostStep(pair[0], fields, None, 0)


def compile_step(
    devices: list[jax.Device], config: Config, directory: ModelDirectory, pairs: TokenizedPairs, step: str
) -> tuple[Program, Shape]:
    setup = set_up_on(meshes.make_mesh(replica=1, fsdp=-1, tensor=1, devices=devices), config, directory)
    if step == "padded":
        plan, host_step = padded_step()
    else:
        plan = setup.plan(pairs, [])
        host_step = first_step(setup, pairs, plan, augmented=step == "sr_dpo")
    return train_program(setup, plan, host_step, blocks_visited(setup.model, host_step)), plan.shape


def cycles_of(program: Program) -> float | None:
    return None if program.refusal else program.estimated_cycles + program.kernel_cycles


def line(name: str, program: Program, shape: Shape) -> str:
    cycles = cycles_of(program)
    shown = "does not fit" if cycles is None else f"{cycles / 1e6:,.0f}"
    return (
        f"{name:24} {shape.rows:4} × {shape.row_length:<5} {shown:>12} {program.kernel_cycles / 1e6:10.1f} "
        f"{program.peak_bytes / GIB:8.2f} {program.compile_s:8.0f}"
    )


def ratio(name: str, upper: float | None, lower: float | None) -> str:
    return f"{name}: unknown" if upper is None or lower is None else f"{name}: {upper / lower:.2f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=HH_FILE, help="HH-RLHF transcripts, .jsonl.gz")
    parser.add_argument("--topology", default="v5e:2x4")
    parser.add_argument("--remat", default="none,full")
    parser.add_argument("--attention", default="splash,dense")
    parser.add_argument("--json", type=Path, help="write all figures here")
    options = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)
    found: dict[str, Program] = {}
    with tempfile.TemporaryDirectory() as work, only_one():
        root = Path(work)
        directory = open_directory(str(known_models.model_directory(root, "llama-3.2-1b")))
        pairs = pairs_of(config_of(directory, options.data, root, step="sr_dpo"), directory, root)
        devices = list(devices_of(options.topology, 1))
        print(f"{'step, attention, remat':24} rows × tokens   Mcycles in kernels      GiB compile s")
        for remat in options.remat.split(","):
            for attention in options.attention.split(","):
                for step in STEPS:
                    config = config_of(directory, options.data, root, step=step, attention=attention, remat=remat)
                    program, shape = compile_step(devices, config, directory, pairs, step)
                    found[f"{step} {attention} {remat}"] = program
                    print(line(f"{step}, {attention}, {remat}", program, shape), flush=True)
    for remat in options.remat.split(","):
        for attention in options.attention.split(","):
            padded, dpo, sr_dpo = (found[f"{step} {attention} {remat}"] for step in STEPS)
            print(
                f"{attention}, {remat}:",
                ratio("Sr-DPO / DPO cycles", cycles_of(sr_dpo), cycles_of(dpo)) + ",",
                ratio("Sr-DPO / padded cycles", cycles_of(sr_dpo), cycles_of(padded)) + ",",
                ratio("Sr-DPO / padded GiB", sr_dpo.peak_bytes, padded.peak_bytes),
            )
    if options.json:
        documents = {name: program.__dict__ for name, program in found.items()}
        options.json.write_text(json.dumps(documents, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
