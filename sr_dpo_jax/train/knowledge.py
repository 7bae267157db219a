"""Asks before step 0 whether the model knows which response is better, and how much its contrast should weigh.

The scores of the model at the start are there already, so this costs nothing. d = log π(y⁺|x) − log π(y⁻|x) is its
preference, d̂ the same with the instruction p, and c = d̂ − d the contrast. A label says that y⁺ is the better response.
A logistic regression of the label on c, without an intercept because either response could have been the first,
has the log-likelihood Σ log σ(λ·c); its slope is the λ with which the contrast adds to the label's evidence.
"""

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.train.objective import Objective

log = logging.getLogger(__name__)

FOLDS = 5
NORMAL_95 = 1.959963984540054
BY_LENGTH = ("chosen shorter", "about as long", "chosen longer")
CRITICAL = 1.920729410347062
"""Half the 95 % quantile of χ² with one degree of freedom."""
TITLES = {"d": "d, the prompt alone", "d_with_p": "d̂, with p", "contrast": "c, the contrast"}
"""The rows of the table, by their names in it."""
LARGEST_SLOPE = 100.0
"""The bound of the search, in units of one over the root mean square of the contrasts."""


def knowledge_of(plain: np.ndarray, augmented: np.ndarray, contrast: np.ndarray, tokens: np.ndarray) -> dict[str, Any]:
    """Measures how well preferences and contrast agree with the labels, and the slope of the labels on the contrast.

    Args:
      plain, augmented: d and d̂, `[N]`, nats.
      contrast: c, `[N]`, nats.
      tokens: `[N, 2]`, of the chosen and the rejected response.

    Returns:
      JSON: for each of `d`, `d_with_p` and `contrast` the `accuracy`, its 95 % interval (Wilson), mean and standard
      deviation, the accuracy again for pairs `by_length` of the two responses; `slope` with its 95 % `interval`
      (profile likelihood) and `gain`, the mean log-likelihood in nats a pair by which slopes fitted on four fifths
      of the pairs beat chance, ln 2, on the fifth left out, with its interval.
    """
    longer = np.sign(tokens[:, 0] - tokens[:, 1].astype(np.int64)) * (
        np.abs(tokens[:, 0].astype(np.int64) - tokens[:, 1]) > 0.1 * tokens.max(axis=1)
    )
    table: dict[str, Any] = {"pairs": len(contrast)}
    for name, values in {"d": plain, "d_with_p": augmented, "contrast": contrast}.items():
        table[name] = {
            **_accuracy(values),
            "mean": float(values.mean()),
            "std": float(values.std()),
            "by_length": {
                label: _accuracy(values[longer == sign]) for label, sign in zip(BY_LENGTH, (-1, 0, 1), strict=True)
            },
        }
    return table | {"slope": _slope(contrast), "gain": _gain(contrast)}


def settled_lam(table: Mapping[str, Any]) -> float:
    """Gives λ for `objective.lam: auto`: the slope, or 0 where its interval holds 0 or it is negative.

    Contrasts that are right for every pair have no finite slope: λ is the low end of the interval then.
    """
    slope = table["slope"]
    low, _ = slope["interval"]
    if low <= 0:
        return 0.0
    return float(slope["value"] if slope["finite"] else low)


def settled_by(table: Mapping[str, Any] | None, objective: Objective) -> Objective:
    """Gives the objective with the λ of a run's table in place of "auto"; with λ = 0 it is the plain one.

    Raises:
      UsageError: there is none, as no run with "auto" has begun.
    """
    if not objective.unsettled:
        return objective
    if table is None or "lam" not in table:
        raise UsageError("objective.lam=auto: no run has settled it here; train first, or set a number")
    log.info("objective.lam=auto is %.4g: %s", table["lam"], verdict_of(table))
    return objective.settled(table["lam"])


def verdict_of(table: Mapping[str, Any]) -> str:
    """Says in a sentence what the table means for a refinement by the contrast."""
    slope, (low, high) = table["slope"]["value"], table["slope"]["interval"]
    said = f"the slope of the labels on the contrast is {slope:.3g} [{low:.3g}, {high:.3g}]"
    if low > 0:
        return f"{said}: the model knows something of the labels; λ = {settled_lam(table):.3g} weighs it as evidence"
    if high < 0:
        return f"{said}: the model holds the rejected responses to be better; refinement by it will hurt"
    return f"{said}, and the interval holds 0: this model does not know, and refinement by its contrast will not help"


