"""A data set that is scored: its pairs, the steps that hold them, the scoring step and the reference's scores.

There is one for the training pairs, one for each held-out set, and one for `sr-dpo score`.
Every pair counts the same, whatever the batch size, the number of hosts or how full the last step is.
"""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sr_dpo_jax.batch import Batch
from sr_dpo_jax.data.dataset import TokenizedPairs
from sr_dpo_jax.data.pipeline import Feed, Packing, pair_sizes
from sr_dpo_jax.data.plan import Plan, Shape, scoring_plan, scoring_shape
from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.model.adapter import split
from sr_dpo_jax.model.decoder import Params
from sr_dpo_jax.parallel.processes import from_leader
from sr_dpo_jax.train.knowledge import knowledge_of, lines_of, settled_lam
from sr_dpo_jax.train.metrics import Progress
from sr_dpo_jax.train.objective import Objective, Refinement
from sr_dpo_jax.train.reference import ReferenceScores, cache_files
from sr_dpo_jax.train.train_step import (
    Scores,
    averages,
    difference,
    log_ratios,
    make_score_step,
    pair_metrics,
    refinement_by,
)
from sr_dpo_jax.weights.placement import PlacedModel

log = logging.getLogger(__name__)

MEASURED_ON = (
    *("data.path", "model.path", "tokenizer", "objective.name", "objective.terms", "objective.ld_alpha"),
    *("refinement.prompt", "refinement.against", "lora.start", "lora.base", "reference.path"),
)
"""The keys of a run's identity that decide what its model knows at the start."""


@dataclasses.dataclass(frozen=True)
class ScoredSet:
    """A data set, ready to be scored with any parameters."""

    name: str
    """`training`, or what its metrics' names begin with: `eval` or `eval/NAME`."""
    pairs: TokenizedPairs
    feed: Feed
    """Holds every pair once."""
    score_step: Callable[[Params, Batch], Scores]
    reference: ReferenceScores | None
    """The reference's scores, as far as the cache has them; None where the objective needs none."""
    reference_step: Callable[[Params, Batch], Scores] | None = None
    """The scoring step of a reference that is not the model at the start; None where it is."""

    def by_reference(self) -> "ScoredSet":
        """Gives the set with the scoring step of the reference."""
        return self if self.reference_step is None else dataclasses.replace(self, score_step=self.reference_step)

    def scores(self, params: Params, progress: Callable[[int], None] = lambda done: None) -> Scores:
        """Scores all pairs with these parameters; `progress` is called with the number of steps done.

        Returns:
          Scores with `[N, 2]` NumPy arrays, in the order of the data; None where the scoring step gives none.
        """
        count, found = len(self.pairs), None
        for done, (pair, scores) in enumerate(self.feed.results(partial(self.score_step, params)), 1):
            if found is None:
                found = jax.tree.map(partial(_blank, count), scores)
            jax.tree.map(partial(_put, pair), found, scores)
            progress(done)
        assert found is not None, "a set has pairs"
        return found

    def metrics(self, objective: Objective, policy: Scores) -> dict[str, float]:
        """Averages loss and metrics over all pairs, under their names in metrics.jsonl behind the set's name."""
        per_pair = self.pair_metrics(objective, policy)
        means = averages({key: np.asarray(value, np.float64) for key, value in per_pair.items()}, policy.tokens)
        named = {f"{self.name}/{key}": float(value) for key, value in means.items()}
        return named | {f"{self.name}/pairs": len(policy.plain)}

    def pair_metrics(self, objective: Objective, policy: Scores) -> dict[str, jax.Array]:
        """Computes loss and metrics of every pair, `[N]` float32, under their names in metrics.jsonl."""
        reference = self.reference_scores(policy) if objective.kind.needs_reference else None
        known = self.refinement(objective)
        return pair_metrics(objective, *jax.tree.map(jnp.asarray, (policy, reference, known)))

    def reference_scores(self, policy: Scores) -> Scores | None:
        """Gives the reference's scores in the form of the policy's; None where the objective needs no reference."""
        if self.reference is None:
            return None
        known = self.reference.scores
        return Scores(known[..., 0], None if policy.augmented is None else known[..., 1], policy.tokens)

    def refinement(self, objective: Objective) -> np.ndarray | None:
        """Computes Δ of each pair, `[N]` float32, where it is known before step 0; else gives None.

        Raises:
          UsageError: ratings judge, and a pair has none, or none of which Δ can be made.
        """
        if not objective.judged_before:
            return None
        if objective.refinement.judge == "ratings":
            return rating_offsets(self.pairs, objective.refinement)
        return np.asarray(refinement_by(objective, self.known_scores, None))

    @property
    def known_scores(self) -> Scores:
        """The scores of the reference, with p and the second instruction where the set has such rows."""
        known, source = self.reference.scores, self.feed.source
        tokens = np.stack([self.pairs.chosen_tokens, self.pairs.rejected_tokens], axis=1)
        augmented = known[..., 1] if source.augmented else None
        return Scores(known[..., 0], augmented, tokens, against=known[..., 2] if source.against else None)

    def margins(self, objective: Objective, policy: Scores) -> dict[str, np.ndarray]:
        """Computes m and, where p is used, m̂ of each pair, `[N]`, nats, as they are in the metrics."""
        reference = self.reference_scores(policy) if objective.kind.needs_reference else None
        tokens = policy.tokens if objective.kind.per_token and reference is None else None
        found = {"margin": difference(log_ratios(policy.plain, reference and reference.plain), tokens)}
        if policy.augmented is not None:
            augmented = log_ratios(policy.augmented, reference and reference.augmented)
            found["augmented_margin"] = difference(augmented, tokens)
        return found

    def fill_reference(self, params: Params, between: Callable[[], None] = lambda: None) -> None:
        """Runs the scoring steps from the first with a missing pair on; calls `between` after each.

        Call it only where the reference's scores are not complete.
        """
        title, leader = f"reference on {self.name} pairs", jax.process_index() == 0
        with Progress(title, total=len(self.feed.source), active=leader) as progress:

            def done(steps: int) -> None:
                progress.update(steps)
                between()

            self.reference.fill(self.score_step, params, done)


