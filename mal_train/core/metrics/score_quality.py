"""Quality of a score as a predictor of IoU: bias, calibration, rank correlation, bad masks among the worst-scored."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mal_train.core.metrics.miou import mean_or_none

BAD_IOU = 0.5
WORST_FRACTION = 0.2


@dataclass(frozen=True)
class ScoreQuality:
    """Quality of a score for finding bad masks.

    Attributes:
        mean_score: mean over instances.
        bias: mean score minus mean IoU; positive = over-confident.
        calibration_error: mean over instances of |mean score − mean IoU| of their score bin (ten equal bins).
        spearman: rank correlation of score and IoU; None when one of them is constant.
        bad_count: masks with IoU < 0.5.
        bad_in_worst_fifth: fraction of those among the worst-scored 20 % of masks; a random order gives 0.2.
    """

    mean_score: float | None
    bias: float | None
    calibration_error: float | None
    spearman: float | None
    bad_count: int
    bad_in_worst_fifth: float | None


def score_quality(scores: ArrayLike, ious: ArrayLike) -> ScoreQuality:
    """Computes how well scores (N,) find the masks with a low IoU (N,)."""
    score, iou = np.asarray(scores, dtype=np.float64), np.asarray(ious, dtype=np.float64)
    mean_score, miou = mean_or_none(score), mean_or_none(iou)
    return ScoreQuality(
        mean_score=mean_score,
        bias=None if mean_score is None or miou is None else mean_score - miou,
        calibration_error=calibration_error(score, iou),
        spearman=spearman(score, iou),
        bad_count=int(np.count_nonzero(iou < BAD_IOU)),
        bad_in_worst_fifth=bad_in_worst(score, iou < BAD_IOU, WORST_FRACTION),
    )


def spearman(a: ArrayLike, b: ArrayLike) -> float | None:
    """Computes the rank correlation in [-1, 1], ties by mean rank; None for fewer than two values or a constant.

    >>> round(spearman([1, 2, 3, 4], [10, 20, 40, 30]), 6)
    0.8
    """
    first, second = _ranks(a), _ranks(b)
    if first.size < 2:
        return None
    first, second = first - first.mean(), second - second.mean()
    norm = math.sqrt(float(first @ first) * float(second @ second))
    return min(max(float(first @ second) / norm, -1.0), 1.0) if norm > 0 else None


def calibration_error(scores: ArrayLike, ious: ArrayLike, bins: int = 10) -> float | None:
    """Computes the expected calibration error.

    It is |mean score − mean IoU| of each equal-width score bin over [0, 1], weighted by the size of the bin.

    >>> round(calibration_error([0.9, 0.9], [0.5, 0.9]), 6)
    0.2
    """
    score, iou = np.asarray(scores, dtype=np.float64), np.asarray(ious, dtype=np.float64)
    if score.size == 0:
        return None
    # Clipped before the conversion: a score beyond the range of integers has no defined one.
    bin_of = np.minimum(np.clip(score, 0.0, 1.0) * bins, bins - 1).astype(np.int64)
    return float(np.abs(np.bincount(bin_of, weights=score - iou, minlength=bins)).sum() / score.size)


def bad_in_worst(scores: ArrayLike, is_bad: ArrayLike, fraction: float) -> float | None:
    """Returns the fraction of the bad masks that are in the worst-scored `fraction` of all; None if no mask is bad.

    Masks tied at the border count in proportion to how many of them fit, so the result does not depend on the order.

    >>> bad_in_worst([0.1, 0.2, 0.3, 0.4, 0.5], [True, False, True, False, False], 0.2)
    0.5
    """
    score, bad = np.asarray(scores, dtype=np.float64), np.asarray(is_bad, dtype=np.bool_)
    if not bad.any():
        return None
    _, group = np.unique(score, return_inverse=True)
    size, bad_of_group = np.bincount(group), np.bincount(group, weights=bad)
    before = np.cumsum(size) - size
    taken = np.clip((fraction * score.size - before) / size, 0.0, 1.0)
    return float((taken * bad_of_group).sum() / bad.sum())


def _ranks(values: ArrayLike) -> NDArray[np.float64]:
    _, group, size = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True)
    mean_rank: NDArray[np.float64] = (np.cumsum(size) - (size - 1) / 2)[group]
    return mean_rank
