"""Pairs -> token ids, so that a prompt has the same ids with and without the instruction p before it.

    ids(x)   = head ⊕ rest           plain prompt
    ids(p⊕x) = head ⊕ p ⊕ rest       augmented prompt: ids are concatenated, text is never tokenised again

    head       the start of the prompt before the user's words: the BOS token where the tokenizer uses one, and for
               conversations the text that the chat template writes before the content of the first user message
    rest       the remainder of the prompt; for conversations it ends with the generation prompt
    response   the ids of its text, then exactly one end: that of the template's turns where it is an end token of the
               model (`model_ends.py`), and else the EOS token

Prompt and responses are tokenised apart as well. A trap: in the ids of prompt + response a token may span the seam, so
cutting them at the length of the prompt's ids can lose the response's first letters.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sr_dpo_jax.data.chat_template import ChatTemplate, Texts, UnplacedError
from sr_dpo_jax.data.messages import Message
from sr_dpo_jax.data.mid_text import MidText, text_ids
from sr_dpo_jax.data.model_ends import end_tokens
from sr_dpo_jax.data.records import BadRow, UnusableError
from sr_dpo_jax.data.rows import Pair
from sr_dpo_jax.errors import UsageError


@dataclass(frozen=True)
class PairTokens:
    """The ids of one pair before truncation. The prompt is head + rest; each response ends with its one end token."""

    head: tuple[int, ...]
    augmentation: tuple[int, ...]
    """The ids of p after this head; empty without p."""
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    """Empty where the row has one response."""


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Loads the fast tokenizer of a Hugging Face directory; code that comes with it is never run.

    Raises:
      UsageError: there is no fast tokenizer, it cannot be loaded, or it has no EOS token.
    """
    if not os.path.isfile(os.path.join(path, "tokenizer.json")):
        # A trap: for some families transformers would make an empty tokenizer, to which all text is unknown.
        raise UsageError(
            f"model.path={path}: has no tokenizer.json; add it, as save_pretrained of a fast tokenizer writes it"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, use_fast=True, trust_remote_code=False)
    except Exception as error:  # a damaged tokenizer.json raises a bare Exception
        first_line = str(error).partition("\n")[0]
        raise UsageError(
            f"model.path={path}: no tokenizer can be loaded from here ({first_line}); it needs a tokenizer.json, "
            "which save_pretrained of a fast tokenizer writes"
        ) from error
    if not tokenizer.is_fast:
        raise UsageError(f"model.path={path}: only fast tokenizers are supported; add a tokenizer.json")
    if tokenizer.eos_token_id is None:
        raise UsageError(f"model.path={path}: the tokenizer has no EOS token; set eos_token in tokenizer_config.json")
    return tokenizer


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Computes the sha256 (hex) of everything that decides ids: backend state, special tokens and chat template."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    # A trap: a caller that pads or truncates changes these two in the object; calls here turn both off.
    del state["padding"], state["truncation"]
    parts = [state, tokenizer.special_tokens_map, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def uses_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tells whether the tokenizer puts its BOS token before plain text by default; some have one and do not use it."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return False
    bare = text_ids(tokenizer, ["a"])[0]
    return bos not in bare and tokenizer(["a"])["input_ids"][0][: 1 + len(bare)] == [bos, *bare]


def truncate(
    prompt_tokens: Sequence[int],
    chosen_tokens: Sequence[int],
    rejected_tokens: Sequence[int],
    head_tokens: int,
    *,
    max_length: int,
    max_prompt_length: int,
    prompt_truncation: str,
) -> tuple[Sequence[int], Sequence[int], Sequence[int]]:
    """Cuts a pair to length as the code base of the paper's experiments does; p is neither counted nor cut.

    Let m be the tokens of the longer response, EOS included. If prompt + m > max_length, the prompt is cut to
    max_prompt_length; if that is still too long, both responses are cut to their first max_length − max_prompt_length
    tokens, even where the prompt leaves more room, and a response that is cut loses its EOS.

    Args:
      prompt_tokens, chosen_tokens, rejected_tokens: ids; the prompt starts with its head.
      head_tokens: the number of ids of the head, which are always kept; the cut is made after them.
      max_length: the most tokens of prompt + longer response.
      max_prompt_length: the tokens that a prompt is cut to, head included.
      prompt_truncation: the end of a cut prompt that stays, `keep_end` or `keep_start`.

    Returns:
      Prompt, chosen and rejected, the same objects where nothing was cut.

    Raises:
      UsageError: there is no room after the head.
    """
    longest = max(len(chosen_tokens), len(rejected_tokens))
    if len(prompt_tokens) + longest > max_length and len(prompt_tokens) > max_prompt_length:
        keep = max_prompt_length - head_tokens
        if keep < 1:
            raise UsageError(
                f"data.max_prompt_length={max_prompt_length}: the head of the prompt alone (BOS, system message) has "
                f"{head_tokens} tokens and is never cut; raise data.max_prompt_length above it"
            )
        if prompt_truncation == "keep_end":
            prompt_tokens = [*prompt_tokens[:head_tokens], *prompt_tokens[-keep:]]
        else:
            prompt_tokens = prompt_tokens[:max_prompt_length]
    if len(prompt_tokens) + longest > max_length:
        most = max_length - max_prompt_length
        chosen_tokens, rejected_tokens = chosen_tokens[:most], rejected_tokens[:most]
    return prompt_tokens, chosen_tokens, rejected_tokens


class PairEncoder:
    """Turns pairs into ids with one tokenizer and one p, a batch at a time; raises UsageError where p is blank."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, augmentation_prompt: str | None):
        if augmentation_prompt is not None and not augmentation_prompt.strip():
            raise UnplacedError("refinement.prompt is blank; give the instruction p, or null for none")
        self._tokenizer, self._augmentation_prompt = tokenizer, augmentation_prompt
        self._mid_text = MidText(tokenizer)
        self._bos = [tokenizer.bos_token_id] if uses_bos(tokenizer) else []
        self._ends = frozenset(end_tokens(tokenizer, Path(tokenizer.name_or_path)))
        self._template: ChatTemplate | None = None
        self._heads: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}

    def encode(self, pairs: Sequence[Pair]) -> list[PairTokens | BadRow]:
        """Encodes pairs; gives for each, in order, its ids or the reason why it cannot be used.

        Raises:
          UsageError: the pairs are conversations, and the tokenizer has no chat template or one that cannot be used.
        """
        texts = [self._text(pair) for pair in pairs]
        good = [text for text in texts if isinstance(text, Texts)]
        prompts = self._prompts(good)
        last = [_last(prompt) for _, _, prompt in prompts]
        chosen = self._mid_text.ids([text.chosen for text in good], after=last)
        rejected = self._mid_text.ids([text.rejected or "" for text in good], after=last)
        encoded = zip(prompts, chosen, rejected, strict=True)
        results: list[PairTokens | BadRow] = []
        for pair, text in zip(pairs, texts, strict=True):
            if isinstance(text, BadRow):
                results.append(text)
                continue
            (head, augmentation, prompt), *responses = next(encoded)
            try:
                if not prompt:
                    raise UnusableError("the prompt has no tokens")
                first, second = responses
                ended = [] if pair.rejected is None else self._ended(second, "rejected")
                results.append(PairTokens(head, augmentation, prompt, self._ended(first, "chosen"), ended))
            except UnusableError as error:
                results.append(BadRow(pair.file, pair.line, str(error)))
        return results

    def prompt_ids(
        self, prompts: Sequence[str | tuple[Message, ...]], options: Sequence[str] | None = None
    ) -> list[list[int] | BadRow]:
        """Encodes prompts without responses, as `encode` does; the line of a `BadRow` is the number of the prompt.

        `options` has the `template_options` of each prompt.
        """
        numbered = enumerate(zip(prompts, options or [""] * len(prompts), strict=True), 1)
        pairs = [
            Pair(str(number), "", number, prompt, "a", None, template_options=own) for number, (prompt, own) in numbered
        ]
        return [result if isinstance(result, BadRow) else result.prompt for result in self.encode(pairs)]

    def _prompts(self, texts: list[Texts]) -> list[tuple[tuple[int, ...], tuple[int, ...], list[int]]]:
        heads = [self._head(text.head) for text in texts]
        # Only a rest without a head opens a text; every other part stands in the middle of one.
        opening = iter(text_ids(self._tokenizer, [text.rest for text in texts if not text.head]))
        within = [(text.rest, _last(head)) for text, (head, _) in zip(texts, heads, strict=True) if text.head]
        inner = iter(self._mid_text.ids([rest for rest, _ in within], after=[last for _, last in within]))
        prompts = []
        for text, (head, augmentation) in zip(texts, heads, strict=True):
            rest = next(inner if text.head else opening)
            if not text.head and self._bos and rest[:1] == self._bos:
                rest = rest[1:]  # the text itself begins with the BOS token
            prompts.append((head, augmentation, [*head, *rest]))
        return prompts

    def _text(self, pair: Pair) -> Texts | BadRow:
        if isinstance(pair.prompt, str):
            return Texts("", pair.prompt, pair.chosen, pair.rejected)
        if self._template is None:
            self._template = ChatTemplate(self._tokenizer, self._augmentation_prompt)
        try:
            return self._template.texts(pair)
        except UnusableError as error:
            return BadRow(pair.file, pair.line, str(error))

    def _head(self, text: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if text not in self._heads:
            head = text_ids(self._tokenizer, [text])[0] if text else []
            if head[: len(self._bos)] != self._bos:
                head = self._bos + head
            augmentation, p = [], self._augmentation_prompt
            if p is not None:
                (augmentation,) = (
                    self._mid_text.ids([p], after=[_last(head)]) if text else text_ids(self._tokenizer, [p])
                )
            self._heads[text] = tuple(head), tuple(augmentation)
        return self._heads[text]

    def _ended(self, ids: list[int], side: str) -> list[int]:
        """Gives a response one end. A trap: a second one after the template's own is a pair of tokens that the model
        never saw, in every log-prob."""
        eos = self._tokenizer.eos_token_id
        ids, end = (ids[:-1], ids[-1]) if ids and ids[-1] in self._ends else (ids, eos)
        if eos in ids:
            raise UnusableError(f"the {side} response holds the end-of-sequence token before its end")
        if not self._ends.isdisjoint(ids):  # generation would end there
            raise UnusableError(f"the {side} response holds another end token of the model before its end")
        if not ids:
            raise UnusableError(f"the {side} response has no tokens")
        return [*ids, end]


def _last(ids: Sequence[int]) -> int | None:
    return ids[-1] if ids else None
