"""COCO's matching and averaging on plain arrays: the arithmetic of pycocotools' COCOeval, vectorized over groups.

pycocotools matches each category of each image separately in Python, once for every area range; this module matches all
groups of one shape in the same loop. The results are the same numbers (tests: test_coco_ap.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Integers = NDArray[np.int64]

THRESHOLDS: Floats = np.linspace(0.5, 0.95, 10)
RECALLS: Floats = np.linspace(0.0, 1.0, 101)
AREAS = ((0.0, 1e10), (0.0, 32.0**2), (32.0**2, 96.0**2), (96.0**2, 1e10))
"""Area ranges in px², both ends inclusive: all, small, medium, large."""
MAX_DETS = 100
"""Detections of a category in an image that count, highest score first."""

AP_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "ARmax1", "ARmax10", "ARmax100", "ARs", "ARm", "ARl")
"""COCO's twelve metrics in pycocotools' order, under the names of the published code (§6.2)."""

LVIS_NAMES = (
    "AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf", "AR300", "ARs300", "ARm300", "ARl300",
)  # fmt: skip
"""LVIS's metrics in its order: AP of all, small, medium and large objects, of rare, common and frequent categories."""

_MAX_ELEMENTS = 1 << 20
"""Elements of the largest array of a batch of groups."""


@dataclass(frozen=True, eq=False)
class Groups:
    """Detections and ground truths of N groups, one for each category in each image, by category, then by image.

    In a few arrays for all groups, since the garbage collector visits every object. Below, D and G are the numbers of
    all detections and of all ground truths; those of a group lie beside each other.

    Attributes:
        categories: (N,) index of the category.
        det_starts: (N + 1,) first detection of each group, and D.
        truth_starts: (N + 1,) first ground truth of each group, and G.
        is_exhaustive: (N,) every object of the category in the image is annotated; otherwise a detection without one is
            ignored.
        det_areas: (D,) px².
        truth_areas: (G,) px²; without crowd regions, which match any number of detections and are never missed.
        truth_order: (G,) place of each among all ground truths of its group, which decides between equal overlaps;
            ascending.
        iou: overlaps of each group, one after the other: of its first detection with all of its ground truths first.
        crowd_overlap: (D,) largest fraction of the detection inside a crowd region; 0 without crowd regions. No other
            crowd region can decide its match.
        crowd_order: (D,) place of that crowd region among all ground truths; the last one of equal overlap.
    """

    categories: Integers
    det_starts: Integers
    truth_starts: Integers
    is_exhaustive: Bools
    det_areas: Floats
    truth_areas: Floats
    truth_order: Integers
    iou: Floats
    crowd_overlap: Floats
    crowd_order: Integers

    def of_detections(self, is_counted: Bools) -> "Groups":
        """Returns the groups of some detections; those that have neither a detection nor a ground truth are left out.

        Args:
            is_counted: (D,) the detections.
        """
        if is_counted.all():
            return self
        truth_counts = np.diff(self.truth_starts)
        det_starts = np.append(0, np.cumsum(is_counted))[self.det_starts]
        is_kept = (np.diff(det_starts) > 0) | (truth_counts > 0)
        ends = np.append(is_kept, True)
        overlaps_of = np.repeat(truth_counts, np.diff(self.det_starts))
        return Groups(
            categories=self.categories[is_kept],
            det_starts=det_starts[ends],
            truth_starts=self.truth_starts[ends],
            is_exhaustive=self.is_exhaustive[is_kept],
            det_areas=self.det_areas[is_counted],
            truth_areas=self.truth_areas,
            truth_order=self.truth_order,
            iou=self.iou[np.repeat(is_counted, overlaps_of)],
            crowd_overlap=self.crowd_overlap[is_counted],
            crowd_order=self.crowd_order[is_counted],
        )

    def without_crowds(self) -> "Groups":
        """Returns the groups without their crowd regions."""
        outside = np.zeros_like(self.crowd_overlap), np.full_like(self.crowd_order, -1)
        return replace(self, crowd_overlap=outside[0], crowd_order=outside[1])


@dataclass(frozen=True, eq=False)
class Matched:
    """Groups after matching: their N counted detections, for A area ranges and T thresholds.

    In a few arrays for all groups: to join one of each of 300 000 images would stop all other threads for a second.

    Attributes:
        scores: (N,) those of a group beside each other, descending.
        rank: (N,) place of each detection in its group.
        is_matched: (A, T, N) detections with a ground truth of their own.
        is_ignored: (A, T, N) detections that count neither as true nor as false.
        truths: (A, groups) number of ground truths that count.
    """

    scores: Floats
    rank: Integers
    is_matched: Bools
    is_ignored: Bools
    truths: Integers


@dataclass(frozen=True)
class Span:
    """A category: its groups and its detections, each from a first one to before another."""

    groups: slice
    detections: slice


