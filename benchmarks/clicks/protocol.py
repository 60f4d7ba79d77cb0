"""Simulates a user who corrects masks by clicks, as the literature on interactive segmentation measures it.

The next click is at the center of the largest error: of all connected regions of missing or wrong pixels the one with
the most pixels, there the pixel that is farthest from its border, the first one on a tie.

Source: Sofiiuk et al., "Reviving iterative training with mask guidance for interactive segmentation", 2021 (arXiv
2102.06583), section 4.
"""

from collections.abc import Callable, Sequence
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

from mal_train.core.masks.points import Point

Mask = NDArray[np.bool_]

TARGETS: Final = (0.80, 0.85, 0.90)
"""IoU that clicks are counted to."""


def next_click(mask: Mask, truth: Mask, col0: int = 0, row0: int = 0) -> Point | None:
    """Returns the next click of a user, None if nothing is wrong.

    >>> next_click(np.array([[1, 1, 1, 0, 0]], bool), np.array([[0, 0, 0, 0, 0]], bool))
    Point(x=1.5, y=0.5, is_positive=False)

    Args:
        mask: mask so far, (rows, columns).
        truth: true mask, (rows, columns).
        col0: column of the image that the first column is.
        row0: row of the image that the first row is.
    """
    errors = [_largest_region(truth & ~mask), _largest_region(mask & ~truth)]
    is_positive = bool(np.count_nonzero(errors[0]) >= np.count_nonzero(errors[1]))
    region = errors[0 if is_positive else 1]
    if not region.any():
        return None
    depth = cv2.distanceTransform(np.pad(region, 1).view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_5)[1:-1, 1:-1]
    row, column = np.unravel_index(int(np.argmax(depth)), depth.shape)
    return Point(col0 + int(column) + 0.5, row0 + int(row) + 0.5, is_positive)


def simulated(correct: Callable[[Sequence[Point]], tuple[float, Point | None]], clicks: int) -> list[float]:
    """Returns the IoU after 0 … `clicks` clicks; that of a mask without errors stays.

    Args:
        correct: returns the IoU of the mask that obeys some points, and the next click.
        clicks: number of clicks.
    """
    points: list[Point] = []
    ious: list[float] = []
    for _ in range(clicks + 1):
        iou, click = correct(points)
        ious.append(iou)
        if click is None:
            break
        points.append(click)
    return ious + ious[-1:] * (clicks + 1 - len(ious))


def clicks_to(ious: Sequence[float], target: float) -> int:
    """Returns the number of clicks until a mask has an IoU of `target`, at most the number of simulated clicks.

    >>> clicks_to([0.5, 0.84, 0.86, 0.8], 0.85), clicks_to([0.5, 0.6, 0.7], 0.85)
    (2, 2)
    """
    return next((count for count, iou in enumerate(ious) if iou >= target), len(ious) - 1)


def _largest_region(errors: Mask) -> Mask:
    _, labels, statistics, _ = cv2.connectedComponentsWithStats(errors.astype(np.uint8), connectivity=8)
    areas = statistics[1:, cv2.CC_STAT_AREA]
    return np.asarray(labels == 1 + int(np.argmax(areas))) if len(areas) else errors
