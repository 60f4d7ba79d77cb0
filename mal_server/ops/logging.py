"""Formats log lines as text or as one JSON object each, with the same fields.

Callers pass fields in `extra=fields(...)`; never pixels, keys or tokens. Values may come from clients, so none of them
can add a field, a line, or a character that controls a terminal.
"""

import json
import logging
import re
import time
from typing import Literal, TextIO

Form = Literal["text", "json"]

MAX_VALUE_CHARS = 2000
"""Longest value and longest message; the rest is cut off."""

PLAIN = re.compile(r"[!#-<>-\[\]-~]+")
"""Values that need no quotes: printable ASCII without space, quote, equals sign and backslash."""


def set_up(level: str, form: Form, stream: TextIO) -> None:
    """Writes the log of the process to `stream`."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logging.basicConfig(level=level, handlers=[handler])


def fields(**values: object) -> dict[str, object]:
    """Returns the argument `extra` of a log call with these fields."""
    return {"fields": values}


class TextFormatter(logging.Formatter):
    """Formats `time=… level=… logger=… message field=value …`; quotes values as JSON where they need it."""

    def __init__(self) -> None:
        super().__init__("time=%(asctime)s level=%(levelname)s logger=%(name)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Returns the line without its traceback."""
        record.message = _escaped(_cut(record.message))
        return " ".join([super().formatMessage(record), *(f"{k}={_quoted(v)}" for k, v in _fields(record).items())])

    def formatException(self, ei: object) -> str:
        """Returns a traceback with every line indented, so that none looks like a line of the log."""
        return "\n".join(f"  {_escaped(line)}" for line in super().formatException(ei).split("\n"))  # type: ignore[arg-type]


class JsonFormatter(logging.Formatter):
    """Formats one JSON object; `time` is UTC, ISO 8601, in milliseconds; a traceback goes under `trace`."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the record as one line of JSON."""
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            **{k: v if isinstance(v, int | float) else _cut(str(v)) for k, v in _fields(record).items()},
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": _cut(record.getMessage()),
        }
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line)


def _quoted(value: object) -> str:
    r"""Returns a value as one word.

    >>> _quoted("mal.v1.ModelService/ListModels"), _quoted('x code=OK\n')
    ('mal.v1.ModelService/ListModels', '"x code=OK\\n"')
    """
    text = _cut(str(value))
    return text if PLAIN.fullmatch(text) else json.dumps(text)


def _escaped(text: str) -> str:
    r"""Returns a text with characters that are not printable as escapes.

    >>> _escaped("two\nlines of é")
    'two\\nlines of é'
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _cut(text: str) -> str:
    return text if len(text) <= MAX_VALUE_CHARS else text[: MAX_VALUE_CHARS - 1] + "…"


def _fields(record: logging.LogRecord) -> dict[str, object]:
    given = getattr(record, "fields", None)
    return dict(given) if isinstance(given, dict) else {}
