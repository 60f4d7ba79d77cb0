"""Reads the members of a JSON object from a file, lists row by row, with one row in memory at a time.

The values are exactly those of `json.loads`. ijson 3.6 (yajl2_c) iterates a list 1.5 times faster (2.2 s instead of
3.4 s of CPU time for 300 000 rows with polygons, 94 MB) but does not keep that promise: it rejects NaN and integers
above 64 bits, replaces lone surrogates by "?", and cannot tell a member "annotations.item" from a row of "annotations".
"""

import codecs
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from mal_train.core.coco.json_file import open_json, remedy
from mal_train.core.coco.json_values import at_position, check_nesting, json_type, too_deep
from mal_train.core.errors import BadDataset

REQUIRED_LISTS: Final = ("images", "annotations")
"""Members that a COCO file must have; `categories` may be absent, since masks need no class."""
MAX_VALUE_CHARS: Final = 1 << 28
"""Default maximum length of a single value, for example one row."""

_READ_BYTES: Final = 1 << 18
_SPACE: Final = " \t\n\r"
_VALUE_ENDS: Final = frozenset(_SPACE + ",]}:")


class JsonMemberReader:
    """Reader of the members of one JSON object; a single pass over the file.

    Args:
        path: file in UTF-8, UTF-16 or UTF-32, with or without a byte order mark, also compressed by gzip.
        max_value_chars: maximum length of a single value, for example one row. Decoding one holds the interpreter.
        instead: what to give in place of a file that is not JSON, for errors; None: `remedy`.
    """

    def __init__(self, path: Path, max_value_chars: int = MAX_VALUE_CHARS, instead: str | None = None) -> None:
        self._path = path
        self._max_value_chars = max_value_chars
        self._text = _TextBuffer(path, instead)
        self._decode = json.JSONDecoder().raw_decode

    def sha256(self) -> str:
        """Returns the SHA-256 of the bytes without compression, 64 hex digits. Call it after the last member."""
        return self._text.sha256()

    def members(self) -> Iterator[tuple[str, Any]]:
        """Yields (name, value) in file order; the value of a list is an iterator over its rows.

        Use up that iterator before the next member; the reader skips the remaining rows otherwise.

        Raises:
            BadDataset: the file is unreadable, not JSON, not an object, or repeats a name.
        """
        if self._text.peek() != "{":
            raise BadDataset(not_an_object(self._path, [] if self._text.peek() == "[" else self._value()))
        names = set()
        for _ in self._entries("{", "}"):
            name = self._value()
            if not isinstance(name, str) or name in names:
                raise self._text.error("expected a unique member name")
            names.add(name)
            self._text.expect(":")
            if self._text.peek() == "[":
                rows = self._rows()
                yield name, rows
                skip_rows(rows)
            else:
                yield name, self._value()
        self._expect_end()

    def rows(self, expected: str = "a COCO results list") -> Iterator[Any]:
        """Yields the values of a file that is one list.

        Args:
            expected: what the list is, for the error.

        Raises:
            BadDataset: the file is unreadable, not JSON, or not a list.
        """
        if self._text.peek() != "[":
            value: Any = {} if self._text.peek() == "{" else self._value()
            raise BadDataset(f"{self._path}: holds {json_type(value)}; it must be {expected}")
        yield from self._rows()
        self._expect_end()

    def _expect_end(self) -> None:
        if self._text.peek():
            raise self._text.error("extra data")

    def _rows(self) -> Iterator[Any]:
        for _ in self._entries("[", "]"):
            yield self._value()

    def _entries(self, opening: str, closing: str) -> Iterator[None]:
        """Yields at the start of each entry of a list or an object; the caller reads the entry."""
        self._text.expect(opening)
        if self._text.peek() == closing:
            self._text.expect(closing)
            return
        while True:
            yield
            separator = self._text.peek()
            if separator == closing:
                self._text.expect(closing)
                return
            if separator != ",":
                raise self._text.error(f"expected ',' or '{closing}'")
            self._text.expect(",")

    def _value(self) -> Any:
        text = self._text
        text.peek()
        while True:
            try:
                value, end = self._decode(text.buffer, text.position)
            except ValueError as error:
                problem, at = (error.msg, error.pos) if isinstance(error, json.JSONDecodeError) else (str(error), None)
                if text.at_end:
                    raise text.error(problem, at) from None
                if len(text.buffer) - text.position > self._max_value_chars:
                    problem = f"{problem}; or a value of more than {self._max_value_chars} characters"
                    raise text.error(problem, at) from None
            except RecursionError:
                raise too_deep(self._path) from None
            else:
                # A number at the end of the buffer may continue ("1.5e" of "1.5e3" decodes as 1.5).
                if text.at_end or text.buffer[end : end + 1] in _VALUE_ENDS:
                    text.position = end
                    return check_nesting(value, self._path)
            text.fill()


