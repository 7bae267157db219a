"""Makers of whole runs: a tiny model directory, preference files, configurations, and how to read what a run wrote."""

import contextlib
import itertools
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import warm
import yaml
from toy_tokenizers import byte_level_tokenizer
from transformers import AutoConfig

from sr_dpo_jax.config.load import config_from_dict
from sr_dpo_jax.config.schema import Config
from sr_dpo_jax.durable import integrity

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED_DATA = REPOSITORY.parent / "shared" / "data"
HH_FILE = SHARED_DATA / "hh_rlhf_harmless_base_test.jsonl.gz"
P = "Answer well, please: "

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt_neox": {"rotary_pct": 0.25},
    "llama": {"num_key_value_heads": 2, "head_dim": 24, "attention_bias": True, "tie_word_embeddings": True},
    "mistral": {"num_key_value_heads": 2, "head_dim": 6, "sliding_window": 20},
    "qwen2": {"num_key_value_heads": 2, "vocab_size": 321},  # transformers gives its tokenizer a padding token
    "qwen3": {"num_key_value_heads": 2, "head_dim": 12},
    "gemma2": {"num_key_value_heads": 2, "head_dim": 12, "sliding_window": 20, "query_pre_attn_scalar": 12},
    "gemma3_text": {"num_key_value_heads": 2, "head_dim": 12, "sliding_window": 20, "query_pre_attn_scalar": 12},
    "phi3": {"num_key_value_heads": 2, "pad_token_id": 0},
    "olmo2": {"num_key_value_heads": 2},
    "olmo3": {"num_key_value_heads": 2, "sliding_window": 20, "layer_types": ["sliding_attention", "full_attention"]},
    "smollm3": {"num_key_value_heads": 2, "no_rope_layers": [1, 0], "pad_token_id": 0},
    "granite": {
        "num_key_value_heads": 2,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "logits_scaling": 0.5,
    },
    "seed_oss": {"num_key_value_heads": 2, "head_dim": 12, "attention_out_bias": True},
}
"""What makes each family's tiny model unlike a plain one."""
BOS_FAMILIES = ("llama", "mistral", "gemma2", "gemma3_text")

_WORDS = """
    acorn birch cedar daisy elder fern grape hazel iris jasmine kelp lemon maple
    nettle olive plum quince rose sage thyme umbel violet willow yarrow zinnia
"""
WORDS = _WORDS.split()
TASKS = {
    "Copy": lambda words: words,
    "Reverse": lambda words: words[::-1],
    "Sort": sorted,
    "First and last": lambda words: [words[0], words[-1]],
}

IMPORTED = ("sr_dpo_jax.train.loop", "pyarrow.parquet", "scipy.optimize")
"""What a forked process has imported before it is one."""
_STARTED = itertools.count()
TIMES = ("pairs_per_second", "tokens_per_second", "tokens_per_second_per_chip", "step_time_s", "goodput")


def make_pairs(count: int, seed: int) -> list[dict[str, str]]:
    """Rows of prompt, chosen and rejected text, drawn from `seed`."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        task, words = rng.choice(list(TASKS)), rng.sample(WORDS, rng.randint(3, 6))
        right = TASKS[task](words)
        wrong = _spoil(right, rng)
        prompt = f"{task}: {' '.join(words)}\nAnswer:"
        rows.append({"prompt": prompt, "chosen": " " + " ".join(right), "rejected": " " + " ".join(wrong)})
    return rows


def _spoil(words: list[str], rng: random.Random) -> list[str]:
    """Swaps two words, drops one or puts a foreign one in: always another list."""
    wrong = list(words)
    match rng.randrange(3):
        case 0:
            first, second = rng.sample(range(len(wrong)), 2)
            wrong[first], wrong[second] = wrong[second], wrong[first]
        case 1:
            del wrong[rng.randrange(len(wrong))]
        case 2:
            wrong[rng.randrange(len(wrong))] = rng.choice([word for word in WORDS if word not in words])
    return wrong


def model_directory(directory: Path, family: str = "gpt_neox", *, vocabulary_tokens: int = 320, **fields: Any) -> Path:
    """A tokenizer and a config.json of a tiny model, without weights."""
    texts = [row["prompt"] + row["chosen"] for row in make_pairs(200, seed=0)]
    byte_level_tokenizer(directory, vocabulary_tokens=vocabulary_tokens, texts=texts, bos=family in BOS_FAMILIES)
    common = {
        "vocab_size": vocabulary_tokens,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "bos_token_id": 1,
        "eos_token_id": 0,
    }
    AutoConfig.for_model(family, **(common | fields)).save_pretrained(directory)
    return directory


def preference_file(path: Path, pairs: int, seed: int = 0) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in make_pairs(pairs, seed)), encoding="utf-8")
    return path


def raw_config(root: Path, model_path: Path, data_path: Path, **sections: Any) -> dict[str, Any]:
    """A small run's configuration; `sections` replace keys section by section."""
    raw: dict[str, Any] = {
        "output_dir": str(root / "run"),
        "cache_dir": str(root / "cache"),
        "model": {"path": str(model_path), "init": "random", "dtype": "float32"},
        "data": {"path": str(data_path), "format": "preference", "max_length": 96, "max_prompt_length": 64},
        "objective": {"name": "sr_dpo", "lam": 0.5},
        "refinement": {"prompt": P},
        "optimizer": {"name": "adamw", "learning_rate": 1e-3, "warmup_steps": 2},
        "batch": {"pairs_per_step": 8, "row_length": 128, "row_multiple": 8},
        "checkpoint": {"every_steps": 100},
    }
    for name, value in sections.items():
        raw[name] = {**raw.get(name, {}), **value} if isinstance(value, dict) else value
    return raw


