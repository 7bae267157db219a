"""How fast and how large TRL's DPOTrainer and sr_dpo_jax are on the same model, the same pairs and the same CPU.

Purpose: the numbers behind the claims that packed, prefix-sharing rows and a cached reference make DPO at least three
times as fast as TRL's, and that Sr-DPO, with its second forward pass, stays more than twice as fast as TRL's plain DPO.

What is compared: one step of 16 HH-RLHF pairs in float32 with AdamW (learning rate 1e-5, no weight decay, gradient
norm clipped to 1), beta 0.1, max_length 512. Only pairs that neither side would truncate take part, so the token
counts must agree; the run fails if they differ by more than 0.1 %, or if a first loss is not ln 2. The model is a
GPT-NeoX with random weights and a byte-level BPE trained on the data, made on the spot and read by both.

    trl-online               reference model run in each step; pairs in random order, padded to the longest of a step
    trl-cached               precompute_ref_log_probs
    trl-online-by-length     as above, but steps of pairs of like length (sorted, cut into steps, steps shuffled)
    trl-cached-by-length
    jax-dpo                  reference cached
    jax-sr-dpo               reference cached, plain and augmented
    jax-contrast             Sr-DPO refined by the reference's contrast: plain rows alone, p in the cached scores
    jax-dpo-online           reference run in each step

TRL gets its best: sdpa attention, fused AdamW, no gradient checkpointing, logging, evaluation, saving or telemetry.
Both sides get every core and glibc's allocator told to keep freed memory instead of faulting it in again at each step
(--plain-malloc runs without). By length, TRL's steps are no longer random samples of the data; sr_dpo_jax's stay
random. The fewer steps there are to sort the pairs into, the more padding is left in those rows.

Command, from the repository root (needs the `parity` extra). Expect about an hour on two cores that nothing else uses,
and ten minutes with --steps 4 --warm-up 1 --rounds 1, which is too few steps to be fair to the rows by length:

    python tests/benchmarks/trl_comparison.py [--data FILE.jsonl.gz] [--steps 24] [--rounds 2] [--json FILE]

How to read the output: `pairs/s` is all timed pairs over all timed seconds, data loading included, compilation and
warm-up excluded, the median of the rounds (best: the fastest round); `median step` is the median time of a step.
`ratio` is pairs/s over that of the row named, taken within each round, then the median of the rounds: on a shared
machine only these mean something. `CPU s a step` is the processor time of all threads, and its ratio is the steadier
one where other work takes the cores; threads that wait for each other may count in it. `peak` is the largest resident
set of the row's own process, with all libraries, compilation and reference scoring. `scoring` is the time that the
cached reference took, once, for all pairs, compilation left out; a step's time does not hold it. `tokens in a step`
counts what passes through the trained model, `padding` the part of it that is none.
"""

import argparse
import itertools
import json
import math
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
DATA = REPOSITORY.parent / "shared" / "data" / "hh_rlhf_harmless_base_test.jsonl.gz"
ROWS = (
    "trl-online",
    "trl-cached",
    "trl-online-by-length",
    "trl-cached-by-length",
    "jax-dpo",
    "jax-sr-dpo",
    "jax-contrast",
    "jax-dpo-online",
)
BASELINES = ("trl-online", "trl-cached", "trl-online-by-length", "trl-cached-by-length")
MAX_LENGTH = 512
SEED = 0
KEEP_MEMORY = {
    "MALLOC_TOP_PAD_": str(2**28),
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_MMAP_THRESHOLD_": str(2**40),
    "MALLOC_MMAP_MAX_": "0",
}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--data", type=Path, default=DATA, help="HH-RLHF transcripts, .jsonl or .jsonl.gz")
    made.add_argument("--steps", type=int, default=24, help="timed steps of a row and round")
    made.add_argument("--warm-up", type=int, default=3, help="steps before them")
    made.add_argument("--rounds", type=int, default=2, help="how often all rows are run, in turn")
    made.add_argument("--pairs", type=int, default=16, help="pairs a step")
    made.add_argument("--hidden", type=int, default=256)
    made.add_argument("--layers", type=int, default=6)
    made.add_argument("--heads", type=int, default=4)
    made.add_argument("--vocabulary", type=int, default=8192)
    made.add_argument("--row-length", type=int, default=640, help="sr_dpo_jax's batch.row_length")
    made.add_argument("--rows", default=",".join(ROWS), help="comma-separated; default all")
    made.add_argument("--plain-malloc", action="store_true", help="leave the allocator as it is")
    made.add_argument("--json", type=Path, help="write all measurements here")
    made.add_argument("--only", help=argparse.SUPPRESS)  # one row, within the subprocess
    made.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    return made


