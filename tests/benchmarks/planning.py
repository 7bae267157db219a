"""Time to plan an epoch of a million pairs, and how full its rows are: python tests/benchmarks/planning.py"""

import argparse
import time

import numpy as np

from sr_dpo_jax.data.plan import Limits, training_plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--pairs-per-step", type=int, default=64)
    parser.add_argument("--row-length", type=int, default=2048)
    parser.add_argument("--row-multiple", type=int, default=128)
    parser.add_argument("--rows-multiple", type=int, default=1)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    prompt = np.clip(rng.lognormal(4.5, 0.8, options.pairs), 4, 256).astype(int)
    scored = np.clip(rng.lognormal(4.0, 0.9, (2, options.pairs)), 1, 256).astype(int).sum(axis=0)
    tokens = prompt + scored
    started = time.perf_counter()
    plan = training_plan(
        tokens,
        scored,
        Limits(options.pairs_per_step, options.row_length, options.row_multiple, options.rows_multiple),
        source=np.zeros(options.pairs, int),
        source_weights=np.ones(1),
        seed=0,
        epochs=1,
    )
    seconds = time.perf_counter() - started
    padding = 1 - tokens[plan.pair].sum() / (len(plan) * plan.shape.rows * plan.shape.row_length)
    print(f"{options.pairs:,} pairs, {len(plan):,} steps: {seconds:.1f} s")
    print(f"{plan.shape}, {100 * padding:.2f} % padding")


if __name__ == "__main__":
    main()
