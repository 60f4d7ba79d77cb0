"""The connected parts of a mask: which of them are specks, and whether there are several worth a look. 8-connected."""

import cv2
import numpy as np
from numpy.typing import NDArray

PART_SHARE = 0.01
_PARTS_SIDE = 512


def remove_small_regions(mask_bool: NDArray[np.bool_], min_area_px: int) -> NDArray[np.bool_]:
    """The mask (h, w) without its parts of fewer than min_area_px pixels.

    The largest part always stays, however small: a small object is no speck. Of equally large ones the first in
    reading order stays.

    >>> without_specks(np.array([[1, 1, 0, 1], [1, 1, 0, 0]], dtype=bool), 2).astype(int).tolist()
    [[1, 1, 0, 0], [1, 1, 0, 0]]
    """
    if min_area_px <= 1 or not mask_bool.size:
        return mask_bool
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask_bool.view(np.uint8), connectivity=8)
    if count <= 2:
        return mask_bool
    areas = stats[:, cv2.CC_STAT_AREA]
    stays = areas >= min_area_px
    stays[1 + int(np.argmax(areas[1:]))] = True
    stays[0] = False
    kept: NDArray[np.bool_] = stays[labels]
    return kept


def has_second_part(mask_bool: NDArray[np.bool_]) -> bool:
    """Whether a second part holds PART_SHARE of the mask (h, w), seen at most _PARTS_SIDE px wide."""
    stride = -(-max(mask_bool.shape) // _PARTS_SIDE)
    seen = np.ascontiguousarray(mask_bool[::stride, ::stride]).view(np.uint8)
    count, _, stats, _ = cv2.connectedComponentsWithStats(seen, connectivity=8)
    areas = np.sort(stats[1:count, cv2.CC_STAT_AREA])
    return areas.size > 1 and int(areas[-2]) >= PART_SHARE * int(areas.sum())
