"""Measures masks without true masks: how tightly they fit their boxes, and how stable they are."""

from dataclasses import dataclass

from mal_train.core.errors import BadBox
from mal_train.core.masks.geometry import Box, box_iou, box_pixels, check_box
from mal_train.kernel.labeler.types import Label

USUAL_FILL = 0.8
"""Share of its box that nine of ten objects of photographs do not exceed (COCO; the median is 0.6). A mask beyond it
counts less, down to nothing for the filled box, which is tight and stable, but no segmentation."""


@dataclass(frozen=True)
class BoxProxy:
    """Means over the boxes of a validation set; None without boxes. None of them needs a true mask.

    Attributes:
        count: boxes.
        tightness: IoU of the given box with the tight box of its mask; 0 for an empty mask.
        stability: score of the mask before any calibration (`LabelerConfig.score_type`); 0 for an empty mask.
        value: tightness · stability · min(1, (1 − fill) / (1 − `USUAL_FILL`)), where fill is the share of the box that
            its mask covers.
    """

    count: int
    tightness: float | None
    stability: float | None
    value: float | None

    def metrics(self) -> dict[str, float | None]:
        """Returns the metrics of metrics.csv and status.json, by name."""
        return {"tightness": self.tightness, "stability": self.stability, "box_proxy": self.value}


class BoxProxyMeter:
    """Sums the proxy over labels."""

    def __init__(self) -> None:
        self._count = 0
        self._tightness = self._stability = self._value = 0.0

    def add(self, box_xywh: Box, label: Label) -> None:
        """Adds the label of a box; its score must not be calibrated. Leaves out a box without a pixel."""
        box = _pixel_box(box_xywh, (label.rle.height, label.rle.width))
        if box is None:
            return
        tightness = 0.0 if label.mask_box is None else box_iou(box, label.mask_box)
        fill = label.area / (box[2] * box[3])
        self._count += 1
        self._tightness += tightness
        self._stability += label.score
        self._value += tightness * label.score * min(1.0, max(0.0, (1 - fill) / (1 - USUAL_FILL)))

    def result(self) -> BoxProxy:
        """Returns the means so far."""
        if not self._count:
            return BoxProxy(0, None, None, None)
        sums = self._tightness, self._stability, self._value
        tightness, stability, value = (total / self._count for total in sums)
        return BoxProxy(self._count, tightness, stability, value)


def _pixel_box(box_xywh: Box, image_hw: tuple[int, int]) -> Box | None:
    """Returns the pixels of a box as a box, so that a mask of all of them fits exactly; None without a pixel."""
    try:
        region = box_pixels(check_box(box_xywh, image_hw)[0], image_hw)
    except BadBox:
        return None
    return None if region.is_empty else (region.col0, region.row0, region.col1 - region.col0, region.row1 - region.row0)
