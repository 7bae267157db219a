"""No secret reaches a log, a manifest, a checkpoint or a traceback: they live in the environment alone.

A configuration that holds one is refused (`config.py`), so that nothing made from it can; what libraries say is
redacted on its way out.
"""

import logging
import os
import re

NAMES = re.compile(
    r"(token(?!s|iz)|secret|password|passwd|credential|api_?key|access_?key|private_?key|(^|_)key$)(?!.*_(path|file|dir)$)",
    re.IGNORECASE,
)
"""Keys and environment variables whose values are secrets; a path to one is none."""
SHAPES = re.compile(r"\bhf_[A-Za-z0-9]{16,}|(?<=://)[^/@\s:]+:[^/@\s]+(?=@)|(?<=Bearer )[A-Za-z0-9._~+/-]{8,}=*")
"""What is a secret wherever it comes from: hub tokens, user:password in an address, bearer tokens."""
SHORTEST = 8
MARK = "[redacted]"


def redact(text: str) -> str:
    """The text without the values of the environment's secrets, and without what looks like one."""
    for secret in _environment_secrets():
        text = text.replace(secret, MARK)
    return SHAPES.sub(MARK, text)


def is_secret_name(name: str) -> bool:
    return bool(NAMES.search(name))


def holds_secret(value: str) -> bool:
    return redact(value) != value


class Formatter(logging.Formatter):
    """Log lines, redacted whole: message, arguments and traceback."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def _environment_secrets() -> list[str]:
    """Longest first, so that one that contains another goes whole."""
    found = {value for name, value in os.environ.items() if len(value) >= SHORTEST and is_secret_name(name)}
    return sorted(found, key=len, reverse=True)
