"""Keeps secrets out of logs, manifests, checkpoints and tracebacks: they live in the environment alone.

A configuration that holds a secret is refused (`config/explain.py`), so nothing made from it can hold one. The messages
of libraries are redacted on their way out.
"""

import logging
import os
import re

NAMES = re.compile(
    r"(token(?!s|iz)|secret|password|passwd|credential|api_?key|access_?key|private_?key|(^|_)key$)(?!.*_(path|file|dir)$)",
    re.IGNORECASE,
)
"""The names of keys and environment variables whose values are secrets; a path to a secret is none."""
SHAPES = re.compile(r"\bhf_[A-Za-z0-9]{16,}|(?<=://)[^/@\s:]+:[^/@\s]+(?=@)|(?<=Bearer )[A-Za-z0-9._~+/-]{8,}=*")
"""Texts that are secrets wherever they come from: hub tokens, user:password in an address, bearer tokens."""
SHORTEST = 8
"""The least length of a variable's value that is taken for a secret; a shorter one stands in too many other words."""
MARK = "[redacted]"


def redact(text: str) -> str:
    """Gives the text without the values of the environment's secrets, and without whatever looks like a secret."""
    secrets = {value for name, value in os.environ.items() if len(value) >= SHORTEST and is_secret_name(name)}
    for secret in sorted(secrets, key=len, reverse=True):  # longest first, so that one that contains another goes whole
        text = text.replace(secret, MARK)
    return SHAPES.sub(MARK, text)


def is_secret_name(name: str) -> bool:
    """Says whether a key or environment variable of this name holds a secret."""
    return bool(NAMES.search(name))


def holds_secret(value: str) -> bool:
    """Says whether a text holds a secret."""
    return redact(value) != value


class Formatter(logging.Formatter):
    """Redacts log lines whole: message, arguments and traceback."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))
