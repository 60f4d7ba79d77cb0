"""Overlaps of many masks or boxes with many others: pycocotools' numbers, in pieces that hold the GIL for a short time.

pycocotools compares all pairs of one call with the GIL held: half a minute for 600 masks of 40 kB each.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from mal_train.core.masks.rle import Rle

Floats = NDArray[np.float64]
IouType = Literal["segm", "bbox"]
"""Overlap of masks or of boxes; pycocotools' iouType."""

MAX_STEPS = 1 << 19
"""Steps of one call of pycocotools, some milliseconds: it reads both masks of a pair once, run by run."""
_CROWDS = 64
"""Crowd regions whose overlaps are in memory at once."""


class Shape(NamedTuple):
    """A mask or a box x, y, w, h to compare.

    Attributes:
        form: the mask or the box.
        steps: steps to read it, at most.
    """

    form: Rle | list[float]
    steps: int

    @classmethod
    def of(cls, form: Rle | list[float]) -> "Shape":
        """Returns the shape of a mask or a box; keeps it, not a copy."""
        return cls(form, len(form.counts) if isinstance(form, Rle) else 1)

    def packed(self) -> Any:
        """Returns the argument of pycocotools' `iou`. It is not kept: the garbage collector visits every object."""
        return self.form.packed() if isinstance(self.form, Rle) else self.form


def iou_matrix(detections: Sequence[Shape], truths: Sequence[Shape]) -> Floats:
    """Returns the intersection over union (D, G) of every detection with every ground truth of one image."""
    result = np.zeros((len(detections), len(truths)))
    _fill(result, detections, truths, is_crowd=False)
    return result


def crowd_overlaps(detections: Sequence[Shape], crowds: Sequence[Shape]) -> tuple[Floats, NDArray[np.int64]]:
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


def _fill(result: Floats, detections: Sequence[Shape], truths: Sequence[Shape], *, is_crowd: bool) -> None:
    """Writes the overlaps (D, G) to `result`; halves the longer side until a call is short enough."""
    if not result.size:
        return
    steps = len(truths) * sum(one.steps for one in detections) + len(detections) * sum(one.steps for one in truths)
    if steps <= MAX_STEPS or result.size == 1:
        packed = [one.packed() for one in detections], [one.packed() for one in truths]
        result[:] = coco_mask.iou(*packed, [int(is_crowd)] * len(truths))
    elif len(detections) >= len(truths):
        half = len(detections) // 2
        _fill(result[:half], detections[:half], truths, is_crowd=is_crowd)
        _fill(result[half:], detections[half:], truths, is_crowd=is_crowd)
    else:
        half = len(truths) // 2
        _fill(result[:, :half], detections, truths[:half], is_crowd=is_crowd)
        _fill(result[:, half:], detections, truths[half:], is_crowd=is_crowd)
