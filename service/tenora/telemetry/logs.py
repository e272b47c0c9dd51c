"""Structured logs on stderr: one line per event, with the id of the request that caused it.

A log line never holds a prompt, a completion or a key. Messages are constants, values go into named fields, exceptions
that are not Tenora's own are recorded by class and place only (their text may quote what a client sent), and what looks
like a key is struck out on the way.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
import traceback
from contextvars import ContextVar
from typing import Any, Final, TextIO

from tenora.errors import TenoraError

request_id: ContextVar[str | None] = ContextVar("tenora_request_id", default=None)

_STANDARD: Final = frozenset(logging.LogRecord("", 0, "", 0, "", None, None).__dict__) | {
    "message",
    "asctime",
    "taskName",
}
_KEY = re.compile(r"\btk-[A-Za-z0-9_-]{6,}|(?i:bearer)\s+[^\s\"']+")


def redact(text: str) -> str:
    """`text` with everything that looks like an API key struck out."""
    return _KEY.sub("[key]", text)


def describe(error: BaseException) -> dict[str, Any]:
    """Class and place of an exception and its causes, innermost frame last; the text only of Tenora's own."""
    frames = traceback.extract_tb(error.__traceback__)
    described: dict[str, Any] = {
        "class": type(error).__name__,
        "frames": [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames[-12:]],
    }
    if isinstance(error, TenoraError):
        described["message"] = error.message
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if cause is not None:
        described["cause"] = describe(cause)
    return described


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    extra = {name: value for name, value in record.__dict__.items() if name not in _STANDARD and value is not None}
    current = request_id.get()
    if current is not None:
        extra.setdefault("request_id", current)
    if record.exc_info and record.exc_info[1] is not None:
        extra["error"] = describe(record.exc_info[1])
    return extra


class JsonFormatter(logging.Formatter):
    """One JSON object a line, for machines."""

    def format(self, record: logging.LogRecord) -> str:
        """The line without its end."""
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        return redact(json.dumps(line, default=str, ensure_ascii=False))


class TextFormatter(logging.Formatter):
    """The same for people at a terminal: time, level, message, then `name=value`."""

    def format(self, record: logging.LogRecord) -> str:
        """The line without its end."""
        fields = " ".join(f"{name}={value}" for name, value in _fields(record).items())
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        return redact(f"{clock} {record.levelname.lower():7} {record.name}: {record.getMessage()} {fields}".rstrip())


def configure(level: str, stream: TextIO | None = None) -> None:
    """Send every logger's lines to `stream` (default stderr): JSON, or plain text if it is a terminal."""
    stream = stream or sys.stderr
    handler = logging.StreamHandler(stream)
    handler.setFormatter(TextFormatter() if stream.isatty() else JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for chatty in ("httpx", "httpcore", "aiosqlite", "alembic", "asyncio", "uvicorn"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    # Its access log would repeat ours with raw paths.
    logging.getLogger("uvicorn.access").disabled = True
