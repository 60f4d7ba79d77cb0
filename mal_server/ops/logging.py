"""How log lines look: text for people, or one JSON object a line for collectors. Both show the same fields.

A line's fields travel in `extra={"fields": {...}}`; no caller puts pixels, keys or tokens there.
"""

import json
import logging
import time
from typing import Literal, TextIO

Form = Literal["text", "json"]


def set_up(level: str, form: Form, stream: TextIO) -> None:
    """Sends the log of the whole process to `stream`."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logging.basicConfig(level=level, handlers=[handler])


class TextFormatter(logging.Formatter):
    """`time=… level=… logger=… message field=value …`."""

    def __init__(self) -> None:
        super().__init__("time=%(asctime)s level=%(levelname)s logger=%(name)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line without a trace."""
        return " ".join([super().formatMessage(record), *(f"{k}={v}" for k, v in _fields(record).items())])


class JsonFormatter(logging.Formatter):
    """One object a line; `time` is UTC, ISO 8601, to the millisecond; a trace goes under `trace`."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _fields(record: logging.LogRecord) -> dict[str, object]:
    fields = getattr(record, "fields", None)
    return dict(fields) if isinstance(fields, dict) else {}
