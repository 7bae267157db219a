"""Ids of a text that something stands before.

SentencePiece tokenizers (Llama 2, Mistral, so Zephyr; Phi-3) put a space before any text that they are given, and many
of them another one after every special token. In front of a response that follows "<|assistant|>\\n" it would be a
space that the model neither saw nor should write; after a special token it is what the model has seen. So a text in
the middle of a sequence gets the ids that it has as part of the whole. Some special tokens (Phi-3's) swallow the
whitespace that follows them, also where it is the start of a response.
"""

import json
from collections.abc import Sequence

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


class MidText:
    """The same tokenizer for texts that do not open a sequence.

    Args:
      tokenizer: a fast tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._inner = _changed(tokenizer, everywhere=False)
        self._bare = _changed(tokenizer, everywhere=True)
        self._alike = self._inner.backend_tokenizer.to_str() == self._bare.backend_tokenizer.to_str()
        # A model gives the unknown token to letters that it does not have, without any special token in the text.
        self._added = set(tokenizer.added_tokens_decoder) - {tokenizer.unk_token_id}
        self._swallowing = {number for number, token in tokenizer.added_tokens_decoder.items() if token.rstrip}

    def ids(self, texts: Sequence[str], *, after: Sequence[int | None]) -> list[list[int]]:
        """One list of ids a text.

        Args:
          texts: what is tokenised.
          after: the id that stands before each text; None for any that is no special token.
        """
        pairs = zip(texts, after, strict=True)
        texts = [text.lstrip() if last in self._swallowing else text for text, last in pairs]
        inner = text_ids(self._inner, texts)
        if self._alike:
            return inner
        bare = text_ids(self._bare, texts)
        return [
            follows if last in self._added else self._spliced(starts, follows)
            for starts, follows, last in zip(bare, inner, after, strict=True)
        ]

    def _spliced(self, bare: list[int], inner: list[int]) -> list[int]:
        """`bare` up to the first special token, `inner` from there on."""
        return bare[: self._first_added(bare)] + inner[self._first_added(inner) :]

    def _first_added(self, ids: list[int]) -> int:
        return next((number for number, token in enumerate(ids) if token in self._added), len(ids))


def text_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """One list of ids a text, without the tokens that a post-processor puts around it."""
    if not texts:
        return []
    # verbose=False: a text longer than the model's context is no news here, truncation comes later.
    options = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
    return tokenizer(list(texts), verbose=False, **options)["input_ids"]


def _changed(tokenizer: PreTrainedTokenizerBase, *, everywhere: bool) -> PreTrainedTokenizerBase:
    """Without the space in front of the whole, or `everywhere`: nor after special tokens."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    steps = {name: _without_space(state[name], everywhere=everywhere) for name in ("normalizer", "pre_tokenizer")}
    if state == {**state, **steps}:
        return tokenizer
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps({**state, **steps})))


def _without_space(step: dict | None, *, everywhere: bool) -> dict | None:
    """A normalizer or pre-tokenizer of the tokenizer.json format, without the rules that put a space in front."""
    if step is None or (everywhere and step["type"] == "Prepend"):
        return None
    if step["type"] == "Sequence":
        inner = "normalizers" if "normalizers" in step else "pretokenizers"
        steps = [_without_space(part, everywhere=everywhere) for part in step[inner]]
        return {**step, inner: [part for part in steps if part is not None]}
    if step["type"] == "Metaspace" and (everywhere or step["prepend_scheme"] == "first"):
        return {**step, "prepend_scheme": "never"}
    return {**step, "add_prefix_space": False} if everywhere and "add_prefix_space" in step else step
