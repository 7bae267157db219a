"""Makes a self-contained HTML page of results.json (no script, no network) and the pictures of the findings page."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sr_dpo_jax.commands.demo import figures
from sr_dpo_jax.commands.demo.results import Results, tables
from sr_dpo_jax.commands.report.figures import svg
from sr_dpo_jax.commands.report.page import fill, image
from sr_dpo_jax.durable.files import write_text


@dataclasses.dataclass(frozen=True)
class Picture:
    """One figure of the page."""

    title: str
    draw: Callable[[Results], Any]
    """Gives the figure, or None where the results have nothing to show."""
    caption: str


FIGURES = (
    Picture(
        "What the base model knows",
        figures.knowledge,
        "The instruction asks for a response of rating k; responses that follow it lie on the broken line. Ratings "
        "drawn by chance in the base text, and tasks that were not learned, flatten the climb.",
    ),
    Picture(
        "True quality of responses",
        figures.quality,
        "Greedy responses show what a model can do, sampled ones (temperature 1) what it does. Bars are 95 % intervals "
        "over seeds.",
    ),
    Picture(
        "Win, tie and lose",
        figures.outcomes,
        "The first arm of each row against the second, on the same pairs and with the same random draws; arms with a β "
        "of their own are the controls.",
    ),
    Picture(
        "Margins over training (figure 1)",
        figures.margins,
        "Held-out pairs, without p (full lines) and with it (broken). Means over seeds.",
    ),
    Picture(
        "Accuracy over training (figure 1)",
        figures.accuracies,
        "The share of held-out pairs whose better response has the larger log-ratio, without p (full lines) and with "
        "it (broken). Means over seeds.",
    ),
    Picture("More pairs (figure 3)", figures.more_pairs, "Quality that falls as more pairs are seen is overfitting."),
    Picture("Shuffled labels", figures.shuffled, "Where labels are drawn by a coin nothing can be learned from them."),
)


def write_page(results: Results, directory: Path) -> None:
    """Writes results.html, and the figures of the findings page as SVG files; leaves out one that shows nothing."""
    write_text(directory / "results.html", render(results))
    for draw in (figures.quality, figures.margins):
        drawn = svg(draw, results)
        if drawn is not None:
            write_text(directory / f"{draw.__name__}.svg", drawn)


def render(results: Results) -> str:
    """Gives the page as HTML."""
    drawn = [(picture, image(picture.draw, results)) for picture in FIGURES]
    shown = [item for item in drawn if item[1] is not None]
    return fill("demo/page.html", setting=results["setting"], pictures=shown, tables=tables(results))
