"""A judge model behind an OpenAI-compatible endpoint, and what it has said already, in a file.

Transport errors (408, 409, 429, 5xx, time-outs, dropped connections) are the client's to retry. A reply without a
verdict is asked for again here. Where the endpoint stays away the run stops: what was said is kept.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import logging
import os
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sr_dpo_jax.commands.judge.settings import Settings
from sr_dpo_jax.durable.files import lines_of
from sr_dpo_jax.errors import UsageError

try:
    import openai
except ImportError as missing:
    raise UsageError("the openai client is not installed; pip install 'sr_dpo_jax[eval]'") from missing

log = logging.getLogger(__name__)

Messages = list[dict[str, str]]
KEY_REFUSED, NOT_FOUND, REQUEST_REFUSED = (401, 403), (404, 405), (400, 413, 422)


@dataclasses.dataclass(frozen=True)
class Verdict:
    choice: str | None
    """`A`, `B` or `tie`; None where there is no verdict."""
    problem: str | None = None
    """Why there is none: `malformed reply` or `HTTP 400`, say."""


def request_key(settings: Settings, messages: Messages) -> str:
    """sha256 of all that a reply depends on: model, parameters, messages; not of where the endpoint is."""
    return hashlib.sha256(json.dumps([settings.model, settings.request, messages], sort_keys=True).encode()).hexdigest()


def parse(pattern: str, reply: str) -> str | None:
    """`A`, `B` or `tie`; None unless the pattern is found and all of its matches say the same."""
    found = {match.casefold() for match in re.findall(pattern, reply)}
    return {"a": "A", "b": "B", "tie": "tie"}.get(found.pop()) if len(found) == 1 else None


class Replies:
    """Replies that hold a verdict, JSON lines of `key` and `reply`, written as they come; a kill loses none of them."""

    def __init__(self, path: Path):
        self._lock = threading.Lock()
        lines = _whole_lines(path)
        self._replies = {line["key"]: line["reply"] for line in lines}
        self._file = path.open("a", encoding="utf-8")
        if lines:
            log.info("%s: holds %d replies", path, len(lines))

    def __enter__(self) -> "Replies":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def get(self, key: str) -> str | None:
        return self._replies.get(key)

    def put(self, key: str, reply: str) -> None:
        with self._lock:
            self._replies[key] = reply
            self._file.write(json.dumps({"key": key, "reply": reply}, ensure_ascii=False) + "\n")
            self._file.flush()


class Judge:
    """Asks for verdicts.

    Args:
      settings: whom and how to ask.
      replies: what is known already, and where new replies go.

    Raises:
      UsageError: the environment has no key.
    """

    def __init__(self, settings: Settings, replies: Replies):
        key = os.environ.get(settings.api_key_variable)
        if not key:
            raise UsageError(
                f"{settings.api_key_variable}: not set; it holds the key of the judge's endpoint (any word, if the "
                "endpoint asks for none). api_key_variable of --judge-config names another variable"
            )
        self._settings, self._replies, self._stopped = settings, replies, threading.Event()
        self._client = openai.OpenAI(
            api_key=key, base_url=settings.base_url, timeout=settings.timeout_s, max_retries=settings.retries
        )

    def verdicts(self, asked: Sequence[Messages], progress: Callable[[int], None]) -> list[Verdict]:
        """The verdict on each conversation, those that are not known yet several at a time.

        Raises:
          UsageError: the endpoint refuses the key, or knows no such model.
          RuntimeError: the endpoint does not answer.
        """
        keys = [request_key(self._settings, messages) for messages in asked]
        known = {key: self._known(key) for key in keys}
        missing = {key: messages for key, messages in zip(keys, asked, strict=True) if known[key] is None}
        progress(len(known) - len(missing))
        pool = concurrent.futures.ThreadPoolExecutor(self._settings.concurrency)
        try:
            futures = {pool.submit(self._ask_unless_stopped, key, messages): key for key, messages in missing.items()}
            for done, future in enumerate(concurrent.futures.as_completed(futures), 1):
                known[futures[future]] = future.result()
                progress(len(known) - len(missing) + done)
        finally:
            self._stopped.set()
            pool.shutdown(wait=True, cancel_futures=True)
        return [known[key] for key in keys]

    def _known(self, key: str) -> Verdict | None:
        reply = self._replies.get(key)
        choice = None if reply is None else parse(self._settings.verdict_pattern, reply)
        return None if choice is None else Verdict(choice)

    def _ask_unless_stopped(self, key: str, messages: Messages) -> Verdict:
        """The first failure stops all threads, before the one that collects their verdicts hears of it."""
        if self._stopped.is_set():
            return Verdict(None, "not asked")
        try:
            return self._ask(key, messages)
        except BaseException:
            self._stopped.set()
            raise

    def _ask(self, key: str, messages: Messages) -> Verdict:
        wait_s = self._settings.malformed_wait_s
        for attempt in range(1 + self._settings.malformed_retries):
            if attempt and self._stopped.wait(wait_s * 2 ** (attempt - 1)):
                break
            try:
                reply = _text(self._request(messages))
            except _RefusedError as error:
                return Verdict(None, f"HTTP {error}")
            choice = None if reply is None else parse(self._settings.verdict_pattern, reply)
            if choice is not None:
                self._replies.put(key, reply)
                return Verdict(choice)
        return Verdict(None, "malformed reply")

    def _request(self, messages: Messages) -> Any:
        """What the endpoint sends back, whatever it is. The endpoint's own words of error may hold the key or the
        user's data, so they go nowhere, and neither does the exception that holds them."""
        settings = self._settings
        try:
            return self._client.chat.completions.create(model=settings.model, messages=messages, **settings.request)
        except openai.APIStatusError as error:
            status = error.status_code
        except openai.APITimeoutError:
            status = f"nothing within {settings.timeout_s:g} s"
        except openai.APIConnectionError:
            status = "no connection"
        except (openai.APIResponseValidationError, ValueError):
            return None
        except TypeError as error:
            raise UsageError(f"request: the openai client does not take it ({error})") from None
        if status in REQUEST_REFUSED:
            raise _RefusedError(status)
        if status in KEY_REFUSED:
            raise UsageError(f"the endpoint refuses the key in {settings.api_key_variable} (HTTP {status})")
        if status in NOT_FOUND:
            raise UsageError(
                f"the endpoint has no model {settings.model!r}, or --base-url does not name an OpenAI-compatible "
                f"endpoint (HTTP {status})"
            )
        told = f"HTTP {status}" if isinstance(status, int) else status
        raise RuntimeError(
            f"the judge's endpoint gave no reply in {1 + settings.retries} attempts (last: {told}); the replies so far "
            "are kept: the same command again goes on from them"
        )


class _RefusedError(Exception):
    """The endpoint takes no such request, a too long one say; never leaves this file."""


def _text(completion: Any) -> str | None:
    """The text of a reply, as far as it is one: an endpoint can send anything."""
    choices = getattr(completion, "choices", None)
    message = getattr(choices[0], "message", None) if isinstance(choices, list) and choices else None
    content = getattr(message, "content", None)
    return content if isinstance(content, str) else None


def _whole_lines(path: Path) -> list[dict[str, str]]:
    """The lines of an earlier run; one that a kill cut short is taken off the file."""
    if not path.exists():
        return []
    try:
        lines = lines_of(path.read_text(encoding="utf-8"))
        if lines and not lines[-1].endswith("\n"):
            lines.pop()
            path.write_text("".join(lines), encoding="utf-8")
        parsed = [json.loads(line) for line in lines]
        if not all(isinstance(line["key"], str) and isinstance(line["reply"], str) for line in parsed):
            raise ValueError("a line is not of text")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: damaged ({type(error).__name__}); delete it, and all is asked again") from error
    return parsed