def coco_summary(groups: Groups, scores: Floats) -> tuple[float, ...]:
    """Computes COCO's twelve metrics in pycocotools' order; −1 where no ground truth defines one.

    Args:
        groups: detections and ground truths.
        scores: (D,) of the detections; those with equal scores keep the given order.
    """
    matched, spans = match_groups(groups, scores)
    average_precision: list[float] = []
    recall = {max_dets: np.full((len(THRESHOLDS), len(spans), len(AREAS)), -1.0) for max_dets in (1, 10, MAX_DETS)}
    for a in range(len(AREAS)):
        # One area range at a time, because this array has 8 kB for each category. Its axes are those of pycocotools:
        # the order of summation decides the last bits of the means.
        precision = np.full((len(THRESHOLDS), len(RECALLS), len(spans)), -1.0)
        for k, span in enumerate(spans):
            accumulate(matched, span, a, precision[:, :, k], {m: r[:, k, a] for m, r in recall.items()})
        average_precision.append(mean_known(precision))
        if a == 0:
            average_precision += [mean_known(precision[0]), mean_known(precision[5])]
    best = recall[MAX_DETS]
    return (
        *average_precision,
        *(mean_known(recall[max_dets][..., 0]) for max_dets in (1, 10, MAX_DETS)),
        *(mean_known(best[..., a]) for a in (1, 2, 3)),
    )


def category_spans(groups: Groups, starts: Integers) -> list[Span]:
    """Returns the categories in order; `starts` has the first detection of each group that counts, and their number."""
    changes = (np.flatnonzero(np.diff(groups.categories)) + 1).tolist()
    bounds = [0, *changes, groups.categories.size] if groups.categories.size else []
    return [Span(slice(i, j), slice(int(starts[i]), int(starts[j]))) for i, j in pairwise(bounds)]


def mean_known(values: Floats) -> float:
    """Returns the mean of the values above −1; −1 if there are none."""
    known = values[values > -1]
    return float(np.mean(known)) if known.size else -1.0


def accumulate(matched: Matched, span: Span, area: int, precision: Floats, recall: dict[int, Floats]) -> None:
    """Fills precision (T, R) at each recall and, by maximum of detections, the recall (T,) of one category.

    Both stay as they are for a category without ground truth in the area range.
    """
    truths = int(matched.truths[area, span.groups].sum())
    if not truths:
        return
    order = np.argsort(-matched.scores[span.detections], kind="stable")
    is_matched = matched.is_matched[area, :, span.detections][:, order]
    counts = ~matched.is_ignored[area, :, span.detections][:, order]
    true = np.cumsum(is_matched & counts, axis=1, dtype=np.float64)
    false = np.cumsum(~is_matched & counts, axis=1, dtype=np.float64)
    *fewer, most = sorted(recall)
    if area == 0:  # the only range with metrics at fewer detections
        rank = matched.rank[span.detections][order]
        for max_dets in fewer:
            recall[max_dets][:] = np.count_nonzero((is_matched & counts)[:, rank < max_dets], axis=1) / truths
    if not order.size:
        precision[:], recall[most][:] = 0.0, 0.0
        return
    reached = true / truths
    recall[most][:] = reached[:, -1]
    exact = true / (false + true + np.spacing(1))
    envelope = np.maximum.accumulate(exact[:, ::-1], axis=1)[:, ::-1]
    for t in range(len(THRESHOLDS)):
        index = np.searchsorted(reached[t], RECALLS, side="left")
        precision[t] = np.where(index < order.size, envelope[t][np.minimum(index, order.size - 1)], 0.0)


