"""The chat template of a model: conversations become the texts of a prompt and its responses, with a place for p."""

import contextlib
import inspect
import json
import logging
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from sr_dpo_jax.data.messages import checked_text
from sr_dpo_jax.data.records import UnusableError
from sr_dpo_jax.data.rows import Pair
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


class UnplacedError(UsageError):
    """Says that p cannot stand in these prompts, all of which can be used without it."""


@dataclass(frozen=True)
class Texts:
    """The four texts of a pair that are tokenised apart."""

    head: str
    rest: str
    chosen: str
    rejected: str | None


class ChatTemplate:
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

    def texts(self, pair: Pair) -> Texts:
        prompt, options = [message.as_dict() for message in pair.prompt], self._options(pair.template_options)
        rendered = self._render(prompt, options, add_generation_prompt=True)
        self._require_tools(prompt, options, rendered)
        head, rest = self._split(prompt, options, rendered)
        responses = []
        for side, content in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            if content is None:
                responses.append(None)
                continue
            whole = self._render([*prompt, {"role": "assistant", "content": content}], options)
            unended = whole.removesuffix(self._ending)
            turn = unended[len(rendered) :]
            placed = unended.startswith(rendered) and whole == unended + self._ending and turn.strip()
            # The turn may lack the first letters of the content: a generation prompt that opens a block of thought has
            # them.
            if not placed or not unended.rstrip().endswith(content.strip()):
                raise UnusableError(f"the chat template does not place the {side} response after its own prompt")
            # Whitespace after the end-of-turn token belongs to the next turn; generation never reaches it.
            responses.append(turn + self._ending.rstrip())
        return Texts(head, rest, *responses)

    def _ending_of_turns(self) -> str:
        """Refuses a template that fails on the plainest conversation, before any row; finds how it ends a turn."""
        user, reply = {"role": "user", "content": "Hello"}, {"role": "assistant", "content": SENTINEL}
        try:
            rendered = self._render([user], {}, add_generation_prompt=True)
            self._split([user], {}, rendered)
            whole = self._render([user, reply], {})
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

    def _options(self, text: str) -> dict[str, Any]:
        """Gives the arguments that a row has for the template; those of transformers itself are refused."""
        given = json.loads(text) if text else {}
        options = given.get("chat_template_kwargs", {})
        own = inspect.signature(self._tokenizer.apply_chat_template).parameters.keys() & options.keys()
        own |= self._tokenizer.special_tokens_map.keys() & options.keys()  # a template gets them in the same way
        if own:
            raise UnusableError(f"chat_template_kwargs: {min(own)} is no argument of a template; remove it")
        return {**options, "tools": given["tools"]} if "tools" in given else options

    def _require_tools(self, prompt: list[dict[str, Any]], options: dict[str, Any], rendered: str) -> None:
        """Refuses tools and calls of tools that the template leaves out: the text would say nothing of them."""
        called = [call for message in prompt for call in message.get("tool_calls", [])]
        for key, entries in (("tools", options.get("tools", [])), ("tool_calls", called)):
            for entry in entries:
                function = entry.get("function", entry) if isinstance(entry, dict) else {}
                name = function.get("name") if isinstance(function, dict) else None
                if not isinstance(name, str) or name not in rendered:
                    raise UnusableError(f"{key}: the chat template does not write them for this conversation")

    def _split(self, prompt: list[dict[str, Any]], options: dict[str, Any], rendered: str) -> tuple[str, str]:
        """Splits a rendered prompt into head and rest, and checks that p fits between them verbatim."""
        first = next(number for number, message in enumerate(prompt) if message["role"] == "user")
        # A trap: some templates write the system message before the last user turn, so the head depends on all roles.
        # So it does on the name of the user, which may stand before the content.
        before = json.dumps([*prompt[:first], {**prompt[first], "content": ""}])
        shape = (tuple((m["role"], *sorted(m)) for m in prompt), before, json.dumps(options))
        if shape not in self._heads:
            self._require_written(prompt, options, rendered)
            marked = self._render(_put_before(SENTINEL, prompt, first), options, add_generation_prompt=True)
            if marked.count(SENTINEL) != 1:
                raise UnusableError("the chat template does not write the first user message exactly once")
            self._heads[shape] = marked.partition(SENTINEL)[0]
        head = self._heads[shape]
        if not rendered.startswith(head):
            raise UnusableError("the chat template writes another start for this conversation than for others like it")
        rest, p = rendered[len(head) :], self._augmentation_prompt
        if p is not None and not self._stands(p, prompt, options, first, head + p + rest):
            raise UnusableError(UNPLACED)
        return head, rest

    def _require_written(self, prompt: list[dict[str, Any]], options: dict[str, Any], rendered: str) -> None:
        """Refuses a message of a role that the template passes over: the text would say nothing of it."""
        for number, message in enumerate(prompt):
            if message["role"] not in ("user", "assistant") and message["content"].strip():
                marked = self._render(_put_before(SENTINEL, prompt, number), options, add_generation_prompt=True)
                if marked == rendered:
                    raise UnusableError(f"the chat template leaves out the message of the {message['role']}")

    def _stands(self, p: str, prompt: list[dict[str, Any]], options: dict[str, Any], first: int, expected: str) -> bool:
        """Tells whether the template writes p verbatim before the first user message as it stands in the prompt.

        A trap: a template that trims messages leaves whitespace between p and the message, where the prompt has none.
        """
        content = prompt[first]["content"]
        for shown in dict.fromkeys((content, content.lstrip(), content.strip())):
            trimmed = [*prompt[:first], {**prompt[first], "content": shown}, *prompt[first + 1 :]]
            try:
                if self._render(_put_before(p, trimmed, first), options, add_generation_prompt=True) == expected:
                    return True
            except UnusableError:  # refuses or does not end: only p is new in this conversation
                continue
        return False

    def _render(
        self, conversation: list[dict[str, Any]], options: dict[str, Any], *, add_generation_prompt: bool = False
    ) -> str:
        """Renders a conversation; whatever a template raises, or that it does not end, is a fault of this row."""
        try:
            with _time_limit(TEMPLATE_S):
                rendered = self._tokenizer.apply_chat_template(
                    conversation, tokenize=False, add_generation_prompt=add_generation_prompt, **options
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


def _put_before(text: str, prompt: list[dict[str, Any]], number: int) -> list[dict[str, Any]]:
    changed = {**prompt[number], "content": text + prompt[number]["content"]}
    return [*prompt[:number], changed, *prompt[number + 1 :]]
