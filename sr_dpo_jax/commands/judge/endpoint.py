"""Asks a judge model behind an OpenAI-compatible endpoint, and keeps its replies in a file.

The client retries transport errors (408, 409, 429, 5xx, time-outs, dropped connections). A reply without a verdict is
asked for again here. Where the endpoint does not come back the run stops; the replies so far are kept. An endpoint is
not trusted: the time and the size of a reply are bounded.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from sr_dpo_jax.commands.judge.settings import Settings
from sr_dpo_jax.durable.files import finished_lines, json_digest
from sr_dpo_jax.errors import RunError, UsageError

try:
    import httpx2
    import openai
except ImportError as missing:
    raise UsageError("the openai client is not installed; pip install 'sr_dpo_jax[eval]'") from missing

log = logging.getLogger(__name__)

Messages = list[dict[str, str]]
Result = TypeVar("Result")
KEY_REFUSED, NOT_FOUND, REQUEST_REFUSED = (401, 403), (404, 405), (400, 413, 422)
MOST_BYTES = 4 * 2**20
"""The most bytes of a reply's body, before and after it is unpacked."""
ENCODINGS = ("", "identity", "gzip", "deflate")
"""The encodings of a body that are unpacked; a part of one grows a thousandfold at most. None is asked for."""
MOST_CHARACTERS = 2**16
"""The most characters of a reply in which a verdict is looked for; a longer one is malformed."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The judge's verdict on one conversation."""

    choice: str | None
    """`A`, `B` or `tie`; None where there is no verdict."""
    problem: str | None = None
    """The reason why there is none, such as `malformed reply` or `HTTP 400`."""


def request_key(settings: Settings, messages: Messages) -> str:
    """Gives the sha256 of all that a reply depends on: model, parameters, messages; not the endpoint's address."""
    return json_digest([settings.model, settings.request, messages])


def parse(pattern: str, reply: str | None) -> str | None:
    """Reads `A`, `B` or `tie` from a reply; None unless the pattern is there and all of its matches say the same."""
    if reply is None or len(reply) > MOST_CHARACTERS:
        return None
    choices = {match.casefold() for match in re.findall(pattern, reply)}
    return {"a": "A", "b": "B", "tie": "tie"}.get(choices.pop()) if len(choices) == 1 else None


class Replies:
    """The replies that hold a verdict, in a file of JSON lines of `key` and `reply`; those of earlier runs are read.

    Each is written as it comes, so that a kill loses none of them. Raises UsageError where the file is damaged.
    """

    def __init__(self, path: Path):
        self._path, self._lock, self._replies = path, threading.Lock(), _read_replies(path)
        if self._replies:
            log.info("%s: holds %d replies", path, len(self._replies))

    def get(self, key: str) -> str | None:
        """Gives the reply of a request, None where it is not known."""
        return self._replies.get(key)

    def put(self, key: str, reply: str) -> None:
        """Adds a reply to the file."""
        with self._lock, self._path.open("a", encoding="utf-8") as file:
            self._replies[key] = reply
            file.write(json.dumps({"key": key, "reply": reply}) + "\n")  # ASCII: a reply may hold half a character


class _TooLarge(Exception):
    """The body of a reply is larger than MOST_BYTES."""


class _Bounded(openai.DefaultHttpxClient):
    """Ends a reply that comes too slowly or grows too large; the client's own time-out starts again with every byte.

    A trap: a client with a transport of its own would ignore the proxies of the environment.
    """

    def __init__(self, reply_s: float):
        super().__init__()
        self._reply_s = reply_s

    def send(self, request: httpx2.Request, *, stream: bool = False, **options: Any) -> httpx2.Response:
        deadline, sent = time.monotonic() + self._reply_s, super().send
        request.headers["Accept-Encoding"] = "identity"
        response = _within(self._reply_s, lambda: sent(request, stream=True, **options))
        response.stream = _BoundedStream(response.stream, deadline)
        return response if stream else _read_whole(response)


def _within(seconds: float, work: Callable[[], Result]) -> Result:
    """Gives the result of `work`, or raises ReadTimeout after so long: headers may come byte by byte, for ever."""
    done: concurrent.futures.Future[Result] = concurrent.futures.Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # noqa: BLE001 (raised where the result is waited for)
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return done.result(seconds)
    except TimeoutError:
        raise httpx2.ReadTimeout("no headers in time") from None


def _read_whole(response: httpx2.Response) -> httpx2.Response:
    """Reads the body, unpacked; of what it says of itself only the type stays, as a charset may be any codec."""
    headers, size, parts = response.headers.copy(), 0, []
    with contextlib.closing(response):
        if headers.get("Content-Encoding", "").lower() not in ENCODINGS:
            raise _TooLarge
        for part in response.iter_bytes():
            size += len(part)
            if size > MOST_BYTES:
                raise _TooLarge
            parts.append(part)
    for name in ("Content-Encoding", "Content-Length", "Transfer-Encoding"):
        headers.pop(name, None)
    headers["Content-Type"] = headers.get("Content-Type", "").partition(";")[0]
    return httpx2.Response(response.status_code, headers=headers, content=b"".join(parts), request=response.request)


