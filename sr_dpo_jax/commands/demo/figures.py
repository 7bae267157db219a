"""Draws the figures of the results page, in the style of the report's, from the results."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sr_dpo_jax.commands.demo.protocol import MORE, PAIRS, SHUFFLED, TEMPERATURES
from sr_dpo_jax.commands.demo.results import OUTCOMES, Results, label, models_of
from sr_dpo_jax.commands.demo.statistics import Mean, mean_of
from sr_dpo_jax.commands.report.figures import COLOURS, HEIGHT, LINE_STYLES, WIDTH
from sr_dpo_jax.train.objective import OBJECTIVES

FAMILIES = {"logistic": "DPO and Sr-DPO", "squared": "IPO and Sr-IPO"}
GREY_BROKEN = {"color": "#999999", "linestyle": "--", "linewidth": 1}
ROW_HEIGHT = 0.3
"""The height in inches of a labelled row."""


def knowledge(results: Results) -> Figure:
    known = results["knowledge"]
    figure, axes = _panel()
    axes.plot([0, 100], [0, 100], **GREY_BROKEN, label="as asked")
    axes.plot(known["ratings"], known["mean_quality"], marker="o", color=COLOURS[0], label="base model")
    axes.set(xlabel="rating k that the instruction asks for", ylabel="mean true quality", ylim=(0, 100))
    axes.legend()
    return figure


def quality(results: Results) -> Figure:
    """Draws a row for each stage and arm: mean quality, sampled and greedy, with intervals."""
    rows = models_of(results)
    figure, axes = _panel([name for name, _ in rows])
    for index, decoding in enumerate(TEMPERATURES):
        places = np.arange(len(rows)) + (index - 0.5) * 0.25
        means = [mean_of(row[decoding]) for _, row in rows]
        _points(axes, means, places, colour=COLOURS[index], name=decoding)
    axes.set(xlabel="mean true quality of responses to held-out tasks")
    figure.legend(loc="outside upper center", ncols=2)
    return figure


def outcomes(results: Results) -> Figure | None:
    compared, arms = results["outcomes"], results["arms"]
    if not compared:
        return None
    figure, axes = _panel([f"{label(arms[one['arm']])} – {label(arms[one['against']])}" for one in compared])
    left = np.zeros(len(compared))
    for key, colour in zip(OUTCOMES, (COLOURS[2], "#cccccc", COLOURS[1]), strict=True):
        widths = np.array([100 * np.mean(one["sampled"][key]) for one in compared])
        axes.barh(np.arange(len(compared)), widths, left=left, color=colour, label=key, height=0.7)
        left += widths
    axes.set(xlabel="% of held-out tasks, sampled", xlim=(0, 100))
    figure.legend(loc="outside upper center", ncols=3)
    return figure


def margins(results: Results) -> Figure | None:
    return _curves(results, ("margin", "augmented/margin"), "margin, nats")


def accuracies(results: Results) -> Figure | None:
    return _curves(results, ("rewards/accuracies", "augmented/accuracies"), "accuracy")


def more_pairs(results: Results) -> Figure | None:
    """Draws true quality over the number of pairs seen: none (SFT), the seed's own pairs, and more."""
    arms = results["arms"].values()
    few_of = {_objective(arm): arm for arm in arms if arm["data"] == PAIRS}
    more = [arm for arm in arms if arm["data"] == MORE]
    if not more:
        return None
    figure, axes = _panel()
    pairs = results["setting"]["pairs"]
    seen = [0, pairs, pairs * results["setting"]["more_factor"]]
    for index, arm in enumerate(more):
        few = few_of[_objective(arm)]
        means = [mean_of(stage["sampled"]) for stage in (results["stages"]["sft"], few, arm)]
        values = [mean.value for mean in means]
        axes.errorbar(seen, values, yerr=_bars(means), marker="o", capsize=3, color=COLOURS[index], label=label(few))
    axes.set(xlabel="pairs seen, each once", ylabel="mean true quality, sampled")
    axes.legend()
    return figure


def shuffled(results: Results) -> Figure | None:
    """Draws the change of quality from SFT, with the seed's labels and with labels drawn by a coin."""
    arms = [arm for arm in results["arms"].values() if arm["data"] != MORE]
    kept = {_objective(arm) for arm in arms if arm["data"] == SHUFFLED}
    arms = [arm for arm in arms if _objective(arm) in kept]
    if not arms:
        return None
    figure, axes = _panel([label(arm) for arm in arms])
    sft = results["stages"]["sft"]["sampled"]
    changes = [mean_of(np.subtract(arm["sampled"], sft)) for arm in arms]
    _points(axes, changes, np.arange(len(arms)), colour=COLOURS[0], name="sampled")
    axes.axvline(0, **GREY_BROKEN)
    axes.set(xlabel="true quality, change from SFT, points")
    return figure


def _objective(arm: dict[str, Any]) -> tuple[Any, ...]:
    """Gives what arms of the same objective on different pairs have in common."""
    return arm["objective"], arm["lam"], arm["beta"]


def _curves(results: Results, keys: tuple[str, str], name: str) -> Figure | None:
    """Draws held-out metrics over steps, a panel a family; the second key, with p, has a broken line."""
    arms = results["arms"].values()
    if all(len(arm["curves"]["step"]) < 2 for arm in arms):
        return None
    figure = Figure(figsize=(2 * WIDTH, 1.2 * HEIGHT))
    for axes, (family, title) in zip(figure.subplots(1, 2), FAMILIES.items(), strict=True):
        shown = [arm for arm in arms if OBJECTIVES[arm["objective"]].family == family and arm["data"] == PAIRS]
        for index, arm in enumerate(shown):
            colour = COLOURS[index % len(COLOURS)]
            for key, style, text in zip(keys, LINE_STYLES[:2], (label(arm), None), strict=True):
                steps, values = arm["curves"]["step"], arm["curves"][key]
                axes.plot(steps, values, style, marker=".", color=colour, label=text)
        axes.set(title=title, xlabel="step", ylabel=f"held-out {name}")
        if shown:
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)
    return figure


def _panel(rows: Sequence[str] = ()) -> tuple[Figure, Axes]:
    """Makes a figure of one empty panel, with one labelled row for each name, the first on top."""
    figure = Figure(figsize=(WIDTH, max(HEIGHT, 1 + ROW_HEIGHT * len(rows))))
    axes = figure.subplots()
    if rows:
        axes.set_yticks(np.arange(len(rows)), rows)
        axes.invert_yaxis()
    return figure, axes


def _points(axes: Axes, means: Sequence[Mean], places: np.ndarray, *, colour: str, name: str) -> None:
    values = [mean.value for mean in means]
    axes.errorbar(values, places, xerr=_bars(means), fmt="o", color=colour, capsize=3, label=name, markersize=4)


def _bars(means: Sequence[Mean]) -> np.ndarray | None:
    """Gives the lengths of error bars, `[2, N]`; None for one seed."""
    value, low, high = np.transpose(means)
    return None if np.isnan(low).any() else np.array([value - low, high - value])
