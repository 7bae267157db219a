"""Generation: tokens a second, what share that is of the ideal, where the rest goes, and programs compiled on the way.

    python tests/benchmarks/generation.py [--prompts 384] [--slots 32] [--hidden 256] [--layers 6] [--mean-tokens 60]

A Pythia-shaped model of random weights answers prompts of the HH-RLHF file. Its responses end at random, after
`--mean-tokens` tokens on average, as responses to such prompts do: drawn at temperature 1, with as many of the
vocabulary's ids as end-of-sequence tokens as that needs.

The ideal is the decoding step alone with every slot at work: slots × tokens a call ÷ the median time of a call. The
figures printed are means over everything after the first calls, which compile:

    fraction of ideal     response tokens a second ÷ the ideal
    idle slots            slot-steps of the decoding calls in which a slot had nothing to say: it had finished within
                          the call, or no prompt waited for it; the last prompts of a file leave slots idle, so the
                          share shrinks with --prompts
    prompt padding        tokens that `read` computes beyond those of the prompts
    reading, host         share of the time in `read`, and in neither program
    programs compiled     after the first two calls of each; any but 0 is a fault
"""

import argparse
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests"), str(REPOSITORY / "tests" / "benchmarks")]

import jax  # noqa: E402
import numpy as np  # noqa: E402
from hh_run import make_model  # noqa: E402
from runs import HH_FILE  # noqa: E402

from sr_dpo_jax.config.load import config_from_dict  # noqa: E402
from sr_dpo_jax.data.rows import Pair, read_rows  # noqa: E402
from sr_dpo_jax.data.tokens import load_tokenizer  # noqa: E402
from sr_dpo_jax.generation.decode import Sampling  # noqa: E402
from sr_dpo_jax.generation.generator import TOKENS_A_CALL, Generator, Prompt, Settings  # noqa: E402
from sr_dpo_jax.model.decoder import Params  # noqa: E402
from sr_dpo_jax.train.setup import read_model, set_up  # noqa: E402

MAX_NEW_TOKENS = 256


class Timed:
    """A compiled program and how long each call took, results awaited."""

    def __init__(self, program):
        self._program, self.seconds = program, []

    def __call__(self, *arguments):
        started = time.perf_counter()
        result = jax.block_until_ready(self._program(*arguments))
        self.seconds.append(time.perf_counter() - started)
        return result


def make_generator(root: Path, options: argparse.Namespace, longest: int) -> tuple[Generator, Params]:
    raw = {
        "output_dir": str(root / "run"),
        "model": {"path": str(root / "model"), "init": "random", "dtype": "float32"},
        "data": {"path": str(HH_FILE), "format": "hh_rlhf"},
        "objective": {"name": "sft"},
    }
    directory, tokenizer = read_model(config_from_dict(raw, where="benchmark"))
    model = set_up(config_from_dict(raw, where="benchmark"), directory).model
    ends = range(round(directory.architecture.vocabulary_tokens / options.mean_tokens))
    settings = Settings(Sampling(1.0, None, None, tuple(ends)), options.slots, MAX_NEW_TOKENS, stop=())
    return Generator(model, tokenizer, settings, longest_prompt_tokens=longest), model.base_params()


def prompts_of_hh(model: Path, count: int) -> list[list[int]]:
    tokenizer = load_tokenizer(str(model))
    pairs = (row for row in read_rows(str(HH_FILE), format="hh_rlhf", split="train") if isinstance(row, Pair))
    prompts = [pair.prompt for pair in itertools.islice(pairs, count)]
    return [ids[-256:] for ids in tokenizer(prompts)["input_ids"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("prompts", 384), ("slots", 32), ("hidden", 256), ("layers", 6), ("mean-tokens", 60)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="sr_dpo_jax_generation_"))
    make_model(root / "model", hidden=options.hidden, layers=options.layers)
    ids = prompts_of_hh(root / "model", options.prompts)
    generator, params = make_generator(root, options, max(map(len, ids)))
    read, proceed = generator._read, generator._proceed
    list(generator.respond(params, [Prompt(0, ids[0], 1), Prompt(1, ids[1], 2)]))  # compiles both
    generator._read, generator._proceed = Timed(read), Timed(proceed)
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _seconds, **_: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )
    started, tokens = time.perf_counter(), []
    for _, response in generator.respond(params, [Prompt(n, each, 100 + n) for n, each in enumerate(ids)]):
        tokens.append(len(response.ids) + (response.finish_reason == "end"))
    wall_s = time.perf_counter() - started
    reading_s, decoding_s = sum(generator._read.seconds), sum(generator._proceed.seconds)
    calls = len(generator._proceed.seconds)
    ideal = options.slots * TOKENS_A_CALL / float(np.median(generator._proceed.seconds))
    slot_steps = calls * TOKENS_A_CALL * options.slots
    decoded = sum(tokens) - len(tokens)  # the first token of a response comes from reading its prompt
    read_tokens = len(generator._read.seconds) * generator._read_batch * generator._prompt_tokens
    report = {
        "prompts": options.prompts,
        "slots": options.slots,
        "prompt_tokens_mean": round(float(np.mean([len(each) for each in ids])), 1),
        "response_tokens_mean": round(float(np.mean(tokens)), 1),
        "response_tokens_per_second": round(sum(tokens) / wall_s, 1),
        "ideal_tokens_per_second": round(ideal, 1),
        "fraction_of_ideal": round(sum(tokens) / wall_s / ideal, 3),
        "idle_slots": round(1 - decoded / slot_steps, 3),
        "prompt_padding": round(1 - sum(map(len, ids)) / read_tokens, 3),
        "reading": round(reading_s / wall_s, 3),
        "host": round(1 - (reading_s + decoding_s) / wall_s, 3),
        "programs_compiled": len(compiled),
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
