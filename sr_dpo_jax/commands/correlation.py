"""Measures how well margins agree with ratings that people or a judge gave: the paper's table 4, with intervals.

    rating difference   rating of the chosen response − rating of the rejected one, in the data's own units
    gap bucket          pairs of like rating difference, a quarter of the pairs each where differences allow it

Plain NumPy and SciPy on the host; only pairs whose two responses are both rated count.
"""

import logging
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

log = logging.getLogger(__name__)

RESAMPLES = 1000
CONFIDENCE = 0.95
LEAST_PAIRS = 3
GAP_BUCKETS = 4
RESAMPLES_AT_ONCE = 50
STATISTICS = {"pearson": "pearsonr", "spearman": "spearmanr", "kendall": "kendalltau"}
"""The functions of `scipy.stats`, which takes so long to import that only rated pairs do so."""


def rating_metrics(margins: dict[str, np.ndarray], difference: np.ndarray, *, seed: int, name: str) -> dict[str, float]:
    """Correlates margins with rating differences, and counts accuracy by rating gap.

    Args:
      margins: `margin` and, where p is used, `augmented_margin`, each `[N]`, nats.
      difference: `[N]` rating differences, NaN where a pair is not rated.
      seed: the seed of the bootstrap.
      name: the held-out set, `eval` or `eval/NAME`; the keys below are those of `eval`.

    Returns:
      `eval/rated_pairs`; for each margin and each of pearson, spearman and kendall `eval/MARGIN/NAME`, with the ends of
      its 95 % interval as `.../low` and `.../high` (percentiles of 1000 bootstrap resamples of pairs); for each gap
      bucket k `eval/rating_gap/k/low`, `high` (the differences that it holds), `pairs` and `accuracy` (share of pairs
      with a margin above 0), and `augmented_accuracy`. A number that is not defined is left out, and the log says why.
      Empty where no pair is rated.
    """
    rated = ~np.isnan(difference)
    if not rated.any():
        return {}
    difference = difference[rated].astype(np.float64)
    margins = {name: values[rated].astype(np.float64) for name, values in margins.items()}
    metrics: dict[str, float] = {f"{name}/rated_pairs": len(difference)}
    for kind, values in margins.items():
        metrics |= _correlations(f"{name}/{kind}", values, difference, seed)
    return metrics | _accuracy_by_gap(name, margins, difference)


def _correlations(name: str, margin: np.ndarray, difference: np.ndarray, seed: int) -> dict[str, float]:
    reason = None
    if len(margin) < LEAST_PAIRS:
        reason = f"{len(margin)} rated pairs are fewer than {LEAST_PAIRS}"
    elif np.ptp(difference) == 0:
        reason = "all rating differences are equal"
    elif np.ptp(margin) == 0:
        reason = "all margins are equal, as before the first update"
    if reason is not None:
        log.warning("%s: no correlation with ratings is defined: %s", name, reason)
        return {}
    import scipy.stats

    metrics = {}
    for statistic, named in STATISTICS.items():
        key, function = f"{name}/{statistic}", getattr(scipy.stats, named)
        metrics[key] = float(function(margin, difference).statistic)
        low, high = _interval(function, margin, difference, seed)
        if np.isfinite([low, high]).all():
            metrics |= {f"{key}/low": low, f"{key}/high": high}
        else:  # a resample of very few pairs may hold one value only
            log.warning("%s: too few different pairs for an interval", key)
    return metrics


def _interval(
    function: Callable[..., Any], margin: np.ndarray, difference: np.ndarray, seed: int
) -> tuple[float, float]:
    """Gives the percentile interval over resampled pairs; a seed resamples the same pairs for every statistic."""
    import scipy.stats

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", scipy.stats.ConstantInputWarning)
        warnings.simplefilter("ignore", scipy.stats.DegenerateDataWarning)
        low, high = scipy.stats.bootstrap(
            (margin, difference),
            lambda x, y: function(x, y).statistic,
            paired=True,
            vectorized=False,
            n_resamples=RESAMPLES,
            batch=RESAMPLES_AT_ONCE,
            confidence_level=CONFIDENCE,
            method="percentile",
            rng=np.random.default_rng(seed),
        ).confidence_interval
    return float(low), float(high)


def _accuracy_by_gap(name: str, margins: dict[str, np.ndarray], difference: np.ndarray) -> dict[str, float]:
    """Counts accuracy in buckets that end where quarters of the sorted differences end; equal ones are never parted."""
    edges = np.unique(np.quantile(difference, np.linspace(0, 1, GAP_BUCKETS + 1)[1:-1], method="inverted_cdf"))
    bucket = np.searchsorted(edges, difference, side="left")  # a difference equal to an edge belongs below it
    metrics: dict[str, float] = {}
    for number, value in enumerate(np.unique(bucket), 1):
        members, key = bucket == value, f"{name}/rating_gap/{number}"
        low, high = float(difference[members].min()), float(difference[members].max())
        metrics |= {f"{key}/low": low, f"{key}/high": high, f"{key}/pairs": int(members.sum())}
        for kind, accuracy in (("margin", "accuracy"), ("augmented_margin", "augmented_accuracy")):
            if kind in margins:
                metrics[f"{key}/{accuracy}"] = float((margins[kind][members] > 0).mean())
    return metrics
