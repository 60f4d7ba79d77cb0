"""COCO's matching and averaging on plain arrays: the arithmetic of pycocotools' COCOeval, vectorized over groups.

pycocotools matches each category of each image separately in Python, once for every area range; this module matches all
groups of one shape in the same loop. The results are the same numbers (tests: test_coco_ap.py).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

THRESHOLDS: Floats = np.linspace(0.5, 0.95, 10)
RECALLS: Floats = np.linspace(0.0, 1.0, 101)
AREAS = ((0.0, 1e10), (0.0, 32.0**2), (32.0**2, 96.0**2), (96.0**2, 1e10))
"""Area ranges in px², both ends inclusive: all, small, medium, large."""
MAX_DETS = 100
"""Detections of a category in an image that count, highest score first."""

AP_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "ARmax1", "ARmax10", "ARmax100", "ARs", "ARm", "ARl")
"""COCO's twelve metrics in pycocotools' order, under the names of the published code (§6.2)."""

_MAX_ELEMENTS = 1 << 20
"""Elements of the largest array of a batch of groups."""


@dataclass(frozen=True, eq=False)
class Group:
    """Detections and ground truths of one category in one image.

    Attributes:
        category: index of the category.
        det_areas: (D,) px².
        truth_areas: (G,) px².
        crowd: (G,) crowd regions: they match any number of detections and are never counted as missed.
        iou: (D, G); for a crowd region, the fraction of the detection inside it.
    """

    category: int
    det_areas: Floats
    truth_areas: Floats
    crowd: Bools
    iou: Floats


@dataclass(frozen=True, eq=False)
class _Matched:
    """A group after matching: D ≤ MAX_DETS detections, highest score first, for A area ranges and T thresholds.

    Attributes:
        scores: (D,), descending.
        is_matched: (A, T, D) detections with a ground truth of their own.
        is_ignored: (A, T, D) detections that count neither as true nor as false.
        truths: (A,) number of ground truths that count.
    """

    scores: Floats
    is_matched: Bools
    is_ignored: Bools
    truths: NDArray[np.int64]


def coco_summary(groups: Sequence[Group], scores: Sequence[Floats]) -> tuple[float, ...]:
    """Computes COCO's twelve metrics in pycocotools' order; −1 where no ground truth defines one.

    Args:
        groups: in order of category, then of image.
        scores: (D,) of each group's detections; detections with equal scores keep the given order.
    """
    matched = _match_all(groups, scores)
    categories = list(dict.fromkeys(group.category for group in groups))
    of_category: dict[int, list[_Matched]] = {category: [] for category in categories}
    for group, result in zip(groups, matched, strict=True):
        of_category[group.category].append(result)
    # The axes of pycocotools: the order of summation decides the last bits of the means.
    shape = len(THRESHOLDS), len(RECALLS), len(categories), len(AREAS)
    precision = np.full(shape, -1.0)
    recall = {max_dets: np.full((len(THRESHOLDS), len(categories), len(AREAS)), -1.0) for max_dets in (1, 10, MAX_DETS)}
    for k, category in enumerate(categories):
        for a in range(len(AREAS)):
            _accumulate(of_category[category], a, precision[:, :, k, a], {m: r[:, k, a] for m, r in recall.items()})
    best = recall[MAX_DETS]
    return (
        _mean(precision[..., 0]),
        _mean(precision[[0], ..., 0]),
        _mean(precision[[5], ..., 0]),
        *(_mean(precision[..., a]) for a in (1, 2, 3)),
        *(_mean(recall[max_dets][..., 0]) for max_dets in (1, 10, MAX_DETS)),
        *(_mean(best[..., a]) for a in (1, 2, 3)),
    )


def _mean(values: Floats) -> float:
    known = values[values > -1]
    return float(np.mean(known)) if known.size else -1.0


def _accumulate(matched: Sequence[_Matched], area: int, precision: Floats, recall: dict[int, Floats]) -> None:
    """Fills precision (T, R) at each recall and, by maximum of detections, the recall (T,) of one category."""
    truths = sum(int(group.truths[area]) for group in matched)
    if not truths:
        return
    order = np.argsort(-np.concatenate([group.scores for group in matched]), kind="stable")
    is_matched = np.concatenate([group.is_matched[area] for group in matched], axis=1)[:, order]
    counts = ~np.concatenate([group.is_ignored[area] for group in matched], axis=1)[:, order]
    true = np.cumsum(is_matched & counts, axis=1, dtype=np.float64)
    false = np.cumsum(~is_matched & counts, axis=1, dtype=np.float64)
    if area == 0:  # the only range with metrics at fewer detections
        rank = np.concatenate([np.arange(group.scores.size) for group in matched])[order]
        for max_dets in (1, 10):
            recall[max_dets][:] = np.count_nonzero((is_matched & counts)[:, rank < max_dets], axis=1) / truths
    if not order.size:
        precision[:], recall[MAX_DETS][:] = 0.0, 0.0
        return
    reached = true / truths
    recall[MAX_DETS][:] = reached[:, -1]
    exact = true / (false + true + np.spacing(1))
    envelope = np.maximum.accumulate(exact[:, ::-1], axis=1)[:, ::-1]
    for t in range(len(THRESHOLDS)):
        index = np.searchsorted(reached[t], RECALLS, side="left")
        precision[t] = np.where(index < order.size, envelope[t][np.minimum(index, order.size - 1)], 0.0)


def _match_all(groups: Sequence[Group], scores: Sequence[Floats]) -> list[_Matched]:
    """Matches every group, groups of one shape together; returns them in the given order."""
    orders = [np.argsort(-score, kind="stable")[:MAX_DETS] for score in scores]
    by_shape: dict[tuple[int, int], list[int]] = {}
    for number, (group, order) in enumerate(zip(groups, orders, strict=True)):
        by_shape.setdefault((order.size, group.crowd.size), []).append(number)
    matched: dict[int, _Matched] = {}
    for (detections, truths), numbers in by_shape.items():
        elements = len(AREAS) * len(THRESHOLDS) * max(detections, truths, 1)
        for chunk in _chunks(numbers, max(1, _MAX_ELEMENTS // elements)):
            batch = [groups[number] for number in chunk]
            rows = [orders[number] for number in chunk]
            is_matched, is_ignored, counted = _match(
                np.stack([group.iou[order] for group, order in zip(batch, rows, strict=True)]),
                np.stack([group.det_areas[order] for group, order in zip(batch, rows, strict=True)]),
                np.stack([group.truth_areas for group in batch]),
                np.stack([group.crowd for group in batch]),
            )
            for index, number in enumerate(chunk):
                sorted_scores = scores[number][orders[number]]
                matched[number] = _Matched(sorted_scores, is_matched[index], is_ignored[index], counted[index])
    return [matched[number] for number in range(len(groups))]


def _chunks(numbers: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(numbers), size):
        yield numbers[start : start + size]


def _match(iou: Floats, det_areas: Floats, truth_areas: Floats, crowd: Bools) -> tuple[Bools, Bools, NDArray[np.int64]]:
    """Matches N groups greedily, highest score first; returns is_matched, is_ignored (N, A, T, D) and truths (N, A).

    A detection takes the free ground truth of highest IoU at or above the threshold, the last one of equal IoU, and an
    ignored one only where no other fits.

    Args:
        iou: (N, D, G).
        det_areas: (N, D).
        truth_areas: (N, G).
        crowd: (N, G).
    """
    low, high = (np.array(bounds)[:, None] for bounds in zip(*AREAS, strict=True))
    excluded = crowd[:, None] | (truth_areas[:, None] < low) | (truth_areas[:, None] > high)
    outside = (det_areas[:, None] < low) | (det_areas[:, None] > high)
    size, detections, truths = iou.shape
    shape = size, len(AREAS), len(THRESHOLDS)
    is_matched = np.zeros((*shape, detections), dtype=np.bool_)
    is_ignored = np.broadcast_to(outside[:, :, None], (*shape, detections)).copy()
    counted = np.count_nonzero(~excluded, axis=2)
    if not truths:
        return is_matched, is_ignored, counted
    limits = np.minimum(THRESHOLDS, 1 - 1e-10)
    free = np.ones((*shape, truths), dtype=np.bool_)
    index = np.ix_(*(np.arange(length) for length in shape))
    for d in range(detections):
        value = iou[:, d, None, None, :]
        fits = free & (value >= limits[:, None])
        if not fits.any():
            continue
        proper = np.where(fits & ~excluded[:, :, None], value, -1.0)
        spare = np.where(fits, value, -1.0)
        last = truths - 1
        has_counted = proper.max(axis=3) >= 0.0
        chosen = np.where(has_counted, last - proper[..., ::-1].argmax(axis=3), last - spare[..., ::-1].argmax(axis=3))
        hit = has_counted | (spare.max(axis=3) >= 0.0)
        is_matched[..., d] = hit
        is_ignored[..., d] = np.where(hit, ~has_counted, is_ignored[..., d])
        # A crowd region stays free for other detections.
        taken = hit & ~crowd[index[0], chosen]
        free[(*index, chosen)] &= ~taken
    return is_matched, is_ignored, counted
