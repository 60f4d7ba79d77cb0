"""Reads boxes from a CSV file with one row per box."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, TextIO

from mal_client.formats.boxes import (
    BAD_ROW,
    SHARE_TOLERANCE,
    BoxRecord,
    Row,
    RowError,
    are_shares,
    check_shares,
)
from mal_client.formats.class_names import ClassNames
from mal_client.formats.csv_columns import Columns
from mal_client.formats.label_files import FindImage, unreadable
from mal_client.formats.row_forms import Units
from mal_train.core.errors import BadDataset
from mal_train.core.input_files import open_text

MAX_ROW_CHARS: Final = 1024 * 1024
"""Longest row of a file; one of boxes has some hundred characters."""

MAX_UNDECIDED: Final = 10_000
"""Rows that are held until one shows the unit of the table, or what width and height are."""

DELIMITERS: Final = ",;\t|"
_SEP: Final = re.compile(r'"?sep=([,;|\t:])"?[,;|\t]*', re.IGNORECASE)
"""First line by which spreadsheets name the delimiter; those that save it again add delimiters."""

_MID: Final = re.compile(r"/[mgt]/[0-9a-z_]+$")
"""Identifier of a class in Open Images."""


@dataclass
class CsvTable:
    """A CSV file of boxes.

    The file needs a column of file names and the columns of either corners (left, top, right, bottom) or x, y, width
    and height, under one of the names in `csv_columns`, in any case; or Open Images' header. Without a category column,
    every box is an "object". The delimiter is a comma, semicolon, tab or "|", or that of a first line such as "sep=;".

    A row of the other unit than that of the table, and a box in a table of pixels that lies in [0, 1], is an error.

    Attributes:
        path: the file, maybe gzip.
        columns: names of the columns, for a file without a header.
        classes: names of classes by number or identifier; None: the cells are names.
        units: unit of the numbers.
        encoding: of text without a byte order mark; None is UTF-8.
        find_image: finds an image by its name without suffix.
        on_notice: receives what a user should know of the table.
    """

    path: Path
    columns: Sequence[str] = ()
    classes: ClassNames | None = None
    units: Units = Units.AUTO
    encoding: str | None = None
    find_image: FindImage = lambda name: [name]
    on_notice: Callable[[str], object] = lambda _: None

    def rows(self) -> Iterator[Row]:
        """Yields the boxes in the order of the file. Memory does not grow with it: a row is held at a time.

        Raises:
            BadDataset: the file cannot be read, a column is missing or repeated, or a row has more than MAX_ROW_CHARS.
        """
        try:
            with open_text(self.path, self.encoding or "utf-8") as file:
                yield from self._rows(file)
        except (OSError, UnicodeError) as error:
            raise BadDataset(f"{self.path}: {unreadable(error, self.encoding)}") from None

    def _rows(self, file: TextIO) -> Iterator[Row]:
        lines = _Lines(self.path, file)
        delimiter = _delimiter(lines)
        table = csv.reader(lines, delimiter=delimiter, skipinitialspace=True)
        try:
            header = [name.strip().lower() for name in (self.columns or next(table, []))]
            lines.end_row()
            columns = Columns(str(self.path), header, self.classes, self.find_image)
            if columns.unread:
                self.on_notice(f"{self.path.name}: columns that are not read: {', '.join(columns.unread)}")
            yield from self._in_units(self._records(self._cells(table, lines, delimiter), columns), columns)
        except csv.Error as error:
            raise BadDataset(
                f"{self.path}: line {table.line_num}: {error}; check for a missing quotation mark"
            ) from None

    def _records(self, rows: Iterator[tuple[list[str], str]], columns: Columns) -> Iterator[Row]:
        undecided: list[tuple[list[str], str]] = []
        for row in rows:
            undecided.append(row)
            if columns.is_size_of_box is None:
                columns.decide_size(row[0])
            if columns.is_size_of_box is not None or len(undecided) > MAX_UNDECIDED:
                columns.is_size_of_box = bool(columns.is_size_of_box)
                yield from (columns.read(*held) for held in undecided)
                undecided.clear()
        yield from (columns.read(*held) for held in undecided)

    def _cells(self, table: Iterator[list[str]], lines: _Lines, delimiter: str) -> Iterator[tuple[list[str], str]]:
        """Yields the cells and the place of each row."""
        first = lines.number + 1
        for row in table:
            last = lines.number
            if any(cell.strip() for cell in row):
                # A quotation mark that is not closed swallows lines: the place names all of them.
                cells = _with_spaces(row, lines.of_row, delimiter)
                yield cells, f"{self.path.name}:{first}{f'-{last}' if last > first else ''}"
            first = last + 1
            lines.end_row()

    def _in_units(self, rows: Iterator[Row], columns: Columns) -> Iterator[Row]:
        units = Units.SHARES if columns.is_open_images and self.units is Units.AUTO else self.units
        undecided: list[Row] = []
        is_named = self.classes is not None or not columns.is_open_images
        for row in rows:
            if not is_named and isinstance(row, BoxRecord) and _MID.match(row.category):
                is_named = True
                self.on_notice(
                    f"classes stay Open Images' identifiers, such as {row.category[:40]}; give their names by --names "
                    "class-descriptions-boxable.csv, which lies beside the boxes where they are downloaded"
                )
            if units is Units.AUTO and isinstance(row, BoxRecord):
                units = _units_of(row)
                if units is Units.SHARES:
                    self.on_notice(f"{row.where}: shows that the numbers are shares of width and height")
            if units is Units.AUTO and len(undecided) < MAX_UNDECIDED:
                undecided.append(row)
                continue
            yield from (self._in_unit(held, units) for held in (*undecided, row))
            undecided.clear()
        yield from (self._in_unit(held, units) for held in undecided)

    def _in_unit(self, row: Row, units: Units) -> Row:
        """Returns a box in the unit of the table, or its error."""
        if not isinstance(row, BoxRecord):
            return row
        if units is Units.SHARES:
            return check_shares(row.xyxy, row.where) or replace(row, is_normalized=True)
        if are_shares(row.xyxy) and self.units is not Units.PIXELS:
            numbers = ", ".join(f"{value:g}" for value in row.xyxy)
            text = f"box {numbers}; a pixel, or shares of width and height? Give --units pixels or shares"
            return RowError(row.where, BAD_ROW, f"{row.where}: {text}")
        return row


def _units_of(row: BoxRecord) -> Units:
    """Returns the unit that a box shows; AUTO for one of whole numbers in [0, 1]."""
    if not all(-SHARE_TOLERANCE <= value <= 1 + SHARE_TOLERANCE for value in row.xyxy):
        return Units.PIXELS
    return Units.AUTO if all(value.is_integer() for value in row.xyxy) else Units.SHARES


def _delimiter(lines: _Lines) -> str:
    """Returns the delimiter of a table: that which a first line such as "sep=;" names, else the most frequent one."""
    _skip_blank(lines)
    named = _SEP.fullmatch(lines.peek().rstrip("\r\n"))
    if named is None:
        return max(DELIMITERS, key=lines.peek().count)
    next(lines)
    _skip_blank(lines)
    return named[1]


def _skip_blank(lines: _Lines) -> None:
    while lines.peek().isspace():
        next(lines)
    lines.end_row()


def _with_spaces(row: list[str], lines: Sequence[str], delimiter: str) -> list[str]:
    """Returns the cells of a row with the spaces before them, as far as these precede no quotation mark.

    They separate cells in some tables, and begin a name in others.
    """
    if not any(line.startswith(" ") or f"{delimiter} " in line for line in lines):
        return row
    cells = next(csv.reader(lines, delimiter=delimiter))
    return cells if [cell.lstrip() for cell in cells] == [cell.lstrip() for cell in row] else row


class _Lines:
    """Lines of a file for the parser of a table, one at a time.

    Attributes:
        number: lines that were given out.
        of_row: lines that were given out since the last call of `end_row`.
    """

    def __init__(self, path: Path, file: TextIO) -> None:
        self.number = 0
        self.of_row: list[str] = []
        self._row_chars = 0
        self._path = path
        self._file = file
        self._ahead: str | None = None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self.peek()
        self._ahead = None
        if not line:
            raise StopIteration
        self.number += 1
        self.of_row.append(line)
        return line

    def peek(self) -> str:
        """Returns the next line, "" at the end, without giving it out."""
        if self._ahead is None:
            self._ahead = self._read()
        return self._ahead

    def end_row(self) -> None:
        """Ends the row that the lines so far belong to."""
        self.of_row.clear()
        self._row_chars = 0

    def _read(self) -> str:
        line = self._file.readline(MAX_ROW_CHARS + 1)
        self._row_chars += len(line)
        if self._row_chars > MAX_ROW_CHARS:
            raise BadDataset(
                f"{self._path}: a row of more than {MAX_ROW_CHARS} characters; check for a missing quotation mark"
            )
        return line
