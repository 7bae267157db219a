"""Builds this process's rows of step n, through grain, and joins them into one global, sharded batch.

Every process can build any row, so each builds only the rows that its devices hold. The state of the pipeline is the
number of the next step: nothing is skipped or replayed on resume, and any number of processes sees the same pairs.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import grain
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from sr_dpo_jax.batch import SIDES, Batch, Placed, Rows, build_row
from sr_dpo_jax.data.dataset import TokenizedPairs
from sr_dpo_jax.data.plan import Limits, Plan, round_up
from sr_dpo_jax.parallel.mesh import replicated, sharding

THREADS = 2
PREFETCHED_STEPS = 4


@dataclasses.dataclass(frozen=True)
class HostStep:
    """One step as this process builds it."""

    pair: np.ndarray
    """`[B]`, indices into the data set, −1 where the step runs short. The same on every process."""
    plain: dict[str, np.ndarray]
    """Fields of `Rows`, `[A, local rows, T or M]`."""
    augmented: dict[str, np.ndarray] | None
    prefix_tokens: int


class Pairs(Protocol):
    """The part of `TokenizedPairs` that a step is built from."""

    head: np.ndarray
    augmentation: np.ndarray

    def pair(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]: ...


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class StepSource:
    """Gives random access to the steps of a plan, for grain."""

    pairs: Pairs
    plan: Plan
    local_rows: np.ndarray
    """The rows of each micro-batch that this process builds, ascending."""
    micro_batches: int
    """A; the plan's rows are cut into A equal parts."""
    row_multiple: int
    """The length of augmented rows is a multiple of this."""
    with_rejected: bool
    """False lays out the chosen side alone (sft)."""
    augmented: bool

    def __len__(self) -> int:
        return len(self.plan)

    @property
    def rows(self) -> int:
        """R, rows of a micro-batch over all processes."""
        return self.plan.shape.rows // self.micro_batches

    def __getitem__(self, step: int) -> HostStep:
        pair, row = self.plan.pair[step], self.plan.row[step]
        shape, head, p = self.plan.shape, self.pairs.head, self.pairs.augmentation
        wanted = np.arange(self.micro_batches)[:, None] * self.rows + self.local_rows
        numbers = [np.flatnonzero((row == r) & (pair >= 0)) for r in wanted.flat]
        members = [[self._placed(number, pair[number]) for number in of_row] for of_row in numbers]
        plain, augmented = self._stack(members, shape.row_length, 0, head[:0]), None
        if self.augmented:
            # The head moves from each prompt to the prefix, so a row grows by at most the length of p.
            length = round_up(shape.row_length + len(p), self.row_multiple)
            augmented = self._stack(members, length, len(head), np.concatenate([head, p]))
        return HostStep(pair, plain, augmented, len(head) + len(p))

    def _placed(self, number: int, index: int) -> Placed:
        prompt, chosen, rejected = self.pairs.pair(index)
        return Placed(SIDES * int(number), prompt, chosen, rejected if self.with_rejected else None)

    def _stack(
        self, members: list[list[Placed]], row_length: int, head_tokens: int, prefix: np.ndarray
    ) -> dict[str, np.ndarray]:
        shape = self.plan.shape
        rows = [
            build_row(
                row_members,
                row_length=row_length,
                scored=shape.scored,
                unused_slot=SIDES * shape.pairs,
                head_tokens=head_tokens,
                prefix=prefix,
            )
            for row_members in members
        ]
        grid = (self.micro_batches, len(self.local_rows), -1)
        return {name: np.stack([row[name] for row in rows]).reshape(grid) for name in rows[0]}