def main() -> int:
    options = parser().parse_args()
    if options.only:
        run = run_trl if options.only.startswith("trl") else run_jax
        result = run(options.only, options)
        result["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        (options.work / "result.json").write_text(json.dumps(result))
        return 0
    rows = options.rows.split(",")
    if unknown := set(rows) - set(ROWS):
        sys.exit(f"unknown rows: {', '.join(sorted(unknown))}; known are {', '.join(ROWS)}")
    with tempfile.TemporaryDirectory() as work:
        options.work = Path(work)
        prepare(options)
        rounds = []
        for number in range(options.rounds):
            order = rows if number % 2 == 0 else rows[::-1]
            rounds.append({row: measure(row, number, options) for row in order})
    check_alike([result for measured in rounds for result in measured.values()])
    print(table(rows, rounds, options))
    if options.json:
        settings = {name: value if isinstance(value, int) else str(value) for name, value in vars(options).items()}
        options.json.write_text(json.dumps({"settings": settings, "rounds": rounds}, indent=2) + "\n")
    return 0


# Data and model, made once and read by every row.


def prepare(options: argparse.Namespace) -> None:
    """Writes `model/` (with its tokenizer) and `pairs.jsonl`: the warm-up's pairs, then the timed ones."""
    sys.path.insert(0, str(REPOSITORY))
    from sr_dpo_jax.data.rows import Pair, read_rows

    good = [row for row in read_rows(str(options.data), format="hh_rlhf", split="test") if isinstance(row, Pair)]
    tokenizer = make_tokenizer([pair.prompt + pair.chosen for pair in good], options)
    make_model(len(tokenizer), options)
    fitting = [pair for pair in good if longer_side(pair, tokenizer) <= MAX_LENGTH]
    wanted = (options.warm_up + options.steps) * options.pairs
    if wanted > len(fitting):
        sys.exit(f"{wanted} pairs are needed, but only {len(fitting)} fit {MAX_LENGTH} tokens; lower --steps")
    chosen = random.Random(SEED).sample(fitting, wanted)
    with (options.work / "pairs.jsonl").open("w", encoding="utf-8") as file:
        for pair in chosen:
            file.write(json.dumps({"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}) + "\n")
    print(f"{len(good)} good pairs, {len(fitting)} of at most {MAX_LENGTH} tokens, {wanted} used", flush=True)


def make_tokenizer(texts: list[str], options: argparse.Namespace):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=options.vocabulary,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    end = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end, pad_token=end)
    tokenizer.save_pretrained(options.work / "model")
    return tokenizer


def make_model(vocabulary_tokens: int, options: argparse.Namespace) -> None:
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(SEED)
    config = GPTNeoXConfig(
        vocab_size=vocabulary_tokens,
        hidden_size=options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        intermediate_size=4 * options.hidden,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPTNeoXForCausalLM(config)
    model.save_pretrained(options.work / "model")
    print(f"GPT-NeoX of {sum(p.numel() for p in model.parameters()):,} parameters, vocabulary {vocabulary_tokens}")


def longer_side(pair, tokenizer) -> int:
    """Tokens of the prompt and the longer response, with its EOS."""
    return max(len(tokenizer(pair.prompt + side)["input_ids"]) + 1 for side in (pair.chosen, pair.rejected))


# One row, in its own process.


def measure(row: str, number: int, options: argparse.Namespace) -> dict:
    environment = os.environ | {
        "PYTHONPATH": str(REPOSITORY),
        "HF_HOME": str(options.work / f"hub-{number}-{row}"),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "true",
        "TQDM_DISABLE": "1",
        "JAX_PLATFORMS": "cpu",
    }
    environment |= {} if options.plain_malloc else KEEP_MEMORY
    command = [sys.executable, __file__, *sys.argv[1:], "--only", row, "--work", str(options.work)]
    log = options.work / f"{number}-{row}.log"
    with log.open("w") as file:
        done = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        sys.exit(f"{row} failed:\n{log.read_text()[-4000:]}")
    result = json.loads((options.work / "result.json").read_text())
    result["pairs_per_second"] = options.pairs * len(result["step_times"]) / sum(result["step_times"])
    result["processor_s"] = sum(result["processor_times"]) / len(result["processor_times"])
    result["median_step"] = statistics.median(result["step_times"])
    print(
        f"round {number + 1}  {row:22} {result['pairs_per_second']:6.2f} pairs/s  {result['peak_mib']:6.0f} MiB",
        flush=True,
    )
    return result


def run_trl(row: str, options: argparse.Namespace) -> dict:
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    torch.set_num_threads(os.cpu_count())
    cached = row.startswith("trl-cached")

    class Timed(DPOTrainer):
        scoring, first_loss, tokens = 0.0, None, []

        def _precompute_ref_logps(self, *arguments, **named):
            started = time.perf_counter()
            try:
                return super()._precompute_ref_logps(*arguments, **named)
            finally:
                self.scoring = time.perf_counter() - started

        def compute_loss(self, model, inputs, **named):
            self.tokens.append((inputs["attention_mask"].numel(), int(inputs["attention_mask"].sum())))
            loss = super().compute_loss(model, inputs, **named)
            self.first_loss = loss.item() if self.first_loss is None else self.first_loss
            return loss

    clock = Stopwatch(options.warm_up)

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            clock.step_done()

    best = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    load = partial(AutoModelForCausalLM.from_pretrained, options.work / "model", **best)
    tokenizer = AutoTokenizer.from_pretrained(options.work / "model")
    pairs = load_dataset("json", data_files=str(options.work / "pairs.jsonl"), split="train")
    if row.endswith("by-length"):
        pairs = pairs.select(order_by_length(pairs, tokenizer, options))
    trainer = Timed(
        model=load(),
        ref_model=None if cached else load(),
        args=DPOConfig(**trl_settings(cached, options)),
        train_dataset=pairs,
        processing_class=tokenizer,
        callbacks=[Clock()],
    )
    trainer.train()
    timed = trainer.tokens[options.warm_up :]
    padded, real = (sum(column) for column in zip(*timed, strict=True))
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return {
        **clock.times(),
        "first_loss": trainer.first_loss,
        "shifted": False,
        "scoring_s": trainer.scoring,
        "tokens": [sum(len(ids) for ids in trainer.train_dataset[name]) for name in names],
        "tokens_a_step": padded / len(timed),
        "padding": 1 - real / padded,
    }


def trl_settings(cached: bool, options: argparse.Namespace) -> dict:
    return {
        "output_dir": str(options.work / "trl"),
        "per_device_train_batch_size": options.pairs,
        "precompute_ref_log_probs": cached,
        "precompute_ref_batch_size": options.pairs,
        "max_length": MAX_LENGTH,
        "beta": 0.1,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "num_train_epochs": 1,
        "train_sampling_strategy": "sequential",  # the order was shuffled, or sorted, when the pairs were prepared
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": SEED,
    }


def order_by_length(pairs, tokenizer, options: argparse.Namespace) -> list[int]:
    """The timed pairs in steps of like length, the steps shuffled. The warm-up's stay in front, as they are."""
    texts = [[row["prompt"] + row[side] for side in ("chosen", "rejected")] for row in pairs]
    lengths = [max(len(ids) for ids in tokenizer(both)["input_ids"]) for both in texts]
    first = options.warm_up * options.pairs
    by_length = sorted(range(first, len(pairs)), key=lengths.__getitem__)
    steps = [by_length[start : start + options.pairs] for start in range(0, len(by_length), options.pairs)]
    random.Random(SEED).shuffle(steps)
    return [*range(first), *(index for step in steps for index in step)]


def run_jax(row: str, options: argparse.Namespace) -> dict:
    import jax

    from sr_dpo_jax.config.load import config_from_dict
    from sr_dpo_jax.durable.preemption import StopSignal
    from sr_dpo_jax.train import reference
    from sr_dpo_jax.train.clock import Clock
    from sr_dpo_jax.train.prepare import prepare
    from sr_dpo_jax.train.setup import read_model, read_training, set_up

    config = config_from_dict(jax_settings(row, options), where=row)
    directory, tokenizer = read_model(config)
    pairs = read_training(config, tokenizer, directory.architecture)
    scoring, compiling = [0.0], [0.0]
    fill = reference.ReferenceScores.fill

    def timed_fill(*arguments) -> None:
        started, compiled = time.perf_counter(), compiling[0]
        fill(*arguments)
        scoring[0] += time.perf_counter() - started - (compiling[0] - compiled)

    def on_duration(event: str, seconds: float, **_) -> None:
        compiling[0] += seconds if event == "/jax/core/compile/backend_compile_duration" else 0.0

    jax.monitoring.register_event_duration_secs_listener(on_duration)
    reference.ReferenceScores.fill = timed_fill
    with StopSignal() as stop:
        setup = set_up(config, directory)
        job, state = prepare(setup, pairs, {}, tokenizer=tokenizer, stop=stop, clock=Clock(), allowed_changes=())
    clock, first_loss, real = Stopwatch(options.warm_up), None, []
    work = setup.work(pairs)
    for host_step, batch in job.feed.batches(0):
        state, metrics = job.train_step(state, job.base, job.reference_params, batch)
        numbers = jax.device_get(metrics)
        clock.step_done()
        first_loss = float(numbers["loss"]) if first_loss is None else first_loss
        real.append(int(work.tokens[host_step.pair].sum()))
    shape = job.feed.source.plan.shape
    real_tokens = statistics.mean(real)
    width = [(shape.row_length, real_tokens)]
    if row == "jax-sr-dpo":
        augmented_length = batch.augmented.tokens.shape[-1]
        width.append((augmented_length, real_tokens + shape.rows * batch.augmented.prefix_tokens))
    in_a_step = sum(shape.rows * length for length, _ in width)
    return {
        **clock.times(),
        "first_loss": first_loss,
        "shifted": row == "jax-contrast",
        "scoring_s": scoring[0],
        "compile_s": compiling[0],
        "tokens": [int(side.sum()) for side in (pairs.prompt_tokens, pairs.chosen_tokens, pairs.rejected_tokens)],
        "tokens_a_step": in_a_step,
        "padding": 1 - sum(tokens for _, tokens in width) / in_a_step,
        "shape": [shape.rows, shape.row_length, shape.scored],
    }


def jax_settings(row: str, options: argparse.Namespace) -> dict:
    chosen = {
        "jax-sr-dpo": {"objective": {"name": "sr_dpo", "lam": 0.3, "beta": 0.1}},
        "jax-contrast": {
            "objective": {"name": "sr_dpo", "lam": 1.0, "beta": 0.1},
            "refinement": {"form": "contrast", "judge": "reference"},
        },
    }.get(row, {"objective": {"name": "dpo", "beta": 0.1}})
    own = options.work / f"jax-{os.getpid()}"  # a fresh cache, so that the reference is scored
    return {
        "output_dir": str(own),
        "seed": SEED,
        "model": {"path": str(options.work / "model"), "dtype": "float32"},
        "data": {
            "path": str(options.work / "pairs.jsonl"),
            "format": "preference",
            "max_length": MAX_LENGTH,
        },
        **chosen,
        "reference": {"mode": "online" if row.endswith("online") else "cached"},
        "optimizer": {"name": "adamw", "learning_rate": 1e-5, "warmup_steps": 0, "max_grad_norm": 1.0},
        "batch": {"pairs_per_step": options.pairs, "row_length": options.row_length, "row_multiple": 8},
    }


class Stopwatch:
    """Wall and processor time of each step after the warm-up, from the end of the step before."""

    def __init__(self, warm_up: int):
        self._warm_up, self._ends = warm_up, []

    def step_done(self) -> None:
        self._ends.append((time.perf_counter(), time.process_time()))

    def times(self) -> dict[str, list[float]]:
        pairs = list(itertools.pairwise(self._ends[self._warm_up - 1 :]))
        names = ("step_times", "processor_times")
        return {name: [after[axis] - before[axis] for before, after in pairs] for axis, name in enumerate(names)}


# What came out.


def check_alike(results: list[dict]) -> None:
    """Fails where two rows saw other tokens, or a first loss is not ln 2; a contrast shifts it from the start."""
    for counts in zip(*(result["tokens"] for result in results), strict=True):
        if max(counts) - min(counts) > 0.001 * min(counts):
            sys.exit(f"the rows saw different tokens: {sorted(set(counts))}")
    losses = [result["first_loss"] for result in results if not result["shifted"]]
    if any(abs(loss - math.log(2)) > 1e-3 for loss in losses):
        sys.exit(f"a first loss is not ln 2 = 0.6931: {losses}")


def table(rows: list[str], rounds: list[dict[str, dict]], options: argparse.Namespace) -> str:
    def over_rounds(row: str, name: str) -> list[float]:
        return [measured[row][name] for measured in rounds]

    middle = statistics.median
    lines = ["", "prompt, chosen and rejected tokens, and the first loss, as each row saw them:"]
    for row in rows:
        seen = rounds[0][row]
        lines.append(f"  {row:22} {' '.join(f'{count:>8,}' for count in seen['tokens'])}   {seen['first_loss']:.6f}")
    lines += ["", f"{'':22} pairs/s    best  median step  CPU s a step  peak MiB  scoring s  tokens in a step  padding"]
    for row in rows:
        speed, seen = over_rounds(row, "pairs_per_second"), rounds[0][row]
        lines.append(
            f"{row:22} {middle(speed):7.2f} {max(speed):7.2f} {middle(over_rounds(row, 'median_step')):10.2f} s"
            f" {middle(over_rounds(row, 'processor_s')):13.2f}"
            f" {middle(over_rounds(row, 'peak_mib')):9.0f} {middle(over_rounds(row, 'scoring_s')):10.1f}"
            f" {seen['tokens_a_step']:17,.0f} {100 * seen['padding']:6.1f} %"
        )
    baselines = [row for row in BASELINES if row in rows]
    titles = (("pairs_per_second", "pairs/s"), ("processor_s", "CPU time"), ("peak_mib", "peak memory"))
    for name, title in titles if baselines else ():
        lines += ["", f"{title + ', ratio to':22} " + "  ".join(baselines)]
        for row in rows:
            ratios = [[m[row][name] / m[base][name] for m in rounds] for base in baselines]
            cells = (f"{middle(ratio):{len(base)}.2f}" for ratio, base in zip(ratios, baselines, strict=True))
            lines.append(f"{row:22} " + "  ".join(cells))
    shapes = {row: rounds[0][row]["shape"] for row in rows if "shape" in rounds[0][row]}
    for row, (count, length, scored) in shapes.items():
        lines.append(f"{row}: {count} rows of {length} tokens, {scored} of them scored, for {options.pairs} pairs")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
