"""Fits the map from score to expected IoU by isotonic regression on groups of instances.

Method: pool adjacent violators (Ayer et al., "An Empirical Distribution Function for Sampling with Incomplete
Information", Ann. Math. Statist. 1955). A step function would give many masks the same score, so the means of the steps
are connected by lines, and the map is stored as their knots.
"""

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mal_train.core.settings import Knots, calibrated

MIN_INSTANCES = 50
"""Number of instances below which nothing is fitted."""
GROUP_SIZE = 15
MAX_GROUPS = 20
FOLDS = 5


def fit_calibration(scores: ArrayLike, ious: ArrayLike) -> Knots | None:
    """Fits knots (score, expected IoU); None for fewer than `MIN_INSTANCES` instances.

    The map is non-decreasing, from score 0 to 1. Empty masks have score 0 and are left out; the map sends 0 to 0.

    Args:
        scores: (N,) scores of masks, in [0, 1].
        ious: (N,) IoU of the masks with their ground truth, in [0, 1].

    >>> knots = fit_calibration(np.linspace(0.5, 1, 100), np.linspace(0.25, 0.5, 100))
    >>> knots[0], knots[-1]
    ((0.0, 0.0), (1.0, 0.5))
    """
    score, iou = np.asarray(scores, dtype=np.float64), np.asarray(ious, dtype=np.float64)
    score, iou = score[score > 0.0], iou[score > 0.0]
    if score.size < MIN_INSTANCES:
        return None
    groups = np.array_split(np.argsort(score, kind="stable"), min(MAX_GROUPS, score.size // GROUP_SIZE))
    points = _monotone([(float(len(g)), float(score[g].mean()), float(iou[g].mean())) for g in groups])
    (x0, y0), (x1, y1) = [(0.0, 0.0), *points][-2:]
    # Extend the last line to score 1, which keeps the mean over the last group equal to its mean IoU.
    end = min(1.0, y1 + (y1 - y0) / (x1 - x0) * (1.0 - x1))
    knots = [(0.0, 0.0)]
    for point in points:
        rounded = (round(point[0], 6), round(point[1], 6))
        if knots[-1][0] < rounded[0] < 1.0:
            knots.append(rounded)
    return (*knots, (1.0, round(end, 6)))


def held_out_scores(scores: ArrayLike, ious: ArrayLike, images: Sequence[Hashable]) -> NDArray[np.float64] | None:
    """Returns cross-validated calibrated scores (N,): each from a map fitted without the image of its mask.

    Images are assigned to five folds in order of appearance. Returns None if too few instances remain for a fit.

    Args:
        scores: (N,) scores of masks, in [0, 1].
        ious: (N,) IoU of the masks with their ground truth, in [0, 1].
        images: image id of each mask.
    """
    score, iou = np.asarray(scores, dtype=np.float64), np.asarray(ious, dtype=np.float64)
    fold = fold_of_images(images)
    result = score.copy()
    for k in range(FOLDS):
        held_out = fold == k
        knots = fit_calibration(score[~held_out], iou[~held_out])
        if knots is None:
            return None
        result[held_out] = [calibrated(float(value), knots) for value in score[held_out]]
    return result


def fold_of_images(images: Sequence[Hashable]) -> NDArray[np.int64]:
    """Returns the fold of each mask (N,), 0 to FOLDS − 1: images are assigned in order of appearance.

    >>> fold_of_images(["a", "a", "b", "a"]).tolist()
    [0, 0, 1, 0]
    """
    index: dict[Hashable, int] = {}
    return np.array([index.setdefault(image, len(index)) % FOLDS for image in images], dtype=np.int64)


def _monotone(groups: Sequence[tuple[float, float, float]]) -> list[tuple[float, float]]:
    """Pools adjacent groups (weight, score, IoU) until the IoUs increase; returns (mean score, mean IoU) of each pool.

    >>> _monotone([(1, 0.2, 0.1), (1, 0.4, 0.5), (1, 0.6, 0.3)])
    [(0.2, 0.1), (0.5, 0.4)]
    """
    pools: list[tuple[float, float, float]] = []
    for group in groups:
        pool = group
        while pools and (pools[-1][2] >= pool[2] or pools[-1][1] >= pool[1]):
            last = pools.pop()
            weight = last[0] + pool[0]
            fraction = pool[0] / weight
            pool = (weight, last[1] + fraction * (pool[1] - last[1]), last[2] + fraction * (pool[2] - last[2]))
        pools.append(pool)
    return [(score, iou) for _, score, iou in pools]
