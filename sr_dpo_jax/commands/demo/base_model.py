"""The tokenizer and the config.json of the base model: a word a token, and a Pythia of a million parameters."""

import shutil
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GPTNeoXConfig, PreTrainedTokenizerFast

from sr_dpo_jax.commands.demo.tasks import OTHER_WORDS, WORDS, instruction_parts

END, UNKNOWN = "<|end|>", "<|unknown|>"
HIDDEN, LAYERS, HEADS = 144, 4, 4
INITIALISER = 0.08
"""Wider than Pythia's 0.02, with which so small a model stands still for hundreds of steps."""


def write_base_model(directory: Path) -> None:
    """Writes a directory without weights, under its name when it is whole; leaves one that is there."""
    if directory.exists():
        return
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(partial)
    GPTNeoXConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=4 * HIDDEN,
        rotary_pct=1.0,
        max_position_embeddings=512,
        initializer_range=INITIALISER,
        bos_token_id=0,
        eos_token_id=0,
    ).save_pretrained(partial)
    partial.rename(directory)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each word with the space before it, and for each piece of the instruction.

    The pieces make p five tokens long instead of fifty, which is most of what the base model would have to read.
    """
    tokens = [END, UNKNOWN, *instruction_parts(), *(f" {word}" for word in (*OTHER_WORDS, *WORDS))]
    tokenizer = Tokenizer(models.WordLevel({token: number for number, token in enumerate(tokens)}, UNKNOWN))
    longest_first = sorted(tokens[2:], key=lambda token: (-len(token), token))
    pattern = "|".join(_escaped(token) for token in longest_first)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, unk_token=UNKNOWN)


def _escaped(token: str) -> str:
    """For a regular expression; a word ends where letters and digits end."""
    text = "".join(f"\\{letter}" if letter in ".+*?()|[]{}^$\\" else letter for letter in token)
    return text + r"\b" if token[-1].isalnum() else text
