"""Finds connected components of masks, with 8-connectivity: removes small ones and detects masks in several parts."""

import cv2
import numpy as np
from numpy.typing import NDArray

SECOND_COMPONENT_FRACTION = 0.01
"""Least fraction of the mask's pixels for `has_second_component`."""
_MAX_SIDE_PX = 512


def remove_small_regions(
    mask_bool: NDArray[np.bool_],
    min_area_px: int,
    kept: tuple[NDArray[np.intp], NDArray[np.intp]] | None = None,
) -> NDArray[np.bool_]:
    """Returns the mask (h, w) without connected components of fewer than min_area_px pixels.

    The largest component is always kept (on a tie the first in reading order), so that a small object does not vanish.
    So are the components of the pixels `kept`, (rows, columns) of pixels of the mask.

    >>> remove_small_regions(np.array([[1, 1, 0, 1], [1, 1, 0, 0]], dtype=bool), 2).astype(int).tolist()
    [[1, 1, 0, 0], [1, 1, 0, 0]]
    """
    if min_area_px <= 1 or not mask_bool.size:
        return mask_bool
    count, labels = _components(mask_bool)
    if count <= 2:
        return mask_bool
    areas = np.bincount(labels.ravel())
    is_kept = areas >= min_area_px
    is_kept[1 + int(np.argmax(areas[1:]))] = True
    if kept is not None:
        is_kept[labels[kept]] = True
    is_kept[0] = False
    result: NDArray[np.bool_] = is_kept[labels]
    return result


def has_second_component(mask_bool: NDArray[np.bool_]) -> bool:
    """Returns True if a second component holds at least SECOND_COMPONENT_FRACTION of the mask (h, w).

    Masks with a side above 512 px are subsampled first.
    """
    stride = -(-max(mask_bool.shape) // _MAX_SIDE_PX)
    count, labels = _components(np.ascontiguousarray(mask_bool[::stride, ::stride]))
    if count <= 2:
        return False
    areas = np.sort(np.bincount(labels.ravel())[1:])
    return int(areas[-2]) >= SECOND_COMPONENT_FRACTION * int(areas.sum())


def _components(mask_bool: NDArray[np.bool_]) -> tuple[int, NDArray[np.int32]]:
    """Returns the number of components, the background included, and the component of each pixel; 0: background."""
    # OpenCV's statistics of each component would take six times as long.
    count, labels = cv2.connectedComponents(mask_bool.view(np.uint8), connectivity=8)
    return count, np.asarray(labels, dtype=np.int32)
