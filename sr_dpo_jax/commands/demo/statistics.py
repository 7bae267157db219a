"""Gives means over seeds with intervals, and paired tests.

Seeds, not prompts, are the repetitions: all arms of a seed share its SFT model, so arms are compared seed by seed.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats

CONFIDENCE = 0.95


class Mean(NamedTuple):
    """A mean with its 95 % interval by Student's t; the ends are NaN for a single value."""

    value: float
    low: float
    high: float


class Paired(NamedTuple):
    """The mean of the differences first − second with its interval, and p of the paired t test (NaN for one pair)."""

    difference: Mean
    p: float


def mean_of(values: Sequence[float | None]) -> Mean:
    """Gives the mean of one value or more, with its interval; None counts as NaN."""
    array = np.asarray(values, np.float64)
    mean, half = float(array.mean()), np.nan
    if len(array) > 1:
        half = scipy.stats.t.ppf((1 + CONFIDENCE) / 2, len(array) - 1) * scipy.stats.sem(array)
    return Mean(mean, float(mean - half), float(mean + half))


def paired(first: Sequence[float], second: Sequence[float]) -> Paired:
    """Compares two arms; both have the same seeds in the same order."""
    differences = np.subtract(first, second, dtype=np.float64)
    if len(differences) < 2:
        return Paired(mean_of(differences), np.nan)
    if np.ptp(differences) == 0:  # the t statistic divides by their spread
        return Paired(mean_of(differences), 1.0 if differences[0] == 0 else 0.0)
    return Paired(mean_of(differences), float(scipy.stats.ttest_rel(first, second).pvalue))


def holm(values: Sequence[float]) -> list[float]:
    """Corrects p-values for their number by Holm's step-down rule; NaN stays NaN and counts for none."""
    corrected, largest = [float("nan")] * len(values), 0.0
    order = sorted((index for index, p in enumerate(values) if not np.isnan(p)), key=lambda index: values[index])
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, values[index] * (len(order) - place)))
        corrected[index] = largest
    return corrected


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Gives the rank correlation; NaN where one of the two is constant."""
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return np.nan
    return float(scipy.stats.spearmanr(first, second).statistic)


def partial_spearman(first: Sequence[float], second: Sequence[float], given: Sequence[float]) -> float:
    """Gives the rank correlation of two with the linear part of the third's ranks taken out of both."""
    both, with_first, with_second = spearman(first, second), spearman(first, given), spearman(second, given)
    return float((both - with_first * with_second) / np.sqrt((1 - with_first**2) * (1 - with_second**2)))


def outcomes(first: np.ndarray, second: np.ndarray) -> tuple[float, float, float]:
    """Gives the shares of prompts on which the first response is better, as good, and worse."""
    return float((first > second).mean()), float((first == second).mean()), float((first < second).mean())
