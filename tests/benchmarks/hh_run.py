"""One epoch of Sr-DPO on the real HH-RLHF pairs, as a user runs it, and what came out.

    python tests/benchmarks/hh_run.py [--hidden 256] [--layers 6] [--output DIR]

A Pythia-shaped model of random weights and a tokenizer trained on the same file; 64 pairs a step, row_length 2048,
reference cached. On two CPU cores about 15 minutes at the default size. Prints the exit code, first and last
losses, accuracy, padding, throughput, and how many programs were compiled once the first step was under way.
"""

import argparse
import gzip
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

from runs import HH_FILE, metrics_of  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from transformers import GPTNeoXConfig, PreTrainedTokenizerFast  # noqa: E402

LEARNING_RATE = 1e-4
"""The paper's 5e-7 is for a trained model; weights drawn at random need larger steps to move within 35 updates."""


def make_tokenizer(directory: Path, data: Path, vocabulary_tokens: int = 8192) -> Path:
    """A byte-level BPE trained on a file of HH transcripts, compressed or not."""
    with (gzip.open if data.suffix == ".gz" else open)(data) as file:
        rows = [json.loads(line) for line in file]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_tokens,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((row[side] for row in rows for side in ("chosen", "rejected")), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(directory)
    return directory


def make_model(
    directory: Path, *, hidden: int, layers: int, vocabulary_tokens: int = 8192, data: Path = HH_FILE
) -> Path:
    """A tokenizer trained on a file of HH transcripts, and the config.json of a Pythia-shaped model."""
    make_tokenizer(directory, data, vocabulary_tokens)
    GPTNeoXConfig(
        vocab_size=vocabulary_tokens,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        intermediate_size=4 * hidden,
        rotary_pct=0.25,
        bos_token_id=0,
        eos_token_id=0,
    ).save_pretrained(directory)
    return directory


def run(root: Path, *, hidden: int, layers: int, overrides: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """`sr-dpo train` in a process of its own; the run directory is root/run."""
    root.mkdir(parents=True, exist_ok=True)
    model = make_model(root / "model", hidden=hidden, layers=layers)
    config = {
        "output_dir": str(root / "run"),
        "model": {"path": str(model), "init": "random", "dtype": "float32"},
        "data": {"path": str(HH_FILE), "format": "hh_rlhf", "max_bad_rows": 9},
        "objective": {"name": "sr_dpo", "lam": 0.5},
        "optimizer": {"learning_rate": LEARNING_RATE, "warmup_steps": 5},
        "batch": {"pairs_per_step": 64, "row_length": 2048, "row_multiple": 8},
    }
    (root / "config.yaml").write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    command = [sys.executable, "-m", "sr_dpo_jax.cli", "train", str(root / "config.yaml"), *overrides]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_LOG_COMPILES": "1"}
    environment.pop("XLA_FLAGS", None)  # the test suite's eight devices and unoptimised code are not a user's
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def compiled_after_start(output: str) -> int:
    """How many programs jax compiled after the loop's first line of progress."""
    _, _, loop = output.partition("compiled in ")
    return loop.count("Finished XLA compilation of jit(step)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    root = options.output or Path(tempfile.mkdtemp(prefix="hh_run_"))
    result = run(root, hidden=options.hidden, layers=options.layers)
    if result.returncode:
        sys.exit(result.stderr[-4000:])
    lines = metrics_of(root / "run")
    print(f"exit code {result.returncode}; {len(lines)} steps; run in {root / 'run'}")
    print(f"programs compiled within the loop: {compiled_after_start(result.stderr)}")
    for line in (lines[0], lines[len(lines) // 2], lines[-1]):
        print(
            f"step {line['step']:3}  loss {line['loss']:.6f}  margin {line['margin']:.3f}  "
            f"accuracy {line['rewards/accuracies']:.2f}  augmented accuracy {line['augmented/accuracies']:.2f}  "
            f"refinement {line['refinement']:.3f}  padding {line['padding_fraction']:.4f}  "
            f"{line['pairs_per_second']:.2f} pairs/s"
        )


if __name__ == "__main__":
    main()