def lines_of(table: Mapping[str, Any]) -> list[str]:
    """Writes the table as lines of text, for the log and for `sr-dpo score --knowledge`."""
    lines = [f"{'':22}{'accuracy':>22}{'mean':>10}{'spread':>10}" + "".join(f"{name:>17}" for name in BY_LENGTH)]
    for name, title in TITLES.items():
        row, groups = table[name], table[name]["by_length"]
        low, high = row["interval"]
        accuracy = f"{row['accuracy']:.3f} [{low:.3f}, {high:.3f}]"
        parts = [
            f"{group['accuracy']:.3f} of {group['pairs']}" if group["pairs"] else "no pairs"
            for group in groups.values()
        ]
        lines.append(
            f"{title:22}{accuracy:>22}{row['mean']:>10.3f}{row['std']:>10.3f}"
            + "".join(f"{part:>17}" for part in parts)
        )
    low, high = table["gain"]["interval"]
    gain = f"held out, the slope beats chance by {table['gain']['value']:.4f} [{low:.4f}, {high:.4f}] nats a pair"
    return [*lines, f"{table['pairs']} pairs; {gain}", verdict_of(table)]


def share_interval(share: float, pairs: float) -> tuple[float, float]:
    """Gives Wilson's 95 % interval of a share of `pairs` pairs, which may hold halves for ties."""
    z2 = NORMAL_95**2 / pairs
    half = NORMAL_95 * math.sqrt(share * (1 - share) / pairs + z2 / (4 * pairs))
    return (share + z2 / 2 - half) / (1 + z2), (share + z2 / 2 + half) / (1 + z2)


def _accuracy(values: np.ndarray) -> dict[str, Any]:
    """Gives the share of values above 0, of ties half, with Wilson's 95 % interval."""
    if not len(values):
        return {"pairs": 0, "accuracy": None, "interval": None}
    share = float(((values > 0).sum() + 0.5 * (values == 0).sum()) / len(values))
    return {"pairs": len(values), "accuracy": share, "interval": list(share_interval(share, len(values)))}


def _log_sigmoid(values: np.ndarray) -> np.ndarray:
    return -np.logaddexp(0, -values)


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    from scipy import optimize

    return float(optimize.brentq(function, low, high))


def _fit(contrast: np.ndarray) -> float:
    """Finds the λ that maximises Σ log σ(λ·c), a concave function, within ±LARGEST_SLOPE."""

    def gradient(slope: float) -> float:
        return float((contrast * np.exp(_log_sigmoid(-slope * contrast))).sum())

    if not contrast.any():
        return 0.0
    if (contrast >= 0).all() or gradient(LARGEST_SLOPE) >= 0:
        return LARGEST_SLOPE
    if (contrast <= 0).all() or gradient(-LARGEST_SLOPE) <= 0:
        return -LARGEST_SLOPE
    return _root(gradient, -LARGEST_SLOPE, LARGEST_SLOPE)


def _scale(contrast: np.ndarray) -> float:
    """Gives the root mean square, or 1 where all are 0: the slope is fitted in this unit, and so are its bounds."""
    return float(np.sqrt(np.square(contrast, dtype=np.float64).mean())) or 1.0


def _slope(contrast: np.ndarray) -> dict[str, Any]:
    """Gives the slope, and as its 95 % interval all slopes that a likelihood-ratio test does not reject.

    `finite` tells whether there is a largest likelihood at all; contrasts that are right for every pair have none.
    """
    scale = _scale(contrast)
    contrast = contrast.astype(np.float64) / scale
    slope = _fit(contrast)

    def surplus(other: float) -> float:
        """The likelihood ratio of this slope to the fitted one, above the test's critical value."""
        return float(_log_sigmoid(slope * contrast).sum() - _log_sigmoid(other * contrast).sum()) - CRITICAL

    def end(bound: float) -> float:
        return (bound if surplus(bound) <= 0 else _root(surplus, slope, bound)) / scale

    interval = [end(-LARGEST_SLOPE), end(LARGEST_SLOPE)]
    return {"value": slope / scale, "interval": interval, "finite": abs(slope) < LARGEST_SLOPE}


def _gain(contrast: np.ndarray) -> dict[str, Any]:
    contrast = contrast.astype(np.float64) / _scale(contrast)
    gains = np.zeros(len(contrast))
    fold = np.random.default_rng(0).permutation(len(contrast)) % FOLDS
    for held_out in range(min(FOLDS, len(contrast))):
        slope = _fit(contrast[fold != held_out])
        gains[fold == held_out] = _log_sigmoid(slope * contrast[fold == held_out]) + np.log(2)
    half = NORMAL_95 * float(gains.std(ddof=1)) / np.sqrt(len(gains)) if len(gains) > 1 else float("inf")
    mean = float(gains.mean())
    return {"value": mean, "interval": [mean - half, mean + half]}
