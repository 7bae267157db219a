"""The identity of a run: written beside it, kept in every checkpoint, and compared when the run goes on.

A checkpoint goes on only as the run that it was. Every value that decides which pairs are seen, what is learned from
them or where it started is compared; a change is refused by key, old -> new, unless the user allows that key.
"""

import hashlib
import logging
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerBase

from sr_dpo_jax import __version__
from sr_dpo_jax.data.dataset import COUNTED, TokenizedPairs
from sr_dpo_jax.data.plan import Plan
from sr_dpo_jax.data.tokens import tokenizer_digest
from sr_dpo_jax.durable.checkpoint import Checkpoints
from sr_dpo_jax.durable.files import json_digest, write_json, write_text
from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.parallel.processes import require_same
from sr_dpo_jax.weights import directory as weights
from sr_dpo_jax.weights.adapters import open_adapter

log = logging.getLogger(__name__)

BEST = "checkpoint.best_metric"
STEPS = "train.max_steps"
SHAPES = ("lora.rank", "lora.targets")
"""Keys that decide which parameters a checkpoint holds, so that no flag can allow a change."""
LOCAL_KEYS = ("cache_dir", "distributed.process_id", "distributed.coordinator_address")
"""Keys whose value each process may have for itself."""
PATHS = ("data.path", "data.eval_path", "data.eval_sets", "model.path", "lora.start", "reference.path")
"""Keys of files: their content is compared, and where it lies is each process's own affair."""
NAMES = ("objective.name", "optimizer.name")
"""The keys that decide which other keys their sections have."""
NOTHING = {"sft_weight": 0.0, "divergence": "reverse_kl", "use_weighting": False}
"""Keys of an objective that ask for nothing with these values."""
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorstore")


def digests_of(
    tokenizer: PreTrainedTokenizerBase,
    sets: Mapping[str, TokenizedPairs] = MappingProxyType({}),
    reference: weights.ModelDirectory | None = None,
) -> dict[str, str]:
    """Digests what a command has read, for `shared_facts`; the key of the training pairs is `data.path`.

    `reference` is the model of reference.path; None where there is none.
    """
    named = {name if name == "data.path" else f"held-out set {name}": pairs.fingerprint for name, pairs in sets.items()}
    if reference is not None:
        named["reference.path"] = weights.fingerprint(reference)
    return {"tokenizer": tokenizer_digest(tokenizer), **named}


def shared_facts(config: Mapping[str, Any], directory: weights.ModelDirectory) -> dict[str, Any]:
    """Collects what all processes must have, by the key that a user would look at: configuration, model and versions.

    Args:
      config: the whole configuration as JSON.
      directory: of the model.
    """
    flat = flatten_dict(config, sep=".")
    pretrained = flat["model.init"] == "pretrained"
    return {
        **{key: value for key, value in flat.items() if not key.startswith((*LOCAL_KEYS, *PATHS))},
        "output_dir": Path(flat["output_dir"]).absolute(),
        "model.path": weights.fingerprint(directory) if pretrained else directory.architecture,
        "lora.start": None if flat.get("lora.start") is None else open_adapter(flat["lora.start"]).digest,
        **{f"the version of {name}": version for name, version in software().items()},
    }


def identity_of(
    pairs: TokenizedPairs,
    plan: Plan,
    *,
    tokenizer: str,
    weights_digest: str,
    adapter_digest: str | None = None,
    reference_digest: str | None = None,
    config: Mapping[str, Any],
    total_steps: int,
) -> dict[str, Any]:
    """Collects what must be the same for a checkpoint to go on as the run that it was, by the key that decides it.

    Args:
      pairs, plan: the training pairs, and the steps that hold them.
      tokenizer, weights_digest: digests, the latter of the weights without adapters.
      adapter_digest: the digest of lora.start; None where there is none.
      reference_digest: the digest of the weights of reference.path; None where there is none.
      config: the whole configuration.
      total_steps: the steps that the run takes; they count where the learning rate of a step follows from the last.
    """
    p = np.concatenate([pairs.head, pairs.augmentation])
    # Null where a key of an objective asks for nothing, as it was before there were others.
    objective = {key: None if value == NOTHING.get(key) else value for key, value in config["objective"].items()}
    if "terms" in objective:
        objective["terms"] = list(objective["terms"])  # as a checkpoint gives it back
    sections = {
        "objective": objective,
        "optimizer": config["optimizer"],
        "train": {"epochs": config["train"]["epochs"]},
        "batch": {"pairs_per_step": config["batch"]["pairs_per_step"]},
        "model": {name: config["model"][name] for name in ("dtype", "param_dtype")},
    }
    named = {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}
    if config["optimizer"]["schedule"] != "constant" or config["optimizer"]["warmup_ratio"] is not None:
        named[STEPS] = total_steps
    best = config["checkpoint"]["best_metric"]
    return {
        "data.path": _digest(pairs.tokens, pairs.offsets),
        "data.path weights": [float(weight) for weight in pairs.source_weights],
        "refinement.prompt": f"{len(pairs.augmentation)} tokens, {_digest(p, pairs.head_tokens)}",
        **_refinement_of(config["refinement"], pairs),
        "refinement.against": f"{len(pairs.against)} tokens, {_digest(pairs.against)}" if len(pairs.against) else None,
        "tokenizer": _short(tokenizer),
        "model.path": _short(weights_digest),
        "lora.start": None if adapter_digest is None else _short(adapter_digest),
        "reference.path": None if reference_digest is None else _short(reference_digest),
        "seed": config["seed"],
        **named,
        **_adapters_of(config["lora"]),
        "plan": _short(plan.digest),
        BEST: None if best is None else f"{best}, {config['checkpoint']['best_mode']}",
    }


