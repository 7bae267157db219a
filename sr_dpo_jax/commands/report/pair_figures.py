"""Draws the report's figures of single held-out pairs: how margins are distributed, and what they go with."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sr_dpo_jax.commands.report.figures import UNTRAINED, ZERO, line_of, look_of, panels_of
from sr_dpo_jax.commands.report.read import Run
from sr_dpo_jax.train.knowledge import share_interval

SHOWN_POINTS = 1500
POINTS = {"markersize": 5.5, "capsize": 2, "linewidth": 1.5}


def distributions(runs: Sequence[Run]) -> Figure | None:
    shown = [run for run in runs if run.pairs]
    if not shown:
        return None
    names = {"margin": "m, the prompt alone", "augmented_margin": "m̂, with p in front"}
    names = {name: title for name, title in names.items() if any(np.isfinite(run.column(name)).any() for run in shown)}
    figure, panels = panels_of(shown, len(names), stacked=True)
    everything = np.concatenate([run.column(name) for run in shown for name in names])
    low, high = np.nanquantile(everything, [0.005, 0.995])
    pad = 0.02 * (high - low) or 1.0
    bins = np.linspace(low - pad, high + pad, 36)
    for axes, (name, title) in zip(panels, names.items(), strict=True):
        for run in shown:
            values = run.column(name)[np.isfinite(run.column(name))]
            counts, _ = np.histogram(np.clip(values, bins[0], bins[-1]), bins)
            axes.stairs(counts / max(len(values), 1), bins, **line_of(run), linewidth=1.7)
        axes.axvline(0, **ZERO)
        axes.set(ylabel="share of pairs", ylim=(0, None))
        axes.set_title(title, loc="left", fontsize=9.5, pad=4, color="#444444")
    panels[-1].set_xlabel("margin (nats)")
    return figure


def rating(runs: Sequence[Run]) -> Figure | None:
    shown = [run for run in runs if np.isfinite(run.column("rating_difference")).sum() >= 3]
    if not shown:
        return None
    figure, (axes,) = panels_of(shown)
    for run in shown:
        _margin_against(axes, run, run.column("rating_difference"))
    axes.axhline(0, **ZERO)
    axes.set(xlabel="rating of chosen − rating of rejected", ylabel="margin m (nats)")
    return figure


def rating_gap(runs: Sequence[Run]) -> Figure | None:
    shown = [run for run in runs if "eval/rating_gap/1/pairs" in run.evaluation]
    if not shown:
        return None
    figure, (axes,) = panels_of(shown)
    for run in shown:
        numbers = [n for n in range(1, 100) if f"eval/rating_gap/{n}/pairs" in run.evaluation]
        low, high, pairs, accuracy = (
            np.array([run.evaluation[f"eval/rating_gap/{n}/{name}"] for n in numbers])
            for name in ("low", "high", "pairs", "accuracy")
        )
        ends = np.array([share_interval(part, count) for part, count in zip(accuracy, pairs, strict=True)])
        axes.errorbar((low + high) / 2, accuracy, yerr=np.abs(ends.T - accuracy), **POINTS, **look_of(run))
    axes.axhline(0.5, **UNTRAINED)
    axes.set(xlabel="rating of chosen − rating of rejected, middle of the quarter", ylabel="share of pairs with m > 0")
    axes.set_ylim(min(0.4, axes.get_ylim()[0]), 1.02)
    return figure


def length(runs: Sequence[Run]) -> Figure | None:
    shown = [run for run in runs if run.pairs]
    if not shown:
        return None
    figure, (axes,) = panels_of(shown)
    for run in shown:
        _margin_against(axes, run, run.column("chosen_tokens") - run.column("rejected_tokens"))
    axes.axhline(0, **ZERO)
    axes.axvline(0, **ZERO)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    axes.set(xlabel="length of chosen − length of rejected (tokens)", ylabel="margin m (nats)")
    return figure


def _margin_against(axes: Axes, run: Run, x: np.ndarray) -> None:
    """Draws m over x, `[N]`: pairs as pale dots, and means with 95 % intervals in up to eight bins of about as many
    pairs each."""
    margin = run.column("margin")
    both = np.isfinite(x) & np.isfinite(margin)
    x, margin = x[both], margin[both]
    thinned = np.linspace(0, len(x) - 1, min(len(x), SHOWN_POINTS)).astype(int)
    dots = {"s": 6, "alpha": 0.22, "linewidths": 0, "rasterized": len(x) > 500}
    axes.scatter(x[thinned], margin[thinned], color=line_of(run)["color"], **dots)
    bins = np.searchsorted(np.unique(np.quantile(x, np.linspace(0, 1, 9)[1:-1])), x, side="left")
    groups = [bins == value for value in np.unique(bins)]
    centre, value = (np.array([of[group].mean() for group in groups]) for of in (x, margin))
    error = [1.96 * margin[group].std() / np.sqrt(group.sum()) for group in groups]
    axes.errorbar(centre, value, yerr=error, **POINTS, **look_of(run))
