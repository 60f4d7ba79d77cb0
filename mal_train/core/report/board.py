"""A contact sheet as one picture: close-ups in a grid, each with a line under it."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from mal_train.core.masks.images import RgbImage

CELL = 200
"""Px of a picture's longest side on the sheet."""
CAPTION = 18
GAP = 6
COLUMNS = 6

_PAPER = (24, 24, 24)
_INK = (232, 234, 237)


def contact_sheet_picture(
    pictures: Sequence[tuple[RgbImage, str]], heading: str = "", columns: int = COLUMNS
) -> RgbImage:
    """(H, W, 3) uint8: pictures (h, w, 3) row by row with their captions, each shrunk or grown to fit its cell.

    >>> contact_sheet_picture([(np.zeros((10, 20, 3), np.uint8), "IoU 0.10")] * 3, columns=2).shape
    (472, 418, 3)

    Args:
        pictures: with the line under each; ASCII.
        heading: the line above them.
        columns: pictures in a row.
    """
    columns = max(1, min(columns, len(pictures)))
    rows = max(1, -(-len(pictures) // columns))
    step_x, step_y = CELL + GAP, CELL + CAPTION + GAP
    sheet = np.full((rows * step_y + GAP + CAPTION, columns * step_x + GAP, 3), _PAPER, dtype=np.uint8)
    _write(sheet, heading, GAP, 13)
    for at, (picture, caption) in enumerate(pictures):
        x, y = GAP + (at % columns) * step_x, GAP + CAPTION + (at // columns) * step_y
        scaled = _fitted(picture)
        height, width = scaled.shape[:2]
        top, left = y + (CELL - height) // 2, x + (CELL - width) // 2
        sheet[top : top + height, left : left + width] = scaled
        _write(sheet, caption, x, y + CELL + 13)
    return sheet


def _write(sheet: RgbImage, text: str, x: int, y: int) -> None:
    cv2.putText(sheet, text, (x, y), cv2.FONT_HERSHEY_SIMPLEX, 0.4, _INK, 1, cv2.LINE_AA)


def _fitted(picture: RgbImage) -> RgbImage:
    height, width = picture.shape[:2]
    scale = CELL / max(height, width)
    size = max(1, min(CELL, round(width * scale))), max(1, min(CELL, round(height * scale)))
    way = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(picture, size, interpolation=way), dtype=np.uint8)
