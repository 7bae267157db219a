"""Held-out metrics, and scores of single pairs, for any parameters: sums over pairs, divided once.

`score_command` and `evaluate_command` are `sr-dpo score` and `sr-dpo eval`. Every pair counts the same, whatever the
batch size, the number of hosts or how full the last step is.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sr_dpo_jax.batch import CHOSEN, REJECTED
from sr_dpo_jax.commands.correlation import rating_metrics
from sr_dpo_jax.config.schema import Config
from sr_dpo_jax.data.dataset import TokenizedPairs
from sr_dpo_jax.data.pipeline import Feed
from sr_dpo_jax.data.plan import Plan, scoring_plan, scoring_shape
from sr_dpo_jax.durable.checkpoint import Checkpoints
from sr_dpo_jax.durable.files import pairs_file
from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.train.metrics import Progress
from sr_dpo_jax.train.train_step import Objective, Params, Scores, averages, make_score_step, pair_metrics
from sr_dpo_jax.weights.placement import (
    Assembly,
    assemble,
    objective_of,
    pair_sizes,
    read_data,
    read_held_out,
    read_model,
)


def score_pairs(
    score_step: Callable[..., Scores],
    params: Params,
    feed: Feed,
    pairs: int,
    *,
    progress: Callable[[int], None] = lambda done: None,
) -> Scores:
    """Scores of a whole data set in its own order.

    Args:
      score_step: `(params, batch) -> Scores` of one step.
      params: of the model that scores.
      feed: steps that hold every pair once.
      pairs: N.
      progress: called with the number of steps done.

    Returns:
      Scores with `[N, 2]` NumPy arrays; `augmented` is None where the feed has no augmented rows.
    """
    plain = np.full((pairs, 2), np.nan, np.float32)
    augmented = np.full((pairs, 2), np.nan, np.float32) if feed.source.augmented else None
    tokens = np.zeros((pairs, 2), np.int32)
    pending: tuple[np.ndarray, Scores] | None = None

    def collect(pair: np.ndarray, scores: Scores) -> None:
        present = pair >= 0
        host = jax.device_get(scores)
        plain[pair[present]] = host.plain[present]
        tokens[pair[present]] = host.tokens[present]
        if host.augmented is not None:
            augmented[pair[present]] = host.augmented[present]

    for done, (step, batch) in enumerate(feed.batches(0), 1):
        scores = score_step(params, batch)
        if pending is not None:  # step n is on its way to the device before step n − 1 is waited for
            collect(*pending)
        pending = (step.pair, scores)
        progress(done)
    if pending is not None:
        collect(*pending)
    return Scores(plain, augmented, tokens)


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """A held-out data set, ready to be evaluated with any parameters."""

    name: str
    """What its metrics' names begin with: `eval` or `eval/NAME`."""
    objective: Objective
    score_step: Callable[..., Scores]
    feed: Feed
    pairs: int
    reference: np.ndarray | None
    """`[N, 2 sides, 2 (plain, augmented)]` scores of the reference; None for sft."""

    def metrics(self, params: Params, progress: Callable[[int], None] = lambda done: None) -> dict[str, float]:
        scores = score_pairs(self.score_step, params, self.feed, self.pairs, progress=progress)
        return evaluate(self.objective, scores, self.reference, name=self.name)


def evaluate(objective: Objective, policy: Scores, reference: np.ndarray | None, *, name: str) -> dict[str, float]:
    """Means over all pairs of a data set under their names in metrics.jsonl, each with `name` and a slash in front.

    Args:
      objective: whose loss is reported.
      policy: from `score_pairs`.
      reference: `[N, 2 sides, 2 (plain, augmented)]` scores of the reference; None for sft.
      name: of the set, `eval` or `eval/NAME`.
    """
    scores = None
    if reference is not None:
        scores = Scores(reference[..., 0], None if policy.augmented is None else reference[..., 1], policy.tokens)
    per_pair = pair_metrics(objective, jax.tree.map(jnp.asarray, policy), jax.tree.map(jnp.asarray, scores))
    means = averages({key: np.asarray(value, np.float64) for key, value in per_pair.items()}, policy.tokens)
    return {f"{name}/{key}": float(value) for key, value in means.items()} | {f"{name}/pairs": len(policy.plain)}


