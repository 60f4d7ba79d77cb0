"""Boxes from a table with a header: one row a box, its columns found by their usual names."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from mal_client.formats.boxes import BAD_ROW, BoxRecord, RowError, numbers
from mal_train.core.errors import BadDataset

FILE: Final = ("file_name", "filename", "file", "image", "image_name", "image_path", "path")
CATEGORY: Final = ("category", "class", "class_name", "label", "name", "category_name")
CORNERS: Final = (("x_min", "xmin", "x1", "left"), ("y_min", "ymin", "y1", "top"), ("x_max", "xmax", "x2", "right"),
                  ("y_max", "ymax", "y2", "bottom"))  # fmt: skip
SIZES: Final = (("x", "bbox_x", "left", "x_min", "xmin"), ("y", "bbox_y", "top", "y_min", "ymin"),
                ("width", "w", "bbox_width", "bbox_w"), ("height", "h", "bbox_height", "bbox_h"))  # fmt: skip

DEFAULT_CATEGORY: Final = "object"


def read_csv(path: Path, columns: Sequence[str] = ()) -> Iterator[BoxRecord | RowError]:
    """Boxes in px, in the order of the file.

    Needed are a column of file names and either left, top, right, bottom or x, y, width, height, by one of the names
    above, upper or lower case; a column of categories may be there, else all are "object". Commas, semicolons or tabs.

    Args:
        path: the table, UTF-8.
        columns: names of its columns, for a file without a header.

    Raises:
        BadDataset: it cannot be read, or a column is missing or ambiguous.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise BadDataset(f"{path}: cannot be read ({error}); a CSV file in UTF-8 is needed") from None
    first = text.split("\n", 1)[0]
    delimiter = max(",;\t", key=first.count)
    table = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        header = [name.strip().lower() for name in (columns or next(table, []))]
        places = _Places(path, header)
        for row in table:
            where = f"{path.name}:{table.line_num}"
            if any(cell.strip() for cell in row):
                yield places.read(row, where)
    except csv.Error as error:
        raise BadDataset(f"{path}: line {table.line_num}: {error}; is a quotation mark left open?") from None


class _Places:
    """Which column holds what."""

    def __init__(self, path: Path, header: list[str]) -> None:
        if len(set(header)) != len(header):
            raise BadDataset(f"{path}: a column name stands twice: {', '.join(header)}")
        self._width = len(header)
        self._file = _one_of(header, FILE)
        self._category = _one_of(header, CATEGORY)
        corners = [_one_of(header, names) for names in CORNERS]
        sizes = [_one_of(header, names) for names in SIZES]
        # Tables with corners often carry the picture's own width and height beside them.
        self._is_corners = None not in corners
        box = corners if self._is_corners else sizes
        if self._file is None or None in box:
            raise BadDataset(
                f"{path}: columns {', '.join(header) or '(none)'}; needed are file_name and x_min, y_min, x_max, y_max "
                "or x, y, width, height; for a file without a header give --columns"
            )
        self._box = [at for at in box if at is not None]
        self._names = [header[at] for at in self._box]

    def read(self, row: list[str], where: str) -> BoxRecord | RowError:
        if len(row) != self._width:
            return RowError(where, BAD_ROW, f"{where}: {len(row)} columns; {self._width} are needed")
        found = numbers((row[at] for at in self._box), self._names, where)
        if isinstance(found, RowError):
            return found
        file_name = row[self._file or 0].strip()
        if not file_name:
            return RowError(where, BAD_ROW, f"{where}: no file name")
        a, b, c, d = found
        xyxy = (a, b, c, d) if self._is_corners else (a, b, a + c, b + d)
        category = DEFAULT_CATEGORY if self._category is None else row[self._category].strip() or DEFAULT_CATEGORY
        return BoxRecord(where, file_name, category, xyxy)


def _one_of(header: list[str], names: Sequence[str]) -> int | None:
    return next((header.index(name) for name in names if name in header), None)
