"""Writes what PyTorch says of every case in `zoo.py`: `<family>.npz` and `rope.npz`, beside this file.

    pip install -e '.[parity]' && python tests/golden/make.py

Regenerate only when cases are added or changed, never to make a test pass: the models here are not ours.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import safe_open
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import zoo


def file_shapes(family: str, case: str) -> dict[str, list[int]]:
    """Names and shapes of the tensors that PyTorch's model writes."""
    model = transformers.AutoModelForCausalLM.from_config(zoo.config_of(family, case))
    with tempfile.TemporaryDirectory() as out:
        model.save_pretrained(out)
        with safe_open(Path(out) / "model.safetensors", framework="numpy") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (not a mapping)


def torch_model(path: Path) -> torch.nn.Module:
    """A directory as PyTorch reads it; every tensor must be used, and none may be missing."""
    model, said = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(said.values()), said
    return model.eval()


def logits(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()).logits.float().numpy()


def rope(parameters: dict) -> np.ndarray:
    """Frequencies by transformers, float32, and behind them the factor on cosine and sine."""
    config = transformers.LlamaConfig(head_dim=128, max_position_embeddings=131_072, **parameters)
    name = config.rope_parameters["rope_type"]
    compute = Phi3RotaryEmbedding.compute_default_rope_parameters if name == "default" else ROPE_INIT_FUNCTIONS[name]
    frequencies, scale = compute(config, "cpu")
    return np.array([*frequencies.tolist(), scale], np.float64)


if __name__ == "__main__":
    np.savez_compressed(zoo.GOLDEN / "rope.npz", **{name: rope(fields) for name, fields in zoo.ROPES.items()})
    for family, cases in zoo.CASES.items():
        kept = {}
        for case in cases:
            shapes = file_shapes(family, case)
            with tempfile.TemporaryDirectory() as path:
                zoo.write(Path(path), family, case, shapes)
                model = torch_model(Path(path))
            kept[f"{case}/logits"] = logits(model, zoo.token_ids(model.config.vocab_size))
            kept[f"{case}/shapes"] = np.str_(json.dumps(shapes))
            print(family, case, "largest logit", np.abs(kept[f"{case}/logits"]).max())
        np.savez_compressed(zoo.GOLDEN / f"{family}.npz", **kept)
