"""Makes the tokenizer and the config.json of the base model: one token a word, and a Pythia of a million parameters."""

import re
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GPTNeoXConfig, PreTrainedTokenizerFast

from sr_dpo_jax.commands.demo.tasks import OTHER_WORDS, WORDS, instruction_parts
from sr_dpo_jax.durable.files import whole

END, UNKNOWN = "<|end|>", "<|unknown|>"
HIDDEN = 144
INITIALISER = 0.08
"""The standard deviation of random weights. With Pythia's 0.02 so small a model learns nothing for long."""


def write_base_model(directory: Path) -> None:
    """Writes tokenizer and config.json, without weights, whole; leaves a directory that is there."""
    if directory.exists():
        return
    tokenizer = make_tokenizer()
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=4 * HIDDEN,
        rotary_pct=1.0,
        max_position_embeddings=512,
        initializer_range=INITIALISER,
        bos_token_id=0,
        eos_token_id=0,
    )
    with whole(directory) as partial:
        tokenizer.save_pretrained(partial)
        config.save_pretrained(partial)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Makes a tokenizer with a token for each word with the space before it, and for each piece of the instruction.

    Thanks to the pieces p is five tokens long instead of fifty, which would be most of what the base model reads.
    """
    tokens = [END, UNKNOWN, *instruction_parts(), *(f" {word}" for word in (*OTHER_WORDS, *WORDS))]
    tokenizer = Tokenizer(models.WordLevel({token: number for number, token in enumerate(tokens)}, UNKNOWN))
    longest_first = sorted(tokens[2:], key=lambda token: (-len(token), token))
    # A word ends where its letters and digits end: ` oak` must not match the start of ` oaks`.
    pattern = "|".join(re.escape(token) + (r"\b" if token[-1].isalnum() else "") for token in longest_first)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, unk_token=UNKNOWN)
