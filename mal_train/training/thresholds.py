"""Fits the mask thresholds to ground truth: the value for each size class that gives the best mean IoU.

Works on the crop's grid, where one sorting of the probabilities gives the IoU at every candidate. All pixels of a crop
have the same area in the image, so these IoUs are those of the pasted masks up to their edges.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mal_train.core.masks import geometry
from mal_train.core.settings import SIZE_NAMES, Compat, size_class
from mal_train.kernel.labeler.labeler import Crop

CANDIDATES: NDArray[np.float64] = np.arange(1, 20, dtype=np.float64) * 0.05
FEWEST = 20
"""A size class with fewer instances takes the threshold that is best for all."""


def iou_curve(crop: Crop, prob: NDArray[np.float32], truth: NDArray[np.bool_], compat: Compat) -> NDArray[np.float64]:
    """IoU at each of CANDIDATES, (19,), of one crop's probability map (S, S) with a ground-truth mask (H, W)."""
    size = prob.shape[0]
    truth_crop = geometry.resize_crop(geometry.cut(truth.astype(np.uint8), crop.window), size).astype(bool)
    inside = geometry.box_mask_in_window(crop.box_inside, crop.window, crop.image_hw, size, compat).astype(bool)
    # A pixel is mask at candidate t when its probability is above t: `above` counts those candidates.
    above = np.searchsorted(CANDIDATES, prob[inside], side="left")
    length = len(CANDIDATES) + 1
    predicted = _at_least(np.bincount(above, minlength=length))
    shared = _at_least(np.bincount(above, weights=truth_crop[inside], minlength=length))
    # Wrapped copies of the object in the margin are no ground truth of this crop.
    total = float((truth_crop & _in_image(crop, size)).sum())
    union = predicted + total - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def best_thresholds(areas: Sequence[float], curves: Sequence[NDArray[np.float64]]) -> tuple[float, float, float] | None:
    """Thresholds for small, medium and large boxes from box areas in px² and their `iou_curve`s; None without any.

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
        _best(stacked[classes == k]) if np.count_nonzero(classes == k) >= FEWEST else overall
        for k in range(len(SIZE_NAMES))
    )
    return small, medium, large


def _best(curves: NDArray[np.float64]) -> float:
    return round(float(CANDIDATES[int(curves.mean(axis=0).argmax())]), 2)


def _at_least(counts: NDArray[np.generic]) -> NDArray[np.float64]:
    """counts[k] of pixels above exactly k candidates → pixels above candidate number t, for each t."""
    return np.cumsum(counts[::-1].astype(np.float64))[::-1][1:]


def _in_image(crop: Crop, size: int) -> NDArray[np.bool_]:
    height, width = crop.image_hw
    window = crop.window
    columns = window.x0 + (np.arange(size) + 0.5) * window.width / size
    rows = window.y0 + (np.arange(size) + 0.5) * window.height / size
    inside: NDArray[np.bool_] = ((rows >= 0) & (rows < height))[:, None] & ((columns >= 0) & (columns < width))[None, :]
    return inside
