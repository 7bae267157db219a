"""Time to plan an epoch, and how full its rows are: python tests/benchmarks/planning.py [--table]

Lengths are drawn, log-normal (`LENGTHS`): `hh` with up to 256 tokens of a prompt and of each response, as HH-RLHF is
short, `ultrafeedback` with up to 512 of each, `long` with up to 2,048 of a prompt and 1,024 of each response. With
`--data`, `hh` is read from a file of HH-RLHF's pairs instead (JSON lines, gzipped or not), cut to 512 tokens a side and
256 a prompt, a token being 4.4 characters.

How to read the table: `shards` are the devices that share the rows of a step, `padding` is the share of the rows'
tokens that are none and `vocabulary` that of the scored positions. Rows have up to 1,024, 2,048 and 8,192 tokens, twice
that on one device. Where padding is above 10 % a row is as long as the longest pair, whatever is dealt to the others.

    lengths        shards  pairs a step   rows × tokens, padding: before   now, in multiples of 16    of 128
    hh, real            1            64      7 × 1,792,  2.9 %              6 × 2,032,  0.1 %          0.9 %
    hh, real      8 or 16            64     16 ×   896, 15.1 %             16 ×   768,  0.9 %          0.9 %
    hh, real           32            64     32 ×   768, 50.5 %             32 ×   720, 47.1 %         50.5 %
    hh, real           32           128     32 ×   896, 15.1 %             32 ×   768,  0.9 %          0.9 %
    hh, real           64           512    128 ×   768,  1.5 %            128 ×   768,  1.5 %          1.5 %
    ultrafeedback       1            64     11 × 3,968,  3.1 %             11 × 3,872,  0.7 %          1.7 %
    ultrafeedback       8            64     24 × 1,920,  8.2 %             24 × 1,808,  2.6 %          8.2 %
    ultrafeedback      16            64     32 × 1,536, 14.0 %             32 × 1,536, 14.0 %         14.0 %
    ultrafeedback      64           512    192 × 1,792,  1.7 %            192 × 1,776,  0.8 %          1.7 %
    long                1            64      7 × 15,872, 2.2 %              8 × 13,648, 0.5 %          0.6 %
    long          8 or 16            64     16 × 7,040,  3.6 %             16 × 6,880,  1.3 %          1.8 %
    long               32            64     32 × 4,224, 19.6 %             32 × 4,096, 17.1 %         17.1 %
    long               32           128     32 × 7,040,  3.6 %             32 × 6,864,  1.1 %          1.8 %
    long               64           512    192 × 4,608,  1.8 %            192 × 4,544,  0.4 %          1.8 %

`before` is first fit in multiples of 128, with the same lengths (2026-11-28, 40,000 pairs each). A million pairs, 64 a
step, took 3.2 s on one core.
"""

import argparse
import gzip
import json
import time
from pathlib import Path

import numpy as np

from sr_dpo_jax.data.plan import Limits, Plan, training_plan

LENGTHS = {  # mean of the logarithm, its deviation and the most tokens: of the prompt, of each response
    "hh": ((4.3, 0.8, 256), (3.4, 0.9, 256)),
    "ultrafeedback": ((4.6, 1.0, 512), (5.4, 0.8, 512)),
    "long": ((6.5, 0.9, 2048), (5.8, 0.9, 1024)),
}
ROW_LENGTH = {"hh": 1024, "ultrafeedback": 2048, "long": 8192}
CHARACTERS_OF_A_TOKEN = 4.4


def drawn(name: str, pairs: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    (mean, deviation, most), response = LENGTHS[name]
    prompt = np.clip(rng.lognormal(mean, deviation, pairs), 4, most).astype(int)
    mean, deviation, most = response
    scored = np.clip(rng.lognormal(mean, deviation, (2, pairs)), 1, most).astype(int).sum(axis=0)
    return prompt + scored, scored


def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads the lengths of HH-RLHF's pairs, whose two dialogues share all but the last turn."""
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    cut = [row["chosen"].rfind("Assistant:") for row in rows]
    prompt = np.minimum(np.array(cut) / CHARACTERS_OF_A_TOKEN, 256).astype(int) + 1
    scored = np.zeros(len(rows), int)
    for side in ("chosen", "rejected"):
        characters = np.array([max(len(row[side]) - start, 0) for row, start in zip(rows, cut, strict=True)])
        scored += np.minimum((characters / CHARACTERS_OF_A_TOKEN).astype(int) + 1, 512 - prompt)
    return prompt + scored, scored


def planned(tokens: np.ndarray, scored: np.ndarray, limits: Limits) -> tuple[Plan, float, float]:
    """Returns the plan, its share of padding and the seconds that it took."""
    started = time.perf_counter()
    plan = training_plan(
        tokens, scored, limits, source=np.zeros(len(tokens), int), source_weights=np.ones(1), seed=0, epochs=1
    )
    seconds = time.perf_counter() - started
    capacity = len(plan) * plan.shape.rows * plan.shape.row_length
    return plan, 1 - tokens[plan.pair].sum() / capacity, seconds


def print_table(options: argparse.Namespace) -> None:
    print("lengths        shards  pairs a step  rows × tokens  scored  padding  vocabulary  seconds")
    for name in LENGTHS:
        given = name == "hh" and options.data
        tokens, scored = read(options.data) if given else drawn(name, options.pairs)
        for shards, pairs in ((1, 64), (8, 64), (16, 64), (32, 64), (32, 128), (64, 128), (64, 512)):
            limits = Limits(pairs, ROW_LENGTH[name] * (2 if shards == 1 else 1), options.row_multiple, shards)
            plan, padding, seconds = planned(tokens, scored, limits)
            shape = plan.shape
            vocabulary = 1 - scored[plan.pair].sum() / (len(plan) * shape.rows * shape.scored)
            print(
                f"{name:13} {shards:7} {pairs:13} {shape.rows:5} × {shape.row_length:6} {shape.scored:7} "
                f"{padding:8.1%} {vocabulary:11.1%} {seconds:8.1f}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="padding by lengths, shards and pairs a step")
    parser.add_argument("--data", type=Path, help="a file of HH-RLHF's pairs, in the place of drawn lengths")
    parser.add_argument("--lengths", choices=list(LENGTHS), default="hh")
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--pairs-per-step", type=int, default=64)
    parser.add_argument("--row-length", type=int, default=2048)
    parser.add_argument("--row-multiple", type=int, default=16)
    parser.add_argument("--rows-multiple", type=int, default=1)
    options = parser.parse_args()
    if options.table:
        print_table(options)
        return
    tokens, scored = drawn(options.lengths, options.pairs)
    limits = Limits(options.pairs_per_step, options.row_length, options.row_multiple, options.rows_multiple)
    plan, padding, seconds = planned(tokens, scored, limits)
    print(f"{options.pairs:,} pairs, {len(plan):,} steps: {seconds:.1f} s")
    print(f"{plan.shape}, {100 * padding:.2f} % padding")


if __name__ == "__main__":
    main()
