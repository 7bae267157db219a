"""results.json -> one self-contained HTML page: no script, no network."""

from pathlib import Path
from typing import Any

from sr_dpo_jax import __version__
from sr_dpo_jax.commands.demo import figures
from sr_dpo_jax.commands.demo.results import Results, tables
from sr_dpo_jax.commands.report.figures import svg
from sr_dpo_jax.commands.report.page import embedded, filled

FIGURES = {
    "What the base model knows": (
        figures.knowledge,
        "The instruction asks for a response of rating k; responses that follow it lie on the broken line. Ratings "
        "drawn by chance in the base text, and tasks that were not learned, flatten the climb.",
    ),
    "True quality of responses": (
        figures.quality,
        "Greedy responses show what a model can do, sampled ones (temperature 1) what it does. Bars are 95 % intervals "
        "over seeds.",
    ),
    "Win, tie and lose": (
        figures.outcomes,
        "The first arm of each row against the second, on the same pairs and with the same random draws; those with a "
        "β of their own are the controls.",
    ),
    "Margins over training (figure 1)": (
        figures.margins,
        "Held-out pairs, without p (full lines) and with it (broken). Means over seeds.",
    ),
    "Accuracy over training (figure 1)": (
        figures.accuracies,
        "The share of held-out pairs whose better response has the larger log-ratio, without p (full lines) and with "
        "it (broken). Means over seeds.",
    ),
    "More pairs (figure 3)": (figures.more_pairs, "Quality that falls as more pairs are seen is over-fitting."),
    "Shuffled labels": (figures.shuffled, "Where labels are drawn by a coin nothing can be learned from them."),
}


PICTURES = {"quality": "True quality of responses", "margins": "Margins over training (figure 1)"}
"""Those of the findings page, by file name."""


def write_pictures(results: Results, directory: Path) -> None:
    """The figures of the findings page as SVG files; one that has nothing to show is left out."""
    for name, title in PICTURES.items():
        drawn = svg(lambda _, draw=FIGURES[title][0]: draw(results), [])
        if drawn is not None:
            (directory / f"{name}.svg").write_text(drawn, encoding="utf-8")


def write_page(results: Results, path: Path) -> None:
    """Writes the page whole, or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(render(results), encoding="utf-8")
    partial.replace(path)


def render(results: Results) -> str:
    """The page as HTML."""
    return filled(
        "sr_dpo_jax.commands.demo",
        setting=results["setting"],
        pictures=[picture for title in FIGURES if (picture := _drawn(title, results)) is not None],
        tables=tables(results),
        version=__version__,
    )


def _drawn(title: str, results: Results) -> dict[str, Any] | None:
    draw, caption = FIGURES[title]
    drawn = svg(lambda _: draw(results), [])
    if drawn is None:
        return None
    image = embedded(drawn)
    return {"title": title, "caption": caption, "wide": image["width"] > image["height"] * 2.5, "image": image}