class _BoundedStream(httpx2.SyncByteStream):
    def __init__(self, stream: httpx2.SyncByteStream, deadline: float):
        self._stream, self._deadline = stream, deadline

    def __iter__(self) -> Iterator[bytes]:
        size = 0
        for part in self._stream:
            size += len(part)
            if size > MOST_BYTES:
                raise _TooLarge
            if time.monotonic() > self._deadline:
                raise httpx2.ReadTimeout("the reply is not whole in time")
            yield part

    def close(self) -> None:
        self._stream.close()


class Judge:
    """Asks for verdicts, and adds new replies to those of earlier runs; raises UsageError where there is no key."""

    def __init__(self, settings: Settings, replies: Replies):
        key = os.environ.get(settings.api_key_variable)
        if not key:
            raise UsageError(
                f"{settings.api_key_variable}: not set; it holds the key of the judge's endpoint (any word, if the "
                "endpoint asks for none). api_key_variable of --judge-config names another variable"
            )
        if not key.isascii() or not key.isprintable():
            raise UsageError(
                f"{settings.api_key_variable}: holds characters that no HTTP header can; set the key alone"
            )
        self._settings, self._replies, self._stopped = settings, replies, threading.Event()
        self._client = openai.OpenAI(
            api_key=key,
            base_url=settings.base_url,
            timeout=settings.timeout_s,
            max_retries=settings.retries,
            http_client=_Bounded(settings.timeout_s),
        )

    def verdicts(self, conversations: Sequence[Messages], progress: Callable[[int], None]) -> list[Verdict]:
        """Gives the verdict on each conversation; several of those that are not known yet are asked for at a time.

        `progress` is called with the number of verdicts so far.

        Raises:
          UsageError: the endpoint refuses the key, or knows no such model.
          RunError: the endpoint does not answer.
        """
        asked = {request_key(self._settings, messages): messages for messages in conversations}
        pattern = self._settings.verdict_pattern
        verdicts = {key: Verdict(choice) for key in asked if (choice := parse(pattern, self._replies.get(key)))}
        progress(len(verdicts))
        pool = concurrent.futures.ThreadPoolExecutor(self._settings.concurrency)
        try:
            unknown = [key for key in asked if key not in verdicts]
            futures = {pool.submit(self._ask, key, asked[key]): key for key in unknown}
            for future in concurrent.futures.as_completed(futures):
                verdicts[futures[future]] = future.result()
                progress(len(verdicts))
        finally:
            self._stopped.set()
            pool.shutdown(wait=True, cancel_futures=True)
        return [verdicts[request_key(self._settings, messages)] for messages in conversations]

    def _ask(self, key: str, messages: Messages) -> Verdict:
        """Asks until there is a verdict; a failure stops all threads before the one that collects them hears of it."""
        for attempt in range(1 + self._settings.malformed_retries):
            if self._stopped.wait(self._settings.malformed_wait_s * 2 ** (attempt - 1) if attempt else 0):
                return Verdict(None, "not asked")
            reply, failure = self._request(messages)
            if failure in REQUEST_REFUSED:
                return Verdict(None, f"HTTP {failure}")
            if failure is not None:
                self._stopped.set()
                raise self._error(failure)
            if choice := parse(self._settings.verdict_pattern, reply):
                self._replies.put(key, reply)
                return Verdict(choice)
        return Verdict(None, "malformed reply")

    def _request(self, messages: Messages) -> tuple[str | None, int | str | None]:
        """Sends a request.

        A trap: the endpoint's own error text may hold the key or the user's data. So neither that text nor an exception
        that holds it leaves this function.

        Returns:
          The text of the reply, None where there is none; and the reason of a failure, None where there was none.
        """
        settings = self._settings
        try:
            create = self._client.chat.completions.create
            completion = create(model=settings.model, messages=messages, **settings.request)
        except openai.APIStatusError as error:
            return None, error.status_code
        except openai.APITimeoutError:
            return None, f"nothing within {settings.timeout_s:g} s"
        except openai.APIConnectionError:
            return None, "no connection"
        # No JSON, nested without end, or too large.
        except (openai.APIResponseValidationError, ValueError, RecursionError, _TooLarge):
            return None, None
        except TypeError as error:
            raise UsageError(f"request: the openai client does not take it ({error})") from None
        try:  # an endpoint can send anything
            content = completion.choices[0].message.content
        except (AttributeError, LookupError, TypeError):
            return None, None
        return content if isinstance(content, str) else None, None

    def _error(self, failure: int | str) -> Exception:
        if failure in KEY_REFUSED:
            return UsageError(f"the endpoint refuses the key in {self._settings.api_key_variable} (HTTP {failure})")
        if failure in NOT_FOUND:
            return UsageError(
                f"the endpoint has no model {self._settings.model!r}, or --base-url does not name an OpenAI-compatible "
                f"endpoint (HTTP {failure})"
            )
        last = f"HTTP {failure}" if isinstance(failure, int) else failure
        return RunError(
            f"the judge's endpoint gave no reply in {1 + self._settings.retries} attempts (last: {last}); the replies "
            "so far are kept: the same command again goes on from them"
        )


def _read_replies(path: Path) -> dict[str, str]:
    """Reads the replies of an earlier run by key; a line that a kill cut short is taken off the file."""
    if not path.exists():
        return {}
    try:
        replies = {line["key"]: line["reply"] for line in map(json.loads, finished_lines(path))}
        if not all(isinstance(text, str) for text in (*replies, *replies.values())):
            raise ValueError("a line is not of text")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: damaged ({type(error).__name__}); delete it, and all is asked again") from error
    return replies
