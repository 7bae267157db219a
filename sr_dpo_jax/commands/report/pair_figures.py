"""The report's figures of single held-out pairs: how margins are spread, and what they go with."""

from collections.abc import Sequence

import numpy as np
import scipy.stats
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sr_dpo_jax.commands.report.figures import look, panels_of
from sr_dpo_jax.commands.report.read import Run

SHOWN_POINTS = 1500


def distributions(runs: Sequence[Run]) -> Figure | None:
    shown = [run for run in runs if run.pairs]
    if not shown:
        return None
    names = {"margin": "m, the prompt alone", "augmented_margin": "m̂, with p in front"}
    names = {name: title for name, title in names.items() if any(np.isfinite(run.column(name)).any() for run in shown)}
    figure, panels = panels_of(runs, shown, len(names), stacked=True)
    everything = np.concatenate([run.column(name) for run in shown for name in names])
    low, high = np.nanquantile(everything, [0.005, 0.995])
    pad = 0.02 * (high - low) or 1.0
    bins = np.linspace(low - pad, high + pad, 36)
    for axes, (name, title) in zip(panels, names.items(), strict=True):
        for index, run in enumerate(runs):
            if run not in shown:
                continue
            values = run.column(name)[np.isfinite(run.column(name))]
            counts, _ = np.histogram(np.clip(values, bins[0], bins[-1]), bins)
            style = look(index)
            axes.stairs(
                counts / max(len(values), 1), bins, color=style["color"], linestyle=style["linestyle"], linewidth=1.7
            )
        axes.axvline(0, color="#666666", linewidth=1)
        axes.set(ylabel="share of pairs", ylim=(0, None))
        axes.set_title(title, loc="left", fontsize=9.5, pad=4, color="#444444")
    panels[-1].set_xlabel("margin (nats)")
    return figure


def rating(runs: Sequence[Run]) -> Figure | None:
    shown = [run for run in runs if np.isfinite(run.column("rating_difference")).sum() >= 3]
    if not shown:
        return None
    figure, (axes,) = panels_of(runs, shown, 1)
    for index, run in enumerate(runs):
        if run in shown:
            _binned(axes, run.column("rating_difference"), run.column("margin"), index)
    axes.axhline(0, color="#666666", linewidth=1)
    axes.set(xlabel="rating of chosen − rating of rejected", ylabel="margin m (nats)")
    return figure


def rating_gap(runs: Sequence[Run]) -> Figure | None:
    shown = [run for run in runs if "eval/rating_gap/1/pairs" in run.evaluation]
    if not shown:
        return None
    figure, (axes,) = panels_of(runs, shown, 1)
    for index, run in enumerate(runs):
        if run not in shown:
            continue
        found = run.evaluation
        numbers = [n for n in range(1, 100) if f"eval/rating_gap/{n}/pairs" in found]
        low, high, pairs, share_right = (
            np.array([found[f"eval/rating_gap/{n}/{name}"] for n in numbers])
            for name in ("low", "high", "pairs", "accuracy")
        )
        ends = np.array([share_interval(part, count) for part, count in zip(share_right, pairs, strict=True)])
        error = np.abs(ends.T - share_right)
        axes.errorbar(
            (low + high) / 2, share_right, yerr=error, markersize=5.5, capsize=2, linewidth=1.5, **look(index)
        )
    axes.axhline(0.5, color="#888888", linewidth=0.9, linestyle=(0, (4, 3)))
    axes.set(xlabel="rating of chosen − rating of rejected, middle of the quarter", ylabel="share of pairs with m > 0")
    axes.set_ylim(min(0.4, axes.get_ylim()[0]), 1.02)
    return figure


def length(runs: Sequence[Run]) -> Figure | None:
    shown = [run for run in runs if run.pairs]
    if not shown:
        return None
    figure, (axes,) = panels_of(runs, shown, 1)
    for index, run in enumerate(runs):
        if run in shown:
            _binned(axes, run.column("chosen_tokens") - run.column("rejected_tokens"), run.column("margin"), index)
    axes.axhline(0, color="#666666", linewidth=1)
    axes.axvline(0, color="#666666", linewidth=1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    axes.set(xlabel="length of chosen − length of rejected (tokens)", ylabel="margin m (nats)")
    return figure


def share_interval(share_of: float, pairs: float) -> tuple[float, float]:
    """95 % interval (Wilson) of a share of so many pairs."""
    count = int(pairs)
    found = scipy.stats.binomtest(round(share_of * count), count).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


def _binned(axes: Axes, x: np.ndarray, y: np.ndarray, index: int) -> None:
    """Pairs as pale dots, and the mean of y with its 95 % interval in up to eight bins of like numbers of pairs."""
    both = np.isfinite(x) & np.isfinite(y)
    x, y = x[both], y[both]
    thinned = np.linspace(0, len(x) - 1, min(len(x), SHOWN_POINTS)).astype(int)
    style = look(index)
    axes.scatter(x[thinned], y[thinned], s=6, color=style["color"], alpha=0.22, linewidths=0, rasterized=len(x) > 500)
    bins = np.searchsorted(np.unique(np.quantile(x, np.linspace(0, 1, 9)[1:-1])), x, side="left")
    groups = [bins == value for value in np.unique(bins)]
    means = [(x[group].mean(), y[group].mean(), 1.96 * y[group].std() / np.sqrt(group.sum())) for group in groups]
    centre, value, error = np.array(means).T
    axes.errorbar(centre, value, yerr=error, markersize=5.5, capsize=2, linewidth=1.5, **style)
