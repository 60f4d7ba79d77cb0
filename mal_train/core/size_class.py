"""Defines the size classes of boxes: those of COCO, by area, and the network's exception to them."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mal_train.core.settings import Compat

SIZE_NAMES = ("small", "medium", "large")
SIZE_BOUNDS = (32.0**2, 96.0**2)
"""Upper bounds of small and medium in px², inclusive: (0, 32²], (32², 96²], larger (the size classes of COCO)."""


def size_class(area: ArrayLike) -> NDArray[np.int64]:
    """Returns the size class 0, 1 or 2 (small, medium, large) of each positive area in px²; any shape.

    >>> size_class([1024.0, 1024.5, 9216.0, 9217.0]).tolist()
    [0, 1, 1, 2]
    """
    return np.searchsorted(np.asarray(SIZE_BOUNDS), np.asarray(area, dtype=np.float64), side="left").astype(np.int64)


def network_size_class(area: ArrayLike, compat: Compat) -> NDArray[np.int64]:
    """Returns the size class that the network uses for box areas in px²: `size_class`, with one exception under `tao`.

    The published network has three open intervals, so areas of exactly 32² and 96² belong to none: −1, zero logits.
    """
    area_array = np.asarray(area, dtype=np.float64)
    classes = size_class(area_array)
    if compat is Compat.TAO:
        classes = np.where(np.isin(area_array, SIZE_BOUNDS), -1, classes)
    return classes
