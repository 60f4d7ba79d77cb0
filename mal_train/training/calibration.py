"""Fits the map from score to expected IoU: isotonic regression on groups of instances, as a few knots.

Pool adjacent violators: Ayer et al., "An Empirical Distribution Function for Sampling with Incomplete Information",
Ann. Math. Statist. 1955. Steps would tie scores that rank masks well, so the means of the steps are joined by lines.
"""

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mal_train.core.settings import Knots, calibrated

FEWEST = 50
"""Instances below which nothing is fitted."""
PER_GROUP = 15
MOST_GROUPS = 20
FOLDS = 5


def fit_calibration(scores: ArrayLike, ious: ArrayLike) -> Knots | None:
    """Knots (score, expected IoU) from 0 to 1 in both, never falling; None with too few instances.

    Masks with score 0 are the empty ones; the map sends 0 to 0 and is fitted on the others.

    Args:
        scores: (N,) in [0, 1].
        ious: (N,) true IoU of the same masks.

    >>> knots = fit_calibration(np.linspace(0.5, 1, 100), np.linspace(0.25, 0.5, 100))
    >>> knots[0], knots[-1]
    ((0.0, 0.0), (1.0, 0.5))
    """
    score, iou = np.asarray(scores, dtype=np.float64), np.asarray(ious, dtype=np.float64)
    score, iou = score[score > 0.0], iou[score > 0.0]
    if score.size < FEWEST:
        return None
    groups = np.array_split(np.argsort(score, kind="stable"), min(MOST_GROUPS, score.size // PER_GROUP))
    points = _rising([(float(len(g)), float(score[g].mean()), float(iou[g].mean())) for g in groups])
    (x0, y0), (x1, y1) = [(0.0, 0.0), *points][-2:]
    # The last line goes on to score 1: the mean over the last group then stays its mean IoU.
    end = min(1.0, y1 + (y1 - y0) / (x1 - x0) * (1.0 - x1))
    knots = [(0.0, 0.0)]
    for at, value in points:
        rounded = (round(at, 6), round(value, 6))
        if knots[-1][0] < rounded[0] < 1.0:
            knots.append(rounded)
    return (*knots, (1.0, round(end, 6)))


def held_out(scores: ArrayLike, ious: ArrayLike, images: Sequence[Hashable]) -> NDArray[np.float64] | None:
    """Calibrated scores (N,), each by a map fitted without its own image: what the calibration is worth elsewhere.

    Images are dealt to five folds in order of appearance. None where the rest is too few for a fit.

    Args:
        scores: (N,) in [0, 1].
        ious: (N,) true IoU of the same masks.
        images: image of each mask.
    """
    score, iou = np.asarray(scores, dtype=np.float64), np.asarray(ious, dtype=np.float64)
    number: dict[Hashable, int] = {}
    fold = np.array([number.setdefault(image, len(number)) % FOLDS for image in images], dtype=np.int64)
    result = score.copy()
    for k in range(FOLDS):
        inside = fold == k
        knots = fit_calibration(score[~inside], iou[~inside])
        if knots is None:
            return None
        result[inside] = [calibrated(float(value), knots) for value in score[inside]]
    return result


def _rising(groups: Sequence[tuple[float, float, float]]) -> list[tuple[float, float]]:
    """Pools neighbors of (weight, score, IoU) until the IoUs rise: (mean score, mean IoU) of each pool.

    >>> _rising([(1, 0.2, 0.1), (1, 0.4, 0.5), (1, 0.6, 0.3)])
    [(0.2, 0.1), (0.5, 0.4)]
    """
    pools: list[tuple[float, float, float]] = []
    for group in groups:
        pool = group
        while pools and (pools[-1][2] >= pool[2] or pools[-1][1] >= pool[1]):
            last = pools.pop()
            weight = last[0] + pool[0]
            share = pool[0] / weight
            pool = (weight, last[1] + share * (pool[1] - last[1]), last[2] + share * (pool[2] - last[2]))
        pools.append(pool)
    return [(score, iou) for _, score, iou in pools]
