"""Writes a checkpoint as a Hugging Face directory that transformers loads, or PEFT where adapters were trained."""

import contextlib
import dataclasses
import glob
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from flax import nnx
from huggingface_hub import ModelCardData

from sr_dpo_jax import __version__
from sr_dpo_jax.config.load import load_config
from sr_dpo_jax.config.objectives import is_refined
from sr_dpo_jax.config.schema import Config
from sr_dpo_jax.durable.checkpoint import Checkpoints
from sr_dpo_jax.durable.files import whole
from sr_dpo_jax.durable.lease import is_alive, this_process
from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.model.adapter import split
from sr_dpo_jax.train.identity import NOTHING, require_same_base
from sr_dpo_jax.train.setup import lora_of
from sr_dpo_jax.weights.adapters import merged as merged_groups
from sr_dpo_jax.weights.adapters import save_adapters
from sr_dpo_jax.weights.directory import ModelDirectory, open_directory, weights_digest
from sr_dpo_jax.weights.files import CONFIG, GENERATION_CONFIG, TEMPLATES, TOKENIZER_FILES
from sr_dpo_jax.weights.layout import flatten
from sr_dpo_jax.weights.placement import abstract_params
from sr_dpo_jax.weights.read import read_groups
from sr_dpo_jax.weights.write import save_params

SHARD_BYTES = 5_000_000_000


@dataclasses.dataclass(frozen=True)
class Origin:
    """The origin of a run, as its manifest states it."""

    revision: str | None
    """The commit that the hub name of the base model was resolved to; None for a local directory."""
    weights_digest: str
    data_digest: str
    version: str
    """The version of this package."""


