"""Writes masks as Ultralytics YOLO segmentation labels: a text file per image, a polygon per object, a data.yaml."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mal_client.formats.masks import LabelFiles, MaskFile, MaskRow, write_bytes
from mal_train.core.masks.polygons import single_polygon


def write_yolo(masks: MaskFile, images_dir: Path, folder: Path) -> None:
    """Writes `folder/labels/NAME.txt` for each image, and `folder/data.yaml`.

    A row is `class x0 y0 x1 y1 …`, shares of width and height. YOLO allows one polygon per object: components and
    holes are joined by bridges of zero width. Filling it by parity gives the mask exactly; Ultralytics also fills the
    pixels under the outline. For training, put the images in a folder `images` beside `labels`.

    Raises:
        OutputError: a file cannot be written.
    """
    files = LabelFiles(folder / "labels", ".txt", masks)
    for image, rows in masks.images():
        path = files.path(image, rows)
        if path is None:
            continue
        size = np.array([image.width, image.height], dtype=np.float64)
        lines = [_line(row, size) for row in rows]
        write_bytes(path, "".join(f"{line}\n" for line in lines).encode())
    names = "".join(f"  {number}: {_quoted(name)}\n" for number, name in enumerate(masks.names))
    images = _quoted(str(images_dir.resolve()))
    write_bytes(folder / "data.yaml", f"train: {images}\nval: {images}\nnames:\n{names}".encode())


def label_folder(images_dir: Path) -> Path | None:
    """Returns the folder in which Ultralytics looks for the labels of a folder of images; None if there is none.

    It takes the path of an image with its last folder `images` replaced by `labels`; the path that `data.yaml` names
    is the one without symbolic links.
    """
    parts = list(images_dir.resolve().parts)
    if "images" not in parts:
        return None
    last = len(parts) - 1 - parts[::-1].index("images")
    return Path(*parts[:last], "labels", *parts[last + 1 :])


def _quoted(text: str) -> str:
    r"""Returns a string of YAML, with escapes where YAML allows no character.

    JSON's escapes are none: YAML reads the two halves of a surrogate pair as two characters.

    >>> print(_quoted('tab\t "é" \x85 😀'))
    "tab\t \"é\" \x85 😀"
    """
    shown = {'"': '\\"', "\\": "\\\\"}
    return f'"{"".join(shown.get(c, c if c.isprintable() else ascii(c)[1:-1]) for c in text)}"'


def _line(row: MaskRow, size_wh: NDArray[np.float64]) -> str:
    points = (single_polygon(row.rings) / size_wh).ravel()
    return " ".join([str(row.category_index), *(f"{value:.8g}" for value in points)])
