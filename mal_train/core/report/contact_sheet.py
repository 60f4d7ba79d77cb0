"""Draws a contact sheet as one image: close-ups in a grid, each with a caption."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from mal_train.core.images.decoder import RgbImage

CELL = 200
"""Longest side of an image on the sheet, in px."""
CAPTION = 18
GAP = 6
COLUMNS = 6

_BACKGROUND = (24, 24, 24)
_FOREGROUND = (232, 234, 237)


def contact_sheet_image(images: Sequence[tuple[RgbImage, str]], heading: str = "", columns: int = COLUMNS) -> RgbImage:
    """Draws images (h, w, 3) row by row with their captions, each scaled to fit its cell; returns (H, W, 3) uint8.

    >>> contact_sheet_image([(np.zeros((10, 20, 3), np.uint8), "IoU 0.10")] * 3, columns=2).shape
    (472, 418, 3)

    Args:
        images: each with its caption, in ASCII.
        heading: text above the images.
        columns: images in a row.
    """
    columns = max(1, min(columns, len(images)))
    rows = max(1, -(-len(images) // columns))
    step_x, step_y = CELL + GAP, CELL + CAPTION + GAP
    sheet = np.full((rows * step_y + GAP + CAPTION, columns * step_x + GAP, 3), _BACKGROUND, dtype=np.uint8)
    _write(sheet, heading, GAP, 13)
    for index, (image, caption) in enumerate(images):
        x, y = GAP + (index % columns) * step_x, GAP + CAPTION + (index // columns) * step_y
        scaled = _scale_to_cell(image)
        height, width = scaled.shape[:2]
        top, left = y + (CELL - height) // 2, x + (CELL - width) // 2
        sheet[top : top + height, left : left + width] = scaled
        _write(sheet, caption, x, y + CELL + 13)
    return sheet


def _write(sheet: RgbImage, text: str, x: int, y: int) -> None:
    cv2.putText(sheet, text, (x, y), cv2.FONT_HERSHEY_SIMPLEX, 0.4, _FOREGROUND, 1, cv2.LINE_AA)


def _scale_to_cell(image: RgbImage) -> RgbImage:
    height, width = image.shape[:2]
    scale = CELL / max(height, width)
    size = max(1, min(CELL, round(width * scale))), max(1, min(CELL, round(height * scale)))
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(image, size, interpolation=interpolation), dtype=np.uint8)
