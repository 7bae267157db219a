"""A server on loopback that speaks the chat-completions protocol, as well or as badly as a test asks.

By itself (`python tests/fake_endpoint.py`) it prints its address and prefers the longer of two answers.
"""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = str | bytes | Iterator[bytes] | tuple[int, dict[str, str]] | None
"""A reply's text; a raw body, whole or in parts as they come; a status with headers; None closes the connection."""


class Endpoint:
    """The requests that the server got. `answer` takes a whole request and the number of times that it came before."""

    def __init__(self, answer: Callable[[dict[str, Any], int], Answer]):
        self.answer, self.requests, self.headers = answer, [], []
        self.most_at_once = self._at_once = 0
        self.lock = threading.Lock()
        self.url = ""

    @property
    def distinct(self) -> int:
        return len({json.dumps(request["messages"]) for request in self.requests})

    def take(self, request: dict[str, Any], headers: dict[str, str]) -> int:
        with self.lock:
            before = sum(known["messages"] == request["messages"] for known in self.requests)
            self.requests.append(request)
            self.headers.append(headers)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        return before

    def done(self) -> None:
        with self.lock:
            self._at_once -= 1


def completion(text: str) -> bytes:
    message = {"role": "assistant", "content": text}
    choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
    return json.dumps(
        {"id": "x", "object": "chat.completion", "created": 1, "model": "judge", "choices": choices}
    ).encode()


def shown(request: dict[str, Any]) -> tuple[str, str]:
    """The last answers shown as A and as B."""
    text = request["messages"][-1]["content"]
    if "<conversation_a>" in text:
        a, b = re.findall(r"<second_answer>\n(.*?)\n\s*</second_answer>", text, re.DOTALL)
        return a, b
    return tuple(re.search(rf"<answer_{side}>\n(.*?)\n\s*</answer_{side}>", text, re.DOTALL)[1] for side in "ab")


@contextmanager
def serve(answer: Callable[[dict[str, Any], int], Answer]) -> Iterator[Endpoint]:
    endpoint = Endpoint(answer)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            request = json.loads(body)
            before = endpoint.take(request, {name.lower(): value for name, value in self.headers.items()})
            try:
                self.send(endpoint.answer(request, before) if self.path.endswith("/v1/chat/completions") else (404, {}))
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True  # the client gave up waiting
            finally:
                endpoint.done()

        def send(self, answered: Answer) -> None:
            status, headers, body = 200, {}, b""
            match answered:
                case None:
                    self.close_connection = True
                    return
                case str():
                    body = completion(answered)
                case bytes():
                    body = answered
                case (status, headers):
                    # Endpoints like to say too much when they refuse.
                    error = {"message": f"refused: {self.headers['Authorization']}", "type": "error"}
                    body = json.dumps({"error": error}).encode()
                case parts:
                    self.send_response(status)
                    self.send_header("Content-Type", "application/json")
                    self.end_headers()
                    for part in parts:
                        self.wfile.write(part)
                    self.close_connection = True
                    return
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", **headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    endpoint.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield endpoint
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def slowly(seconds: float, answer: Answer) -> Answer:
    time.sleep(seconds)
    return answer


def main() -> None:
    """Serves until it is killed, preferring the longer answer; the first line printed is the address."""

    def longer(request: dict[str, Any], _before: int) -> str:
        a, b = shown(request)
        return f"Verdict: {'A' if len(a) > len(b) else 'B' if len(b) > len(a) else 'tie'}"

    with serve(longer) as endpoint:
        print(endpoint.url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
