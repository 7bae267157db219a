"""The report's figures as SVG: every run has one colour, line style and marker in all of them.

The palette is that of Okabe and Ito, which colour-blind readers tell apart; line styles and markers do so in print.
Each function takes the runs and returns the figure, or None where no run has what it shows.
"""

import io
from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from sr_dpo_jax.commands.report.read import REFINED, Run, series

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
LABEL_LENGTH = 30
SETS_ACROSS = 3
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
    figure, panels = panels_of(runs, shown, len(families))
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
    figure, (axes,) = panels_of(runs, shown, 1)
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


def held_out_sets(runs: Sequence[Run]) -> Figure | None:
    """One panel a set, all on one scale: accuracy, or the loss where no run has that."""
    sets = list(dict.fromkeys(name for run in runs for name in run.sets))
    if len(sets) < 2:
        return None
    shown = [run for run in runs if run.sets]
    ranked = any(f"{name}/rewards/accuracies" in line for run in shown for line in run.evaluations for name in sets)
    measure, title = ("rewards/accuracies", "share of pairs with m > 0") if ranked else ("loss", "loss")
    figure, panels = panels_of(runs, shown, len(sets), across=SETS_ACROSS, sharey=True)
    for axes, name in zip(panels, sets, strict=True):
        for index, run in enumerate(runs):
            steps, values = series(run.evaluations, f"{name}/{measure}")
            if len(steps):
                axes.plot(steps, values, markersize=6, markeredgecolor="white", linewidth=1.4, **look(index))
                _ring(axes, run, steps, values)
        if ranked:
            axes.axhline(0.5, color="#888888", linewidth=0.9, linestyle=(0, (4, 3)))
        axes.set_title("data.eval_path" if name == "eval" else name.removeprefix("eval/"), loc="left", fontsize=9.5)
        axes.set_xlabel("optimizer step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    for axes in panels[::SETS_ACROSS]:
        axes.set_ylabel(title)
    return figure


def cost(runs: Sequence[Run]) -> Figure | None:
    shown = [run for run in runs if len(series(run.steps, "step_time_s")[0])]
    if not shown:
        return None
    figure, panels = panels_of(runs, shown, 3)
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


def running_mean(values: np.ndarray, steps: int) -> np.ndarray:
    """Mean over about `steps` values around each, fewer at both ends; values that are not finite count as absent."""
    finite, around = np.isfinite(values), steps // 2
    total = np.cumsum(np.concatenate([[0.0], np.where(finite, values, 0.0)]))
    count = np.cumsum(np.concatenate([[0], finite]))
    place = np.arange(len(values))
    first, last = np.maximum(place - around, 0), np.minimum(place + around + 1, len(values))
    counts = count[last] - count[first]
    return np.where(counts > 0, (total[last] - total[first]) / np.maximum(counts, 1), np.nan)


def panels_of(
    runs: Sequence[Run],
    shown: Sequence[Run],
    count: int,
    *,
    stacked: bool = False,
    across: int | None = None,
    sharey: bool = False,
) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels under a legend of the runs that it shows.

    They stand side by side, at most `across` in a row, or stacked over one x axis.
    """
    wide = count > 1 and not stacked
    columns = 1 if stacked else min(count, across or count)
    shape = (-(-count // columns), columns)
    height = HEIGHT if stacked else HEIGHT * (1 + 0.8 * (shape[0] - 1))
    figure = Figure(figsize=(2.1 * WIDTH if wide else WIDTH, height))
    grid = figure.subplots(
        *shape, squeeze=False, sharex="col" if stacked else "none", sharey="all" if sharey else "none"
    )
    panels = list(grid.flat)[:count]
    for axes in list(grid.flat)[count:]:
        axes.remove()
    labelled = [(index, run) for index, run in enumerate(runs) if run in shown]
    handles = [Line2D([], [], linewidth=1.8, markersize=5, **look(index)) for index, _ in labelled]
    labels = [_short(run.label) for _, run in labelled]
    columns = max(1, min(len(labels), int((140 if wide else 66) / (max(map(len, labels)) + 8))))
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, handlelength=2.6, columnspacing=1.4)
    figure.set_figheight(height + 0.2 * (-(-len(labels) // columns) - 1))
    return figure, panels


def _short(label: str) -> str:
    """A label that fits; with a space in front where matplotlib would take the underscore for a hidden line."""
    label = label if len(label) <= LABEL_LENGTH else "…" + label[1 - LABEL_LENGTH :]
    return f" {label}" if label.startswith("_") else label


def _one_curve(runs: Sequence[Run], name: str, title: str, *, zero: bool = False, half: bool = False) -> Figure | None:
    shown = [run for run in runs if any(name in line for line in run.steps) or _held_out(run, name) is not None]
    if not shown:
        return None
    figure, (axes,) = panels_of(runs, shown, 1)
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
            _ring(axes, run, *found)
    axes.set(xlabel="optimizer step", ylabel=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))


def _ring(axes: Axes, run: Run, steps: np.ndarray, values: np.ndarray) -> None:
    """Around the evaluation whose checkpoint is the best."""
    if run.best_step in steps:
        value = values[steps == run.best_step]
        axes.plot([run.best_step], value, "o", markersize=13, fillstyle="none", color="#1c1c1c", zorder=5)


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