def evaluate_command(config: Config, *, best: bool = False) -> dict[str, float]:
    """`sr-dpo eval`: metrics on every held-out set.

    They are those of the latest (or `best`) checkpoint of output_dir, or else of model.path.
    The reference is model.path in all cases. Where pairs are rated, they hold the correlation of margins with ratings.
    Writes them to output_dir/eval.json too, and the pairs of each set, one JSON line each, to output_dir/`pairs_file`.
    """
    if not config.data.held_out:
        raise UsageError(
            "neither data.eval_path nor data.eval_sets is set: they name the pairs that `sr-dpo eval` measures"
        )
    directory, tokenizer = read_model(config)
    sets = read_held_out(config, tokenizer, directory.architecture)
    assembly, root = assemble(config, directory), Path(config.output_dir)
    held_out, base = _ready(assembly, sets)
    params, step = latest_params(assembly, base, best=best)
    metrics: dict[str, float] = {"step": step}
    for one in held_out:
        pairs, policy = sets[one.name], score_pairs(one.score_step, params, one.feed, one.pairs)
        require_finite(pairs, policy, config)
        metrics |= evaluate(one.objective, policy, one.reference, name=one.name)
        if jax.process_index() == 0 and one.reference is not None:
            difference = pairs.chosen_score - pairs.rejected_score
            margins = _margins(policy, one.reference)
            metrics |= rating_metrics(margins, difference, seed=config.seed, name=one.name)
            root.mkdir(parents=True, exist_ok=True)
            write_scores(root / pairs_file(one.name), pairs, policy, one.reference)
    if jax.process_index() == 0:
        root.mkdir(parents=True, exist_ok=True)
        (root / "eval.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    return metrics


def _ready(assembly: Assembly, sets: Mapping[str, TokenizedPairs]) -> tuple[list[HeldOut], Params | None]:
    """Every set with the reference's scores of it, and the reference's parameters if they had to be made for that."""
    held_out, base, objective = [], None, objective_of(assembly.config)
    preference = objective.name != "sft"
    for name, pairs in sets.items():
        feed, plan = _one_pass(assembly, pairs, with_rejected=preference)
        score_step = make_score_step(assembly.graph, pairs=plan.shape.pairs, mesh=assembly.mesh)
        reference = None
        if preference:
            scores = assembly.reference_scores(pairs, plan, augmented=len(pairs.augmentation) > 0)
            if not scores.complete:
                base = assembly.base_params() if base is None else base
                title = f"reference on {name} pairs"
                with Progress(title, total=len(plan), active=jax.process_index() == 0) as progress:
                    scores.fill(score_step, base, progress.update)
            reference = scores.scores
        held_out.append(HeldOut(name, objective, score_step, feed, len(pairs), reference))
    return held_out, base


def _margins(policy: Scores, reference: np.ndarray) -> dict[str, np.ndarray]:
    """m and, where p is used, m̂ of each pair, `[N]`, nats."""
    kinds = {"margin": policy.plain}
    if policy.augmented is not None:
        kinds["augmented_margin"] = policy.augmented
    log_ratios = {name: scores - reference[..., kind] for kind, (name, scores) in enumerate(kinds.items())}
    return {name: ratio[:, CHOSEN] - ratio[:, REJECTED] for name, ratio in log_ratios.items()}


def score_command(config: Config, output: Path) -> int:
    """`sr-dpo score`: log-probabilities under model.path of every pair of data.path; returns how many."""
    if not output.parent.is_dir() or output.is_dir():
        raise UsageError(f"--output {output}: names a directory, or stands in one that does not exist; name a file")
    directory, tokenizer = read_model(config)
    p = config.refinement.prompt
    pairs = read_data(
        config, config.data.path, config.data.split, tokenizer, directory.architecture, augmentation_prompt=p
    )
    assembly = assemble(config, directory)
    feed, plan = _one_pass(assembly, pairs, with_rejected=True)
    score_step = make_score_step(assembly.graph, pairs=plan.shape.pairs, mesh=assembly.mesh)
    with Progress("score", total=len(plan), active=jax.process_index() == 0) as progress:
        scores = score_pairs(
            score_step,
            assembly.base_params(),
            feed,
            len(pairs.ids),
            progress=progress.update,
        )
    require_finite(pairs, scores, config)
    if jax.process_index() == 0:
        write_scores(output, pairs, scores)
    return len(pairs.ids)


def _one_pass(assembly: Assembly, pairs: TokenizedPairs, *, with_rejected: bool) -> tuple[Feed, Plan]:
    config, sizes = assembly.config, pair_sizes(pairs, with_rejected=with_rejected)
    shape = scoring_shape(
        *sizes,
        pairs_per_step=min(config.batch.pairs_per_step, len(pairs.ids)),
        row_length=config.batch.row_length,
        row_multiple=config.batch.row_multiple,
        rows_multiple=assembly.rows_multiple,
    )
    plan = scoring_plan(*sizes, shape)
    augmented = with_rejected and len(pairs.augmentation) > 0
    return assembly.feed(pairs, plan, augmented=augmented, with_rejected=with_rejected), plan


def latest_params(assembly: Assembly, base: Params | None, *, best: bool = False) -> tuple[Params, int]:
    """Parameters and step of the latest checkpoint of output_dir; without one those of model.path, and step 0.

    With `best` those of the best checkpoint; raises UsageError where the run has none.
    """
    if best or (Path(assembly.config.output_dir) / "checkpoints").is_dir():
        checkpoints = Checkpoints(assembly.config.output_dir, read_only=True, strict=assembly.config.checkpoint.strict)
        latest = checkpoints.best() if best else checkpoints.newest_good(prefix="params.")
        if latest is not None:
            params = checkpoints.restore_params(assembly.param_shapes, assembly.param_shardings, step=latest)
        checkpoints.close()
        if latest is not None:
            return params, latest
    return base if base is not None else assembly.base_params(), 0


def require_finite(pairs: TokenizedPairs, scores: Scores, config: Config) -> None:
    """Refuses scores that are no numbers.

    Raises:
      UsageError: names the first pair by file and line.
    """
    bad = ~np.isfinite(scores.plain).all(axis=1)
    if scores.augmented is not None:
        bad |= ~np.isfinite(scores.augmented).all(axis=1)
    if bad.any():
        raise UsageError(
            f"{bad.sum()} of {len(bad)} pairs, first {pairs.place(np.flatnonzero(bad)[0])}, have no finite "
            f"log-probability with the weights of model.path={config.model.path} in model.dtype={config.model.dtype}; "
            "set model.dtype=float32, or choose other weights"
        )


def write_scores(path: Path, pairs: TokenizedPairs, scores: Scores, reference: np.ndarray | None = None) -> None:
    """One JSON line a pair, in the order of the data: id, token counts, log-probabilities in nats, scores if rated.

    With the reference's scores `[N, 2 sides, 2 (plain, augmented)]` also those and the margins.
    """
    counts = {name: getattr(pairs, name) for name in ("prompt_tokens", "chosen_tokens", "rejected_tokens")}
    columns = _logp_columns("", scores.plain, scores.augmented)
    if reference is not None:
        columns |= _logp_columns(
            "reference_", reference[..., 0], None if scores.augmented is None else reference[..., 1]
        )
        columns |= _margins(scores, reference)
    ratings = {"chosen_score": pairs.chosen_score, "rejected_score": pairs.rejected_score}
    if reference is not None:
        ratings["rating_difference"] = pairs.chosen_score - pairs.rejected_score
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        for index, identity in enumerate(pairs.ids):
            line: dict[str, Any] = {"id": identity} | {name: int(values[index]) for name, values in counts.items()}
            line |= {name: float(values[index]) for name, values in columns.items()}
            line |= {name: float(values[index]) for name, values in ratings.items() if not np.isnan(values[index])}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    partial.replace(path)


def _logp_columns(prefix: str, plain: np.ndarray, augmented: np.ndarray | None) -> dict[str, np.ndarray]:
    columns = {f"{prefix}logp_chosen": plain[:, CHOSEN], f"{prefix}logp_rejected": plain[:, REJECTED]}
    if augmented is not None:
        columns[f"{prefix}logp_chosen_augmented"] = augmented[:, CHOSEN]
        columns[f"{prefix}logp_rejected_augmented"] = augmented[:, REJECTED]
    return columns
