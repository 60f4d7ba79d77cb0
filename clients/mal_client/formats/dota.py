"""Reads boxes of DOTA: a text file per image, a row per object with four corners in px, which may be rotated."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Final

from mal_client.formats.boxes import BAD_FILE, BAD_ROW, BoxRecord, Row, RowError, are_shares, parse_numbers
from mal_client.formats.label_files import (
    ImageNames,
    ImageRows,
    annotation_files,
    file_rows,
    only_image,
    read_label_lines,
    without_rivals,
    without_suffix,
)
from mal_client.formats.rotated import extent
from mal_train.core.numbers import counted, number_of

NAMES: Final = ("x1", "y1", "x2", "y2", "x3", "y3", "x4", "y4")
HEADERS: Final = ("imagesource:", "gsd:")
DIFFICULT: Final = ("0", "1", "2")
RESULTS: Final = re.compile(r"task[0-9]_")
"""Begins the lower-case name of a file of results, one per class, for DOTA's evaluation."""
NO_RESULTS: Final = "results (image score x1 y1 …) are not converted; give the ground truth"


def read_dota(labels_dir: Path, images: ImageNames, encoding: str | None = None) -> Iterator[Row]:
    """Yields the boxes of all text files below a folder, file by file.

    A row is `x1 y1 x2 y2 x3 y3 x4 y4 class`, optionally followed by `difficult`, which is kept. The lines
    `imagesource:` and `gsd:` at the beginning of a file are no boxes. Rows and files of results, which have as many
    columns, are errors: a class that is a number, or another `difficult` than 0, 1 or 2, may be a column of theirs.

    Args:
        labels_dir: folder of the text files, with the names and subfolders of the images.
        images: the images.
        encoding: of text without a byte order mark; None is UTF-8.
    """
    yield from without_rivals(_read_files(labels_dir, images, encoding))


def _read_files(labels_dir: Path, images: ImageNames, encoding: str | None) -> Iterator[ImageRows | RowError]:
    for path, name in annotation_files(labels_dir, ".txt"):
        stem = PurePosixPath(without_suffix(name))
        found = images.find(stem.name, str(stem.parent))
        if not found and RESULTS.match(stem.name.lower()):
            yield RowError(name, BAD_FILE, f"{name}: {NO_RESULTS}")
            continue
        image = only_image(name, str(stem), found)
        lines = image if isinstance(image, RowError) else read_label_lines(path, name, encoding)
        if isinstance(image, RowError):
            yield image
            continue
        if isinstance(lines, RowError):
            yield replace(lines, images=(image,))
            continue
        rows = [
            _read_row(line.split(), f"{name}:{number}", image)
            for number, line in enumerate(lines, start=1)
            if line.strip() and not line.lower().startswith(HEADERS)
        ]
        yield file_rows(name, image, [*rows])


def _read_row(cells: list[str], where: str, file_name: str) -> BoxRecord | RowError:
    if len(cells) not in (len(NAMES) + 1, len(NAMES) + 2):
        text = (
            f"{counted(len(cells), 'column')}; expected x1 y1 x2 y2 x3 y3 x4 y4 class [difficult], separated by spaces"
        )
        return RowError(where, BAD_ROW, f"{where}: {text}")
    corners = parse_numbers(cells[: len(NAMES)], NAMES, where)
    if isinstance(corners, RowError):
        return replace(corners, message=f"{corners.message}; {NO_RESULTS}") if len(cells) > len(NAMES) + 1 else corners
    category, *difficult = cells[len(NAMES) :]
    if number_of(category) is not None:
        text = f"class {category[:100]!r}; expected a name after the corners; {NO_RESULTS}"
        return RowError(where, BAD_ROW, f"{where}: {text}")
    if difficult and difficult[0] not in DIFFICULT:
        rule = f"expected {', '.join(DIFFICULT)} as last column, and a class without spaces"
        text = f"difficult {difficult[0][:100]!r}; {rule}"
        return RowError(where, BAD_ROW, f"{where}: {text}")
    if are_shares(corners):
        return RowError(where, BAD_ROW, f"{where}: corners in [0, 1]; expected pixels, not shares")
    extra = {"difficult": difficult[0]} if difficult else {}
    return BoxRecord(where, file_name, category, extent(corners), corners=corners, extra=extra)
