"""Draws masks on images: outline and tint, the box, the outline of the ground-truth mask."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from mal_train.core.images.decoder import RgbImage, encode_png
from mal_train.core.masks.geometry import Box
from mal_train.core.masks.rle import Rle, decode_mask

Color = tuple[int, int, int]
"""Red, green, blue."""

MASK: Color = (255, 64, 129)
TRUTH: Color = (64, 224, 255)
BOX: Color = (255, 214, 0)

# Consecutive objects get colors that are easy to tell apart, also for color-blind readers (Okabe and Ito's palette).
PALETTE: tuple[Color, ...] = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
)

TINT = 0.35
CONTEXT = 0.35
"""Margin on each side of a box in a close-up, as a fraction of its longer side."""


@dataclass(frozen=True)
class Drawn:
    """One object to draw: its mask (None: without one), its box, and a short text above it."""

    rle: Rle | None
    box_xywh: Box
    text: str = ""


def draw_labels(image: RgbImage, objects: Sequence[Drawn], max_side: int = 1280) -> RgbImage:
    """Draws every object in a color of its own on a copy of the image, shrunk to `max_side` px if it is larger."""
    height, width = image.shape[:2]
    scale = min(1.0, max_side / max(height, width))
    canvas = _resize(image, scale)
    for index, drawn in enumerate(objects):
        color = PALETTE[index % len(PALETTE)]
        if drawn.rle is not None:
            canvas = _draw_mask(canvas, _resize_mask(decode_mask(drawn.rle), canvas.shape[:2]), color)
        _draw_box(canvas, drawn.box_xywh, (0.0, 0.0), scale, color)
    # Draw texts last, so that no object covers them.
    for index, drawn in enumerate(objects):
        if np.isfinite(drawn.box_xywh).all():
            x, y = (int(np.clip(v * scale, 0, 10**4)) for v in drawn.box_xywh[:2])
            _draw_text(canvas, drawn.text, (x, max(12, y - 3)), PALETTE[index % len(PALETTE)])
    return canvas


def draw_close_up(
    image: RgbImage, box_xywh: Box, rle: Rle | None, truth: Rle | None = None, *, side: int = 240
) -> RgbImage:
    """Draws mask, ground-truth mask and box on the surroundings of the box, whose longer side becomes `side` px.

    For a box outside the image, the surroundings are the entire image.
    """
    height, width = image.shape[:2]
    x0, y0, x1, y1 = _surroundings(box_xywh, width, height)
    scale = side / max(x1 - x0, y1 - y0)
    canvas = _resize(image[y0:y1, x0:x1], scale)
    if rle is not None:
        canvas = _draw_mask(canvas, _resize_mask(decode_mask(rle)[y0:y1, x0:x1], canvas.shape[:2]), MASK)
    if truth is not None:
        mask = _resize_mask(decode_mask(truth)[y0:y1, x0:x1], canvas.shape[:2])
        cv2.drawContours(canvas, _contours(mask), -1, TRUTH, 1)
    _draw_box(canvas, box_xywh, (x0, y0), scale, BOX)
    return canvas


def png_data_uri(image: RgbImage) -> str:
    """Encodes an image as a data URI, for an <img> of a self-contained page."""
    return f"data:image/png;base64,{base64.b64encode(encode_png(image)).decode('ascii')}"


def _surroundings(box_xywh: Box, width: int, height: int) -> tuple[int, int, int, int]:
    x, y, w, h = box_xywh
    if not np.isfinite(box_xywh).all():
        return 0, 0, width, height
    pad = CONTEXT * max(w, h)
    x0, y0 = (int(np.clip(v, 0, 10**6)) for v in (x - pad, y - pad))
    x1, y1 = int(np.clip(x + w + pad + 1, 0, width)), int(np.clip(y + h + pad + 1, 0, height))
    return (x0, y0, x1, y1) if x1 > x0 and y1 > y0 else (0, 0, width, height)


def _resize(image: RgbImage, scale: float) -> RgbImage:
    height, width = image.shape[:2]
    size = max(1, round(width * scale)), max(1, round(height * scale))
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    return np.ascontiguousarray(cv2.resize(image, size, interpolation=interpolation), dtype=np.uint8)


def _resize_mask(mask: NDArray[np.bool_], size_hw: tuple[int, ...]) -> NDArray[np.uint8]:
    height, width = size_hw[0], size_hw[1]
    resized = cv2.resize(mask.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)
    return np.asarray(resized, dtype=np.uint8)


def _draw_mask(canvas: RgbImage, mask: NDArray[np.uint8], color: Color) -> RgbImage:
    tinted = canvas.astype(np.float32)
    tinted[mask > 0] += TINT * (np.asarray(color, dtype=np.float32) - tinted[mask > 0])
    drawn = np.ascontiguousarray(tinted.round(), dtype=np.uint8)
    cv2.drawContours(drawn, _contours(mask), -1, color, 2, cv2.LINE_AA)
    return drawn


def _contours(mask: NDArray[np.uint8]) -> Sequence[NDArray[np.int32]]:
    # CCOMP: also returns the outlines of holes.
    contours, _ = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    return contours  # type: ignore[return-value]


def _draw_box(canvas: RgbImage, box_xywh: Box, origin_xy: tuple[float, float], scale: float, color: Color) -> None:
    if not np.isfinite(box_xywh).all():
        return
    x, y, w, h = box_xywh
    corners = np.array([[x, y], [x + w, y + h]]) - origin_xy
    (x0, y0), (x1, y1) = np.clip(np.round(corners * scale), -(10**4), 10**4).astype(int).tolist()
    cv2.rectangle(canvas, (x0, y0), (x1 - 1, y1 - 1), color, 1)


def _draw_text(canvas: RgbImage, text: str, at_xy: tuple[int, int], color: Color) -> None:
    if not text:
        return
    font, size = cv2.FONT_HERSHEY_SIMPLEX, 0.42
    (width, height), below = cv2.getTextSize(text, font, size, 1)
    x, y = min(at_xy[0], max(0, canvas.shape[1] - width)), at_xy[1]
    # A dark background keeps the text readable on any image.
    cv2.rectangle(canvas, (x, y - height - 2), (x + width, y + below - 2), (24, 24, 24), cv2.FILLED)
    cv2.putText(canvas, text, (x, y), font, size, color, 1, cv2.LINE_AA)
