"""Fits the mask thresholds to ground truth: for each size class, the threshold with the best mean IoU.

Works on the grid of the crop, where sorting the probabilities once gives the IoU at every candidate. All pixels of a
crop cover the same area of the image, so these IoUs equal those of the pasted masks except at the mask edges.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mal_train.core.masks import geometry
from mal_train.core.masks.image_patch import MaskPixels
from mal_train.core.masks.rle import Rle
from mal_train.core.settings import Compat
from mal_train.core.size_class import SIZE_NAMES, size_class
from mal_train.kernel.labeler.types import Crop

CANDIDATES: NDArray[np.float64] = np.arange(1, 20, dtype=np.float64) * 0.05
MIN_INSTANCES = 20
"""A size class with fewer instances gets the threshold that is best for all instances."""


def iou_curve(crop: Crop, prob: NDArray[np.float32], truth: Rle, compat: Compat) -> NDArray[np.float64]:
    """Returns the IoU (19,) of a crop's probability map (S, S) with a mask of its image, at each of `CANDIDATES`.

    Raises:
        BadDataset: an object of too many px to be decoded.
    """
    size = prob.shape[0]
    truth_crop = geometry.resize_crop(geometry.cut(MaskPixels(truth), crop.window), size).astype(bool)
    inside = geometry.box_mask_in_window(crop.box_inside, crop.window, crop.image_hw, size, compat).astype(bool)
    # A pixel belongs to the mask at threshold t if its probability is above t; `above` counts these candidates.
    above = np.searchsorted(CANDIDATES, prob[inside], side="left")
    length = len(CANDIDATES) + 1
    predicted = _at_least(np.bincount(above, minlength=length))
    shared = _at_least(np.bincount(above, weights=truth_crop[inside], minlength=length))
    # The crop wraps around image borders; wrapped copies of the object in the margin are not ground truth.
    total = float((truth_crop & _in_image(crop, size)).sum())
    union = predicted + total - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def best_thresholds(areas: Sequence[float], curves: Sequence[NDArray[np.float64]]) -> tuple[float, float, float] | None:
    """Returns the best thresholds for small, medium and large boxes; None without instances.

    Args:
        areas: box areas in px².
        curves: `iou_curve` of each box.

    >>> peak = np.zeros(19); peak[5] = 1.0
    >>> best_thresholds([100.0] * 30, [peak] * 30)
    (0.3, 0.3, 0.3)
    """
    if not curves:
        return None
    stacked = np.stack(curves)
    classes = size_class(list(areas))
    overall = _best(stacked)
    small, medium, large = (
        _best(stacked[classes == k]) if np.count_nonzero(classes == k) >= MIN_INSTANCES else overall
        for k in range(len(SIZE_NAMES))
    )
    return small, medium, large


def _best(curves: NDArray[np.float64]) -> float:
    return round(float(CANDIDATES[int(curves.mean(axis=0).argmax())]), 2)


def _at_least(counts: NDArray[np.generic]) -> NDArray[np.float64]:
    """Converts counts[k] of pixels above exactly k candidates into the number of pixels above each candidate."""
    return np.cumsum(counts[::-1].astype(np.float64))[::-1][1:]


def _in_image(crop: Crop, size: int) -> NDArray[np.bool_]:
    height, width = crop.image_hw
    window = crop.window
    columns = window.x0 + (np.arange(size) + 0.5) * window.width / size
    rows = window.y0 + (np.arange(size) + 0.5) * window.height / size
    inside: NDArray[np.bool_] = ((rows >= 0) & (rows < height))[:, None] & ((columns >= 0) & (columns < width))[None, :]
    return inside
