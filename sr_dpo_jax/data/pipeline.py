"""Builds this process's rows of step n, through grain, and joins them into one global, sharded batch.

Every process can build any row, so each builds only the rows that its devices hold. The state of the pipeline is the
number of the next step: nothing is skipped or replayed on resume, and any number of processes sees the same pairs.
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import cached_property
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
    """Tokens of head and p at the start of augmented rows; 0 where p stands in each prompt."""
    against: dict[str, np.ndarray] | None = None
    against_prefix_tokens: int = 0


class Pairs(Protocol):
    """The part of `TokenizedPairs` that a step is built from."""

    head: np.ndarray
    augmentation: np.ndarray
    against: np.ndarray
    head_tokens: np.ndarray
    """`[N]`, tokens of each prompt before p where p stands in each prompt; empty where it stands once a row."""
    offsets: np.ndarray

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
    against: bool = False
    """Rows with the second instruction are built too."""

    def __len__(self) -> int:
        return len(self.plan)

    @property
    def rows(self) -> int:
        """R, rows of a micro-batch over all processes."""
        return self.plan.shape.rows // self.micro_batches

    def __getitem__(self, step: int) -> HostStep:
        pair, row = self.plan.pair[step], self.plan.row[step]
        wanted = np.arange(self.micro_batches)[:, None] * self.rows + self.local_rows
        numbers = [np.flatnonzero((row == r) & (pair >= 0)) for r in wanted.flat]
        members = [[self._placed(number, pair[number]) for number in of_row] for of_row in numbers]
        plain = self._stack(members, self.plan.shape.row_length, 0, self.pairs.head[:0])
        augmented, prefix_tokens = self._with(self.pairs.augmentation, numbers, pair) if self.augmented else (None, 0)
        against, against_prefix = self._with(self.pairs.against, numbers, pair) if self.against else (None, 0)
        return HostStep(pair, plain, augmented, prefix_tokens, against, against_prefix)

    @cached_property
    def _lengths(self) -> dict[int, int]:
        """Finds T of the rows with an instruction, by the tokens of the instruction."""
        row_length, instructions = self.plan.shape.row_length, (self.pairs.augmentation, self.pairs.against)
        room = {len(ids): instruction_room(self.pairs, self.plan, len(ids)) for ids in instructions}
        return {tokens: round_up(row_length + more, self.row_multiple) for tokens, more in room.items()}

    def _with(
        self, instruction: np.ndarray, numbers: list[np.ndarray], pair: np.ndarray
    ) -> tuple[dict[str, np.ndarray], int]:
        """Stacks rows that begin with head and instruction, and counts their tokens.

        The head moves there from each prompt. Where heads differ, the instruction stands in each prompt instead.
        """
        head, each = self.pairs.head, len(self.pairs.head_tokens) > 0
        inserted = instruction if each else None
        members = [[self._placed(number, pair[number], inserted) for number in of_row] for of_row in numbers]
        prefix = head if each else np.concatenate([head, instruction])
        return self._stack(members, self._lengths[len(instruction)], len(head), prefix), len(prefix)

    def _placed(self, number: int, index: int, instruction: np.ndarray | None = None) -> Placed:
        """Takes a pair, with an instruction after its own head if one is given."""
        prompt, chosen, rejected = self.pairs.pair(index)
        if instruction is not None:
            prompt = np.insert(prompt, self.pairs.head_tokens[index], instruction)
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
    """`[N, 2 sides, kinds (plain, augmented)]` float32, scores of the data set; None where a batch needs none."""
    refinement: np.ndarray | None = None
    """`[N]` float32, Δ of the data set; None where it is not known before step 0."""

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
        augmented = self._rows(step.augmented, step.prefix_tokens)
        batch = Batch(self._rows(step.plain), augmented, against=self._rows(step.against, step.against_prefix_tokens))
        if self.refinement is not None:
            batch = dataclasses.replace(batch, refinement=self._of_pairs(self.refinement, step.pair))
        if self.reference is None:
            return batch
        return dataclasses.replace(
            batch,
            reference=self._of_pairs(self.reference[..., 0], step.pair),
            reference_augmented=None if augmented is None else self._of_pairs(self.reference[..., 1], step.pair),
        )

    def _rows(self, fields: dict[str, np.ndarray] | None, prefix_tokens: int = 0) -> Rows | None:
        if fields is None:
            return None
        return Rows(**{name: self._globally(array) for name, array in fields.items()}, prefix_tokens=prefix_tokens)

    def _of_pairs(self, values: np.ndarray, pair: np.ndarray) -> jax.Array:
        """Picks a step's pairs from the values of the data set, whole on every device; 0 where the step runs short."""
        present = (pair >= 0).reshape(-1, *[1] * (values.ndim - 1))
        return self._whole(np.where(present, values[pair], 0).astype(np.float32))

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

    def source(
        self,
        pairs: Pairs,
        plan: Plan,
        rows: np.ndarray,
        *,
        augmented: bool,
        with_rejected: bool = True,
        against: bool = False,
    ) -> StepSource:
        """Lays out the steps of a plan; `rows` are those of each micro-batch that are built here, ascending."""
        multiple = self.limits.row_multiple
        return StepSource(pairs, plan, rows, self.micro_batches, multiple, with_rejected, augmented, against)

    def feed(
        self,
        pairs: Pairs,
        plan: Plan,
        *,
        reference: np.ndarray | None = None,
        refinement: np.ndarray | None = None,
        **kinds: bool,
    ) -> Feed:
        """Makes the steps of a plan into batches on the mesh.

        `reference` and `refinement` are as for `Feed`; `augmented`, `with_rejected` and `against` as for `StepSource`.
        """
        rows = plan.shape.rows // self.micro_batches
        shape = (self.micro_batches, rows, plan.shape.row_length)
        row_sharding = sharding(self.mesh, ("micro_batches", "rows", None), shape, "batch.plain.tokens")
        here = local_rows(row_sharding, self.micro_batches, rows)
        return Feed(self.source(pairs, plan, here, **kinds), row_sharding, reference, refinement)


def pair_sizes(pairs: TokenizedPairs, *, with_rejected: bool) -> tuple[np.ndarray, np.ndarray]:
    """Counts the tokens that each pair takes in a row, and how many of them are scored, each `[N]`."""
    scored = pairs.chosen_tokens + (pairs.rejected_tokens if with_rejected else 0)
    return pairs.prompt_tokens + scored, scored


def instruction_room(pairs: Pairs, plan: Plan, tokens: int) -> int:
    """Counts the tokens by which an instruction of this many makes the rows of a plan longer, both sides laid out.

    Once a row, or, where heads differ, once a pair; the row that is fullest then decides, and may leave room over.
    """
    if not len(pairs.head_tokens):
        return tokens
    sizes, present = pairs.offsets[:, 3] - pairs.offsets[:, 0] + tokens, plan.pair >= 0
    rows = np.arange(len(plan))[:, None] * plan.shape.rows + plan.row
    return int(np.bincount(rows[present], weights=sizes[plan.pair[present]]).max()) - plan.shape.row_length


def local_rows(row_sharding: NamedSharding, micro_batches: int, rows: int) -> np.ndarray:
    """Finds which of the rows `[A, rows, T]` of a sharded batch live on this process's devices, ascending."""
    slices = row_sharding.addressable_devices_indices_map((micro_batches, rows, 1)).values()
    return np.unique(np.concatenate([np.arange(rows)[index[1]] for index in slices]))
