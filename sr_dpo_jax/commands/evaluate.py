"""`sr-dpo eval`: metrics on held-out sets. `sr-dpo score`: log-probs of every pair under model.path."""

import json
from pathlib import Path

import jax
import numpy as np

from sr_dpo_jax.batch import CHOSEN, REJECTED
from sr_dpo_jax.commands.correlation import rating_metrics
from sr_dpo_jax.config.schema import Config
from sr_dpo_jax.data.dataset import TokenizedPairs
from sr_dpo_jax.durable.files import pairs_file, require_output, require_writable, whole, write_json
from sr_dpo_jax.durable.lease import Lease
from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.parallel.processes import on_leader
from sr_dpo_jax.train.identity import digests_of
from sr_dpo_jax.train.metrics import Progress
from sr_dpo_jax.train.scored_set import ScoredSet, make_scored_set
from sr_dpo_jax.train.setup import Setup, read_held_out, read_model, read_pairs_of, set_up
from sr_dpo_jax.train.train_step import Scores


def evaluate_command(config: Config, *, best: bool = False) -> dict[str, float]:
    """Measures every held-out set with the latest (or `best`) checkpoint of output_dir, or else with model.path.

    The reference is model.path in all cases. Where pairs are rated, the metrics hold the correlation of margins with
    ratings. Writes them to output_dir/eval.json too, and the pairs of each set, one JSON line each, to
    output_dir/`pairs_file`.
    """
    if not config.data.held_out:
        raise UsageError(
            "neither data.eval_path nor data.eval_sets is set: they name the pairs that `sr-dpo eval` measures"
        )
    directory, tokenizer = read_model(config)
    sets = read_held_out(config, tokenizer, directory.architecture)
    setup, root = set_up(config, directory, digests_of(tokenizer, sets)), Path(config.output_dir)
    with Lease.of_file(root / "eval.json", remedy="choose another output_dir") as lease:
        on_leader(lambda: require_writable(root))
        on_leader(lease.take)
        return _measure(setup, sets, root, lease, best=best)


def _measure(
    setup: Setup, sets: dict[str, TokenizedPairs], root: Path, lease: Lease, *, best: bool
) -> dict[str, float]:
    config = setup.config
    held_out, base = [setup.scored_set(name, pairs) for name, pairs in sets.items()], None
    for held in held_out:
        if held.reference is not None and not held.reference.complete:
            base = setup.model.base_params() if base is None else base
            held.fill_reference(base)
    params, step = setup.latest_params(base, best=best)
    metrics: dict[str, float] = {"step": step}
    for held in held_out:
        policy = held.scores(params)
        require_finite(held.pairs, policy, config)
        metrics |= held.metrics(setup.objective, policy)
        lease.check()
        if jax.process_index() == 0 and held.reference is not None:
            difference = held.pairs.chosen_score - held.pairs.rejected_score
            metrics |= rating_metrics(held.margins(policy), difference, seed=config.seed, name=held.name)
            write_scores(root / pairs_file(held.name), held.pairs, policy, held)
    lease.check()
    if jax.process_index() == 0:
        write_json(root / "eval.json", metrics)
    return metrics


def score_command(config: Config, output: Path) -> int:
    """Writes the log-probs under model.path of every pair of data.path; returns the count of pairs."""
    require_output(output)
    directory, tokenizer = read_model(config)
    data, p = config.data, config.refinement.prompt
    pairs = read_pairs_of(config, data.path, data.split, tokenizer, directory.architecture, instruction=p)
    setup = set_up(config, directory, digests_of(tokenizer, {"data.path": pairs}))
    with Lease.of_file(output) as lease:
        on_leader(lease.take)
        scored = make_scored_set("score", pairs, setup.model, setup.packing, None, cache_dir=config.cache_path)
        with Progress("score", total=len(scored.feed.source), active=jax.process_index() == 0) as progress:
            scores = scored.scores(setup.model.base_params(), progress.update)
        require_finite(pairs, scores, config)
        lease.check()
        if jax.process_index() == 0:
            write_scores(output, pairs, scores)
    return len(pairs)


def require_finite(pairs: TokenizedPairs, scores: Scores, config: Config) -> None:
    """Refuses scores that are no numbers with a UsageError that names the first pair by file and line."""
    given = [part for part in (scores.plain, scores.augmented) if part is not None]
    bad = ~np.isfinite(np.concatenate(given, axis=1)).all(axis=1)
    if bad.any():
        raise UsageError(
            f"{bad.sum()} of {len(bad)} pairs, first {pairs.place(np.flatnonzero(bad)[0])}, have no finite "
            f"log-prob with the weights of model.path={config.model.path} in model.dtype={config.model.dtype}; "
            "set model.dtype=float32, or choose other weights"
        )


def write_scores(path: Path, pairs: TokenizedPairs, scores: Scores, held: ScoredSet | None = None) -> None:
    """Writes one JSON line a pair, in the order of the data: id, token counts, log-probs in nats, scores if rated.

    With a held-out set also the reference's log-probs and the margins.
    """
    names = ("prompt_tokens", "chosen_tokens", "rejected_tokens", "chosen_score", "rejected_score")
    columns = {name: getattr(pairs, name) for name in names} | _logp_columns("", scores)
    if held is not None:
        columns |= _logp_columns("reference_", held.reference_scores(scores)) | held.margins(scores)
        columns["rating_difference"] = pairs.chosen_score - pairs.rejected_score
    with whole(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for index, identity in enumerate(pairs.ids):
            numbers = {name: values[index].item() for name, values in columns.items() if not np.isnan(values[index])}
            file.write(json.dumps({"id": identity} | numbers, ensure_ascii=False) + "\n")


def _logp_columns(prefix: str, scores: Scores) -> dict[str, np.ndarray]:
    columns = {f"{prefix}logp_chosen": scores.plain[:, CHOSEN], f"{prefix}logp_rejected": scores.plain[:, REJECTED]}
    if scores.augmented is not None:
        columns[f"{prefix}logp_chosen_augmented"] = scores.augmented[:, CHOSEN]
        columns[f"{prefix}logp_rejected_augmented"] = scores.augmented[:, REJECTED]
    return columns
