"""Problems between keys of a configuration, which none of them shows alone, each with its remedy.

What needs the data or the devices is checked where they are. Imports no jax.
"""

from sr_dpo_jax.config.objectives import AotObjective, PairObjective, is_a, is_refined, parts_of
from sr_dpo_jax.config.schema import ONE_RESPONSE, Config, Refinement

MEASURES = ("loss", "logps/chosen")
PAIR_MEASURES = (
    "logps/rejected",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "margin",
)
AUGMENTED_MEASURES = ("augmented/margin", "augmented/accuracies")
LOSSES = ("loss", "loss_per_token")
GAINS = ("margin", "margins", "accuracies")
"""Metrics whose names end so are better when they are higher."""
RESERVED = {
    *(measure.partition("/")[0] for measure in (*MEASURES, *PAIR_MEASURES, *AUGMENTED_MEASURES)),
    *("augmented_margin", "eval", "loss_per_token", "pairs", "rated_pairs", "rating_gap", "refinement", "weight"),
}
"""Metrics under `eval/` begin so: a held-out set of one of these names could not be told from a metric."""


def evaluation_metrics(config: Config) -> list[str]:
    """Names every mean that an evaluation while training gives, over all held-out sets."""
    measures = [*MEASURES]
    if isinstance(config.objective, PairObjective):
        measures += PAIR_MEASURES
        if config.refinement.prompt:
            measures += AUGMENTED_MEASURES
        if is_refined(config.objective):
            measures.append("refinement")
        if getattr(config.objective, "use_weighting", False):
            measures.append("weight")
    else:
        measures.append("loss_per_token")
    return [f"{name}/{measure}" for name, _ in config.data.held_out for measure in measures]


def cross_checks(config: Config) -> list[str]:
    """Finds the problems between keys, each with its remedy."""
    found = [*_addresses(config), *_evaluation_problems(config)]
    found += [*_objective_problems(config), *_refinement_problems(config), *_reference_problems(config)]
    if config.generation.temperature == 0 and (config.generation.top_k, config.generation.top_p) != (None, None):
        found.append(
            "  generation.top_k, generation.top_p: without effect at generation.temperature=0, the likeliest token; "
            "remove them, or raise the temperature"
        )
    found += [*_one_response_problems(config), *_column_problems(config)]
    if config.data.max_prompt_length >= config.data.max_length:
        found.append(
            f"  data.max_prompt_length={config.data.max_prompt_length} leaves no room for a response in "
            f"data.max_length={config.data.max_length}; lower the first or raise the second"
        )
    if (config.distributed.process_id is None) != (config.distributed.coordinator_address is None):
        found.append("  distributed.process_id and distributed.coordinator_address go together; set both or neither")
    elif config.distributed.process_id is not None and config.distributed.process_id >= config.distributed.processes:
        found.append(
            f"  distributed.process_id={config.distributed.process_id}: not below "
            f"distributed.processes={config.distributed.processes}; set that to how many were started"
        )
    elif config.distributed.coordinator_address is not None and config.distributed.processes == 1:
        found.append("  distributed.processes=1 has no coordinator; set how many processes were started")
    sizes = config.mesh.model_dump()
    if list(sizes.values()).count(-1) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        found.append(f"  mesh={sizes}: sizes are positive, and at most one of them is -1 (all devices left)")
    return found


def _one_response_problems(config: Config) -> list[str]:
    """Finds data with one response a row where the objective compares two."""
    if not isinstance(config.objective, PairObjective):
        return []
    formats = {f"data.eval_sets.{name}.format": one.format for name, one in config.data.eval_sets}
    formats |= {"data.format": config.data.format}
    return [
        f"  {key}={format}: its rows have one response, and objective.name={config.objective.name} compares two; set "
        "preference where they have two, or train by objective.name=sft"
        for key, format in formats.items()
        if format in ONE_RESPONSE
    ]


def _column_problems(config: Config) -> list[str]:
    """Finds columns that are read as two things, or named and ignored at once."""
    data = config.data
    responses = {} if data.format in ONE_RESPONSE else {"chosen": "chosen", "rejected": "rejected"}
    names = {**responses, **dict(data.columns)}
    return [
        f"  data.columns.{ours}={name}: is {'also ignored' if ignored else 'read as two columns'}; correct data.columns"
        for ours, name in data.columns
        if (ignored := name in data.ignored_columns) or list(names.values()).count(name) > 1
    ]


def _objective_problems(config: Config) -> list[str]:
    objective, steps, found = config.objective, config.batch.accumulation_steps, []
    for number, part in enumerate(parts_of(objective)):
        key = "objective" if part is objective else f"objective.terms.{number}"
        if is_a(part, AotObjective):
            if steps > 1:
                found.append(
                    f"  batch.accumulation_steps={steps}: {key}.name={part.name} sorts over all pairs of a step, and a "
                    "micro-batch has some of them; set it to 1, with model.remat=full or fewer batch.pairs_per_step to "
                    "save memory, or choose another objective"
                )
            if getattr(objective, "use_weighting", False):
                found.append(
                    f"  objective.use_weighting: {key}.name={part.name} sorts over pairs, and its losses belong to "
                    "ranks, which have no weights; remove it, or choose another objective"
                )
        if hasattr(part, "divergence"):
            needs, alpha = part.divergence == "alpha_divergence", part.divergence_alpha
            if needs and alpha is None:
                found.append(f"  {key}.divergence=alpha_divergence: set {key}.divergence_alpha, from 0 to 1")
            if alpha is not None and not needs:
                found.append(
                    f"  {key}.divergence_alpha={alpha}: is for {key}.divergence=alpha_divergence; set that, or "
                    "remove it"
                )
    return found


