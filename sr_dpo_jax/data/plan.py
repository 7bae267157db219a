"""Plans which pairs stand in which row of step n, ahead of the run, as a pure function of token lengths, seed and n.

    step      one optimizer update: exactly `pairs_per_step` pairs, whatever their lengths
    window    up to 256 neighbouring steps of a shuffled epoch; pairs are dealt between them so that each step holds
              nearly the same number of tokens
    row       `row_length` tokens that hold whole pairs; every step has the same number of rows
    scored    the positions of a row that predict a response token; each row has room for the same number

Steps of nearly equal size fit one compiled shape with 1 to 3 % of padding. The plan does not depend on hosts, devices
or history, so resuming at step n needs only n.

Next: `batch.py`, which lays pairs out in rows.
"""

import bisect
import dataclasses
import hashlib

import numpy as np

from sr_dpo_jax.errors import UsageError

WINDOW_STEPS = 256

TOKENS, SCORED = 0, 1

HARDEST = 64
"""A shape is tried on this many steps before it is tried on all."""

EMPTIEST = 16
"""Exchanges are tried with this many rows of a step."""

AT_ONCE = 2**21
"""About as many exchanges are weighed at a time, which bounds the memory of planning."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """The numbers by which pairs are packed."""

    pairs_per_step: int
    row_length: int
    """Most tokens of a row."""
    row_multiple: int
    """Row lengths are multiples of this."""
    rows_multiple: int
    """The number of rows of a step is a multiple of this: row shards × micro-batches."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """The one compiled shape of a run."""

    pairs: int
    """Pairs a step."""
    rows: int
    row_length: int
    """Tokens a row, without p."""
    scored: int
    """Scored positions a row."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """The pairs of every planned step, and the row of the step that holds each.

    `pair` and `row` are int32 `[steps, pairs]`. `pair` is an index into the data set, or −1 where a step of a scoring
    plan holds fewer pairs. The pairs of a row stand in it in the order of the second axis.
    """

    shape: Shape
    steps_per_epoch: int
    pair: np.ndarray
    row: np.ndarray

    def __len__(self) -> int:
        return len(self.pair)

    @property
    def digest(self) -> str:
        """The sha256 (hex) of `pair`, which is the same on any mesh and any number of hosts."""
        return hashlib.sha256(np.ascontiguousarray(self.pair).tobytes()).hexdigest()


def training_plan(
    tokens: np.ndarray,
    scored: np.ndarray,
    limits: Limits,
    *,
    source: np.ndarray,
    source_weights: np.ndarray,
    seed: int,
    epochs: int,
    room_for: tuple[int, int] = (0, 0),
) -> Plan:
    """Plans all steps of all epochs; the pairs of an epoch that do not fill a step are left out, other ones each time.

    Args:
      tokens: `[N]`, tokens of each pair: prompt + chosen + rejected.
      scored: `[N]`, response tokens of each pair.
      limits: the numbers by which they are packed.
      source: `[N]`, index of the source that each pair comes from.
      source_weights: `[S]`, the times that an epoch draws each pair of a source.
      seed, epochs: as configured.
      room_for: tokens and scored tokens of the longest pair that will be scored in this shape besides these.

    Raises:
      UsageError: a pair is longer than a row, or an epoch holds less than one step.
    """
    pairs_per_step = limits.pairs_per_step
    orders = [_epoch_order(source, source_weights, seed, epoch) for epoch in range(epochs)]
    steps = len(orders[0]) // pairs_per_step
    if steps == 0:
        raise UsageError(
            f"batch.pairs_per_step={pairs_per_step}: an epoch holds only {len(orders[0])} pairs; lower it, add data, "
            "or raise the weights of data.path"
        )
    pair = np.concatenate([_deal(order[: steps * pairs_per_step], tokens, scored, pairs_per_step) for order in orders])
    room_for = (max(room_for[0], int(tokens.max())), max(room_for[1], int(scored.max())))
    shape = _fit_shape(tokens[pair], scored[pair], limits, room_for)
    return _place(pair, tokens, scored, shape, steps)


def scoring_shape(tokens: np.ndarray, scored: np.ndarray, limits: Limits) -> Shape:
    """Finds the shape for one pass over data that is only scored; arguments and errors as in `training_plan`."""
    pairs_per_step = min(limits.pairs_per_step, len(tokens))
    pair = _deal(_in_order(len(tokens), pairs_per_step), tokens, scored, pairs_per_step)
    return _fit_shape(*_sizes(pair, tokens, scored), limits, (int(tokens.max()), int(scored.max())))


def scoring_plan(tokens: np.ndarray, scored: np.ndarray, shape: Shape) -> Plan:
    """Plans one pass over all pairs in a given compiled shape, each pair once.

    Where pairs are longer than those that the shape was made for, steps hold fewer of them.

    Raises:
      UsageError: a pair does not fit a row of the shape.
    """
    pairs_per_step = shape.pairs
    while True:
        pair = _deal(_in_order(len(tokens), pairs_per_step), tokens, scored, pairs_per_step)
        pair = np.pad(pair, ((0, 0), (0, shape.pairs - pairs_per_step)), constant_values=-1)
        if pairs_per_step == 1 or _pack(*_sizes(pair, tokens, scored), shape) is not None:
            return _place(pair, tokens, scored, shape, len(pair))
        pairs_per_step //= 2


def covering_plan(plan: Plan, tokens: np.ndarray, scored: np.ndarray) -> Plan:
    """Plans every pair of the data set once: the first epoch's steps as training packs them, then the pairs left out.

    A reference that is scored in the layout of training makes the first step's margins zero to the last bits of
    bfloat16.
    """
    first = slice(0, plan.steps_per_epoch)
    left_out = np.setdiff1d(np.arange(len(tokens)), plan.pair[first])
    if not len(left_out):
        return dataclasses.replace(plan, pair=plan.pair[first], row=plan.row[first])
    rest = scoring_plan(tokens[left_out], scored[left_out], plan.shape)
    pair = np.concatenate([plan.pair[first], np.where(rest.pair >= 0, left_out[rest.pair], -1).astype(np.int32)])
    return Plan(plan.shape, len(pair), pair, np.concatenate([plan.row[first], rest.row]))


def _in_order(count: int, pairs_per_step: int) -> np.ndarray:
    return np.pad(np.arange(count), (0, -count % pairs_per_step), constant_values=-1)


def _sizes(pair: np.ndarray, tokens: np.ndarray, scored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.where(pair >= 0, tokens[pair], 0), np.where(pair >= 0, scored[pair], 0)


def _epoch_order(source: np.ndarray, source_weights: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    rng = np.random.default_rng([seed, epoch])
    drawn = []
    for index, weight in enumerate(source_weights):
        members = np.flatnonzero(source == index)
        count = round(float(weight) * len(members))
        if count == 0:
            raise UsageError(
                f"data.path entry {index}: weight {weight} of {len(members)} pairs draws none an epoch; raise the "
                "weight or remove the entry"
            )
        whole, part = divmod(count, len(members))
        drawn += [members] * whole + [rng.permutation(members)[:part]]
    return rng.permutation(np.concatenate(drawn))


def _deal(order: np.ndarray, tokens: np.ndarray, scored: np.ndarray, pairs_per_step: int) -> np.ndarray:
    """Deals shuffled pairs `[steps·B]` into steps `[steps, B]` with nearly equal tokens and scored tokens.

    Within a window the pairs are sorted by length and dealt in rounds of one pair a step. In two rounds of three the
    longest pair goes to the step with the fewest tokens so far, in the third the pair with the most scored tokens to
    the step with the fewest of those. A round's pairs are of similar length, so later rounds even out what one leaves
    uneven.
    """
    steps = len(order) // pairs_per_step
    dealt = np.empty((steps, pairs_per_step), np.int32)
    for window in np.array_split(np.arange(steps), -(-steps // WINDOW_STEPS)):
        members = order[window[0] * pairs_per_step : (window[-1] + 1) * pairs_per_step]
        sizes = np.stack(_sizes(members, tokens, scored))
        by_length = np.argsort(-sizes[0], kind="stable")
        totals = np.zeros((2, len(window)), np.int64)
        for turn in range(pairs_per_step):
            hand = by_length[turn * len(window) : (turn + 1) * len(window)]
            balanced = TOKENS if turn % 3 < 2 else SCORED
            hand = hand[np.argsort(-sizes[balanced, hand], kind="stable")]
            neediest = np.argsort(totals[balanced], kind="stable")
            dealt[window[neediest], turn] = members[hand]
            totals[:, neediest] += sizes[:, hand]
    return dealt


def _fit_shape(tokens: np.ndarray, scored: np.ndarray, limits: Limits, room_for: tuple[int, int]) -> Shape:
    """Finds the smallest rows × row length, then the fewest scored positions, that hold every step `[steps, B]`.

    Numbers of rows from the fewest that `row_length` allows to at least twice as many are tried, each with the shortest
    rows that hold the steps with the most tokens; the smallest of these shapes that holds all steps is taken.
    """
    row_length, row_multiple, rows_multiple = limits.row_length, limits.row_multiple, limits.rows_multiple
    limit, (longest, longest_scored) = row_length - row_length % row_multiple, room_for
    if longest > limit:
        raise UsageError(
            f"batch.row_length={row_length} (in multiples of batch.row_multiple={row_multiple}): a pair has {longest} "
            "tokens, prompt and both responses, and is never split; raise batch.row_length or lower data.max_length"
        )
    pairs, fullest = tokens.shape[1], int(tokens.sum(axis=1).max())
    every = np.argsort(-tokens.sum(axis=1), kind="stable")
    hardest = every[:HARDEST]

    def fits(shape: Shape, part: np.ndarray) -> bool:
        return _pack(tokens[part], scored[part], shape) is not None

    def least_that_fits(shapes: list[Shape]) -> list[Shape]:
        """Leaves out the first shapes, which grow, that do not hold the steps with the most tokens."""
        return shapes[bisect.bisect_left(shapes, True, key=lambda shape: fits(shape, hardest)) :]

    most_rows = round_up(pairs, rows_multiple)
    shapes = [Shape(pairs, most_rows, length := round_up(longest, row_multiple), length)]  # works: a row for each pair
    least = round_up(-(-fullest // limit), rows_multiple)
    for rows in range(least, min(max(2 * least, least + 4 * rows_multiple), most_rows) + 1, rows_multiple):
        lengths = range(round_up(max(longest, -(-fullest // rows)), row_multiple), limit + 1, row_multiple)
        shapes += least_that_fits([Shape(pairs, rows, length, scored=length) for length in lengths])
    shapes.sort(key=lambda shape: (shape.rows * shape.row_length, shape.rows))
    shape = next(shape for shape in shapes if fits(shape, every))
    least_scored = round_up(max(-(-int(scored.sum(axis=1).max()) // shape.rows), longest_scored), 8)
    counts = [*range(least_scored, shape.row_length, 8), shape.row_length]
    shapes = least_that_fits([dataclasses.replace(shape, scored=count) for count in counts])
    return next(shape for shape in shapes if fits(shape, every))


def _place(pair: np.ndarray, tokens: np.ndarray, scored: np.ndarray, shape: Shape, steps_per_epoch: int) -> Plan:
    row = _pack(*_sizes(pair, tokens, scored), shape)
    if row is None:
        raise UsageError(
            f"a pair does not fit rows of {shape.row_length} tokens with {shape.scored} scored; raise batch.row_length "
            "or lower data.max_length"
        )
    return Plan(shape, steps_per_epoch, pair, row)


def _pack(tokens: np.ndarray, scored: np.ndarray, shape: Shape) -> np.ndarray | None:
    """Packs all steps, `[steps, B]` sizes -> the row of each pair, or None where some step finds no room.

    Pairs are dealt to the emptiest row, which suits many pairs a row, and in steps that do not fit so to the fullest
    row with room, which suits few. Either way they are then exchanged between rows where a row is too full.
    """
    sizes, row = np.stack([tokens, scored]), np.empty(tokens.shape, np.int32)
    at_once = max(1, AT_ONCE // (shape.pairs + shape.rows))
    for start in range(0, len(tokens), at_once):
        left = np.arange(start, min(start + at_once, len(tokens)))
        for tightly in (False, True):
            row[left], used = _deal_to_rows(sizes[:, left], shape, tightly=tightly)
            left = left[(_fullness(used, shape) > 1).any(axis=1)]
        if len(left):
            return None
    return row


def _fullness(used: np.ndarray, shape: Shape) -> np.ndarray:
    """Tells how full rows are: the fuller of their shares of tokens and of scored positions, `[2, ...]` -> `[...]`."""
    return np.maximum(used[0] / shape.row_length, used[1] / max(shape.scored, 1))


def _deal_to_rows(sizes: np.ndarray, shape: Shape, *, tightly: bool) -> tuple[np.ndarray, np.ndarray]:
    """Deals the pairs of each step to its rows, the longest pair first.

    Args:
      sizes: int64 `[2, steps, B]`, tokens and scored tokens.
      shape: the rows.
      tightly: takes the row that the pair fills best, in place of the one that it leaves emptiest.

    Returns:
      row: int32 `[steps, B]`, the row of each pair.
      used: int64 `[2, steps, R]`, tokens and scored tokens of each row; more than it holds where a step did not fit.
    """
    _, steps, pairs = sizes.shape
    row, used = np.empty((steps, pairs), np.int32), np.zeros((2, steps, shape.rows), np.int64)
    every = np.arange(steps)
    for turn in np.argsort(-sizes[0], axis=1, kind="stable").T:
        size = sizes[:, every, turn]
        after = _fullness(used + size[..., None], shape)
        chosen = np.where(after <= 1, -after if tightly else after, after).argmin(axis=1)
        row[every, turn] = chosen
        used[:, every, chosen] += size
    at_once = max(1, AT_ONCE * shape.rows // (EMPTIEST * pairs**2))
    for part in (slice(start, start + at_once) for start in range(0, steps, at_once)):
        _exchange(sizes[:, part], row[part], used[:, part], shape)
    return row, used


def _exchange(sizes: np.ndarray, row: np.ndarray, used: np.ndarray, shape: Shape) -> None:
    """Empties the fullest row of each step that does not fit, pair by pair, in place.

    A pair of that row is exchanged with a pair of one of the emptiest rows, or with nothing: the exchange after which
    the fuller of the two is emptiest. A step is left as it is once it fits, or once no exchange helps.

    Args:
      sizes: int64 `[2, steps, B]`, tokens and scored tokens.
      row, used: as `_deal_to_rows` returns them.
    """
    near = min(EMPTIEST, shape.rows)
    left = np.arange(len(row))
    while len(left := left[(_fullness(used[:, left], shape) > 1).any(axis=1)]):
        every = np.arange(len(left))
        size, place, full = sizes[:, left], row[left], _fullness(used[:, left], shape)
        fullest = full.argmax(axis=1)
        is_there = place == fullest[:, None]
        given = np.argsort(~is_there, axis=1, kind="stable")[:, : is_there.sum(axis=1).max()]
        emptiest = np.argsort(full, axis=1, kind="stable")[:, :near]
        rank = np.full(full.shape, near)
        np.put_along_axis(rank, emptiest, np.arange(near), axis=1)
        rank_of_pair = np.take_along_axis(rank, place, axis=1)
        # What may come back: a pair of the emptiest rows, or nothing from one of them.
        taken = np.argsort(rank_of_pair, axis=1, kind="stable")[:, : (rank_of_pair < near).sum(axis=1).max()]
        partner = np.concatenate([np.take_along_axis(place, taken, axis=1), emptiest], axis=1)
        size_back = np.take_along_axis(size, taken[None], axis=2)
        back = np.concatenate([size_back, np.zeros((2, *emptiest.shape), int)], axis=2)
        less = np.take_along_axis(size, given[None], axis=2)[..., None] - back[:, :, None]  # [2, left, given, partner]
        here = _fullness(used[:, left, fullest][..., None, None] - less, shape)
        there = _fullness(np.take_along_axis(used[:, left], partner[None], axis=2)[:, :, None] + less, shape)
        after = np.maximum(here, there)
        after[~np.take_along_axis(is_there, given, axis=1)] = np.inf
        after[np.broadcast_to((partner == fullest[:, None])[:, None], after.shape)] = np.inf
        best = after.reshape(len(left), -1).argmin(axis=1)
        which, other = np.divmod(best, partner.shape[1])
        helps = after[every, which, other] < full[every, fullest]
        every, left, which, other, fullest = (array[helps] for array in (every, left, which, other, fullest))
        target, moved = partner[every, other], less[:, every, which, other]
        row[left, given[every, which]] = target
        comes = other < taken.shape[1]
        row[left[comes], taken[every, np.minimum(other, taken.shape[1] - 1)][comes]] = fullest[comes]
        used[:, left, fullest] -= moved
        used[:, left, target] += moved


def round_up(value: int, multiple: int) -> int:
    """Gives the least multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple
