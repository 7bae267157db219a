"""Plans which pairs stand in which row of step n, ahead of the run, as a pure function of token lengths, seed and n.

    step      one optimizer update: exactly `pairs_per_step` pairs, whatever their lengths
    window    up to 64 neighbouring steps of a shuffled epoch; pairs are dealt between them so that each step holds
              nearly the same number of tokens
    row       `row_length` tokens that hold whole pairs; every step has the same number of rows
    scored    the positions of a row that predict a response token; each row has room for the same number

Steps of nearly equal size fit one compiled shape with 1 to 3 % of padding. The plan does not depend on hosts, devices
or history, so resuming at step n needs only n.

Next: `batch.py`, which lays pairs out in rows.
"""

import dataclasses
import hashlib

import numpy as np

from sr_dpo_jax.errors import UsageError

WINDOW_STEPS = 64


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

    Within a window the pairs are sorted by length and dealt in rounds of one pair a step. In even rounds the longest
    pair goes to the step with the fewest tokens so far, in odd rounds the pair with the most scored tokens to the step
    with the fewest of those. A round's pairs are of similar length, so later rounds even out what one leaves uneven.
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
            balanced = turn % 2
            hand = hand[np.argsort(-sizes[balanced, hand], kind="stable")]
            neediest = np.argsort(totals[balanced], kind="stable")
            dealt[window[neediest], turn] = members[hand]
            totals[:, neediest] += sizes[:, hand]
    return dealt


def _fit_shape(tokens: np.ndarray, scored: np.ndarray, limits: Limits, room_for: tuple[int, int]) -> Shape:
    """Finds the smallest rows × row length, then the fewest scored positions, that hold every step `[steps, B]`.

    Row lengths down to half of `row_length` are tried in the order of rows × row length, so the first that works is the
    best. A trap: with no slack only one packing may work, whose scored tokens lie unevenly; so 1 % is added.
    """
    row_length, row_multiple, rows_multiple = limits.row_length, limits.row_multiple, limits.rows_multiple
    limit, (longest, longest_scored) = row_length - row_length % row_multiple, room_for
    if longest > limit:
        raise UsageError(
            f"batch.row_length={row_length} (in multiples of batch.row_multiple={row_multiple}): a pair has {longest} "
            "tokens, prompt and both responses, and is never split; raise batch.row_length or lower data.max_length"
        )
    fullest, pairs = int(1.01 * tokens.sum(axis=1).max()), tokens.shape[1]
    lengths = [n for n in range(row_multiple, limit + 1, row_multiple) if n >= longest and 2 * n > limit]
    least_rows = {n: round_up(max(1, -(-fullest // n)), rows_multiple) for n in lengths}
    extras = range(0, 4 * rows_multiple + 1, rows_multiple)
    candidates = sorted((n * (least_rows[n] + extra), n, least_rows[n] + extra) for n in lengths for extra in extras)
    roomiest = (0, limit, round_up(pairs, rows_multiple))  # always works: a row for each pair
    hardest = np.argsort(-tokens.sum(axis=1), kind="stable")
    for _, length, rows in [*candidates, roomiest]:
        shape = Shape(pairs, rows, length, scored=length)
        if all(_pack(tokens[part], scored[part], shape) is not None for part in (hardest[:64], hardest)):
            break
    least_scored = max(-(-int(scored.sum(axis=1).max()) // rows), longest_scored)
    shape = dataclasses.replace(shape, scored=min(round_up(least_scored, 8), length))
    while _pack(tokens, scored, shape) is None:
        more = round_up(shape.scored + shape.scored // 64 + 1, 8)
        shape = dataclasses.replace(shape, scored=min(more, length))
    return shape


def _place(pair: np.ndarray, tokens: np.ndarray, scored: np.ndarray, shape: Shape, steps_per_epoch: int) -> Plan:
    row = _pack(*_sizes(pair, tokens, scored), shape)
    if row is None:
        raise UsageError(
            f"a pair does not fit rows of {shape.row_length} tokens with {shape.scored} scored; raise batch.row_length "
            "or lower data.max_length"
        )
    return Plan(shape, steps_per_epoch, pair, row)


def _pack(tokens: np.ndarray, scored: np.ndarray, shape: Shape) -> np.ndarray | None:
    """Packs all steps at once, `[steps, B]` sizes -> the row of each pair, or None where some pair finds no room.

    The longest pair comes first. It goes to the row in which the room left for tokens and for scored positions is
    closest to the shape's proportion; where some step cannot be packed so, to the first row with room (first fit
    decreasing), which packs tightest.
    """
    evenly = _decreasing(tokens, scored, shape, evenly=True)
    return _decreasing(tokens, scored, shape, evenly=False) if evenly is None else evenly


def _decreasing(tokens: np.ndarray, scored: np.ndarray, shape: Shape, *, evenly: bool) -> np.ndarray | None:
    every = np.arange(len(tokens))
    room = np.full((len(tokens), shape.rows), shape.row_length, np.int64)
    scored_room = np.full((len(tokens), shape.rows), shape.scored, np.int64)
    row = np.empty(tokens.shape, np.int32)
    for turn in np.argsort(-tokens, axis=1, kind="stable").T:
        room_left = room - tokens[every, turn, None]
        scored_left = scored_room - scored[every, turn, None]
        fits = (room_left >= 0) & (scored_left >= 0)
        if not fits.any(axis=1).all():
            return None
        unevenness = np.abs(scored_left * shape.row_length - room_left * shape.scored) if evenly else 0
        chosen = np.where(fits, unevenness, np.iinfo(np.int64).max).argmin(axis=1)
        row[every, turn] = chosen
        room[every, chosen] = room_left[every, chosen]
        scored_room[every, chosen] = scored_left[every, chosen]
    return row


def round_up(value: int, multiple: int) -> int:
    """Gives the least multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple
