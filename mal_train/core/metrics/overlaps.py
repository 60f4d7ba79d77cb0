"""Overlaps of many masks or boxes with many others: pycocotools' numbers, in calls of bounded work.

pycocotools compares all pairs of one call with the GIL held: half a minute for 600 masks of 40 kB each. A call for one
pair takes some forty times as long as the comparison in it, so small groups share one.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from mal_train.core.masks.rle import Rle

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
IouType = Literal["segm", "bbox"]
"""Overlap of masks or of boxes; pycocotools' iouType."""
Form: TypeAlias = Rle | list[float]
"""A mask, or a box x, y, w, h."""

MAX_STEPS = 1 << 19
"""Steps of one call of pycocotools, some milliseconds: it reads both masks of a pair once, run by run."""
_JOINED_STEPS = 1 << 17
"""Steps of a call for several groups. It compares all pairs, also those of two groups."""
_MAX_AREAS = 128
"""Masks of one call for areas; pycocotools takes at most 255."""
_CROWDS = 64
"""Crowd regions whose overlaps are in memory at once."""


def iou_matrix(detections: Sequence[Form], truths: Sequence[Form]) -> Floats:
    """Returns the intersection over union (D, G) of every detection with every ground truth."""
    result = np.zeros((len(detections), len(truths)))
    _fill(result, detections, truths, is_crowd=False)
    return result


def iou_of_groups(
    detections: Sequence[Form], truths: Sequence[Form], det_starts: Integers, truth_starts: Integers
) -> Floats:
    """Returns the intersection over union of every detection with every ground truth of its group.

    Args:
        detections: of all groups, group by group.
        truths: of all groups, group by group.
        det_starts: (N + 1,) first detection of each of N groups, and the number of all.
        truth_starts: (N + 1,) as `det_starts`.

    Returns:
        The matrices (D, G) of the groups, row by row, one after the other.
    """
    result = np.zeros(int(np.dot(np.diff(det_starts), np.diff(truth_starts))))
    starts = det_starts.tolist(), truth_starts.tolist()
    end = 0
    for numbers in _joined(_steps(detections), _steps(truths), det_starts, truth_starts):
        rows, columns = ([slice(each[n], each[n + 1]) for n in numbers] for each in starts)
        if len(numbers) == 1:
            # In place: the matrix may be the largest part of the memory.
            shape = rows[0].stop - rows[0].start, columns[0].stop - columns[0].start
            start, end = end, end + shape[0] * shape[1]
            _fill(result[start:end].reshape(shape), detections[rows[0]], truths[columns[0]], is_crowd=False)
            continue
        matrix = iou_matrix(
            [one for part in rows for one in detections[part]], [one for part in columns for one in truths[part]]
        )
        row = column = 0
        for part, other in zip(rows, columns, strict=True):
            last_row, last_column = row + part.stop - part.start, column + other.stop - other.start
            start, end = end, end + (last_row - row) * (last_column - column)
            result[start:end] = matrix[row:last_row, column:last_column].ravel()
            row, column = last_row, last_column
    return result


def _joined(
    det_steps: Integers, truth_steps: Integers, det_starts: Integers, truth_starts: Integers
) -> Iterator[list[int]]:
    """Yields the numbers of the groups that are compared together; those without a pair are left out."""
    sizes = [np.diff(starts) for starts in (det_starts, truth_starts)]
    steps = [
        np.diff(np.concatenate(([0], np.cumsum(each)))[starts])
        for each, starts in ((det_steps, det_starts), (truth_steps, truth_starts))
    ]
    numbers: list[int] = []
    total = [0, 0, 0, 0]
    (has_pairs,) = np.nonzero(sizes[0] * sizes[1])
    for n, *own in np.stack([has_pairs, *(each[has_pairs] for each in (*sizes, *steps))], axis=1).tolist():
        total = [a + b for a, b in zip(total, own, strict=True)]
        if numbers and total[0] * total[3] + total[1] * total[2] > _JOINED_STEPS:
            yield numbers
            numbers, total = [], own
        numbers.append(n)
    if numbers:
        yield numbers


def crowd_overlaps(detections: Sequence[Form], crowds: Sequence[Form]) -> tuple[Floats, Integers]:
    """Returns the largest fraction of each detection (D,) that lies in one crowd region, and the last such region (D,).

    Memory does not grow with detections times crowds. Without crowds the fractions are 0 and the indices −1.
    """
    best, index = np.zeros(len(detections)), np.full(len(detections), -1)
    for start in range(0, len(crowds), _CROWDS):
        part = crowds[start : start + _CROWDS]
        inside = np.zeros((len(detections), len(part)))
        _fill(inside, detections, part, is_crowd=True)
        last = len(part) - 1 - inside[:, ::-1].argmax(axis=1)
        fraction = inside[np.arange(len(detections)), last]
        is_better = fraction >= best
        best[is_better], index[is_better] = fraction[is_better], start + last[is_better]
    return best, index


def _fill(result: Floats, detections: Sequence[Form], truths: Sequence[Form], *, is_crowd: bool) -> None:
    """Writes the overlaps (D, G) to `result`; halves the longer side until a call is short enough."""
    if not result.size:
        return
    steps = len(truths) * _steps(detections).sum() + len(detections) * _steps(truths).sum()
    if steps <= MAX_STEPS or result.size == 1:
        result[:] = coco_mask.iou(_packed(detections), _packed(truths), [int(is_crowd)] * len(truths))
    elif len(detections) >= len(truths):
        half = len(detections) // 2
        _fill(result[:half], detections[:half], truths, is_crowd=is_crowd)
        _fill(result[half:], detections[half:], truths, is_crowd=is_crowd)
    else:
        half = len(truths) // 2
        _fill(result[:, :half], detections, truths[:half], is_crowd=is_crowd)
        _fill(result[:, half:], detections, truths[half:], is_crowd=is_crowd)


def _steps(forms: Sequence[Form]) -> Integers:
    """Returns the steps to read each mask or box, at most."""
    return np.fromiter((len(one.counts) if isinstance(one, Rle) else 1 for one in forms), np.int64, len(forms))


def _packed(forms: Sequence[Form]) -> list[Any]:
    """Returns an argument of pycocotools' `iou`. It is not kept: the garbage collector visits every object."""
    return [one.packed() if isinstance(one, Rle) else one for one in forms]


def mask_areas(masks: Sequence[Rle]) -> Floats:
    """Returns the number of pixels (N,) of each mask."""
    steps, numbers = np.cumsum(_steps(masks)), np.arange(len(masks))
    is_last = (np.diff(steps // MAX_STEPS) > 0) | (np.diff(numbers // _MAX_AREAS) > 0)
    parts = np.split(numbers, np.flatnonzero(is_last) + 1)
    areas = [coco_mask.area(_packed([masks[n] for n in part.tolist()])) for part in parts if part.size]
    return np.concatenate([np.zeros(0), *areas])
