"""Draws the report's figures of training and held-out sets as SVG; a run looks the same in all of them.

The palette is that of Okabe and Ito, which colour-blind readers tell apart; line styles and markers do so in print.
Each function takes the runs and gives the figure, or None where no run has the data that it shows.
"""

import io
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from sr_dpo_jax.commands.report.read import Run, series, set_title

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
ZERO = {"color": "#666666", "linewidth": 1}
BROKEN = {"linewidth": 0.9, "linestyle": (0, (4, 3))}
UNTRAINED = {"color": "#888888", **BROKEN}
WIDTH, HEIGHT = 5.6, 3.5
"""The size in inches of a figure that takes one of two columns."""
LABEL_LENGTH = 30
SETS_ACROSS = 3
MARGIN_OF = {"rewards/accuracies": "margin", "augmented/accuracies": "augmented/margin"}
FAMILIES = {
    "logistic": "loss of DPO, Sr-DPO",
    "squared": "loss of IPO, Sr-IPO",
    "squared, per token": "loss of IPO per token",
    "hinge": "hinge loss",
    "other": "loss of other objectives",
    "likelihood": "loss of SFT (nats a response)",
    "unknown": "loss of unknown objective",
}
"""Families of objectives, whose losses share an axis, and the titles of these axes."""


def svg(draw: Callable[..., Figure | None], *arguments: Any) -> str | None:
    """Draws a figure as SVG text, the same bytes for the same arguments; None where there is none."""
    with matplotlib.rc_context(STYLE):
        figure = draw(*arguments)
        if figure is None:
            return None
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()


def line_of(run: Run) -> dict[str, Any]:
    """Gives colour and line style of a run, as keyword arguments of a plot."""
    colours, styles = len(COLOURS), len(LINE_STYLES)
    return {"color": COLOURS[run.number % colours], "linestyle": LINE_STYLES[run.number % styles]}


def look_of(run: Run) -> dict[str, Any]:
    """Gives colour, line style and marker of a run."""
    return {**line_of(run), "marker": MARKERS[run.number % len(MARKERS)]}


def loss(runs: Sequence[Run]) -> Figure | None:
    shown = [run for run in runs if run.steps or any("eval/loss" in line for line in run.evaluations)]
    families = [name for name in FAMILIES if any(run.kind.family == name for run in shown)]
    if not families:
        return None
    figure, panels = panels_of(shown, len(families))
    for axes, family in zip(panels, families, strict=True):
        members = [run for run in shown if run.kind.family == family]
        _curves(axes, members, "loss", FAMILIES[family])
        for start in sorted({run.loss_at_zero for run in members} - {None}):
            axes.axhline(start, **UNTRAINED)
            where = axes.get_yaxis_transform()  # x as a share of the axes, y as data
            axes.text(1, start, "untrained", transform=where, ha="right", va="bottom", color="#666666", fontsize=8)
    return figure


def curve(name: str, title: str, *, is_share: bool = False) -> Callable[[Sequence[Run]], Figure | None]:
    """Makes the function that draws a metric of metrics.jsonl over steps, and 0, or for a share chance, 0.5."""

    def draw(runs: Sequence[Run]) -> Figure | None:
        shown = [run for run in runs if any(name in line for line in run.steps) or len(_held_out(run, name)[0])]
        if not shown:
            return None
        figure, (axes,) = panels_of(shown)
        _curves(axes, shown, name, title)
        axes.axhline(0.5 if is_share else 0, **(UNTRAINED if is_share else ZERO))
        if is_share:
            low, high = axes.get_ylim()
            axes.set_ylim(max(0, min(0.45, low)), min(1.02, max(high, 0.6)))
        return figure

    return draw


def share(runs: Sequence[Run]) -> Figure | None:
    """Draws |λΔ| over |βm| (|m| in the IPO family), each a running mean over steps; nothing before the margin moved."""
    shown = [run for run in runs if run.kind.refined and len(series(run.steps, "refinement")[0])]
    if not shown:
        return None
    figure, (axes,) = panels_of(shown)
    for run in shown:
        steps, delta = series(run.steps, "refinement")
        shift = running_mean(np.abs(run.lam * delta), window(len(steps)))
        reward = running_mean(np.abs(run.scale * series(run.steps, "margin")[1]), window(len(steps)))
        moved = reward > 0.02 * np.nanmax(reward, initial=0)
        axes.axhline(run.lam * run.beta / run.scale, color=line_of(run)["color"], **BROKEN)
        axes.plot(steps, np.where(moved, shift / np.where(moved, reward, 1), np.nan), **line_of(run), linewidth=1.8)
    axes.set_ylim(0, min(2.0, max(0.1, 1.15 * _highest(axes))))
    _over_steps(axes, "|λΔ| / |βm|, or / |m| in Sr-IPO")
    return figure


def held_out_sets(runs: Sequence[Run]) -> Figure | None:
    """Draws a panel a held-out set, all on one scale: accuracy, or the loss where no run has an accuracy."""
    sets = list(dict.fromkeys(name for run in runs for name in run.sets))
    if len(sets) < 2:
        return None
    shown = [run for run in runs if run.sets]
    ranked = any(f"{name}/rewards/accuracies" in line for run in shown for line in run.evaluations for name in sets)
    measure, title = ("rewards/accuracies", "share of pairs with m > 0") if ranked else ("loss", "loss")
    figure, panels = panels_of(shown, len(sets), across=SETS_ACROSS, sharey=True)
    for number, (axes, name) in enumerate(zip(panels, sets, strict=True)):
        for run in shown:
            steps, values = series(run.evaluations, f"{name}/{measure}")
            if len(steps):
                axes.plot(steps, values, markersize=6, markeredgecolor="white", linewidth=1.4, **look_of(run))
                _ring(axes, run, steps, values)
        if ranked:
            axes.axhline(0.5, **UNTRAINED)
        axes.set_title(set_title(name), loc="left", fontsize=9.5)
        _over_steps(axes, title if number % SETS_ACROSS == 0 else None, ticks=5)
    return figure