def _refinement_problems(config: Config) -> list[str]:
    section, name, found = config.refinement, config.objective.name, []
    asked = {key: value for key, value in section if key != "prompt" and value != Refinement.model_fields[key].default}
    if not is_refined(config.objective):
        if asked:
            keys = ", ".join(f"refinement.{key}" for key in asked)
            found.append(f"  {keys}: objective.name={name} has no refinement; remove them, or choose one of sr_*")
        return found
    rated = section.judge == "ratings"
    if not section.prompt and not rated:
        found.append(f"  refinement.prompt is empty: {name} needs the instruction p; remove the key")
    if section.judge == "reference" and section.form == "margin":
        found.append(
            "  refinement.judge=reference with refinement.form=margin: the reference's own margin is 0; "
            "set refinement.form=contrast"
        )
    if section.form == "contrast" and rated:
        found.append("  refinement.form=contrast: ratings are no log-probs; remove it, or choose another judge")
    if section.against is not None and (section.form != "contrast" or not section.against.strip()):
        found.append(
            "  refinement.against: is a second instruction of refinement.form=contrast; set that, or remove it"
        )
    found += [
        f"  refinement.{key}={asked[key]}: is for refinement.judge=ratings; set that, or remove it"
        for key in ("offset", "alpha")
        if key in asked and not rated
    ]
    automatic = any(getattr(part, "lam", None) == "auto" for part in parts_of(config.objective))
    if automatic and (section.form != "contrast" or rated):
        found.append(
            "  objective.lam=auto: only a contrast can be weighed against the labels before step 0; set "
            "refinement.form=contrast, or a number"
        )
    return found


def _reference_problems(config: Config) -> list[str]:
    section = config.reference
    if section.path is None and section.revision is not None:
        return [f"  reference.revision={section.revision}: pins reference.path; set that, or remove it"]
    if section.path is not None and section.mode == "online" and config.lora is not None:
        return [
            "  reference.mode=online with reference.path and lora: policy and reference would have no base in common; "
            "set reference.mode=cached"
        ]
    return []


def _addresses(config: Config) -> list[str]:
    return [
        f"  {key}={path}: is an address; files are written to directories alone: mount the bucket, as "
        "tpu_scripts/README.md shows"
        for key, path in (("output_dir", config.output_dir), ("cache_dir", config.cache_dir))
        if path is not None and "://" in path
    ]


def _evaluation_problems(config: Config) -> list[str]:
    data, train, found = config.data, config.train, []
    if data.eval_pairs is not None and data.eval_path is None:
        found.append(f"  data.eval_pairs={data.eval_pairs}: set data.eval_path, or remove it")
    found += [
        f"  data.eval_sets.{name}: is the name of a metric; choose another"
        for name, _ in data.eval_sets
        if name in RESERVED
    ]
    held_out = {"data.eval_path": data.eval_path or ()}
    held_out |= {f"data.eval_sets.{name}.path": one.path for name, one in data.eval_sets}
    found += [
        f"  {key}.{number}.weight={source.weight}: every held-out pair is evaluated once; remove it"
        for key, sources in held_out.items()
        for number, source in enumerate(sources)
        if source.weight != 1
    ]
    needing = {"train.eval_every_steps": train.eval_every_steps, "train.samples": train.samples}
    found += [
        f"  {key}={value}: set data.eval_path or data.eval_sets, or remove it"
        for key, value in needing.items()
        if value and not data.held_out
    ]
    return found + _best_problems(config)


def _best_problems(config: Config) -> list[str]:
    metric, mode, train = config.checkpoint.best_metric, config.checkpoint.best_mode, config.train
    found = []
    if train.early_stopping_min_delta and train.early_stopping_patience is None:
        found.append(
            f"  train.early_stopping_min_delta={train.early_stopping_min_delta}: set train.early_stopping_patience, or "
            "remove it"
        )
    if metric is None:
        if train.early_stopping_patience is not None:
            found.append(
                f"  train.early_stopping_patience={train.early_stopping_patience}: set checkpoint.best_metric, the "
                "metric that must get better, or remove it"
            )
        if mode != "max":
            found.append(f"  checkpoint.best_mode={mode}: set checkpoint.best_metric, or remove it")
        return found
    known = evaluation_metrics(config)
    if metric not in known:
        choice = f"choose one of {', '.join(known)}" if known else "set data.eval_path or data.eval_sets, or remove it"
        return [*found, f"  checkpoint.best_metric={metric}: no evaluation of this run gives it; {choice}"]
    if train.eval_every_steps is None:
        found.append(
            f"  checkpoint.best_metric={metric}: only the end of the run is evaluated, so that there is nothing to "
            "choose from; set train.eval_every_steps, or remove it"
        )
    measure = metric.rpartition("/")[2]
    automatic = any(getattr(part, "lam", None) == "auto" for part in parts_of(config.objective))
    if measure == "refinement" and automatic:
        found.append(
            f"  checkpoint.best_metric={metric}: objective.lam=auto may make the objective the plain one, which has no "
            "refinement; choose another"
        )
    if mode == "max" and measure in LOSSES:
        found.append(f"  checkpoint.best_mode=max: would choose the highest {metric}; set it to min")
    if mode == "min" and measure in GAINS:
        found.append(f"  checkpoint.best_mode=min: would choose the lowest {metric}; set it to max")
    return found
