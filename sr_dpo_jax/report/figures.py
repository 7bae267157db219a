"""The report's figures as SVG: every run has one colour, line style and marker in all of them.

The palette is that of Okabe and Ito, which colour-blind readers tell apart; line styles and markers do so in print.
Each function takes the runs and returns the figure, or None where no run has what it shows.
"""

import io
from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
import scipy.stats
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from sr_dpo_jax.report.read import REFINED, Run, series

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
LINE_STYLES = ("-", "--", "-.", (0, (1, 1.2)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.limits": (-3, 5),
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.hashsalt": "sr-dpo report",
    "text.parse_math": False,
    "figure.constrained_layout.use": True,
}
WIDTH, HEIGHT = 5.6, 3.5
"""Inches, of a figure that takes one of two columns."""
SHOWN_POINTS = 1500
LABEL_LENGTH = 30
MARGIN_OF = {"rewards/accuracies": "margin", "augmented/accuracies": "augmented/margin"}
FAMILIES = {
    "DPO, Sr-DPO": ("dpo", "sr_dpo"),
    "IPO, Sr-IPO": ("ipo", "sr_ipo"),
    "IPO per token": ("ipo_mean",),
    "SFT": ("sft",),
    "unknown objective": ("unknown",),
}
"""Losses of one scale share an axis."""


def svg(draw: Callable[[Sequence[Run]], Figure | None], runs: Sequence[Run]) -> str | None:
    """The figure as SVG text, the same bytes for the same runs."""
    with matplotlib.rc_context(STYLE):
        figure = draw(runs)
        if figure is None:
            return None
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()


def look(index: int) -> dict[str, object]:
    """Colour, line style and marker of run number `index`."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": LINE_STYLES[index % len(LINE_STYLES)],
        "marker": MARKERS[index % len(MARKERS)],
    }


def loss(runs: Sequence[Run]) -> Figure | None:
    shown = [run for run in runs if run.steps or any("eval/loss" in line for line in run.evaluations)]
    families = {title: names for title, names in FAMILIES.items() if any(run.objective in names for run in shown)}
    if not families:
        return None
    figure, panels = _panels(runs, shown, len(families))
    for axes, (title, names) in zip(panels, families.items(), strict=True):
        members = [run if run.objective in names else None for run in runs]
        _curves(axes, members, "loss", "loss of SFT (nats a response)" if title == "SFT" else f"loss of {title}")
        for start in sorted({_untrained_loss(run) for run in members if run is not None} - {None}):
            axes.axhline(start, color="#888888", linewidth=0.9, linestyle=(0, (4, 3)))
            axes.annotate(
                "untrained",
                (1, start),
                xycoords=("axes fraction", "data"),
                ha="right",
                va="bottom",
                xytext=(0, 2),
                textcoords="offset points",
                color="#666666",
                fontsize=8,
            )
    return figure


def _untrained_loss(run: Run) -> float | None:
    if run.objective in ("dpo", "sr_dpo"):
        return float(np.log(2))
    if run.objective in ("ipo", "sr_ipo", "ipo_mean") and run.beta > 0:
        return 1 / (4 * run.beta**2)
    return None


def margin(runs: Sequence[Run]) -> Figure | None:
    return _one_curve(runs, "margin", "mean margin m (nats)", zero=True)


def accuracy(runs: Sequence[Run]) -> Figure | None:
    return _one_curve(runs, "rewards/accuracies", "share of pairs with m > 0", half=True)


def augmented_accuracy(runs: Sequence[Run]) -> Figure | None:
    return _one_curve(runs, "augmented/accuracies", "share of pairs with m̂ > 0", half=True)


def refinement(runs: Sequence[Run]) -> Figure | None:
    return _one_curve(runs, "refinement", "mean refinement Δ", zero=True)


def share(runs: Sequence[Run]) -> Figure | None:
    """|λΔ| against |βm| (|m| in the IPO family), each a running mean over steps; none before the margin moved."""
    shown = [run for run in runs if run.objective in REFINED and len(series(run.steps, "refinement")[0])]
    if not shown:
        return None
    figure, (axes,) = _panels(runs, shown, 1)
    for index, run in enumerate(runs):
        if run not in shown:
            continue
        steps, delta = series(run.steps, "refinement")
        shift = running_mean(np.abs(run.lam * delta), window(len(steps)))
        reward = running_mean(np.abs(run.scale * series(run.steps, "margin")[1]), window(len(steps)))
        moved = reward > 0.02 * np.nanmax(reward, initial=0)
        style = look(index)
        axes.axhline(run.lam * run.beta / run.scale, color=style["color"], linewidth=0.9, linestyle=(0, (4, 3)))
        axes.plot(
            steps,
            np.where(moved, shift / np.where(moved, reward, 1), np.nan),
            color=style["color"],
            linestyle=style["linestyle"],
            linewidth=1.8,
        )
    axes.set_ylim(0, min(2.0, max(0.1, 1.15 * _highest(axes))))
    axes.set(xlabel="optimizer step", ylabel="|λΔ| / |βm|, or / |m| in Sr-IPO")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    return figure


def distributions(runs: Sequence[Run]) -> Figure | None:
    shown = [run for run in runs if run.pairs]
    if not shown:
        return None
    names = {"margin": "m, the prompt alone", "augmented_margin": "m̂, with p in front"}
    names = {name: title for name, title in names.items() if any(np.isfinite(run.column(name)).any() for run in shown)}
    figure, panels = _panels(runs, shown, len(names), stacked=True)
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
    figure, (axes,) = _panels(runs, shown, 1)
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
    figure, (axes,) = _panels(runs, shown, 1)
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
    figure, (axes,) = _panels(runs, shown, 1)
    for index, run in enumerate(runs):
        if run in shown:
            _binned(axes, run.column("chosen_tokens") - run.column("rejected_tokens"), run.column("margin"), index)
    axes.axhline(0, color="#666666", linewidth=1)
    axes.axvline(0, color="#666666", linewidth=1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    axes.set(xlabel="length of chosen − length of rejected (tokens)", ylabel="margin m (nats)")
    return figure


def cost(runs: Sequence[Run]) -> Figure | None:
    shown = [run for run in runs if len(series(run.steps, "step_time_s")[0])]
    if not shown:
        return None
    figure, panels = _panels(runs, shown, 3)
    names = {
        "tokens_per_second": "real tokens a second",
        "step_time_s": "time of a step (s)",
        "padding_fraction": "padding, share of a step's tokens",
    }
    for axes, (name, title) in zip(panels, names.items(), strict=True):
        _curves(axes, [run if run in shown else None for run in runs], name, title, held_out=False, raw=False)
        axes.set_ylim(0, max(0.05, 1.2 * _highest(axes)))
    return figure


def window(points: int) -> int:
    """Steps of the running mean that is drawn over so many points."""
    return max(1, points // 12)


def share_interval(share_of: float, pairs: float) -> tuple[float, float]:
    """95 % interval (Wilson) of a share of so many pairs."""
    count = int(pairs)
    found = scipy.stats.binomtest(round(share_of * count), count).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


def running_mean(values: np.ndarray, steps: int) -> np.ndarray:
    """Mean over about `steps` values around each, fewer at both ends; values that are not finite count as absent."""
    finite, around = np.isfinite(values), steps // 2
    total = np.cumsum(np.concatenate([[0.0], np.where(finite, values, 0.0)]))
    count = np.cumsum(np.concatenate([[0], finite]))
    place = np.arange(len(values))
    first, last = np.maximum(place - around, 0), np.minimum(place + around + 1, len(values))
    counts = count[last] - count[first]
    return np.where(counts > 0, (total[last] - total[first]) / np.maximum(counts, 1), np.nan)


def _panels(
    runs: Sequence[Run], shown: Sequence[Run], count: int, *, stacked: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, side by side or stacked over one x axis, under a legend of the runs that it shows."""
    wide = count > 1 and not stacked
    figure = Figure(figsize=(2.1 * WIDTH if wide else WIDTH, HEIGHT))
    shape = (count, 1) if stacked else (1, count)
    panels = list(figure.subplots(*shape, squeeze=False, sharex="col" if stacked else "none").flat)
    labelled = [(index, run) for index, run in enumerate(runs) if run in shown]
    handles = [Line2D([], [], linewidth=1.8, markersize=5, **look(index)) for index, _ in labelled]
    labels = [_short(run.label) for _, run in labelled]
    columns = max(1, min(len(labels), int((140 if wide else 66) / (max(map(len, labels)) + 8))))
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, handlelength=2.6, columnspacing=1.4)
    figure.set_figheight(HEIGHT + 0.2 * (-(-len(labels) // columns) - 1))
    return figure, panels


def _short(label: str) -> str:
    """A label that fits; with a space in front where matplotlib would take the underscore for a hidden line."""
    label = label if len(label) <= LABEL_LENGTH else "…" + label[1 - LABEL_LENGTH :]
    return f" {label}" if label.startswith("_") else label


def _one_curve(runs: Sequence[Run], name: str, title: str, *, zero: bool = False, half: bool = False) -> Figure | None:
    shown = [run for run in runs if any(name in line for line in run.steps) or _held_out(run, name) is not None]
    if not shown:
        return None
    figure, (axes,) = _panels(runs, shown, 1)
    _curves(axes, [run if run in shown else None for run in runs], name, title)
    if zero:
        axes.axhline(0, color="#666666", linewidth=1)
    if half:
        axes.axhline(0.5, color="#888888", linewidth=0.9, linestyle=(0, (4, 3)))
        low, high = axes.get_ylim()
        axes.set_ylim(max(0, min(0.45, low)), min(1.02, max(high, 0.6)))
    return figure


def _held_out(run: Run, name: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Steps and values of evaluations while training and of `sr-dpo eval`."""
    lines = {line["step"]: line for line in (*run.evaluations, run.evaluation) if f"eval/{name}" in line}
    return series([lines[step] for step in sorted(lines)], f"eval/{name}") if lines else None


def _curves(
    axes: Axes, runs: Sequence[Run | None], name: str, title: str, *, held_out: bool = True, raw: bool = True
) -> None:
    """Lines are running means over training steps, over the steps themselves, pale; markers are held-out pairs."""
    for index, run in enumerate(runs):
        if run is None:
            continue
        style = look(index)
        # An untrained policy prefers neither: its m is 0, and the share of m > 0 says nothing.
        moved = [line for line in run.steps if line.get(MARGIN_OF.get(name)) != 0]
        steps, values = series(moved, name)
        if raw and window(len(steps)) > 1:
            axes.plot(steps, values, color=style["color"], alpha=0.22, linewidth=0.7)
        axes.plot(
            steps,
            running_mean(values, window(len(steps))),
            color=style["color"],
            linestyle=style["linestyle"],
            linewidth=1.8,
            marker="." if len(steps) == 1 else None,
        )
        found = _held_out(run, name) if held_out else None
        if found is not None:
            axes.plot(
                *found,
                color=style["color"],
                marker=style["marker"],
                markersize=7,
                markeredgecolor="white",
                linewidth=0,
                zorder=4,
            )
    axes.set(xlabel="optimizer step", ylabel=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))


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


def _highest(axes: Axes) -> float:
    """The 98th percentile of all that is drawn: one odd step must not squeeze the rest."""
    drawn = np.concatenate([np.asarray(line.get_ydata(), np.float64) for line in axes.lines])
    drawn = drawn[np.isfinite(drawn)]
    return float(np.quantile(drawn, 0.98)) if len(drawn) else 1.0


def swatch(index: int) -> Figure:
    """A piece of a run's line with its marker."""
    figure = Figure(figsize=(0.42, 0.16), layout="none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.plot([0, 0.5, 1], [0, 0, 0], linewidth=1.8, markersize=5, markevery=[1], **look(index))
    axes.set(xlim=(-0.02, 1.02), ylim=(-1, 1))
    axes.axis("off")
    return figure
