"""Formats log lines as text or as one JSON object each, with the same fields.

Callers pass fields in `extra={"fields": {...}}`; never pixels, keys or tokens.
"""

import json
import logging
import time
from typing import Literal, TextIO

Form = Literal["text", "json"]


def set_up(level: str, form: Form, stream: TextIO) -> None:
    """Writes the log of the process to `stream`."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logging.basicConfig(level=level, handlers=[handler])


class TextFormatter(logging.Formatter):
    """Formats `time=… level=… logger=… message field=value …`."""

    def __init__(self) -> None:
        super().__init__("time=%(asctime)s level=%(levelname)s logger=%(name)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Returns the line without its traceback."""
        return " ".join([super().formatMessage(record), *(f"{k}={v}" for k, v in _fields(record).items())])


class JsonFormatter(logging.Formatter):
    """Formats one JSON object; `time` is UTC, ISO 8601, in milliseconds; a traceback goes under `trace`."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the record as one line of JSON."""
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