def match_groups(groups: Groups, scores: Floats, max_dets: int = MAX_DETS) -> tuple[Matched, list[Span]]:
    """Matches every group, groups of one shape together; also returns the categories in order.

    Args:
        groups: detections and ground truths.
        scores: (D,) of the detections.
        max_dets: detections of a group that count, highest score first.
    """
    detections, truths = np.diff(groups.det_starts), np.diff(groups.truth_starts)
    iou_starts = starts_of(detections * truths)
    sizes = np.minimum(detections, max_dets)
    starts = starts_of(sizes)
    count = int(starts[-1])
    matched = Matched(
        scores=np.zeros(count),
        rank=np.zeros(count, np.int64),
        is_matched=np.zeros((len(AREAS), len(THRESHOLDS), count), np.bool_),
        is_ignored=np.zeros((len(AREAS), len(THRESHOLDS), count), np.bool_),
        truths=np.zeros((len(AREAS), sizes.size), np.int64),
    )
    for numbers in _of_one_shape(detections, truths):
        shape = int(detections[numbers[0]]), int(truths[numbers[0]])
        elements = len(AREAS) * len(THRESHOLDS) * max(*shape, 1)
        for chunk in _chunks(numbers, max(1, _MAX_ELEMENTS // elements)):
            det_ND = _places(groups.det_starts[chunk], shape[0])
            order_ND = np.argsort(-scores[det_ND], axis=1, kind="stable")[:, :max_dets]
            det_ND = np.take_along_axis(det_ND, order_ND, axis=1)
            row_ND = iou_starts[chunk][:, None] + order_ND * shape[1]
            iou = groups.iou[row_ND[..., None] + np.arange(shape[1])]
            truth_NG = _places(groups.truth_starts[chunk], shape[1])
            is_matched, is_ignored, counted = _match(groups, iou, det_ND, truth_NG)
            place = _places(starts[chunk], order_ND.shape[1])
            matched.truths[:, chunk] = counted.T
            matched.rank[place] = np.arange(order_ND.shape[1])
            matched.scores[place] = scores[det_ND]
            matched.is_matched[:, :, place] = np.moveaxis(is_matched, 0, 2)
            matched.is_ignored[:, :, place] = np.moveaxis(is_ignored, 0, 2)
    if not groups.is_exhaustive.all():
        np.logical_or(
            matched.is_ignored,
            ~matched.is_matched & np.repeat(~groups.is_exhaustive, sizes),
            out=matched.is_ignored,
        )
    return matched, category_spans(groups, starts)


def starts_of(sizes: Integers) -> Integers:
    """Returns the place (N + 1,) of the first element of each of N parts that follow each other, and of their end."""
    return np.concatenate(([0], np.cumsum(sizes, dtype=np.int64)))


def _of_one_shape(detections: Integers, truths: Integers) -> list[Integers]:
    """Returns the numbers of the groups with equal numbers of detections and of ground truths, for each such shape."""
    if not detections.size:
        return []
    shape = detections * (int(truths.max()) + 1) + truths
    order = np.argsort(shape, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(shape[order])) + 1)


def _places(starts: Integers, size: int) -> Integers:
    """Returns the places (N, size) of the elements of N parts of one size."""
    return starts[:, None] + np.arange(size)


def _chunks(numbers: Integers, size: int) -> Iterator[Integers]:
    for start in range(0, numbers.size, size):
        yield numbers[start : start + size]


def _match(groups: Groups, iou: Floats, det_ND: Integers, truth_NG: Integers) -> tuple[Bools, Bools, Integers]:
    """Matches N groups of one shape greedily; returns is_matched, is_ignored (N, A, T, D) and truths (N, A).

    A detection takes the free ground truth of highest IoU at or above the threshold, the last one of equal IoU, and an
    ignored one (outside the area range, or a crowd region) only where no other fits.

    Args:
        groups: detections and ground truths.
        iou: (N, D, G) overlaps.
        det_ND: places of the detections of each that count, highest score first.
        truth_NG: places of the ground truths.
    """
    det_areas, truth_areas = groups.det_areas[det_ND], groups.truth_areas[truth_NG]
    crowd_overlap, crowd_order = groups.crowd_overlap[det_ND], groups.crowd_order[det_ND]
    truth_order = groups.truth_order[truth_NG]
    low, high = (np.array(bounds)[:, None] for bounds in zip(*AREAS, strict=True))
    excluded = (truth_areas[:, None] < low) | (truth_areas[:, None] > high)
    outside = (det_areas[:, None] < low) | (det_areas[:, None] > high)
    size, detections, truths = iou.shape
    shape = size, len(AREAS), len(THRESHOLDS)
    is_matched = np.zeros((*shape, detections), dtype=np.bool_)
    is_ignored = np.broadcast_to(outside[:, :, None], (*shape, detections)).copy()
    limits = np.minimum(THRESHOLDS, 1 - 1e-10)
    free = np.ones((*shape, truths), dtype=np.bool_)
    index = np.ix_(*(np.arange(length) for length in shape))
    for d in range(detections):
        value = iou[:, d, None, None, :]
        fits = free & (value >= limits[:, None])
        crowd_fits = crowd_overlap[:, d, None, None] >= limits
        has_counted = np.zeros(shape, dtype=np.bool_)
        takes = np.zeros(shape, dtype=np.bool_)
        if fits.any():
            proper, chosen = _last_largest(np.where(fits & ~excluded[:, :, None], value, -1.0))
            spare, ignored = _last_largest(np.where(fits, value, -1.0))
            has_counted = proper >= 0.0
            # A crowd region stays free for other detections. It goes by overlap, then by order, like any other.
            crowd_value, order = crowd_overlap[:, d, None, None], truth_order[index[0], ignored]
            by_crowd = crowd_fits & (
                (crowd_value > spare) | ((crowd_value == spare) & (crowd_order[:, d, None, None] > order))
            )
            takes = has_counted | ((spare >= 0.0) & ~by_crowd)
            free[(*index, np.where(has_counted, chosen, ignored))] &= ~takes
        hit = takes | crowd_fits
        is_matched[..., d] = hit
        is_ignored[..., d] = np.where(hit, ~has_counted, is_ignored[..., d])
    return is_matched, is_ignored, np.count_nonzero(~excluded, axis=2)


def _last_largest(values: Floats) -> tuple[Floats, Integers]:
    """Returns the largest of the last axis and its last index."""
    index = values.shape[-1] - 1 - values[..., ::-1].argmax(axis=-1)
    return np.take_along_axis(values, index[..., None], axis=-1)[..., 0], index
