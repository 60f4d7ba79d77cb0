"""Losses of one training step from the logits of both networks. Pure functions; no trainer, no files.

Shape suffixes: N crops, M crops with a mask, H and W sides of the logit map, S crop side in px.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from mal_train.core.masks.geometry import Region
from mal_train.core.settings import Compat
from mal_train.kernel.networks.regions import grown
from mal_train.losses.crf import crf_loss
from mal_train.losses.logit_penalty import logit_excess
from mal_train.losses.mask import mask_loss
from mal_train.losses.mil import mil_loss

Refine = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Maps guide (N, 3, H, W), probability (N, H, W) and box mask (N, H, W) to a mask (N, H, W), as `MeanField` does."""


class LossWeights(NamedTuple):
    """Weights of the losses at one step, ramps included."""

    mil: float
    crf: float
    logit: float = 0.0
    mask: float = 0.0


class StepLosses(NamedTuple):
    """Weighted losses, float32 scalars; `total` is the sum of the others."""

    total: Tensor
    mil: Tensor
    crf: Tensor
    logit: Tensor
    mask: Tensor


def step_losses(
    student_N1HW: Tensor,
    teacher_N1HW: Tensor | None,
    guide_N3SS: Tensor,
    box_mask_NSS: Tensor,
    *,
    refine: Refine,
    weights: LossWeights,
    compat: Compat,
    crf_size_ratio: int = 1,
) -> StepLosses:
    """Computes the losses of a batch from its boxes, in float32 for logits of any dtype.

    Source: MAL (Lan et al., CVPR 2023), sections 3.3 and 3.4; the logit penalty is an addition.

    Args:
        student_N1HW: logits of the student; only they receive gradients.
        teacher_N1HW: logits of the teacher; None leaves out the mean-field loss.
        guide_N3SS: normalized image whose colors guide the mean field.
        box_mask_NSS: the box on the crop, 0/1, any dtype.
        refine: the mean field; its input is the mean of both networks' probabilities.
        weights: weights of the losses at this step.
        compat: `tao` divides the MIL sum by N + 10⁻⁴ instead of N.
        crf_size_ratio: resolution of the mean field's grid, as a multiple of the logit map's.
    """
    student_N1HW = student_N1HW.float()
    side = student_N1HW.shape[-2:]
    box_N1SS = box_mask_NSS[:, None].float()
    student_NHW = student_N1HW[:, 0].sigmoid()
    mil_N = mil_loss(student_NHW, resize(box_N1SS, side)[:, 0])
    count = mil_N.shape[0] + (1e-4 if compat is Compat.TAO else 0.0)
    mil = mil_N.sum() / count * weights.mil

    zero = torch.zeros_like(mil)
    # Skipped, not multiplied by 0: to the other losses an overflowed logit is a probability of 1, but 0 · ∞ is NaN.
    logit = logit_excess(student_N1HW[:, 0]).mean() * weights.logit if weights.logit else zero
    if teacher_N1HW is None:
        return StepLosses(mil + logit, mil, zero, logit, zero)
    teacher_NHW = teacher_N1HW[:, 0].detach().float().sigmoid()
    if crf_size_ratio != 1:
        side = torch.Size(crf_size_ratio * length for length in side)
        student_NHW = resize(student_NHW[:, None], side)[:, 0]
        teacher_NHW = resize(teacher_NHW[:, None], side)[:, 0]
    with torch.no_grad():
        start_NHW = (student_NHW + teacher_NHW) / 2
        target_NHW = refine(resize(guide_N3SS.float(), side), start_NHW, resize(box_N1SS, side)[:, 0])
    crf = crf_loss(student_NHW, target_NHW).mean() * weights.crf
    return StepLosses(mil + crf + logit, mil, crf, logit, zero)


