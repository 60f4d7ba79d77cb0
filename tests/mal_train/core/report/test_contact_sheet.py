"""The contact sheet as one image."""

import numpy as np
import pytest

from mal_train.core.report.contact_sheet import CELL, contact_sheet_image


def patch(height: int, width: int, color: tuple[int, int, int]) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.full((height, width, 3), color, dtype=np.uint8)


def center_of(sheet: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], color: tuple[int, int, int]) -> tuple[int, int]:
    rows, columns = np.nonzero((np.abs(sheet.astype(int) - color) < 3).all(axis=2))
    return int(rows.mean()), int(columns.mean())


def test_images_are_in_reading_order_and_fit_their_cells() -> None:
    colors = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    shapes = [(10, 500), (500, 10), (3, 3)]
    images = [(patch(*shape, color), "IoU 0.1") for shape, color in zip(shapes, colors, strict=True)]
    sheet = contact_sheet_image(images, columns=2)
    red, green, blue = (center_of(sheet, color) for color in colors)
    assert red[0] == pytest.approx(green[0], abs=CELL // 2)
    assert red[1] < green[1]
    assert blue[0] > red[0]
    assert blue[1] < CELL
    assert np.count_nonzero((np.abs(sheet.astype(int) - (0, 0, 250)) < 3).all(axis=2)) == CELL * CELL


def test_captions_are_below_their_images() -> None:
    with_text = contact_sheet_image([(patch(9, 9, (9, 9, 9)), "IoU 0.10")], "epoch 1")
    without = contact_sheet_image([(patch(9, 9, (9, 9, 9)), "")])
    changed = np.nonzero((with_text != without).any(axis=(1, 2)))[0]
    assert changed.min() < 20
    assert changed.max() > CELL


def test_a_sheet_without_images_is_an_image() -> None:
    assert contact_sheet_image([]).ndim == 3