def export(
    run_dir: Path,
    out_dir: Path,
    *,
    step: int | None = None,
    best: bool = False,
    merge: bool = False,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes weights, config, generation config, tokenizer and model card of one step.

    Of a run with adapters that is a PEFT directory, or with `merge` the model with the adapters added to its weights.

    The weights stream from the checkpoint: host memory holds the stacked parameters of one tensor, of all layers and
    as they were trained (up to twice while Orbax reads them), and one output file. No device memory is used. The
    directory is written under a temporary name beside its own and renamed, so it is whole or not there.

    Args:
      run_dir: the output_dir of a run.
      out_dir: a directory that does not exist.
      step: the step of the checkpoint; None takes the latest, or the `best` one.
      best: whether to take the best checkpoint.
      merge: whether to add adapters to the weights of the base model.
      dtype: the type of the weights; None takes the run's model.param_dtype, and for merged ones its model.dtype.
      shard_bytes: the most bytes of tensors in one file.

    Raises:
      UsageError: run_dir is no run or has no checkpoint, the step or a best one is not there, out_dir exists, a weight
        is not finite in `dtype`, or there is nothing to merge or nothing to merge it with.
    """
    config, origin = _run_of(run_dir, out_dir, merge=merge, shard_bytes=shard_bytes)
    section, lora = config.model, lora_of(config)
    # The commit that the run resolved, whatever a branch has become since.
    directory = open_directory(section.path, revision=origin.revision, weights=merge)
    abstract = abstract_params(directory.architecture, lora)
    dtype = dtype or (section.dtype if merge else section.param_dtype)
    with contextlib.closing(Checkpoints(run_dir, read_only=True)) as checkpoints:
        step = checkpoints.best() if best else checkpoints.existing(step)
        if merge:
            facts = {"lora": config.lora.model_dump(), "weights_digest": weights_digest(directory)}
            require_same_base(checkpoints, step, **facts)
        trained = flatten(split(nnx.to_pure_dict(abstract))[0])
        checkpoints.check_params({name: param.shape for name, param in trained.items()}, step=step)
        with _new_directory(out_dir) as out:
            card = model_card(config, origin, name=out_dir.name, step=step, dtype=dtype, merged=merge)
            (out / "README.md").write_text(card, encoding="utf-8")
            _write_tokenizer(directory, out)
            if config.lora is None:
                groups = (checkpoints.read_params(tensor.params, step=step) for tensor in directory.tensors)
            else:
                adapters = checkpoints.read_params(list(trained), step=step)
                if not merge:
                    base = {"base": section.path, "revision": origin.revision}
                    save_adapters(adapters, directory, abstract, out, lora=lora, dtype=np.dtype(dtype), **base)
                    return
                groups = merged_groups(read_groups(directory, abstract, np.dtype(np.float32)), adapters, lora)
            _write_configs(directory, out, dtype)
            save_params(groups, directory, abstract, out, dtype=np.dtype(dtype), shard_bytes=shard_bytes)


def _run_of(run_dir: Path, out_dir: Path, *, merge: bool, shard_bytes: int) -> tuple[Config, Origin]:
    """Reads configuration and origin of a run, after checking that it can be exported so and to there."""
    if shard_bytes <= 0:
        raise UsageError(f"--shard-bytes {shard_bytes}: must be positive")
    if not (run_dir / "checkpoints").is_dir():
        raise UsageError(f"{run_dir}: has no checkpoints; name the output_dir of a run of sr-dpo train")
    if out_dir.exists() or out_dir.is_symlink():
        raise UsageError(f"{out_dir}: exists already; name a new directory")
    config = load_config(run_dir / "config.yaml")
    if merge and config.lora is None:
        raise UsageError(f"--merge: {run_dir} trained no adapters, so that there is nothing to merge; leave it out")
    if config.lora is not None and config.model.init == "random":
        raise UsageError(
            f"{run_dir}: its adapters stand beside weights that were drawn anew (model.init=random), which are in no "
            "file; train with model.init=pretrained"
        )
    return config, _read_manifest(run_dir / "manifest.json")


OWNER = ".owner.json"
"""Names the process that writes an export, within the directory that it writes."""
STILL_S = 600.0
"""The seconds after which an export of another machine that has written nothing more is taken for dead."""


def model_card(config: Config, origin: Origin, *, name: str, step: int, dtype: str, merged: bool = False) -> str:
    """Writes the README.md of an exported model, its origin and numbers; of a local path only the last name shows."""
    objective, base = config.objective, _shown(config.model.path)
    header = ModelCardData(
        library_name="transformers" if merged or config.lora is None else "peft",
        pipeline_tag="text-generation",
        base_model=None if origin.revision is None else base,
        tags=["sr_dpo_jax", objective.name],
    )
    rows = {"objective": objective.name}
    symbols = {"beta": "beta (β)", "lam": "lam (λ)"}
    numbers = objective.model_dump(exclude={"name"})
    numbers = {key: value for key, value in numbers.items() if value not in (None, NOTHING.get(key))}
    rows |= {symbols.get(key, key.replace("_", " ")): _plain(value) for key, value in numbers.items()}
    made = config.refinement
    if is_refined(objective) and (made.form, made.judge) != ("margin", "policy"):
        rows["refinement (Δ)"] = (
            "ratings of the rows" if made.judge == "ratings" else f"{made.form}, by the {made.judge}"
        )
    if config.lora is not None:
        form = lora_of(config)
        scaled = "alpha / √rank" if form.rslora else "alpha / rank"
        rows["LoRA"] = f"rank {form.rank}, alpha {form.alpha:g} ({scaled}), {', '.join(form.targets)}"
        rows["LoRA"] += ", beside a base rounded to int8" if form.base == "int8" else ""
        rows["LoRA"] += ", merged" if merged else ""
    pinned = "" if config.model.revision is None else f" at revision `{config.model.revision}`"
    commit = "" if origin.revision is None else f", commit `{origin.revision}`"
    rows |= {
        "base model": f"`{base}`{pinned}{commit}" + (", weights drawn anew" if config.model.init == "random" else ""),
        "base weights, digest": f"`{origin.weights_digest}`",
        **({} if config.reference.path is None else {"reference": f"`{_shown(config.reference.path)}`"}),
        "data, digest": f"`{origin.data_digest}`",
        "optimizer updates": str(step),
        "weights": dtype,
        "made with": f"sr_dpo_jax {origin.version}, exported with {__version__}",
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return f"---\n{header.to_yaml()}\n---\n\n# {name}\n\n| | |\n|---|---|\n{table}\n"


def _shown(model: str) -> str:
    """Gives a hub name, or of a local path the last name."""
    return Path(model).name if Path(model).is_absolute() else model


def _plain(value: Any) -> str:
    """Writes a value of an objective's key: text, number, yes, or the terms of a sum."""
    if isinstance(value, tuple):
        return " + ".join(f"{_plain(term['weight'])} · {term['name']}{_numbers_of(term)}" for term in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else f"{value:g}"


def _numbers_of(term: Mapping[str, Any]) -> str:
    asked = {key: value for key, value in term.items() if value not in (None, NOTHING.get(key))}
    said = [f"{key} {_plain(value)}" for key, value in asked.items() if key not in ("name", "weight")]
    return f" ({', '.join(said)})" if said else ""


def _write_configs(directory: ModelDirectory, out: Path, dtype: str) -> None:
    """Writes the base model's config and generation config."""
    fields = json.loads((directory.path / CONFIG).read_text(encoding="utf-8"))
    for outdated in ("torch_dtype", "_name_or_path"):
        fields.pop(outdated, None)
    fields["dtype"] = dtype
    (out / CONFIG).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    if not (directory.path / GENERATION_CONFIG).is_file():
        config = transformers.AutoConfig.from_pretrained(directory.path, local_files_only=True, trust_remote_code=False)
        generation = transformers.GenerationConfig.from_model_config(config)
        (out / GENERATION_CONFIG).write_text(generation.to_json_string(), encoding="utf-8")
    else:
        shutil.copyfile(directory.path / GENERATION_CONFIG, out / GENERATION_CONFIG)


def _write_tokenizer(directory: ModelDirectory, out: Path) -> None:
    """Copies the base model's tokenizer and chat templates, and none of its other files."""
    for name in TOKENIZER_FILES:
        if (directory.path / name).is_file():
            shutil.copyfile(directory.path / name, out / name)
    for template in sorted((directory.path / TEMPLATES).glob("*.jinja")):
        (out / TEMPLATES).mkdir(exist_ok=True)
        shutil.copyfile(template, out / TEMPLATES / template.name)


def _read_manifest(path: Path) -> Origin:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        digests = manifest["digests"]
        revision, version = manifest["model"]["revision"], manifest["versions"]["sr_dpo_jax"]
        return Origin(revision, digests["weights"], digests["data"], version)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path}: missing or damaged ({type(error).__name__}: {error}); the run's own sr-dpo train command writes "
            "it anew"
        ) from error


