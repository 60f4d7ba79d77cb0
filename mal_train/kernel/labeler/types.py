"""Inputs and outputs of the labeler's three steps: `Crop` → `Prediction` → `Label`."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mal_train.core.masks.flags import Flag
from mal_train.core.masks.geometry import Box, Window
from mal_train.core.masks.points import Point
from mal_train.core.masks.rle import Rle
from mal_train.core.settings import Branch

ProbMap = NDArray[np.float32]
"""Foreground probabilities in [0, 1], (rows, columns)."""


@dataclass(frozen=True)
class Crop:
    """The network's input for one box, and the geometry that maps its output back to the image.

    Attributes:
        pixels: (S, S, 3) uint8 RGB; S is `LabelerConfig.crop_size`.
        box_xywh: the caller's box, unchanged.
        box_inside: the box that is labeled: `box_xywh` clipped to the image, x, y, w, h in px.
        window: region that the pixels show, in px of the image; where it extends beyond the image, the image repeats.
        image_hw: height and width of the image in px.
        area: area of `box_inside` in px²; selects the network's size class and the threshold.
        points: points in px of the image that the mask obeys.
    """

    pixels: NDArray[np.uint8]
    box_xywh: Box
    box_inside: Box
    window: Window
    image_hw: tuple[int, int]
    area: float
    points: tuple[Point, ...] = ()

    @property
    def was_clipped(self) -> bool:
        """True if the caller's box extends beyond the image."""
        return self.box_inside != self.box_xywh

    def for_finish(self) -> "Crop":
        """Returns what `Labeler.finish` needs: the geometry alone, and with points also the pixels (`clicks`)."""
        return self if self.points else replace(self, pixels=self.pixels[:0].copy())


@dataclass(frozen=True)
class PredictOptions:
    """Options of a forward pass. Crops share a batch only if their options are equal.

    Attributes:
        branch: student, teacher, or mixed, the mean of their logits.
        agreement: run both networks, so that `finish` can compute the IoU of their masks.
        flip: average the logits with those of the mirrored crop; doubles the work.
        whole_map: predict all pixels of the crop. Otherwise those on which the mask of the box does not depend may be
            0: about 40 % of a crop with the default margin, more for boxes of a few pixels.
    """

    branch: Branch = Branch.STUDENT
    agreement: bool = False
    flip: bool = False
    whole_map: bool = False


DEFAULT_PREDICT_OPTIONS = PredictOptions()
"""The student alone, without flip."""


@dataclass(frozen=True)
class Prediction:
    """The network's output for one crop.

    Attributes:
        prob: foreground probability of the requested branch, (S, S) float32 in [0, 1], on the pixels of the crop, not
            corrected by its points; see `PredictOptions.whole_map`.
        student: like `prob`, from the student; None unless `PredictOptions.agreement` is set.
        teacher: like `prob`, from the teacher; None unless `PredictOptions.agreement` is set.
        pooled: means over the mask of the backbone's features, (C,) float32, for the score; see
            `crop_predictor.pooled_features`. None: not computed.
    """

    prob: ProbMap
    student: ProbMap | None = None
    teacher: ProbMap | None = None
    pooled: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Label:
    """The result for one box.

    Attributes:
        rle: mask of the full image, run-length encoded; `rle.decode_mask` returns it as (H, W) bool.
        score: in [0, 1]: the expected IoU if the checkpoint has a calibration, else the score of
            `LabelerConfig.score_type`; 0 for an empty mask.
        area: number of pixels in the mask.
        mask_box: tight box of the mask, x, y, w, h in px; None for an empty mask.
        agreement: IoU in [0, 1] of the masks of student and teacher; None unless requested.
        flags: properties to check; see `FLAG_DESCRIPTIONS`.
    """

    rle: Rle
    score: float
    area: int
    mask_box: Box | None
    agreement: float | None
    flags: tuple[Flag, ...]
