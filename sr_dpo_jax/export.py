"""A checkpoint -> a Hugging Face directory that AutoModelForCausalLM.from_pretrained loads."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np

from sr_dpo_jax import config as configuration
from sr_dpo_jax.assembly import assemble, read_model
from sr_dpo_jax.checkpoint import Checkpoints
from sr_dpo_jax.errors import UsageError
from sr_dpo_jax.weights.directory import save_params

SHARD_BYTES = 5_000_000_000
SIDE_FILES = ("*.json", "*.jinja", "tokenizer.model")


def export(run_dir: Path, out_dir: Path, *, step: int | None = None) -> None:
    """Writes the parameters of `step`, or of the latest checkpoint, with config and tokenizer of the base model.

    The directory is written under a temporary name and renamed, so it is whole or not there. Weights keep
    model.param_dtype.

    Raises:
      UsageError: run_dir is no run or has no checkpoint, the step is not there, or out_dir exists.
    """
    if not (run_dir / "checkpoints").is_dir():
        raise UsageError(f"{run_dir}: has no checkpoints; name the output_dir of a run of sr-dpo train")
    if out_dir.exists():
        raise UsageError(f"{out_dir}: exists already; name a new directory")
    here = ("distributed={}", "mesh={replica: 1, fsdp: -1, tensor: 1}")  # not the pod that the run was trained on
    config = configuration.load(run_dir / "config.yaml", [f"output_dir={json.dumps(str(run_dir))}", *here])
    directory, _ = read_model(config)
    assembly = assemble(config, directory)
    checkpoints = Checkpoints(run_dir, read_only=True)
    params = checkpoints.restore_params(assembly.param_shapes, assembly.param_shardings, step=step)
    checkpoints.close()
    partial = out_dir.with_name(out_dir.name + ".partial")
    if jax.process_index() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for pattern in SIDE_FILES:
            for file in directory.path.glob(pattern):
                if not file.name.endswith(".index.json"):
                    shutil.copyfile(file, partial / file.name)
        fields = json.loads((partial / "config.json").read_text(encoding="utf-8"))
        fields.pop("torch_dtype", None)
        fields["dtype"] = config.model.param_dtype
        (partial / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
    dtype = np.dtype(config.model.param_dtype)
    save_params(params, directory, assembly.abstract, partial, dtype=dtype, shard_bytes=SHARD_BYTES)
    if jax.process_index() == 0:
        partial.rename(out_dir)