@contextlib.contextmanager
def _new_directory(path: Path) -> Iterator[Path]:
    """Gives a directory to write to that gets the name `path` when all went well, and is removed otherwise.

    An export that was killed leaves its directory behind, as large as a model; the next one of this name removes it,
    unless its process lives or was heard of in the last STILL_S seconds: two exports to one name would mix.
    """
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Of this name alone: `out.v2` may be under way beside `out`.
            for leftover in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 16}.partial"):
                _remove_leftover(leftover, path)
            temporary = stack.enter_context(whole(path))
            temporary.mkdir()
            (temporary / OWNER).write_text(this_process(), encoding="utf-8")
        except OSError as error:
            raise UsageError(f"{path}: cannot be made ({error}); name another directory") from error
        yield temporary
        (temporary / OWNER).unlink()
        if path.exists():
            raise UsageError(f"{path}: another export has taken the name meanwhile; name another directory")


def _remove_leftover(leftover: Path, path: Path) -> None:
    owner = leftover / OWNER
    alive = is_alive(owner.read_text(encoding="utf-8")) if owner.is_file() else False
    if alive is None:  # of another machine, whose processes cannot be seen from here
        newest = max(file.stat().st_mtime for file in (leftover, *leftover.rglob("*")))
        alive = time.time() - newest < STILL_S
    if alive:
        raise UsageError(
            f"{path}: another export to this name is under way in {leftover}; wait for it, name another directory, or "
            "delete that one if its process is gone"
        )
    shutil.rmtree(leftover)