def _adapters_of(lora: Mapping[str, Any] | None) -> dict[str, Any]:
    """Collects the form of adapters; nothing where all weights are trained."""
    if lora is None:
        return {}
    return {f"lora.{key}": lora[key] for key in ("rank", "alpha", "rslora", "init", "base")} | {
        "lora.targets": ", ".join(lora["targets"])
    }


def require_same_base(checkpoints: Checkpoints, step: int, *, lora: Mapping[str, Any], weights_digest: str) -> None:
    """Refuses to set adapters of a checkpoint beside other weights than those that they were trained beside.

    Args:
      checkpoints, step: the checkpoint.
      lora: the section `lora`.
      weights_digest: of the weights without adapters.

    Raises:
      UsageError: the weights, or the form of the adapters, are others.
    """
    before, where = checkpoints.restore_position(step)["identity"], checkpoints.directory / str(step)
    now = {"model.path": _short(weights_digest), **_adapters_of({**lora, "init": before.get("lora.init")})}
    wrong = [f"  {key}: {_shown(before.get(key))} -> {_shown(now[key])}" for key in now if before.get(key) != now[key]]
    if wrong:
        raise UsageError(
            "\n".join([f"{where}: its adapters were trained with other weights or in another form:", *wrong])
            + "\nRestore what was: the keys of the run's config.yaml, and the weights"
        )


def _refinement_of(refinement: Mapping[str, Any], pairs: TokenizedPairs) -> dict[str, Any]:
    """Collects how Δ is made: null where it is the paper's, as it was before there were other ways."""
    made = {"refinement.form": refinement["form"], "refinement.judge": refinement["judge"]}
    made = {key: None if value in ("margin", "policy") else value for key, value in made.items()}
    if refinement["judge"] == "ratings":
        made |= {f"refinement.{key}": refinement[key] for key in ("offset", "alpha")}
        made["data.path ratings"] = _digest(pairs.chosen_score, pairs.rejected_score)
    return made


def software() -> dict[str, Any]:
    """Lists the versions of the libraries: with other ones the same run goes on, but no longer bit by bit."""
    return {
        "sr_dpo_jax": __version__,
        "python": platform.python_version(),
        **{library: version(library) for library in LIBRARIES},
    }


def require_same_run(
    before: Mapping[str, Any], now: Mapping[str, Any], *, where: str, allowed_changes: Sequence[str]
) -> None:
    """Refuses to go on from a checkpoint of another run.

    Args:
      before, now: from `identity_of`, of the checkpoint and of this start.
      where: the checkpoint, for the message.
      allowed_changes: keys that may differ.

    Raises:
      UsageError: a key differs that is not allowed to, or an allowed one is no key.
    """
    unknown = sorted(set(allowed_changes) - now.keys() - before.keys())
    if unknown:
        raise UsageError(f"--allow-change {', '.join(unknown)}: no such key; known: {', '.join(now)}")
    # Another objective or optimizer has other keys: those come and go with its name, and need no flag of their own.
    renamed = tuple(name.removesuffix("name") for name in NAMES if before.get(name) != now.get(name))
    implied = {key for key in before.keys() ^ now.keys() if key.startswith(renamed)} if renamed else set()
    keys = [*now, *(key for key in before if key not in now and (key in implied or key.startswith("lora.")))]
    if before.get(STEPS) is None:  # earlier versions did not write it
        keys = [key for key in keys if key != STEPS]
    changed = [key for key in keys if before.get(key) != now.get(key)]
    # The plan follows from other keys: its change is news only where none of them has changed.
    changed = [key for key in changed if key != "plan"] or changed
    # Another metric gives up the best checkpoint so far; where there was none, nothing is given up.
    changed = [key for key in changed if key != BEST or before.get(BEST) is not None]
    asked = [key for key in changed if key not in implied]
    lines = [f"  {key}: {_shown(before.get(key))} -> {_shown(now.get(key), 'none')}" for key in changed]
    if any(key in SHAPES for key in changed):
        raise UsageError(
            "\n".join([f"{where} holds parameters of other shapes:", *lines])
            + "\nRestore what was, or choose another output_dir"
        )
    if set(asked) - set(allowed_changes):
        flags = " ".join(f"--allow-change '{key}'" if " " in key else f"--allow-change {key}" for key in asked)
        raise UsageError(
            "\n".join([f"{where} was reached by another run:", *lines])
            + f"\nRestore what was, choose another output_dir, or go on with {flags}"
        )
    if changed:
        log.warning("%s", "\n".join([f"{where}: going on with what --allow-change allows:", *lines]))