@dataclasses.dataclass(frozen=True)
class Feed:
    """The steps of a source as global batches."""

    source: StepSource
    row_sharding: NamedSharding
    """The sharding of `[A, R, T]`."""
    reference: np.ndarray | None = None
    """`[N, 2 sides, 2 (plain, augmented)]` float32, scores of the data set; None where a batch needs none."""

    def batches(self, first: int) -> Iterator[tuple[HostStep, Batch]]:
        """Yields the steps from number `first` on; background threads build them ahead."""
        steps = grain.MapDataset.source(self.source)[first:]
        for step in steps.to_iter_dataset(grain.ReadOptions(THREADS, PREFETCHED_STEPS)):
            yield step, self._to_batch(step)

    def results(self, program: Callable[[Batch], Any]) -> Iterator[tuple[np.ndarray, Any]]:
        """Runs a program that gives arrays `[B, ...]` over all steps; yields the pairs of each step and what it gives
        of them, on the host.

        Step n is on its way to the device before the result of step n − 1 is waited for.
        """

        def of_pairs(pair: np.ndarray, result: Any) -> tuple[np.ndarray, Any]:
            present = pair >= 0
            return pair[present], jax.tree.map(lambda array: array[present], jax.device_get(result))

        pending: list[tuple[np.ndarray, Any]] = []
        for step, batch in self.batches(0):
            pending.append((step.pair, program(batch)))
            if len(pending) > 1:
                yield of_pairs(*pending.pop(0))
        yield from (of_pairs(*last) for last in pending)

    def _to_batch(self, step: HostStep) -> Batch:
        plain, augmented = self._rows(step.plain), None
        if step.augmented is not None:
            augmented = dataclasses.replace(self._rows(step.augmented), prefix_tokens=step.prefix_tokens)
        if self.reference is None:
            return Batch(plain, augmented)
        scores = np.where((step.pair >= 0)[:, None, None], self.reference[step.pair], 0).astype(np.float32)
        return Batch(
            plain,
            augmented,
            reference=self._whole(scores[..., 0]),
            reference_augmented=None if augmented is None else self._whole(scores[..., 1]),
        )

    def _rows(self, fields: dict[str, np.ndarray]) -> Rows:
        return Rows(**{name: self._globally(array) for name, array in fields.items()})

    def _globally(self, array: np.ndarray) -> jax.Array:
        rows = self.source.rows

        def part(index: tuple[slice, ...]) -> np.ndarray:
            return array[:, np.searchsorted(self.source.local_rows, np.arange(rows)[index[1]])]

        return jax.make_array_from_callback((array.shape[0], rows, array.shape[2]), self.row_sharding, part)

    def _whole(self, array: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(array.shape, replicated(self.row_sharding.mesh), array.__getitem__)


@dataclasses.dataclass(frozen=True)
class Packing:
    """The mesh and the numbers with which pairs are packed; `data/plan.py` packs them."""

    mesh: Mesh
    limits: Limits
    micro_batches: int
    """A, the parts that a step's rows are cut into."""

    def source(self, pairs: Pairs, plan: Plan, rows: np.ndarray, *, augmented: bool, with_rejected: bool) -> StepSource:
        """Lays out the steps of a plan; `rows` are those of each micro-batch that are built here, ascending."""
        return StepSource(pairs, plan, rows, self.micro_batches, self.limits.row_multiple, with_rejected, augmented)

    def feed(
        self,
        pairs: Pairs,
        plan: Plan,
        *,
        augmented: bool,
        with_rejected: bool = True,
        reference: np.ndarray | None = None,
    ) -> Feed:
        """Makes the steps of a plan into batches on the mesh; arguments as for `StepSource` and `Feed`."""
        rows = plan.shape.rows // self.micro_batches
        shape = (self.micro_batches, rows, plan.shape.row_length)
        row_sharding = sharding(self.mesh, ("micro_batches", "rows", None), shape, "batch.plain.tokens")
        here = local_rows(row_sharding, self.micro_batches, rows)
        source = self.source(pairs, plan, here, augmented=augmented, with_rejected=with_rejected)
        return Feed(source, row_sharding, reference)


def pair_sizes(pairs: TokenizedPairs, *, with_rejected: bool) -> tuple[np.ndarray, np.ndarray]:
    """Counts the tokens that each pair takes in a row, and how many of them are scored, each `[N]`."""
    scored = pairs.chosen_tokens + (pairs.rejected_tokens if with_rejected else 0)
    return pairs.prompt_tokens + scored, scored


def local_rows(row_sharding: NamedSharding, micro_batches: int, rows: int) -> np.ndarray:
    """Finds which of the rows `[A, rows, T]` of a sharded batch live on this process's devices, ascending."""
    slices = row_sharding.addressable_devices_indices_map((micro_batches, rows, 1)).values()
    return np.unique(np.concatenate([np.arange(rows)[index[1]] for index in slices]))