class _TextBuffer:
    """Window over the decoded text of a file.

    Attributes:
        buffer: text read so far and not yet dropped.
        position: index of the next character in `buffer`.
        at_end: `buffer` holds the rest of the file.
    """

    def __init__(self, path: Path, instead: str | None) -> None:
        self.buffer = ""
        self.position = 0
        self.at_end = False
        self._path = path
        self._instead = instead
        self._hash = hashlib.sha256()
        self._line = self._column = 0
        self._has_dropped_text = False
        self._chunks = self._decoded_chunks()

    def sha256(self) -> str:
        return self._hash.hexdigest()

    def peek(self) -> str:
        """Skips white space and returns the next character, "" at the end of the file."""
        while True:
            while self.position < len(self.buffer):
                char = self.buffer[self.position]
                if char not in _SPACE:
                    return char
                self.position += 1
            if self.at_end:
                return ""
            self.fill()

    def expect(self, char: str) -> None:
        """Consumes the next character, which must be `char`."""
        if self.peek() != char:
            raise self.error(f"expected {char!r}")
        self.position += 1

    def fill(self) -> None:
        """Drops the consumed text and at least doubles the rest, so that a long value is decoded only a few times."""
        pieces = [self.buffer[self.position :]]
        missing = max(1, len(pieces[0]))
        while missing > 0:
            piece = next(self._chunks, None)
            if piece is None:
                self.at_end = True
                break
            pieces.append(piece)
            missing -= len(piece)
        self._line, self._column = self._place(self.position)
        self._has_dropped_text = self._has_dropped_text or bool(self.buffer[: self.position].strip())
        self.buffer, self.position = "".join(pieces), 0

    def error(self, message: str, at: int | None = None) -> BadDataset:
        """Returns the error for invalid JSON at an index of `buffer`; None: at the current position."""
        line, column = self._place(self.position if at is None else at)
        is_empty = not (self._has_dropped_text or self.buffer.strip())
        detail = "empty file" if is_empty else at_position(message, line + 1, column + 1)
        return BadDataset(f"{self._path}: not JSON ({detail}); {self._instead or remedy(self._path)}")

    def _place(self, index: int) -> tuple[int, int]:
        """Returns line and column in the file, from 0, of an index of `buffer`."""
        last = self.buffer.rfind("\n", 0, index)
        if last < 0:
            return self._line, self._column + index
        return self._line + self.buffer.count("\n", 0, index), index - last - 1

    def _decoded_chunks(self) -> Iterator[str]:
        decoder: codecs.IncrementalDecoder | None = None
        try:
            with open_json(self._path, self._instead) as file:
                while chunk := file.read(_READ_BYTES):
                    self._hash.update(chunk)
                    if decoder is None:
                        # The encodings that json.loads accepts, detected from the first bytes.
                        decoder = codecs.getincrementaldecoder(json.detect_encoding(chunk))("surrogatepass")
                    yield decoder.decode(chunk)
                if decoder is not None:
                    yield decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            raise BadDataset(f"{self._path}: not JSON ({error}); {self._instead or remedy(self._path)}") from error


def not_an_object(name: object, value: Any, instead: str | None = None) -> str:
    """Returns the message for a file that holds another value than an object, such as a bare list."""
    hint = (
        " (a COCO results list is given with --boxes or box_inputs, beside the file of its images; an export of Label "
        "Studio is converted by mal-client convert)"
    )
    hint = hint if isinstance(value, list) and instead is None else ""
    return (
        f"{name}: holds {json_type(value)}{hint}; it must be an object with "
        f"{', '.join(REQUIRED_LISTS)}; {instead or remedy(name)}"
    )


def missing_lists(name: str, missing: Sequence[str]) -> str:
    """Returns the message for a file without some of the required lists."""
    return f"{name}: has no {', '.join(map(repr, missing))}; a COCO file needs {', '.join(REQUIRED_LISTS)}"


def not_a_list(name: str, member: str, value: Any) -> str:
    """Returns the message for a file in which a member that must be a list is another value."""
    return f"{name}: {member!r} is {json_type(value)}; it must be a list"


def skip_rows(value: Any) -> None:
    """Reads the remaining rows of a member's value; does nothing for a value that is not a list."""
    if isinstance(value, Iterator):
        for _ in value:
            pass