def knowledge(scores: Scores, *, per_token: bool = False) -> dict[str, Any] | None:
    """Measures how well a model's scores agree with the labels, as `knowledge_of` does; None without a finite pair.

    With `per_token` every log-prob is divided by the tokens of its response, as the objective has it.
    """
    tokens = scores.tokens if per_token else None
    without = scores.plain if scores.against is None else scores.against
    plain, augmented, other = (
        np.asarray(difference(part, tokens)) for part in (scores.plain, scores.augmented, without)
    )
    finite = np.isfinite(np.stack([plain, augmented, other])).all(axis=0)
    if not finite.all():
        log.warning("%d of %d pairs have no finite log-prob and tell nothing", (~finite).sum(), len(finite))
    if not finite.any():
        return None
    return knowledge_of(
        plain[finite], augmented[finite], (augmented - other)[finite], np.asarray(scores.tokens)[finite]
    )


def known_at_start(
    training: ScoredSet | None, objective: Objective, before: Mapping[str, Any], now: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Measures what the model at the start knows of the labels, logs it, and adds the λ that it gives to `auto`.

    A run that goes on keeps the table, and so the λ, of its checkpoint, unless what it was measured on was allowed to
    change. `before` and `now` are the records of that checkpoint and of this start. None where p was not scored.
    """
    same = all(before.get("identity", {}).get(key) == now["identity"].get(key) for key in MEASURED_ON)
    table = before.get("knowledge") if same else None
    if table is None and training is not None and objective.scored_with_p:
        table = knowledge(training.known_scores, per_token=objective.kind.per_token)
        if table is not None:
            who = "the model at the start" if now["identity"].get("reference.path") is None else "the reference"
            log.info("%s", "\n".join([f"what {who} knows of the labels:", *lines_of(table)]))
    if objective.unsettled and table is not None and "lam" not in table:
        return {**table, "lam": from_leader(settled_lam(table))}
    return table


def training_feed(
    packing: Packing,
    objective: Objective,
    pairs: TokenizedPairs,
    plan: Plan,
    scored: ScoredSet | None,
    *,
    online: bool,
) -> Feed:
    """Makes the steps of training into batches, with what the reference's scores of the pairs give them.

    `scored` are the training pairs with these scores; None where none are needed, or an `online` reference gives them.
    """
    known = None
    if objective.judged_before:
        known = scored.refinement(objective) if scored else rating_offsets(pairs, objective.refinement)
    cached = scored is not None and objective.kind.needs_reference and not online
    return packing.feed(
        pairs,
        plan,
        reference=scored.reference.scores if cached else None,
        refinement=known,
        augmented=objective.judged_in_step,
        against=objective.judged_in_step and objective.refinement.against,
        with_rejected=objective.kind.needs_rejected,
    )


def _blank(count: int, part: np.ndarray) -> np.ndarray:
    """Makes the array for all pairs: log-probs are NaN until they are known, counts are 0."""
    return np.full((count, *part.shape[1:]), np.nan if np.issubdtype(part.dtype, np.floating) else 0, part.dtype)


def _put(pair: np.ndarray, array: np.ndarray, values: np.ndarray) -> None:
    array[pair] = values


def rating_offsets(pairs: TokenizedPairs, refinement: Refinement) -> np.ndarray:
    """Computes Δ from the ratings of the rows, `[N]` float32: α·log of their difference, or α times it.

    Reference: arXiv:2402.10571, section 3, where the difference of the scores is the offset that a margin must exceed.

    Raises:
      UsageError: a pair has no ratings; or its difference, of which the logarithm is taken, is not above 0.
    """
    gap = np.asarray(pairs.chosen_score, np.float32) - np.asarray(pairs.rejected_score, np.float32)
    unrated = np.flatnonzero(np.isnan(gap))
    if len(unrated):
        raise UsageError(
            f"refinement.judge=ratings: {len(unrated)} of {len(gap)} pairs have no ratings, first "
            f"{pairs.place(unrated[0])}; give each row score_chosen and score_rejected, or choose another judge"
        )
    if refinement.offset == "linear":
        return refinement.alpha * gap
    wrong = np.flatnonzero(gap <= 0)
    if len(wrong):
        raise UsageError(
            f"refinement.offset=log: {len(wrong)} of {len(gap)} pairs have no rating difference above 0, first "
            f"{pairs.place(wrong[0])}, {gap[wrong[0]]:g}; set refinement.offset=linear, or remove them"
        )
    return refinement.alpha * np.log(gap)


def compiled_sets(sets: Sequence[ScoredSet], params: Params, programs: dict[Any, Any]) -> tuple[ScoredSet, ...]:
    """Gives the sets with their scoring steps compiled for their batches; a batch of another shape raises from then on.

    Args:
      sets: of one model.
      params: of the model; only shapes, types and shardings count.
      programs: what was compiled before, by the shapes of batches; gets what is compiled now.
    """
    found = []
    for held in sets:
        batch = next(held.feed.batches(0))[1]
        leaves, tree = jax.tree.flatten(batch)
        shapes = (tree, *(leaf.shape for leaf in leaves))  # sets differ in it where the template head does
        if shapes not in programs:
            programs[shapes] = held.score_step.lower(params, batch).compile()
        found.append(dataclasses.replace(held, score_step=programs[shapes]))
    return tuple(found)


def score_reference(
    model: PlacedModel,
    sets: Sequence[ScoredSet],
    compiled: Callable[[Sequence[ScoredSet]], Sequence[ScoredSet]],
    *,
    reference: PlacedModel,
    remembered: Mapping[str, str],
    between: Callable[[], None],
    online: bool,
    keep_base: bool,
) -> tuple[dict[str, str], Params | None, tuple[Params | None, Params | None]]:
    """Checks and completes the reference's scores, and copies its parameters where it stays on the mesh.

    Args:
      model: the model; its base parameters are what training starts from.
      sets: the sets that the reference scores, and others.
      compiled: compiles the scoring steps of sets for the model.
      reference: the model whose base parameters are the reference; mostly `model` itself.
      remembered: digest of each set's scores in the checkpoint that is resumed: those are believed.
      between: called after each step of scoring.
      online: the reference stays on the mesh.
      keep_base: training starts from the base parameters, or has them beside its adapters, so that they are wanted in
        any case.

    Returns:
      Digest of the scores by set, the online reference's parameters or None, and the base parameters as `split` parts
      them, None and None where they are not wanted.
    """
    known = {held.name: held.reference for held in sets if held.reference is not None}
    doubted = [held for held in sets if held.name in known and remembered.get(held.name) != known[held.name].digest]
    same = reference is model
    base = reference.base_params() if online or doubted or (keep_base and same) else None
    if not same:
        compiled = partial(compiled_sets, params=reference.shapes, programs={})
    for held in compiled([held.by_reference() for held in doubted]):
        held.reference.spot_check(held.score_step, base, dtype=model.dtype.name)
        if not held.reference.complete:
            held.fill_reference(base, between)
    copy = None
    if online:  # a model that is the reference alone has the types of one
        copy = model.reference_copy(base) if same else base
    if not same:
        base = None  # freed before the model's are made
        base = model.base_params() if keep_base else None
    return {name: scores.digest for name, scores in known.items()}, copy, split(base) if keep_base else (None, None)


def make_scored_set(
    name: str,
    pairs: TokenizedPairs,
    model: PlacedModel,
    packing: Packing,
    objective: Objective | None,
    *,
    cache_dir: Path,
    shape: Shape | None = None,
    plan: Plan | None = None,
    augmented: bool | None = None,
    ld_alpha: float | None = None,
    reference: PlacedModel | None = None,
) -> ScoredSet:
    """Plans a set and looks up what the cache has of its reference scores.

    Args:
      name, pairs, model, packing: of the set, and of the run.
      objective: decides which sides are scored and whether a reference is needed; None: both sides, no reference.
      cache_dir: holds the reference's scores.
      shape: the compiled shape to plan in; None chooses one for these pairs.
      plan: a plan that holds every pair once; None makes one.
      augmented: whether the rows with p are scored too; None: if both sides are scored and the pairs have p.
      ld_alpha: as for `response_logprobs`, of a set without an objective, which else says it.
      reference: the model that is the reference; None: `model`.
    """
    with_rejected = objective is None or objective.kind.needs_rejected
    sizes = pair_sizes(pairs, with_rejected=with_rejected)
    if plan is None:
        plan = scoring_plan(*sizes, scoring_shape(*sizes, packing.limits) if shape is None else shape)
    if augmented is None:
        augmented = with_rejected and len(pairs.augmentation) > 0
    against = augmented and len(pairs.against) > 0
    feed = packing.feed(pairs, plan, augmented=augmented, with_rejected=with_rejected, against=against)
    judge, known = model if reference is None else reference, None
    if objective is not None and objective.wants_scores:
        files = cache_files(
            cache_dir,
            pairs,
            weights_digest=judge.digest,
            dtype=f"{model.dtype.name} {model.param_dtype.name}",
            ld_alpha=objective.ld_alpha,
            augmented=augmented,
            against=against,
        )
        known = ReferenceScores(files, feed, key="model.path" if judge is model else "reference.path")
    if objective is not None and objective.kind.refined and objective.refinement.judge == "ratings":
        rating_offsets(pairs, objective.refinement)  # refused here, and not at the first evaluation
    ld_alpha = ld_alpha if objective is None else objective.ld_alpha
    step = partial(make_score_step, pairs=plan.shape.pairs, mesh=model.mesh, ld_alpha=ld_alpha)
    score_step = step(model.graph, squares=objective is not None and objective.use_weighting)
    return ScoredSet(name, pairs, feed, score_step, known, None if judge is model else step(judge.graph))
