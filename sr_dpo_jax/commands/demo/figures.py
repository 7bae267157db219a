"""The results page's figures, in the style of the report's; each takes the results and returns the figure."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sr_dpo_jax.commands.demo.protocol import MORE, PAIRS, SHUFFLED
from sr_dpo_jax.commands.demo.results import DECODINGS, Results, label
from sr_dpo_jax.commands.demo.statistics import Mean, mean_of
from sr_dpo_jax.commands.report.figures import COLOURS, HEIGHT, LINE_STYLES, WIDTH

FAMILIES = {"DPO and Sr-DPO": ("dpo", "sr_dpo"), "IPO and Sr-IPO": ("ipo", "sr_ipo")}
ROW_HEIGHT = 0.3
"""Inches of a labelled row."""


def knowledge(results: Results) -> Figure:
    known = results["knowledge"]
    figure, axes = _axes()
    axes.plot([0, 100], [0, 100], color="#999999", linestyle="--", linewidth=1, label="as asked")
    axes.plot(known["ratings"], known["mean_quality"], marker="o", color=COLOURS[0], label="base model")
    axes.set(xlabel="rating k that the instruction asks for", ylabel="mean true quality", ylim=(0, 100))
    axes.legend()
    return figure


def quality(results: Results) -> Figure:
    """A row an arm, sampled and greedy, with intervals."""
    rows = [("Base model", results["stages"]["base"]), ("SFT", results["stages"]["sft"])]
    rows += [(label(arm), arm) for arm in results["arms"].values()]
    figure, axes = _rows([name for name, _ in rows])
    for index, decoding in enumerate(DECODINGS):
        places = np.arange(len(rows)) + (index - 0.5) * 0.25
        means = [mean_of(row[decoding]) for _, row in rows]
        _points(axes, means, places, colour=COLOURS[index], name=decoding)
    axes.set(xlabel="mean true quality of responses to held-out tasks")
    figure.legend(loc="outside upper center", ncols=2)
    return figure


def outcomes(results: Results) -> Figure | None:
    found = results["outcomes"]
    if not found:
        return None
    arms = results["arms"]
    names = [f"{label(arms[one['arm']])} – {label(arms[one['against']])}" for one in found]
    figure, axes = _rows(names)
    left = np.zeros(len(found))
    for key, colour in (("win", COLOURS[2]), ("tie", "#cccccc"), ("lose", COLOURS[1])):
        widths = np.array([100 * np.mean(one["sampled"][key]) for one in found])
        axes.barh(np.arange(len(found)), widths, left=left, color=colour, label=key, height=0.7)
        left += widths
    axes.set(xlabel="% of held-out tasks, sampled", xlim=(0, 100))
    figure.legend(loc="outside upper center", ncols=3)
    return figure


def margins(results: Results) -> Figure | None:
    return _curves(results, ("margin", "augmented/margin"), "margin, nats", PAIRS)


def accuracies(results: Results) -> Figure | None:
    return _curves(results, ("rewards/accuracies", "augmented/accuracies"), "accuracy", PAIRS)


def more_pairs(results: Results) -> Figure | None:
    """True quality against the number of pairs seen: the arms with the seed's own pairs and those with more."""
    arms = results["arms"]
    names = [name for name, arm in arms.items() if arm["data"] == MORE]
    if not names:
        return None
    figure, axes = _axes()
    pairs = results["setting"]["pairs"]
    seen = [0, pairs, pairs * results["setting"]["more_factor"]]
    for index, name in enumerate(names):
        few = next(arm for arm in arms.values() if (*_form(arm), arm["data"]) == (*_form(arms[name]), PAIRS))
        means = [mean_of(of["sampled"]) for of in (results["stages"]["sft"], few, arms[name])]
        values = [mean.value for mean in means]
        axes.errorbar(seen, values, yerr=_bars(means), marker="o", capsize=3, color=COLOURS[index], label=label(few))
    axes.set(xlabel="pairs seen, each once", ylabel="mean true quality, sampled")
    axes.legend()
    return figure


def shuffled(results: Results) -> Figure | None:
    """Change of quality from SFT, with the seed's labels and with labels drawn by a coin."""
    arms = [arm for arm in results["arms"].values() if arm["data"] != MORE]
    kept = {_form(arm) for arm in arms if arm["data"] == SHUFFLED}
    rows = [(label(arm), arm) for arm in arms if _form(arm) in kept]
    if not rows:
        return None
    figure, axes = _rows([name for name, _ in rows])
    sft = results["stages"]["sft"]["sampled"]
    changes = [mean_of(np.subtract(arm["sampled"], sft).tolist()) for _, arm in rows]
    _points(axes, changes, np.arange(len(rows)), colour=COLOURS[0], name="sampled")
    axes.axvline(0, color="#999999", linestyle="--", linewidth=1)
    axes.set(xlabel="true quality, change from SFT, points")
    return figure


def _form(arm: dict[str, Any]) -> tuple[Any, ...]:
    """What arms on different pairs have in common."""
    return arm["objective"], arm["lam"], arm["beta"]


def _curves(results: Results, keys: tuple[str, str], name: str, data: str) -> Figure | None:
    """Held-out metrics over steps, a panel a family; the second key, with p, is drawn broken."""
    if all(len(arm["curves"]["step"]) < 2 for arm in results["arms"].values()):
        return None
    figure = Figure(figsize=(2 * WIDTH, 1.2 * HEIGHT))
    for place, (title, objectives) in enumerate(FAMILIES.items(), 1):
        axes = figure.add_subplot(1, 2, place)
        chosen = [
            (label(arm), arm["curves"])
            for arm in results["arms"].values()
            if arm["objective"] in objectives and arm["data"] == data
        ]
        for index, (arm_name, curve) in enumerate(chosen):
            for key, style in zip(keys, LINE_STYLES, strict=False):
                described = arm_name if key == keys[0] else None
                axes.plot(
                    curve["step"], curve[key], style, marker=".", color=COLOURS[index % len(COLOURS)], label=described
                )
        axes.set(title=title, xlabel="step", ylabel=f"held-out {name}")
        if chosen:
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=3)
    return figure


def _axes() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, HEIGHT))
    return figure, figure.add_subplot()


def _rows(names: Sequence[str]) -> tuple[Figure, Axes]:
    """A figure with a labelled row each, the first on top."""
    figure = Figure(figsize=(WIDTH, max(HEIGHT, 1 + ROW_HEIGHT * len(names))))
    axes = figure.add_subplot()
    axes.set_yticks(np.arange(len(names)), names)
    axes.invert_yaxis()
    return figure, axes


def _points(axes: Axes, means: Sequence[Mean], places: np.ndarray, *, colour: str, name: str) -> None:
    values = [mean.value for mean in means]
    axes.errorbar(values, places, xerr=_bars(means), fmt="o", color=colour, capsize=3, label=name, markersize=4)


def _bars(means: Sequence[Mean]) -> np.ndarray | None:
    """Lengths of error bars, `[2, N]`; none for one seed."""
    if any(np.isnan(mean.low) for mean in means):
        return None
    return np.array([[mean.value - mean.low for mean in means], [mean.high - mean.value for mean in means]])
