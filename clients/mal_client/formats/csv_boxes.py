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
from mal_client.formats.label_files import FindImage
from mal_client.formats.row_forms import Units
from mal_train.core.errors import BadDataset
from mal_train.core.input_files import cause_of, open_text

MAX_ROW_CHARS: Final = 1024 * 1024
"""Longest row of a file; one of boxes has some hundred characters."""

MAX_UNDECIDED: Final = 10_000
"""Rows that are held until one shows the unit of the table, or what width and height are."""

_MID: Final = re.compile(r"/[mgt]/[0-9a-z_]+$")
"""Identifier of a class in Open Images."""


@dataclass
class CsvTable:
    """A CSV file of boxes.

    The file needs a column of file names and the columns of either corners (left, top, right, bottom) or x, y, width
    and height, under one of the names in `csv_columns`, in any case; or Open Images' header. Without a category column,
    every box is an "object". The delimiter is a comma, semicolon or tab.

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
            rule = f"expected a CSV file in {self.encoding or 'UTF-8'}, or give --encoding"
            raise BadDataset(f"{self.path}: cannot be read ({cause_of(error)}); {rule}") from None

    def _rows(self, file: TextIO) -> Iterator[Row]:
        lines = _Lines(self.path, file)
        delimiter = max(",;\t", key=lines.first.count)
        table = csv.reader(lines, delimiter=delimiter, skipinitialspace=True)
        try:
            header = [name.strip().lower() for name in (self.columns or next(table, []))]
            columns = Columns(str(self.path), header, self.classes, self.find_image)
            if columns.unread:
                self.on_notice(f"{self.path.name}: columns that are not read: {', '.join(columns.unread)}")
            yield from self._in_units(self._records(self._cells(table, lines), columns), columns)
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

    def _cells(self, table: Iterator[list[str]], lines: _Lines) -> Iterator[tuple[list[str], str]]:
        """Yields the cells and the place of each row."""
        first = lines.number + 1
        for row in table:
            last = lines.number
            if any(cell.strip() for cell in row):
                # A quotation mark that is not closed swallows lines: the place names all of them.
                yield row, f"{self.path.name}:{first}{f'-{last}' if last > first else ''}"
            first = last + 1
            lines.row_chars = 0

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


class _Lines:
    """Lines of a file for the parser of a table, one at a time.

    Attributes:
        first: the first line.
        number: lines that were given out.
        row_chars: characters of the lines since the last complete row; the reader of the rows sets it to 0.
    """

    def __init__(self, path: Path, file: TextIO) -> None:
        self.row_chars = self.number = 0
        self._path = path
        self._file = file
        self.first = self._next()
        self._is_new = True

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self.first if self._is_new else self._next()
        self._is_new = False
        if not line:
            raise StopIteration
        self.number += 1
        return line

    def _next(self) -> str:
        line = self._file.readline(MAX_ROW_CHARS + 1)
        self.row_chars += len(line)
        if self.row_chars > MAX_ROW_CHARS:
            raise BadDataset(
                f"{self._path}: a row of more than {MAX_ROW_CHARS} characters; check for a missing quotation mark"
            )
        return line