def make_config(root: Path, model_path: Path, data_path: Path, **sections: Any) -> Config:
    return config_from_dict(raw_config(root, model_path, data_path, **sections), where="test")


def tiny_setup(root: Path, model_path: Path, data_path: Path, **sections: Any) -> tuple[Any, Any, Any]:
    """The set-up of a small run on one device, its training pairs and its tokenizer."""
    import jax

    from sr_dpo_jax.parallel.mesh import make_mesh
    from sr_dpo_jax.train.setup import read_model, read_training, set_up_on

    config = make_config(root, model_path, data_path, **sections)
    directory, tokenizer = read_model(config)
    pairs = read_training(config, tokenizer, directory.architecture)
    mesh = make_mesh(replica=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
    return set_up_on(mesh, config, directory), pairs, tokenizer


def written(root: Path, raw: dict[str, Any]) -> str:
    """A configuration's file under `root`."""
    path = root / "config.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return str(path)


def metrics_of(output_dir: str | Path) -> list[dict[str, Any]]:
    lines = (Path(output_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def without_times(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def run_process(
    arguments: Sequence[str],
    *,
    devices: int = 1,
    fault: dict[str, Any] | None = None,
    **environment: str,
) -> "subprocess.Popen[str] | warm.Process":
    """`sr-dpo ARGUMENTS` in a process of its own with this many CPU devices; `fault` is for `fault_driver.py`."""
    driver = ["-m", "sr_dpo_jax.cli"]
    if fault is not None:
        driver = [str(REPOSITORY / "tests" / "fault_driver.py"), json.dumps(fault)]
    return start_python([*driver, *arguments], devices=devices, **environment)


def start_python(
    program: Sequence[str], *, devices: int = 1, **environment: str
) -> "subprocess.Popen[str] | warm.Process":
    """Python with the command line `program`, forked from one that has the imports behind it where that is the same."""
    env = {**os.environ, **environment}
    kept = [flag for flag in env.get("XLA_FLAGS", "").split() if "device_count" not in flag]
    env["XLA_FLAGS"] = " ".join([*kept, f"--xla_force_host_platform_device_count={devices}"])
    env["PYTHONPATH"] = str(REPOSITORY)
    parent = warm.warm_process(next(_STARTED) % 2, IMPORTED)
    if parent.same_imports(env):
        return parent.start(program, env)
    return subprocess.Popen(
        [sys.executable, *program],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_processes(
    arguments: Sequence[str],
    *,
    processes: int = 2,
    devices: int = 1,
    faults: Sequence[dict[str, Any] | None] = (None,) * 4,
    own: Sequence[Sequence[str]] = ((),) * 4,
) -> "list[subprocess.Popen[str] | warm.Process]":
    """Starts the same command in several processes that join through jax.distributed, `devices` each.

    `own` are arguments that a process has for itself, behind the others.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    joined = [f"distributed.processes={processes}", f"distributed.coordinator_address={address}"]
    return [
        run_process(
            [*arguments, *joined, f"distributed.process_id={number}", *own[number]],
            devices=devices,
            fault=faults[number],
        )
        for number in range(processes)
    ]


def verified_steps(output_dir: str | Path) -> list[int]:
    """Steps of a run whose bytes are those that were saved, lowest first, read anew."""
    found = []
    for path in (Path(output_dir).absolute() / "checkpoints").glob("*"):
        if path.name.isdigit() and path.is_dir():
            with contextlib.suppress(integrity.Unverified, integrity.Damaged):
                integrity.check(path)
                found.append(int(path.name))
    return sorted(found)


def state_of(output_dir: str | Path) -> dict[str, np.ndarray]:
    """Every array of the latest checkpoint by its path, read with Orbax alone."""
    import jax
    import orbax.checkpoint as ocp

    root = Path(output_dir).absolute() / "checkpoints"
    step = max(int(entry.name) for entry in root.iterdir() if entry.name.isdigit())
    with ocp.StandardCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(root / str(step) / "state").item_metadata
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), metadata.tree)
        tree = checkpointer.restore(root / str(step) / "state", target)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}
