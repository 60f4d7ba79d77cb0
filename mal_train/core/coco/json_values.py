"""Rules for JSON values from files: how deep they may be nested, and their form in messages."""

import json
from pathlib import Path
from typing import Any, Final

from mal_train.core.errors import BadDataset

MAX_NESTING: Final = 100
"""Maximum depth of lists and objects in each other: far below Python's limit of recursion, so that what was read can
also be written, shown and sent to another process."""

_NESTED: Final = frozenset((dict, list))
_MAX_SHOWN_CHARS: Final = 80


def json_problem(error: ValueError) -> str:
    r"""Returns what is wrong in a text that is not JSON, with line and column, counted from 1.

    >>> try: json.loads("{\n1}")
    ... except ValueError as error: print(json_problem(error))
    Expecting property name enclosed in double quotes, line 2, column 1
    """
    if not isinstance(error, json.JSONDecodeError):  # text of another encoding, or a number of thousands of digits
        return str(error)
    if not error.doc.strip():
        return "empty file"
    return at_position(error.msg, error.lineno, error.colno)


def at_position(text: str, line: int, column: int) -> str:
    """Returns a problem with its position in a file, counted from 1."""
    return f"{text}, line {line}, column {column}"


def check_nesting(value: Any, path: Path) -> Any:
    """Returns a JSON value of the file at `path`. Raises BadDataset if it is nested more than MAX_NESTING deep."""
    if is_too_deep(value):
        raise too_deep(path)
    return value


def is_too_deep(value: Any) -> bool:
    """Returns True for a JSON value that is nested more than MAX_NESTING deep."""
    layer = [value] if type(value) in _NESTED else []
    for _ in range(MAX_NESTING):
        inner: list[Any] = []
        for one in layer:
            values = one.values() if isinstance(one, dict) else one
            # Most lists hold numbers only; this looks at them without a step of Python for each.
            if not _NESTED.isdisjoint(map(type, values)):
                inner += [each for each in values if type(each) in _NESTED]
        if not inner:
            return False
        layer = inner
    return True


def too_deep(path: Path) -> BadDataset:
    """Returns the error for a file that is nested too deeply."""
    return BadDataset(f"{path}: lists and objects nested more than {MAX_NESTING} deep; a COCO file needs 5")


def as_json(value: object) -> str:
    """Returns a value as JSON, shortened to _MAX_SHOWN_CHARS characters."""
    try:
        text = json.dumps(value)
    except ValueError:
        # Python limits the conversion of an integer to text to 4300 digits.
        text = "a number of thousands of digits"
    except RecursionError:
        text = "a deeply nested value"
    return text if len(text) <= _MAX_SHOWN_CHARS else f"{text[: _MAX_SHOWN_CHARS - 3]}..."


def json_type(value: object) -> str:
    """Returns the JSON type of a value in words."""
    return {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
    }.get(type(value), "null")
