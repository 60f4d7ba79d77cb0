"""Log lines whose values come from clients."""

import json
import logging
import sys
from typing import Any

import pytest

from mal_server.ops.logging import MAX_VALUE_CHARS, JsonFormatter, TextFormatter, fields

FORGED = [
    "/x/y code=OK caller=admin request_id=forged",
    'a"b',
    "back\\slash",
    "two\nlines",
    "return\rhere",
    "\x1b[2J",
    "del\x7f",
    "\u202eright to left",
    "\u2028",
    "\x85",
    "",
    "tab\there",
]


def record(message: str, *args: object, **values: object) -> logging.LogRecord:
    made = logging.LogRecord("mal_server", logging.INFO, "file", 1, message, args, None)
    made.__dict__.update(fields(**values))
    return made


@pytest.mark.parametrize("value", FORGED)
def test_no_value_adds_a_field_a_line_or_a_control_character(value: str) -> None:
    line = TextFormatter().format(record("call", method=value, code="OK"))
    _, _, rest = line.partition(" call method=")
    text, end = json.JSONDecoder().raw_decode(rest)
    assert (text, rest[end:]) == (value, " code=OK")
    assert line.isascii()
    assert line.isprintable()


def test_a_plain_value_has_no_quotes() -> None:
    line = TextFormatter().format(record("call", method="mal.v1.ModelService/ListModels", took_ms=1.5))
    assert line.endswith(" call method=mal.v1.ModelService/ListModels took_ms=1.5")


@pytest.mark.parametrize("value", [v for v in FORGED if v and not v.isprintable()])
def test_no_message_adds_a_line_or_a_control_character(value: str) -> None:
    assert TextFormatter().format(record("for %s", value)).isprintable()


def raised(text: str) -> Any:
    try:
        raise ValueError(text)
    except ValueError:
        return sys.exc_info()


def test_no_error_forges_a_line_after_its_traceback() -> None:
    made = record("failed")
    made.exc_info = raised("x\ntime=now level=INFO logger=a call\r\x1b[2J")
    first, *others = TextFormatter().format(made).split("\n")
    assert first.startswith("time=")
    assert others
    assert all(line.startswith("  ") and line.isprintable() for line in others)


@pytest.mark.parametrize("form", [TextFormatter(), JsonFormatter()], ids=["text", "json"])
def test_long_values_and_messages_are_cut(form: logging.Formatter) -> None:
    assert len(form.format(record("%s", "m" * 10**6, error="e" * 10**6))) < 3 * MAX_VALUE_CHARS


def test_a_field_does_not_replace_the_parts_of_a_json_line() -> None:
    line = json.loads(JsonFormatter().format(record("call", level="DEBUG", method="a")))
    assert (line["level"], line["method"]) == ("INFO", "a")
