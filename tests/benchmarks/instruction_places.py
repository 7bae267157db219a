"""Two ways to lay out rows with p where prompts start differently (system messages), weighed in tokens and flops.

    each       p stands in each prompt, after its own head; pairs stay in the rows in which the plan puts them
    grouped    a row holds pairs of one head only, and has head and p once, at its start; the pairs of a step stay the
               same, and rows and row length are the best that hold every step

Command, from the repository root (no device is used; half a minute):

    python tests/benchmarks/instruction_places.py [--pairs-per-step 64] [--row-length 2048] [--rows-multiple 1]

How to read the output: `tokens` are those of all rows with p of a step, padding included; `padding` its share; `step`
is the cost of a step, in forwards over the tokens of its plain rows: 3 for those (forward and backward) and one forward
over the rows with p. `one head` is the layout for data with one head, as if all pairs had it: the least there can be.
"""

import argparse
from collections import defaultdict

import numpy as np

from sr_dpo_jax.data.pipeline import instruction_room
from sr_dpo_jax.data.plan import Limits, Plan, round_up, training_plan

P_TOKENS = 17
"""The paper's instruction, in tokens."""


class Lengths:
    """Pairs of lengths alone: what the pipeline asks of them to find the length of rows."""

    def __init__(self, count: int, heads: int, head_tokens: int):
        rng = np.random.default_rng(0)
        lengths = np.round(head_tokens * rng.uniform(0.5, 1.5, heads)).astype(int)
        self.head_of = rng.integers(heads, size=count)
        self.head_tokens = lengths[self.head_of]
        rest = np.clip(rng.lognormal(4.3, 0.88, count), 4, 256).astype(int)
        self.scored = np.clip(rng.lognormal(4.2, 0.9, (2, count)), 1, 256).astype(int).sum(axis=0)
        self.tokens = self.head_tokens + rest + self.scored
        ends = np.cumsum(self.tokens)
        self.offsets = np.stack([ends - self.tokens, ends, ends, ends], axis=1)


def rows_needed(pairs: Lengths, step: np.ndarray, length: int) -> int:
    """Counts the rows of this length that hold a step's pairs, each row those of one head, first fit decreasing."""
    groups = defaultdict(list)
    for index in step:
        groups[pairs.head_of[index]].append(index)
    rows = 0
    for members in groups.values():
        head = pairs.head_tokens[members[0]]
        room: list[int] = []
        for size in sorted((pairs.tokens[index] - head for index in members), reverse=True):
            row = next((number for number, left in enumerate(room) if left >= size), None)
            if row is None:
                room.append(length - head - P_TOKENS)
                row = -1
            room[row] -= size
        rows += len(room)
    return rows


def grouped_tokens(pairs: Lengths, plan: Plan, limits: Limits) -> int:
    """Finds the fewest tokens of a step's rows, one shape for all steps, where a row has one head."""
    shortest = int(pairs.tokens.max()) + P_TOKENS
    lengths = range(round_up(shortest, limits.row_multiple), 2 * limits.row_length + 1, limits.row_multiple)
    return min(
        length * round_up(max(rows_needed(pairs, step, length) for step in plan.pair), limits.rows_multiple)
        for length in lengths
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=6400)
    parser.add_argument("--pairs-per-step", type=int, default=64)
    parser.add_argument("--row-length", type=int, default=2048)
    parser.add_argument("--row-multiple", type=int, default=128)
    parser.add_argument("--rows-multiple", type=int, default=1)
    options = parser.parse_args()
    limits = Limits(options.pairs_per_step, options.row_length, options.row_multiple, options.rows_multiple)
    print(f"{'heads':>6} {'tokens a head':>13}   {'layout':9} {'tokens':>7} {'padding':>8} {'step':>6}")
    for head_tokens in (30, 200):
        for heads in (2, 20, 1000):
            pairs = Lengths(options.pairs, heads, head_tokens)
            source = {"source": np.zeros(options.pairs, int), "source_weights": np.ones(1), "seed": 0, "epochs": 1}
            plan = training_plan(pairs.tokens, pairs.scored, limits, **source)
            plain, length = plan.shape.rows * plan.shape.row_length, plan.shape.row_length
            once = plan.shape.rows * round_up(length + P_TOKENS, limits.row_multiple)
            each = plan.shape.rows * round_up(length + instruction_room(pairs, plan, P_TOKENS), limits.row_multiple)
            real = float(pairs.tokens[plan.pair].sum(axis=1).mean())
            grouped = grouped_tokens(pairs, plan, limits)
            saved = np.mean([sum(pairs.head_tokens[step]) for step in plan.pair])
            groups = np.mean([np.unique(pairs.head_of[step]).size for step in plan.pair])
            used = {
                "one head": real + P_TOKENS * plan.shape.rows,
                "each": real + P_TOKENS * options.pairs_per_step,
                "grouped": real - saved + groups * (head_tokens + P_TOKENS),  # a row a head at the least
            }
            for name, tokens in (("one head", once), ("each", each), ("grouped", grouped)):
                padding, step = 1 - used[name] / tokens, 3 + tokens / plain
                print(
                    f"{heads:6} {head_tokens:13}   {name:9} {tokens:7} {100 * padding:6.1f} % {step:6.2f}", flush=True
                )


if __name__ == "__main__":
    main()
