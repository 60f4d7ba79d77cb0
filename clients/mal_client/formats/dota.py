"""Reads boxes of DOTA: a text file per image, a row per object with four corners in px, which may be rotated."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Final

from mal_client.formats.boxes import BAD_ROW, BoxRecord, Row, RowError, are_shares, parse_numbers
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
from mal_train.core.numbers import counted

NAMES: Final = ("x1", "y1", "x2", "y2", "x3", "y3", "x4", "y4")
HEADERS: Final = ("imagesource:", "gsd:")


def read_dota(labels_dir: Path, images: ImageNames, encoding: str | None = None) -> Iterator[Row]:
    """Yields the boxes of all text files below a folder, file by file.

    A row is `x1 y1 x2 y2 x3 y3 x4 y4 class`, optionally followed by `difficult`, which is kept. The lines
    `imagesource:` and `gsd:` at the beginning of a file are no boxes.

    Args:
        labels_dir: folder of the text files, with the names and subfolders of the images.
        images: the images.
        encoding: of text without a byte order mark; None is UTF-8.
    """
    yield from without_rivals(_read_files(labels_dir, images, encoding))


def _read_files(labels_dir: Path, images: ImageNames, encoding: str | None) -> Iterator[ImageRows | RowError]:
    for path, name in annotation_files(labels_dir, ".txt"):
        stem = PurePosixPath(without_suffix(name))
        image = only_image(name, str(stem), images.find(stem.name, str(stem.parent)))
        lines = image if isinstance(image, RowError) else read_label_lines(path, name, encoding)
        if isinstance(image, RowError):
            yield image
            continue
        if isinstance(lines, RowError):
            yield lines
            continue
        rows = [
            _read_row(line.split(), f"{name}:{number}", image)
            for number, line in enumerate(lines, start=1)
            if line.strip() and not line.lower().startswith(HEADERS)
        ]
        yield file_rows(name, image, [*rows])


def _read_row(cells: list[str], where: str, file_name: str) -> BoxRecord | RowError:
    if len(cells) not in (len(NAMES) + 1, len(NAMES) + 2):
        text = f"{counted(len(cells), 'column')}; expected x1 y1 x2 y2 x3 y3 x4 y4 class, and difficult"
        return RowError(where, BAD_ROW, f"{where}: {text}")
    corners = parse_numbers(cells[: len(NAMES)], NAMES, where)
    if isinstance(corners, RowError):
        return corners
    if are_shares(corners):
        return RowError(where, BAD_ROW, f"{where}: corners in [0, 1]; expected pixels, not shares")
    extra = {"difficult": cells[-1]} if len(cells) > len(NAMES) + 1 else {}
    return BoxRecord(where, file_name, cells[len(NAMES)], extent(corners), corners=corners, extra=extra)
