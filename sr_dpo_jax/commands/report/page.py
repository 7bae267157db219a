"""Makes one self-contained HTML page from runs: no script, no network, and the same bytes for the same runs.

Each figure is an SVG image of its own, which a reader can save. `page.html` is the layout of the demo's page too.
"""

import base64
import dataclasses
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

from sr_dpo_jax import __version__
from sr_dpo_jax.commands.report import figures, pair_figures, tables
from sr_dpo_jax.commands.report.figures import curve
from sr_dpo_jax.commands.report.read import Run, read_runs, texts_of
from sr_dpo_jax.durable.files import require_output, write_text

PIXELS_AN_INCH, PIXELS_A_POINT = 96, 96 / 72

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Picture:
    """One figure of the page."""

    name: str
    title: str
    draw: Callable[[Sequence[Run]], Figure | None]
    needs: str
    """The data that a run must have to be in the figure; the page names it where no run has it."""
    caption: str
    """Says what to look for, to a reader who knows the paper's abstract."""


SECTIONS = {
    "Does it learn?": (
        Picture(
            "loss",
            "Loss",
            figures.loss,
            "a step or an evaluation",
            "Falls while the run learns; a marker well above the end of its line means overfitting. Only runs of one "
            "panel compare, and Δ is part of a refined loss, so Sr-DPO may lie above DPO and yet rank better.",
        ),
        Picture(
            "margin",
            "Margin m",
            curve("margin", "mean margin m (nats)"),
            "margins (preference runs)",
            "How much further than the reference the policy prefers the chosen response. It starts at 0 and should "
            "grow. The method claims separation where it matters, not the largest margin.",
        ),
        Picture(
            "accuracy",
            "Accuracy",
            curve("rewards/accuracies", "share of pairs with m > 0", is_share=True),
            "margins (preference runs)",
            "The share of pairs that the policy orders as people did; 0.5 is chance. Compare the markers, held-out "
            "pairs, rather than the lines.",
        ),
        Picture(
            "augmented-accuracy",
            "Accuracy with the instruction p in front",
            curve("augmented/accuracies", "share of pairs with m̂ > 0", is_share=True),
            "augmented margins (refinement.prompt)",
            "The same when the policy is first asked for a good response. Higher than plain accuracy means that the "
            "policy can judge more than it shows, and the refinement Δ draws on that.",
        ),
    ),
    "What the refinement does": (
        Picture(
            "refinement",
            "Refinement Δ",
            curve("refinement", "mean refinement Δ"),
            "an objective with Δ (sr_*)",
            "The judge's verdict on how far apart the two responses are. The paper's, β·m̂ of the policy, is 0 at the "
            "start and grows as the policy learns; a contrast by the reference, or ratings, stay as they are.",
        ),
        Picture(
            "share",
            "Share of the loss that Δ takes back",
            figures.share,
            "an objective with Δ (sr_*)",
            "λΔ relative to what it is subtracted from, βm (m in Sr-IPO). At the broken line, λ (λβ in Sr-IPO), m̂ is "
            "as large as m. Near 0 the run is plain DPO or IPO; towards 1 Δ cancels the margin, and λ is too large.",
        ),
    ),
    "Held-out pairs, one by one": (
        Picture(
            "distributions",
            "Distribution of m and m̂ over held-out pairs",
            pair_figures.distributions,
            "eval_pairs.jsonl (`sr-dpo eval`)",
            "Right of 0 the policy agrees with the label. A good run moves the bulk to the right without a long tail "
            "on the left. The outermost bins also hold the pairs beyond them, half a per cent on each side.",
        ),
        Picture(
            "rating",
            "Margin against rating",
            pair_figures.rating,
            "rated pairs in eval_pairs.jsonl",
            "The paper's table 4 as a picture: where raters saw a larger difference, the margin should be larger. "
            "Points are means of an eighth of the pairs with 95 % intervals; a steadier climb is a better judge.",
        ),
        Picture(
            "rating-gap",
            "Accuracy by rating gap",
            pair_figures.rating_gap,
            "rated pairs in eval.json",
            "Pairs that differ clearly should almost always be ordered correctly, close ones little better than by "
            "chance. Bars are 95 % intervals of a quarter of the pairs each.",
        ),
        Picture(
            "length",
            "Length effects",
            pair_figures.length,
            "eval_pairs.jsonl (`sr-dpo eval`)",
            "Length alone should not decide the margin. A line that climbs to the right means that the policy prefers "
            "longer responses.",
        ),
    ),
    "What it costs": (
        Picture(
            "cost",
            "Throughput, step time, padding",
            figures.cost,
            "training steps",
            "The refinement needs one forward pass more than plain DPO or IPO. Padding is computed in vain. Lines are "
            "running means; compare only runs on the same devices.",
        ),
    ),
}
SETS = Picture(
    "held-out-sets",
    "Held-out sets, one by one",
    figures.held_out_sets,
    "more than one held-out set (data.eval_sets)",
    "All panels have one scale. A run that gains on one set and loses on another has learned to tell the two sets "
    "apart, not what people prefer.",
)
GUIDE = (
    "Each run has one colour, line style and marker throughout. Lines are running means over training steps, with the "
    "single steps pale behind them; markers without a line are held-out pairs. Broken grey lines are what an untrained "
    "policy gives: the loss at m = 0, or chance. A ring marks the best evaluation, by checkpoint.best_metric."
)


