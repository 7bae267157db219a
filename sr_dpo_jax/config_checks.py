"""Problems between keys of a configuration that each of them alone does not show."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sr_dpo_jax.config import Config


def cross_checks(config: "Config") -> list[str]:
    """Problems between keys, each with its remedy; what needs the data or the devices is checked where they are."""
    found = [
        f"  {key}={path}: is an address; files are written to directories alone: mount the bucket, as "
        "tpu_scripts/README.md shows"
        for key, path in (("output_dir", config.output_dir), ("cache_dir", config.cache_dir))
        if path is not None and "://" in path
    ]
    refined = config.objective.name in ("sr_dpo", "sr_ipo")
    if refined and config.objective.lam is None:
        found.append(
            f"  objective.lam=null: {config.objective.name} needs it; the paper chooses from 0.1, 0.3, 0.5 and 1"
        )
    if not refined and config.objective.lam is not None:
        found.append(
            f"  objective.lam={config.objective.lam}: {config.objective.name} does not use it; "
            "remove it or choose sr_dpo or sr_ipo"
        )
    if refined and not config.refinement.prompt:
        found.append(f"  refinement.prompt is empty: {config.objective.name} needs the instruction p; remove the key")
    if config.objective.label_smoothing and config.objective.name != "dpo":
        found.append(
            f"  objective.label_smoothing={config.objective.label_smoothing}: only dpo uses it; remove it or choose dpo"
        )
    if config.optimizer.weight_decay and config.optimizer.name != "adamw":
        found.append(f"  optimizer.weight_decay={config.optimizer.weight_decay}: only adamw uses it; remove it")
    if config.optimizer.name != "adamw" and (config.optimizer.b1, config.optimizer.b2) != (0.9, 0.999):
        found.append("  optimizer.b1, optimizer.b2: only adamw uses them; remove them")
    if config.optimizer.name != "adamw" and config.optimizer.first_moment_dtype is not None:
        found.append(
            f"  optimizer.first_moment_dtype={config.optimizer.first_moment_dtype}: only adamw keeps a first moment; "
            "remove it"
        )
    if config.generation.temperature == 0 and (config.generation.top_k, config.generation.top_p) != (None, None):
        found.append(
            "  generation.top_k, generation.top_p: without effect at generation.temperature=0, the likeliest token; "
            "remove them, or raise the temperature"
        )
    if config.data.max_prompt_length >= config.data.max_length:
        found.append(
            f"  data.max_prompt_length={config.data.max_prompt_length} leaves no room for a response in "
            f"data.max_length={config.data.max_length}; lower the first or raise the second"
        )
    if config.data.eval_pairs is not None and config.data.eval_path is None:
        found.append(f"  data.eval_pairs={config.data.eval_pairs}: set data.eval_path, or remove it")
    if config.train.eval_every_steps and config.data.eval_path is None:
        found.append(f"  train.eval_every_steps={config.train.eval_every_steps}: set data.eval_path, or remove it")
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
