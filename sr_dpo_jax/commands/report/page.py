"""One self-contained HTML page from runs: no script, no network, and the same bytes for the same runs."""

import base64
import dataclasses
import logging
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

from sr_dpo_jax import __version__
from sr_dpo_jax.commands.report import figures, pair_figures, tables
from sr_dpo_jax.commands.report.read import Run, read_runs, texts_of
from sr_dpo_jax.errors import UsageError

PIXELS_AN_INCH, PIXELS_A_POINT = 96, 96 / 72

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Picture:
    """One figure of the page."""

    name: str
    title: str
    draw: Callable[[Sequence[Run]], Figure | None]
    needs: str
    """What a run must have to be in it; said where none has."""
    caption: str
    """What a reader who knows the paper's abstract should look for."""


LEARNING = (
    Picture(
        "loss",
        "Loss",
        figures.loss,
        "a step or an evaluation",
        "Falls while the run learns; a marker well above the end of its line means overfitting. Only "
        "runs of one panel compare, and Δ is part of a refined loss, so Sr-DPO may lie above DPO and yet rank better.",
    ),
    Picture(
        "margin",
        "Margin m",
        figures.margin,
        "margins (preference runs)",
        "How much further than the reference the policy prefers the chosen response. It starts at 0 and should "
        "grow. The method claims separation where it matters, not the largest margin.",
    ),
    Picture(
        "accuracy",
        "Accuracy",
        figures.accuracy,
        "margins (preference runs)",
        "The share of pairs that the policy orders as people did; 0.5 is chance. Compare the markers, held-out "
        "pairs, rather than the lines.",
    ),
    Picture(
        "augmented-accuracy",
        "Accuracy with the instruction p in front",
        figures.augmented_accuracy,
        "augmented margins (refinement.prompt)",
        "The same when the policy is first asked for a good response. Higher than plain accuracy means that the "
        "policy can judge more than it shows, and that is what the refinement Δ draws on.",
    ),
)
REFINING = (
    Picture(
        "refinement",
        "Refinement Δ = β·m̂",
        figures.refinement,
        "an objective with Δ (sr_dpo, sr_ipo)",
        "The policy's own verdict on how far apart the two responses are. 0 at the start; it grows as the policy "
        "learns to judge.",
    ),
    Picture(
        "share",
        "Share of the loss that Δ takes back",
        figures.share,
        "an objective with Δ (sr_dpo, sr_ipo)",
        "λΔ relative to what it is subtracted from, βm (m in Sr-IPO). At the broken line, λ (λβ in Sr-IPO), m̂ is as "
        "large as m. Near 0 the run is plain DPO or IPO; towards 1 Δ cancels the margin, and λ is too large.",
    ),
)
JUDGING = (
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
        "Pairs that differ clearly should be ordered rightly almost always, close ones little better than chance. "
        "Bars are 95 % intervals of a quarter of the pairs each.",
    ),
    Picture(
        "length",
        "Length effects",
        pair_figures.length,
        "eval_pairs.jsonl (`sr-dpo eval`)",
        "Margins should not follow from length alone. A line that climbs to the right means that the policy "
        "prefers longer responses.",
    ),
)
COST = (
    Picture(
        "cost",
        "Throughput, step time, padding",
        figures.cost,
        "training steps",
        "The refinement needs one forward pass more than plain DPO or IPO. Padding is what a step computes in "
        "vain. Running means; compare only runs on the same devices.",
    ),
)
GUIDE = (
    "Each run has one colour, line style and marker throughout. Lines are running means over training steps, with the "
    "single steps pale behind them; markers without a line are held-out pairs. Broken grey lines are what an untrained "
    "policy gives: the loss at m = 0, or chance. A ring marks the best evaluation, by checkpoint.best_metric."
)
SETS = Picture(
    "held-out-sets",
    "Held-out sets, one by one",
    figures.held_out_sets,
    "more than one held-out set (data.eval_sets)",
    "All panels have one scale. A run that gains on one set and loses on another has learned what tells the two "
    "apart, not what people prefer.",
)
SECTIONS = {
    "Does it learn?": LEARNING,
    "What the refinement does": REFINING,
    "Held-out pairs, one by one": JUDGING,
    "What it costs": COST,
}


def report(directories: Sequence[Path], output: Path, *, with_texts: bool) -> int:
    """`sr-dpo report`: writes the page and returns how many runs it compares. All that is amiss is logged too."""
    if not output.parent.is_dir() or output.is_dir():
        raise UsageError(f"--output {output}: names a directory, or stands in one that does not exist; name a file")
    runs = read_runs(directories)
    for run in runs:
        for problem in run.problems:
            log.warning("%s: %s", run.label, problem)
    partial = output.with_name(output.name + ".partial")
    partial.write_text(render(runs, with_texts=with_texts), encoding="utf-8")
    partial.replace(output)
    return len(runs)


def filled(package: str, **values: Any) -> str:
    """`page.html` of a package with these values, in the style that all pages share."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(files(package).joinpath("page.html").read_text(encoding="utf-8"))
    style = files("sr_dpo_jax.commands.report").joinpath("page.css").read_text(encoding="utf-8")
    return template.render(style=style, **values)


def render(runs: Sequence[Run], *, with_texts: bool) -> str:
    """The page as HTML."""
    ids, samples = tables.sample_pairs(runs)
    texts: dict[str, tuple[str, str, str]] = {}
    if with_texts:
        scored = next((run for run in runs if run.pairs), None)
        texts = texts_of(scored, ids) if scored is not None else {}
    final = tables.final_metrics(runs)
    return filled(
        "sr_dpo_jax.commands.report",
        runs=runs,
        looks=[_swatch(index) for index in range(len(runs))],
        headline=tables.headline(runs),
        final=final,
        difference=tables.config_difference(runs),
        sections={title: [_drawn(picture, runs) for picture in pictures] for title, pictures in SECTIONS.items()},
        guide=GUIDE,
        sets=_drawn(SETS, runs),
        set_metrics=tables.held_out_sets(runs),
        sampled=[run for run in runs if run.samples],
        completions=tables.samples(runs) if with_texts else [],
        samples=samples,
        texts=texts,
        with_texts=with_texts,
        version=__version__,
    )


def _drawn(picture: Picture, runs: Sequence[Run]) -> dict[str, object]:
    """The figure as an image of its own, which a reader can save; `wide` where it takes both columns."""
    drawn = figures.svg(picture.draw, runs)
    if drawn is None:
        return {"picture": picture, "image": None, "wide": False}
    image = embedded(drawn)
    return {"picture": picture, "image": image, "wide": image["width"] > 1.5 * figures.WIDTH * PIXELS_AN_INCH}


def embedded(drawn: str) -> dict[str, Any]:
    """An SVG as `source` of an image, with `width` and `height` in CSS pixels."""
    width, height = (float(drawn.partition(f'{name}="')[2].partition("pt")[0]) for name in ("width", "height"))
    return {
        "source": _data_uri(drawn),
        "width": round(width * PIXELS_A_POINT),
        "height": round(height * PIXELS_A_POINT),
    }


def _data_uri(drawn: str) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(drawn.encode()).decode()}"


def _swatch(index: int) -> str:
    """A run's line and marker as a small image, for the tables."""
    drawn = figures.svg(lambda _: figures.swatch(index), [])
    return _data_uri(drawn)