def target_regions(box_mask_NSS: Tensor) -> list[Region]:
    """Returns the pixels of each crop at which `step_losses` needs the teacher's probability.

    Those outside the box have no effect: the mean field multiplies its start by the box mask.

    Args:
        box_mask_NSS: the box on the crop, 0/1, any dtype, on the CPU.
    """
    side = box_mask_NSS.shape[-1]
    regions = []
    for columns_S, rows_S in zip(box_mask_NSS.amax(1), box_mask_NSS.amax(2), strict=True):
        columns, rows = columns_S.nonzero()[:, 0].tolist(), rows_S.nonzero()[:, 0].tolist()
        # A crop without a box needs none; one entry keeps its region valid.
        box = Region(columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) if columns else Region(0, 0, 1, 1)
        # The grid of the mean field may read one pixel beside the box.
        regions.append(grown(box, 1, side))
    return regions


def pseudo_label_losses(
    student_N1HW: Tensor,
    mask_MSS: Tensor,
    masked_M: Tensor,
    *,
    mask_weight_M: Tensor,
    weight: float,
    boxes: StepLosses,
) -> StepLosses:
    """Adds the loss of pseudo-labels, masks that an earlier model predicted, to the box losses of a batch.

    Args:
        student_N1HW: logits of the student.
        mask_MSS: pseudo-label masks, 0/1, any dtype.
        masked_M: indices of the crops with a pseudo-label.
        mask_weight_M: confidence weight of each pseudo-label, float32, 1 on average.
        weight: weight of the mask loss.
        boxes: `step_losses` of the complete batch.
    """
    mask_M = mask_loss(*_mask_targets(student_N1HW, mask_MSS, masked_M))
    mask = (mask_M * mask_weight_M).sum() / student_N1HW.shape[0] * weight
    return boxes._replace(total=boxes.total + mask, mask=mask)


def mixed_losses(
    student_N1HW: Tensor,
    mask_MSS: Tensor,
    masked_M: Tensor,
    weight: float,
    of_boxes: Callable[[Tensor], StepLosses],
) -> StepLosses:
    """Computes the losses of a batch in which some crops have a mask: mask loss for these, box losses for the others.

    Each crop has the same weight in the mean over the batch.

    Args:
        student_N1HW: logits of the student.
        mask_MSS: masks of the crops that have one, 0/1, any dtype.
        masked_M: indices of these crops.
        weight: weight of the mask loss.
        of_boxes: computes `step_losses` of the crops with the given indices.
    """
    count = student_N1HW.shape[0]
    mask = mask_loss(*_mask_targets(student_N1HW, mask_MSS, masked_M)).sum() / count * weight
    is_box_N = torch.ones(count, dtype=torch.bool)
    is_box_N[masked_M] = False
    if not is_box_N.any():
        zero = torch.zeros_like(mask)
        return StepLosses(mask, zero, zero, zero, mask)
    boxes = of_boxes(is_box_N.nonzero()[:, 0])
    fraction = float(is_box_N.sum()) / count
    mil, crf, logit = boxes.mil * fraction, boxes.crf * fraction, boxes.logit * fraction
    return StepLosses(mil + crf + logit + mask, mil, crf, logit, mask)


def _mask_targets(student_N1HW: Tensor, mask_MSS: Tensor, masked_M: Tensor) -> tuple[Tensor, Tensor]:
    """Returns logits (M, H, W) of the crops with a mask, and the foreground fraction (M, H, W) of each cell."""
    logit_MHW = student_N1HW[masked_M, 0].float()
    height, width = logit_MHW.shape[-2:]
    return logit_MHW, functional.adaptive_avg_pool2d(mask_MSS[:, None].float(), (height, width))[:, 0]


def resize(x_NCHW: Tensor, side: torch.Size) -> Tensor:
    """Resizes bilinearly with half-pixel centers and without antialiasing, as the published code does."""
    if x_NCHW.shape[-2:] == side:
        return x_NCHW
    return functional.interpolate(x_NCHW, size=tuple(side), mode="bilinear", align_corners=False)
