"""Tokenises a text that stands in the middle of a sequence, so that it gets the ids that it has as part of the whole.

SentencePiece tokenizers (Llama 2, Mistral and so Zephyr, Phi-3) put a space before every text, and many of them another
one after every special token. Before a response that follows "<|assistant|>\\n" that space is wrong, for the model has
not seen it there; after a special token it is right. Some special tokens (Phi-3's) swallow the whitespace after them,
even where a response starts with it.
"""

import json
from collections.abc import Sequence

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


class MidText:
    """Tokenises texts that do not open a sequence, with a fast tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._inner = _without_spaces(tokenizer, everywhere=False)
        self._bare = _without_spaces(tokenizer, everywhere=True)
        self._no_spaces_after_tokens = self._inner.backend_tokenizer.to_str() == self._bare.backend_tokenizer.to_str()
        # A trap: the unknown token is an added one, but stands for unknown letters, with no special token in the text.
        self._added = set(tokenizer.added_tokens_decoder) - {tokenizer.unk_token_id}
        self._swallowing = {number for number, token in tokenizer.added_tokens_decoder.items() if token.rstrip}

    def ids(self, texts: Sequence[str], *, after: Sequence[int | None]) -> list[list[int]]:
        """Gives one list of ids for each text.

        `after` holds the id before each text; None serves for every id that is no special token.
        """
        pairs = zip(texts, after, strict=True)
        texts = [text.lstrip() if last in self._swallowing else text for text, last in pairs]
        inner = text_ids(self._inner, texts)
        if self._no_spaces_after_tokens:
            return inner
        bare = text_ids(self._bare, texts)
        return [
            follows if last in self._added else self._spliced(starts, follows)
            for starts, follows, last in zip(bare, inner, after, strict=True)
        ]

    def _spliced(self, bare: list[int], inner: list[int]) -> list[int]:
        """Joins `bare` up to the first special token and `inner` from there on."""
        return bare[: self._first_added(bare)] + inner[self._first_added(inner) :]

    def _first_added(self, ids: list[int]) -> int:
        return next((number for number, token in enumerate(ids) if token in self._added), len(ids))


def text_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Gives one list of ids for each text, without the tokens that a post-processor puts around it."""
    if not texts:
        return []
    # verbose=False silences the warning about texts longer than the model's context; they are truncated later.
    options = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
    return tokenizer(list(texts), verbose=False, **options)["input_ids"]


def _without_spaces(tokenizer: PreTrainedTokenizerBase, *, everywhere: bool) -> PreTrainedTokenizerBase:
    """Gives the tokenizer without the space before a text, or, with `everywhere`, also without those after tokens."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    steps = {name: _without_space(state[name], everywhere=everywhere) for name in ("normalizer", "pre_tokenizer")}
    if state == {**state, **steps}:
        return tokenizer
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps({**state, **steps})))


def _without_space(step: dict | None, *, everywhere: bool) -> dict | None:
    """Gives a normalizer or pre-tokenizer (in tokenizer.json's format) without the rules that put a space in front."""
    if step is None or (everywhere and step["type"] == "Prepend"):
        return None
    if step["type"] == "Sequence":
        inner = "normalizers" if "normalizers" in step else "pretokenizers"
        steps = [_without_space(part, everywhere=everywhere) for part in step[inner]]
        return {**step, inner: [part for part in steps if part is not None]}
    if step["type"] == "Metaspace" and (everywhere or step["prepend_scheme"] == "first"):
        return {**step, "prepend_scheme": "never"}
    return {**step, "add_prefix_space": False} if everywhere and "add_prefix_space" in step else step
