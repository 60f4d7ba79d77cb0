"""The arithmetic of one training step: logits of both networks → the losses. Pure; knows no trainer and no files.

Letters: N crops, H = W side of the logit map, S crop side in px.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from mal_train.labeling.settings import Compat
from mal_train.losses.crf import crf_loss
from mal_train.losses.mil import mil_loss
from mal_train.losses.saturation import logit_excess

Refine = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(guide (N, 3, H, W), probability (N, H, W), box mask (N, H, W)) → mask (N, H, W); `losses.crf.MeanField` is one."""


class LossWeights(NamedTuple):
    """Weights of this step, ramps included."""

    mil: float
    crf: float
    logit: float = 0.0


class StepLosses(NamedTuple):
    """Scalars float32: `mil`, `crf` and `logit` with their weights applied, `total` their sum."""

    total: Tensor
    mil: Tensor
    crf: Tensor
    logit: Tensor


def step_losses(
    student_N1HW: Tensor,
    teacher_N1HW: Tensor,
    guide_N3SS: Tensor,
    box_mask_NSS: Tensor,
    *,
    refine: Refine,
    weights: LossWeights,
    compat: Compat,
    crf_size_ratio: int = 1,
) -> StepLosses:
    """Losses of a batch (§4 of the method), in float32 whatever the networks computed in.

    Args:
        student_N1HW: the student's logits; gradients flow through these alone.
        teacher_N1HW: the teacher's.
        guide_N3SS: normalised picture whose colours steer the mean field.
        box_mask_NSS: the box on the crop, 0/1, any number type.
        refine: the mean field; sees the mean of both networks' probabilities.
        weights: of this step.
        compat: `tao` divides the MIL sum by N + 10⁻⁴ instead of N.
        crf_size_ratio: the mean field's grid, as a multiple of the logits' grid.
    """
    student_N1HW, teacher_N1HW = student_N1HW.float(), teacher_N1HW.detach().float()
    side = student_N1HW.shape[-2:]
    box_N1SS = box_mask_NSS[:, None].float()
    student_NHW = student_N1HW[:, 0].sigmoid()
    mil_N = mil_loss(student_NHW, resize(box_N1SS, side)[:, 0])
    count = mil_N.shape[0] + (1e-4 if compat is Compat.TAO else 0.0)
    mil = mil_N.sum() / count * weights.mil

    teacher_NHW = teacher_N1HW[:, 0].sigmoid()
    if crf_size_ratio != 1:
        side = torch.Size(crf_size_ratio * length for length in side)
        student_NHW = resize(student_NHW[:, None], side)[:, 0]
        teacher_NHW = resize(teacher_NHW[:, None], side)[:, 0]
    with torch.no_grad():
        start_NHW = (student_NHW + teacher_NHW) / 2
        target_NHW = refine(resize(guide_N3SS.float(), side), start_NHW, resize(box_N1SS, side)[:, 0])
    crf = crf_loss(student_NHW, target_NHW).mean() * weights.crf
    logit = logit_excess(student_N1HW[:, 0]).mean() * weights.logit
    return StepLosses(mil + crf + logit, mil, crf, logit)


def resize(x_NCHW: Tensor, side: torch.Size) -> Tensor:
    """Bilinear, half-pixel centres, no antialias: how the published code brings pictures to the logits' grid."""
    if x_NCHW.shape[-2:] == side:
        return x_NCHW
    return functional.interpolate(x_NCHW, size=tuple(side), mode="bilinear", align_corners=False)
