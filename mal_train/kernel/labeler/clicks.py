"""Corrects the probabilities of a crop by the points of a user, without another pass of the network.

A click tells the class of one pixel c; how far it holds is inferred from the mask that it corrects. With the logits
m(p) of the network, relative to the threshold of the mask, the corrected ones are

    f(p) = m(p) + Σᵢ aᵢ κᵢ(p),    κ(p) = exp(−½ [(d(p)/D)² + (max(b(p)/b(c) − 1, 0)/B)² + (Δ(p)/C)²]),

where d is the distance to the click, b the distance to the nearest pixel of the other class in the mask so far, and Δ
the difference in color. The second term follows from where users click, in the middle of what is wrong: behind the
click an error reaches about as far as the edge of the mask is before it. A wrong strip along the edge thus changes in
its whole width, and the object behind it does not.

The weights a are a ridge regression: f has the class of each click with `MARGIN_LOGITS`, and stays the network's where
clicks have it already. As m is part of f, pixels of which the network is less certain than of the click change with it
at a larger distance. Clicks are added in order, since each corrects the mask of those before it. Features of the
network are no part of κ: they were tried, and gained nothing (docs/results.md).

Letters: G side of the grid, half the crop side S; K clicks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import cv2
import numpy as np
from numpy.typing import NDArray

from mal_train.core.masks.geometry import Window, box_mask_in_window
from mal_train.core.masks.points import Point
from mal_train.core.settings import Compat
from mal_train.kernel.labeler.overlaps import logits
from mal_train.kernel.labeler.types import Crop, ProbMap

MARGIN_LOGITS: Final = 4.0
"""Distance of a clicked pixel from the threshold."""
DISTANCE: Final = 0.12
"""D, in crop sides."""
DEPTH: Final = 0.6
"""B, in distances of the click from the edge of the mask."""
COLOR: Final = 100.0
"""C, in units of OpenCV's CIELAB of 8 bits."""

_MAPS_BYTES_PER_PIXEL: Final = 32
"""Peak of `corrected` without its kernels, for each pixel of the crop."""
_RIDGE: Final = 0.01
_STEP: Final = 2
"""Pixels of the crop to a cell of the grid: a finer one takes twice the time, and its masks are no better."""

_Floats = NDArray[np.float32]
_Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class _Click:
    """A point on the grid; `sign` is 1 if it is positive, else −1."""

    row: int
    column: int
    sign: float


def correcting_bytes(points: int, crop_pixels: int) -> int:
    """Returns the memory that `corrected` takes at most for the points and pixels of a crop; 0 without points."""
    kernel_bytes = crop_pixels * np.dtype(np.float32).itemsize // _STEP**2
    return points * kernel_bytes + _MAPS_BYTES_PER_PIXEL * crop_pixels if points else 0


def corrected(prob: ProbMap, crop: Crop, threshold: float, compat: Compat) -> ProbMap:
    """Returns the probabilities (S, S) float32 of a crop, corrected by its points.

    The result depends on the arguments only. Points outside the box change nothing: the mask obeys them.

    Args:
        prob: foreground probability from the network, (S, S) float32 in [0, 1].
        crop: the crop, with its pixels.
        threshold: threshold of the mask in (0, 1).
        compat: clip rule of the box.
    """
    if not crop.points:
        return prob
    side = max(len(prob) // _STEP, 1)
    is_inside = box_mask_in_window(crop.box_inside, crop.window, crop.image_hw, side, compat).astype(np.bool_)
    clicks = _clicks(crop.points, crop.window, is_inside)
    if not clicks:
        return prob
    offset = float(np.log(threshold) - np.log1p(-threshold))
    logits_SS = logits(prob) - np.float32(offset)
    start_GG = _resized(logits_SS, side, cv2.INTER_AREA)
    colors_GGC = _resized(cv2.cvtColor(crop.pixels, cv2.COLOR_RGB2LAB), side, cv2.INTER_AREA)
    fitted_GG, kernels_KGG = start_GG, np.empty((len(clicks), side, side), np.float32)
    for index, click in enumerate(clicks):
        kernels_KGG[index] = _kernel(click, fitted_GG > 0, is_inside, colors_GGC)
        so_far = slice(index + 1)
        weights_K = _weights(clicks[so_far], start_GG, kernels_KGG[so_far])
        fitted_GG = start_GG + np.tensordot(weights_K, kernels_KGG[so_far], 1)
    change_SS = _resized(fitted_GG - start_GG, len(prob), cv2.INTER_LINEAR)
    result: ProbMap = 1 / (1 + np.exp(-(logits_SS + change_SS + np.float32(offset))))
    return result


def _clicks(points: Sequence[Point], window: Window, is_inside: _Mask) -> list[_Click]:
    """Returns the points in the box, on the grid."""
    side = len(is_inside)
    clicks = []
    for point in points:
        column = int((point.x - window.x0) / window.width * side)
        row = int((point.y - window.y0) / window.height * side)
        if 0 <= row < side and 0 <= column < side and is_inside[row, column]:
            clicks.append(_Click(row, column, 1.0 if point.is_positive else -1.0))
    return clicks


def _kernel(click: _Click, mask: _Mask, is_inside: _Mask, colors_GGC: _Floats) -> _Floats:
    """Returns κ of a click, (G, G) in (0, 1], for the mask so far."""
    side, here = len(mask), (click.row, click.column)
    same_class = is_inside & ((mask & is_inside) == mask[here])
    depth = cv2.distanceTransform(np.pad(same_class, 1).view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_3)[1:-1, 1:-1]
    beyond = np.maximum(depth / max(float(depth[here]), 1.0) - 1.0, 0.0)
    position = np.arange(side, dtype=np.float32)
    distance2 = np.square(position[:, None] - click.row) + np.square(position - click.column)
    color2 = np.square(colors_GGC - colors_GGC[here]).sum(axis=2)
    exponent = distance2 / (DISTANCE * side) ** 2 + np.square(beyond / DEPTH) + color2 / COLOR**2
    result: _Floats = np.exp(-0.5 * exponent).astype(np.float32)
    return result


def _weights(clicks: Sequence[_Click], start_GG: _Floats, kernels_KGG: _Floats) -> _Floats:
    """Returns the weight (K,) of each click, 0 for those whose class needs no correction."""
    rows, columns = np.array([(click.row, click.column) for click in clicks]).T
    signs = np.array([click.sign for click in clicks])
    start = start_GG[rows, columns].astype(np.float64)
    values = kernels_KGG[:, rows, columns].T.astype(np.float64)
    weights, is_fitted = np.zeros(len(clicks)), np.zeros(len(clicks), dtype=np.bool_)
    # A correction for one click may move others below the margin; each round adds at least one.
    while (is_below := ~is_fitted & (signs * (start + values @ weights) < MARGIN_LOGITS)).any():
        is_fitted |= is_below
        part = values[np.ix_(is_fitted, is_fitted)]
        target = part.T @ (signs * MARGIN_LOGITS - start)[is_fitted]
        weights[is_fitted] = np.linalg.solve(part.T @ part + _RIDGE * np.eye(len(part)), target)
    return weights.astype(np.float32)


def _resized(values: NDArray[Any], side: int, interpolation: int) -> _Floats:
    return np.asarray(cv2.resize(values, (side, side), interpolation=interpolation), dtype=np.float32)
