"""`sr-dpo eval`: metrics on held-out sets. `sr-dpo score`: log-probs of every pair under model.path."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import jax
import numpy as np

from sr_dpo_jax.batch import CHOSEN, REJECTED
from sr_dpo_jax.commands.correlation import rating_metrics
from sr_dpo_jax.config.schema import ONE_RESPONSE, Config
from sr_dpo_jax.data.dataset import TokenizedPairs
from sr_dpo_jax.durable.files import pairs_file, require_output, require_writable, whole, write_json
from sr_dpo_jax.durable.lease import Lease
from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.parallel.processes import on_leader
from sr_dpo_jax.train.identity import digests_of
from sr_dpo_jax.train.knowledge import lines_of
from sr_dpo_jax.train.metrics import Progress
from sr_dpo_jax.train.objective import Objective
from sr_dpo_jax.train.scored_set import ScoredSet, make_scored_set
from sr_dpo_jax.train.scored_set import knowledge as knowledge_from
from sr_dpo_jax.train.setup import Setup, read_held_out, read_model, read_pairs_of, read_reference, set_up
from sr_dpo_jax.train.train_step import Scores


def evaluate_command(config: Config, *, best: bool = False) -> dict[str, float]:
    """Measures every held-out set with the latest (or `best`) checkpoint of output_dir, or else with model.path.

    The reference is reference.path, or else model.path, in all cases. Where pairs are rated, the metrics hold the
    correlation of margins with ratings. Writes them to output_dir/eval.json too, and the pairs of each set, one JSON
    line each, to output_dir/`pairs_file`.
    """
    if not config.data.held_out:
        raise UsageError(
            "neither data.eval_path nor data.eval_sets is set: they name the pairs that `sr-dpo eval` measures"
        )
    directory, tokenizer = read_model(config)
    sets = read_held_out(config, tokenizer, directory.architecture)
    read = {"--best": best, **digests_of(tokenizer, sets, read_reference(config, tokenizer))}
    setup, root = set_up(config, directory, read), Path(config.output_dir)
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
            base = setup.reference.base_params() if base is None else base
            held.by_reference().fill_reference(base)
    if setup.reference is not setup.model:
        base = None  # the model's own are made where they are needed
    params, step = setup.latest_params(base, best=best)
    setup = setup.settled_at(step)
    metrics: dict[str, float] = {"step": step}
    for held in held_out:
        policy = held.scores(params)
        require_finite(held.pairs, policy, config)
        metrics |= held.metrics(setup.objective, policy)
        lease.check()
        if jax.process_index() == 0 and setup.objective.kind.needs_rejected:
            difference = held.pairs.chosen_score - held.pairs.rejected_score
            margins = held.margins(setup.objective, policy)
            metrics |= rating_metrics(margins, difference, seed=config.seed, name=held.name)
            columns = margins | {"rating_difference": difference} | _more_columns(held, setup.objective, policy)
            write_scores(root / pairs_file(held.name), held.pairs, policy, columns)
    lease.check()
    if jax.process_index() == 0:
        write_json(root / "eval.json", metrics)
    return metrics


def score_command(config: Config, output: Path | None, *, knowledge: bool = False) -> int:
    """Writes the log-probs under model.path of every pair of data.path; returns the count of pairs.

    With `knowledge` prints how well they agree with the labels: the table by which `objective.lam: auto` is settled.
    """
    if output is None and not knowledge:
        raise UsageError("give --output FILE.jsonl for the log-probs, --knowledge for the table of them, or both")
    if output is not None:
        require_output(output)
    data, section = config.data, config.refinement
    if knowledge and not section.prompt:
        raise UsageError("--knowledge: compares log-probs with p and without; remove refinement.prompt=null")
    ld_alpha = getattr(config.objective, "ld_alpha", None) if knowledge else None
    if output is not None and knowledge and (ld_alpha is not None or config.reference.path is not None):
        which = "objective.ld_alpha" if config.reference.path is None else "reference.path"
        raise UsageError(
            f"--output, --knowledge: {which} makes the table one of other log-probs than those of the file, which are "
            "whole and of model.path; ask for one of them, and then for the other"
        )
    directory, tokenizer = read_model(config)
    if data.format in ONE_RESPONSE:
        raise UsageError(f"data.format={data.format}: its rows have one response, and score compares two")
    instructions = {"instruction": section.prompt, "against": section.against}
    pairs = read_pairs_of(config, data.path, data.split, tokenizer, directory.architecture, **instructions)
    reference = read_reference(config, tokenizer) if knowledge else None
    asked = {"--knowledge": knowledge, "--output": "a file" if output is not None else "none"}
    setup = set_up(config, directory, {**asked, **digests_of(tokenizer, {"data.path": pairs}, reference)})
    model = setup.reference if knowledge else setup.model
    with contextlib.nullcontext() if output is None else Lease.of_file(output) as lease:
        if lease is not None:
            on_leader(lease.take)
        options = {"cache_dir": config.cache_path, "ld_alpha": ld_alpha}
        scored = make_scored_set("score", pairs, model, setup.packing, None, **options)
        with Progress("score", total=len(scored.feed.source), active=jax.process_index() == 0) as progress:
            scores = scored.scores(model.base_params(), progress.update)
        require_finite(pairs, scores, config)
        if lease is not None:
            lease.check()
        if jax.process_index() == 0 and output is not None:
            write_scores(output, pairs, scores)
    if jax.process_index() == 0 and knowledge:
        print("\n".join(lines_of(knowledge_from(scores, per_token=setup.objective.kind.per_token))))
    return len(pairs)


def require_finite(pairs: TokenizedPairs, scores: Scores, config: Config) -> None:
    """Refuses scores that are no numbers with a UsageError that names the first pair by file and line."""
    given = [part for part in (scores.plain, scores.augmented, scores.against) if part is not None]
    bad = ~np.isfinite(np.concatenate(given, axis=1)).all(axis=1)
    if bad.any():
        raise UsageError(
            f"{bad.sum()} of {len(bad)} pairs, first {pairs.place(np.flatnonzero(bad)[0])}, have no finite "
            f"log-prob with the weights of model.path={config.model.path} in model.dtype={config.model.dtype}; "
            "set model.dtype=float32, or choose other weights"
        )


def write_scores(
    path: Path, pairs: TokenizedPairs, scores: Scores, more: Mapping[str, np.ndarray] = MappingProxyType({})
) -> None:
    """Writes one JSON line a pair, in the order of the data: id, token counts, log-probs in nats, scores if rated.

    `more` are further columns, `[N]` each, by name; a NaN is left out.
    """
    names = ("prompt_tokens", "chosen_tokens", "rejected_tokens", "chosen_score", "rejected_score")
    columns = {name: getattr(pairs, name) for name in names} | _logp_columns("", scores) | {**more}
    with whole(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for index, identity in enumerate(pairs.ids):
            numbers = {name: values[index].item() for name, values in columns.items() if not np.isnan(values[index])}
            file.write(json.dumps({"id": identity} | numbers, ensure_ascii=False) + "\n")


def _more_columns(held: ScoredSet, objective: Objective, policy: Scores) -> dict[str, np.ndarray]:
    """Gives the reference's log-probs and Δ, where the objective has them."""
    reference = held.reference_scores(policy)
    columns = {} if reference is None else _logp_columns("reference_", reference)
    if objective.kind.refined:
        columns["refinement"] = np.asarray(held.pair_metrics(objective, policy)["refinement"])
    return columns


def _logp_columns(prefix: str, scores: Scores) -> dict[str, np.ndarray]:
    columns = {f"{prefix}logp_chosen": scores.plain[:, CHOSEN], f"{prefix}logp_rejected": scores.plain[:, REJECTED]}
    if scores.augmented is not None:
        columns[f"{prefix}logp_chosen_augmented"] = scores.augmented[:, CHOSEN]
        columns[f"{prefix}logp_rejected_augmented"] = scores.augmented[:, REJECTED]
    if scores.against is not None:
        columns[f"{prefix}logp_chosen_against"] = scores.against[:, CHOSEN]
        columns[f"{prefix}logp_rejected_against"] = scores.against[:, REJECTED]
    return columns