def cost(runs: Sequence[Run]) -> Figure | None:
    shown = [run for run in runs if len(series(run.steps, "step_time_s")[0])]
    if not shown:
        return None
    figure, panels = panels_of(shown, 3)
    names = {
        "tokens_per_second": "real tokens a second",
        "step_time_s": "time of a step (s)",
        "padding_fraction": "padding, share of a step's tokens",
    }
    for axes, (name, title) in zip(panels, names.items(), strict=True):
        _curves(axes, shown, name, title, single_values=False)
        axes.set_ylim(0, max(0.05, 1.2 * _highest(axes)))
    return figure


def window(points: int) -> int:
    """Gives the steps of the running mean that is drawn over a curve of `points` points."""
    return max(1, points // 12)


def running_mean(values: np.ndarray, steps: int) -> np.ndarray:
    """Gives the mean of about `steps` values around each, fewer at both ends; counts only finite values."""
    if not len(values):
        return values
    finite, around = np.isfinite(values), np.ones(2 * (steps // 2) + 1)
    total = np.convolve(np.where(finite, values, 0.0), around, "same")
    count = np.convolve(finite, around, "same")
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def panels_of(
    shown: Sequence[Run], count: int = 1, *, stacked: bool = False, across: int | None = None, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    """Makes a figure of `count` empty panels under a legend of the runs that it shows.

    They stand side by side, at most `across` in a row, or stacked over one horizontal axis.
    """
    wide = count > 1 and not stacked
    columns = 1 if stacked else min(count, across or count)
    rows = -(-count // columns)
    height = HEIGHT if stacked else HEIGHT * (1 + 0.8 * (rows - 1))
    figure = Figure(figsize=(2.1 * WIDTH if wide else WIDTH, height))
    shared = {"sharex": "col" if stacked else "none", "sharey": "all" if sharey else "none"}
    panels = list(figure.subplots(rows, columns, squeeze=False, **shared).flat)
    for axes in panels[count:]:
        axes.remove()
    handles = [Line2D([], [], linewidth=1.8, markersize=5, **look_of(run)) for run in shown]
    labels = [_short(run.label) for run in shown]
    across = max(1, min(len(labels), int((140 if wide else 66) / (max(map(len, labels)) + 8))))
    figure.legend(handles, labels, loc="outside upper left", ncols=across, handlelength=2.6, columnspacing=1.4)
    figure.set_figheight(height + 0.2 * (-(-len(labels) // across) - 1))
    return figure, panels[:count]


def _short(label: str) -> str:
    """Cuts a label to the legend's width.

    A trap: matplotlib hides a line whose label begins with an underscore, so a space is put in front of it.
    """
    label = label if len(label) <= LABEL_LENGTH else "…" + label[1 - LABEL_LENGTH :]
    return f" {label}" if label.startswith("_") else label


def _held_out(run: Run, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Gives steps and values of a metric from evaluations during training and from `sr-dpo eval`."""
    lines = {line["step"]: line for line in (*run.evaluations, run.evaluation) if f"eval/{name}" in line}
    return series([lines[step] for step in sorted(lines)], f"eval/{name}")


def _curves(axes: Axes, runs: Sequence[Run], name: str, title: str, *, single_values: bool = True) -> None:
    """Draws running means over training steps as lines; with `single_values` also the values of single steps, pale, and
    those of held-out pairs, as markers."""
    for run in runs:
        # Before the first update m is 0, and the share of m > 0 would read as an accuracy of 0.
        moved = [line for line in run.steps if line.get(MARGIN_OF.get(name)) != 0]
        steps, values = series(moved, name)
        style, over = look_of(run), window(len(steps))
        if single_values and over > 1:
            axes.plot(steps, values, color=style["color"], alpha=0.22, linewidth=0.7)
        mark = "." if len(steps) == 1 else None
        axes.plot(steps, running_mean(values, over), **line_of(run), linewidth=1.8, marker=mark)
        held_out = _held_out(run, name)
        if single_values and len(held_out[0]):
            axes.plot(*held_out, **style | {"linestyle": ""}, markersize=7, markeredgecolor="white", zorder=4)
            _ring(axes, run, *held_out)
    _over_steps(axes, title)


def _over_steps(axes: Axes, title: str | None, *, ticks: int = 6) -> None:
    axes.set(xlabel="optimizer step", ylabel=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=ticks))


def _ring(axes: Axes, run: Run, steps: np.ndarray, values: np.ndarray) -> None:
    """Draws a ring around the evaluation whose checkpoint is the best."""
    if run.best_step in steps:
        value = values[steps == run.best_step]
        axes.plot([run.best_step], value, "o", markersize=13, fillstyle="none", color="#1c1c1c", zorder=5)


def _highest(axes: Axes) -> float:
    """Gives the 98th percentile of all that is drawn: one odd step must not squeeze the rest."""
    drawn = np.concatenate([np.asarray(line.get_ydata(), np.float64) for line in axes.lines])
    drawn = drawn[np.isfinite(drawn)]
    return float(np.quantile(drawn, 0.98)) if len(drawn) else 1.0


def swatch(run: Run) -> Figure:
    """Draws a piece of a run's line with its marker."""
    figure = Figure(figsize=(0.42, 0.16), layout="none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.plot([0, 0.5, 1], [0, 0, 0], linewidth=1.8, markersize=5, markevery=[1], **look_of(run))
    axes.set(xlim=(-0.02, 1.02), ylim=(-1, 1))
    axes.axis("off")
    return figure
