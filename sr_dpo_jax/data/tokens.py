"""Pairs -> token ids, so that a prompt has the same ids with and without the instruction p before it.

    ids(x)   = head ⊕ rest           plain prompt
    ids(p⊕x) = head ⊕ p ⊕ rest       augmented prompt: ids are concatenated, text is never tokenised again

    head       the start of the prompt before the user's words: the BOS token where the tokenizer uses one, and for
               conversations the text that the chat template writes before the content of the first user message
    rest       the remainder of the prompt; for conversations it ends with the generation prompt
    response   the ids of its text, then exactly one EOS

Prompt and responses are tokenised apart as well. A trap: in the ids of prompt + response a token may span the seam, so
cutting them at the length of the prompt's ids can lose the response's first letters.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import FrameType

import jinja2
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sr_dpo_jax.data.mid_text import MidText, text_ids
from sr_dpo_jax.data.rows import BadRow, Message, Pair, UnusableError, checked_text
from sr_dpo_jax.errors import UsageError

LOG = logging.getLogger(__name__)
SENTINEL = "\ue000sr-dpo\ue001"  # private-use characters: no template writes them, none trims them
TEMPLATE_S = 5
"""The seconds that a chat template has for one conversation; it is a program, and may loop without end."""
MOST_ENDLESS = 8
"""The most conversations for which it may take longer."""
UNPLACED = (
    "the chat template cannot place refinement.prompt verbatim before the first user message (as where it trims "
    "messages, and refinement.prompt starts with whitespace)"
)
"""The reason of a row that only p makes unusable."""
FORMERLY_UNPLACED = "and that message or refinement.prompt starts with whitespace)"
"""The end of that reason in caches of earlier versions, which refused a trimmed message too."""


class UnplacedError(UsageError):
    """Says that p cannot stand in these prompts, all of which can be used without it."""


@dataclass(frozen=True)
class PairTokens:
    """The ids of one pair before truncation. The prompt is head + rest; each response ends with its one EOS."""

    head: tuple[int, ...]
    augmentation: tuple[int, ...]
    """The ids of p after this head; empty without p."""
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


@dataclass(frozen=True)
class _Text:
    """The four texts of a pair that are tokenised apart."""

    head: str
    rest: str
    chosen: str
    rejected: str


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
        self._template: _ChatTemplate | None = None
        self._heads: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}

    def encode(self, pairs: Sequence[Pair]) -> list[PairTokens | BadRow]:
        """Encodes pairs; gives for each, in order, its ids or the reason why it cannot be used.

        Raises:
          UsageError: the pairs are conversations, and the tokenizer has no chat template or one that cannot be used.
        """
        texts = [self._text(pair) for pair in pairs]
        good = [text for text in texts if isinstance(text, _Text)]
        prompts = self._prompts(good)
        last = [_last(prompt) for _, _, prompt in prompts]
        chosen = self._mid_text.ids([text.chosen for text in good], after=last)
        rejected = self._mid_text.ids([text.rejected for text in good], after=last)
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
                ended = [self._ended(ids, side) for ids, side in zip(responses, ("chosen", "rejected"), strict=True)]
                results.append(PairTokens(head, augmentation, prompt, *ended))
            except UnusableError as error:
                results.append(BadRow(pair.file, pair.line, str(error)))
        return results

    def prompt_ids(self, prompts: Sequence[str | tuple[Message, ...]]) -> list[list[int] | BadRow]:
        """Encodes prompts without responses, as `encode` does; the line of a `BadRow` is the number of the prompt."""
        pairs = [Pair(str(number), "", number, prompt, "a", "a") for number, prompt in enumerate(prompts, 1)]
        return [result if isinstance(result, BadRow) else result.prompt for result in self.encode(pairs)]

    def _prompts(self, texts: list[_Text]) -> list[tuple[tuple[int, ...], tuple[int, ...], list[int]]]:
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

    def _text(self, pair: Pair) -> _Text | BadRow:
        if isinstance(pair.prompt, str):
            return _Text("", pair.prompt, pair.chosen, pair.rejected)
        if self._template is None:
            self._template = _ChatTemplate(self._tokenizer, self._augmentation_prompt)
        try:
            return self._template.text(pair)
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
        eos = self._tokenizer.eos_token_id
        if ids and ids[-1] == eos:
            ids = ids[:-1]
        if eos in ids:
            raise UnusableError(f"the {side} response holds the end-of-sequence token before its end")
        if not ids:
            raise UnusableError(f"the {side} response has no tokens")
        return [*ids, eos]


class _ChatTemplate:
    """Splits conversations into the texts of head, rest and responses, and proves for each that p stands verbatim."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, augmentation_prompt: str | None):
        if tokenizer.chat_template is None:
            raise UsageError(
                "the data holds conversations, but the tokenizer of model.path has no chat template; choose a model "
                "with one, add a chat_template.jinja, or give prompts and responses as text"
            )
        if "strftime_now" in str(tokenizer.chat_template):
            LOG.warning("the chat template writes today's date: pairs tokenised tomorrow will get other ids")
        self._tokenizer, self._augmentation_prompt = tokenizer, augmentation_prompt
        self._heads: dict[tuple, str] = {}
        self._endless = 0
        self._ending = self._ending_of_turns()

    def text(self, pair: Pair) -> _Text:
        prompt = [dataclasses.asdict(message) for message in pair.prompt]
        rendered = self._render(prompt, add_generation_prompt=True)
        head, rest = self._split(prompt, rendered)
        responses = []
        for side, content in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            whole = self._render([*prompt, {"role": "assistant", "content": content}])
            unended = whole.removesuffix(self._ending)
            turn = unended[len(rendered) :]
            placed = unended.startswith(rendered) and whole == unended + self._ending and turn.strip()
            # The turn may lack the first letters of the content: a generation prompt that opens a block of thought has
            # them.
            if not placed or not unended.rstrip().endswith(content.strip()):
                raise UnusableError(f"the chat template does not place the {side} response after its own prompt")
            # Whitespace after the end-of-turn token belongs to the next turn; generation never reaches it.
            responses.append(turn + self._ending.rstrip())
        return _Text(head, rest, *responses)

    def _ending_of_turns(self) -> str:
        """Refuses a template that fails on the plainest conversation, before any row; finds how it ends a turn."""
        user, reply = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": SENTINEL}
        try:
            rendered = self._render([user], add_generation_prompt=True)
            self._split([user], rendered)
            whole = self._render([user, reply])
        except UnusableError as error:
            kind = UnplacedError if str(error) == UNPLACED else UsageError
            raise kind(
                f"the chat template of model.path cannot be used: {error}; change chat_template.jinja, or set "
                "refinement.prompt=null where the objective needs none"
            ) from error
        if not whole.startswith(rendered) or whole.count(SENTINEL) != 1:
            raise UsageError(
                "the chat template of model.path cannot be used: a prompt with its response does not start with the "
                "prompt and its generation prompt, so the response cannot be told apart; change chat_template.jinja"
            )
        return whole.partition(SENTINEL)[2]

    def _split(self, prompt: list[dict[str, str]], rendered: str) -> tuple[str, str]:
        """Splits a rendered prompt into head and rest, and checks that p fits between them verbatim."""
        first = next(number for number, message in enumerate(prompt) if message["role"] == "user")
        # A trap: some templates write the system message before the last user turn, so the head depends on all roles.
        shape = (tuple(m["role"] for m in prompt), tuple(m["content"] for m in prompt[:first]))
        if shape not in self._heads:
            marked = self._render(_put_before(SENTINEL, prompt, first), add_generation_prompt=True)
            if marked.count(SENTINEL) != 1:
                raise UnusableError("the chat template does not write the first user message exactly once")
            self._heads[shape] = marked.partition(SENTINEL)[0]
        head = self._heads[shape]
        if not rendered.startswith(head):
            raise UnusableError("the chat template writes another start for this conversation than for others like it")
        rest, p = rendered[len(head) :], self._augmentation_prompt
        if p is not None and not self._stands(p, prompt, first, head + p + rest):
            raise UnusableError(UNPLACED)
        return head, rest

    def _stands(self, p: str, prompt: list[dict[str, str]], first: int, expected: str) -> bool:
        """Tells whether the template writes p verbatim before the first user message as it stands in the prompt.

        A trap: a template that trims messages leaves whitespace between p and the message, where the prompt has none.
        """
        content = prompt[first]["content"]
        for shown in dict.fromkeys((content, content.lstrip(), content.strip())):
            trimmed = [*prompt[:first], {**prompt[first], "content": shown}, *prompt[first + 1 :]]
            try:
                if self._render(_put_before(p, trimmed, first), add_generation_prompt=True) == expected:
                    return True
            except UnusableError:  # refuses or does not end: only p is new in this conversation
                continue
        return False

    def _render(self, conversation: list[dict[str, str]], *, add_generation_prompt: bool = False) -> str:
        """Renders a conversation; whatever a template raises, or that it does not end, is a fault of this row."""
        try:
            with _time_limit(TEMPLATE_S):
                rendered = self._tokenizer.apply_chat_template(
                    conversation, tokenize=False, add_generation_prompt=add_generation_prompt
                )
            return checked_text(rendered, "the text that it makes")
        except _TooLong:
            self._endless += 1
            if self._endless > MOST_ENDLESS:
                raise UsageError(
                    f"the chat template of model.path did not end within {TEMPLATE_S} s for {self._endless} "
                    "conversations; change chat_template.jinja"
                ) from None
            raise UnusableError(f"the chat template does not end within {TEMPLATE_S} s for this conversation") from None
        except UnusableError as error:
            raise UnusableError(f"the chat template cannot be used for this conversation: {error}") from None
        except Exception as error:
            # A refusal that stands word for word in the template holds no text of the row.
            reason = f": {error}" if str(error) and str(error) in str(self._tokenizer.chat_template) else ""
            kind = "" if isinstance(error, jinja2.TemplateError) else f" with {type(error).__name__}"
            raise UnusableError(f"the chat template refuses this conversation{kind}{reason}") from error


class _TooLong(BaseException):
    """The time of a `_time_limit` is over. No `Exception`, so that nothing on the way takes it for one of its own."""


@contextlib.contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    """Raises _TooLong in the block after so many seconds; only the main thread gets signals, others have no limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(_number: int, _frame: FrameType | None) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _put_before(text: str, prompt: list[dict[str, str]], first: int) -> list[dict[str, str]]:
    changed = {**prompt[first], "content": text + prompt[first]["content"]}
    return [*prompt[:first], changed, *prompt[first + 1 :]]


def _last(ids: Sequence[int]) -> int | None:
    return ids[-1] if ids else None