def report(directories: Sequence[Path], output: Path, *, with_texts: bool) -> int:
    """Runs `sr-dpo report`: writes the page, logs every problem, and returns the number of runs that it compares.

    Raises:
      UsageError: a directory is no run, the output cannot be written, or the data of `with_texts` cannot be read.
    """
    require_output(output)
    runs = read_runs(directories)
    for run in runs:
        for problem in run.problems:
            log.warning("%s: %s", run.label, problem)
    write_text(output, render(runs, with_texts=with_texts))
    return len(runs)


def fill(template: str, **values: Any) -> str:
    """Fills a template of the commands, `report/page.html` or one that extends it, with these values."""
    loader = jinja2.PackageLoader("sr_dpo_jax.commands", "")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.get_template(template).render(version=__version__, **values)


def render(runs: Sequence[Run], *, with_texts: bool) -> str:
    """Gives the page as HTML."""
    ids, samples = tables.sample_pairs(runs)
    scored = next((run for run in runs if run.pairs), None)
    return fill(
        "report/page.html",
        runs=runs,
        swatches=[data_uri(figures.svg(figures.swatch, run)) for run in runs],
        headline=tables.headline(runs),
        final=tables.final_metrics(runs),
        known=tables.knowledge(runs),
        lives=tables.lives(runs),
        difference=tables.config_difference(runs),
        sections={title: [(item, image(item.draw, runs)) for item in items] for title, items in SECTIONS.items()},
        guide=GUIDE,
        sets=(SETS, image(SETS.draw, runs)),
        set_metrics=tables.held_out_sets(runs),
        sampled=[run for run in runs if run.samples],
        completions=tables.samples(runs) if with_texts else {},
        samples=samples,
        texts=texts_of(scored, ids) if with_texts and scored is not None else {},
        with_texts=with_texts,
    )


def image(draw: Callable[..., Figure | None], *arguments: Any) -> dict[str, Any] | None:
    """Draws a figure for the template: source, width and height in CSS pixels, and whether it is wide."""
    drawn = figures.svg(draw, *arguments)
    if drawn is None:
        return None
    points = re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', drawn).groups()
    width, height = (round(float(number) * PIXELS_A_POINT) for number in points)
    wide = width > 1.5 * figures.WIDTH * PIXELS_AN_INCH
    return {"source": data_uri(drawn), "width": width, "height": height, "wide": wide}


def data_uri(drawn: str) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(drawn.encode()).decode()}"