def resume_point(
    checkpoints: Checkpoints,
    record: Mapping[str, Any],
    *,
    where: str,
    strict: bool,
    allowed_changes: Sequence[str],
) -> tuple[int | None, dict[str, Any]]:
    """Finds the step that the run goes on from, and what its checkpoint stored; None and nothing for a new run.

    Args:
      checkpoints: of the run directory.
      record: identity and surroundings of this start.
      where: the run directory, for messages.
      strict: refuses other versions than before.
      allowed_changes: keys of the identity that may differ.

    Raises:
      UsageError: the checkpoint is of another run, or no checkpoint is usable although there was one.
    """
    step = checkpoints.newest_good()
    if step is None:
        return None, {}
    before, named = checkpoints.restore_position(step), f"{where}: step {step}"
    require_same({named: json_digest(before)})
    require_same_run(before["identity"], record["identity"], where=named, allowed_changes=allowed_changes)
    report_drift(before["surroundings"], record["surroundings"], where=named, strict=strict)
    log.info("resuming at step %d", before["next_step"])
    return step, before


def report_drift(before: Mapping[str, Any], now: Mapping[str, Any], *, where: str, strict: bool) -> None:
    """Logs which versions, mesh or number of processes differ; with `strict` another version is refused."""
    lines = [f"  {key}: {_shown(before.get(key))} -> {_shown(now[key])}" for key in now if before.get(key) != now[key]]
    if not lines:
        return
    text = "\n".join([f"{where} was reached with other software or devices:", *lines])
    if strict and any(before.get(key) != now[key] for key in software()):
        raise UsageError(f"{text}\ncheckpoint.strict=true asks for the same versions; install them, or set it to false")
    log.warning("%s\nThe pairs and their order are the same; the numbers are so up to float order.", text)


def surroundings(mesh: Mesh) -> dict[str, Any]:
    """Collects versions, mesh and number of processes."""
    return {**software(), "mesh": dict(mesh.shape), "processes": jax.process_count()}


def write_run_files(
    root: Path,
    pairs: TokenizedPairs,
    *,
    config: str,
    model: Mapping[str, Any],
    digests: Mapping[str, str],
    record: Mapping[str, Any],
    mesh: Mesh,
    reference: Mapping[str, Any] | None = None,
) -> None:
    """Writes config.yaml as resolved, and manifest.json: what the run was made from.

    `model` holds the path of the base model and the commit of a hub name; `digests` are those of the tokenizer and of
    the base weights. `reference` holds path, commit and digest of a reference that is another model.
    """
    manifest = {
        "run_id": record["run_id"],
        "run_id_digest": json_digest(record["run_id"]),
        "versions": software(),
        "digests": {"data": pairs.content_digest, "tokens": pairs.digest, **digests},
        "model": model,
        "reference": reference,
        "identity": record["identity"],
        "knowledge": record.get("knowledge"),
        "pairs": len(pairs.ids),
        "bad_rows": len(pairs.report.bad_rows),
        **{name: getattr(pairs.report, name) for name in COUNTED},
        "mesh": dict(mesh.shape),
        "processes": jax.process_count(),
    }
    write_text(root / "config.yaml", config)
    write_json(root / "manifest.json", manifest)


def _digest(*arrays: np.ndarray) -> str:
    """Hashes arrays of ids; the pairs' and p's apart, so that a refusal names the one that has changed."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
    return _short(digest.hexdigest())


def _short(digest: str) -> str:
    return digest[:16]


def _shown(value: Any, absent: str = "(not recorded)") -> str:
    return absent if value is None else str(value)
