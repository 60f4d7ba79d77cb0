"""The arithmetic of one training step: logits of both networks → the losses. Pure; knows no trainer and no files.

Letters: N crops, H = W side of the logit map, S crop side in px.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from mal_train.core.settings import Compat
from mal_train.losses.crf import crf_loss
from mal_train.losses.logit_penalty import logit_excess
from mal_train.losses.mask import mask_loss
from mal_train.losses.mil import mil_loss

Refine = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(guide (N, 3, H, W), probability (N, H, W), box mask (N, H, W)) → mask (N, H, W); `losses.crf.MeanField` is one."""


class LossWeights(NamedTuple):
    """Weights of this step, ramps included."""

    mil: float
    crf: float
    logit: float = 0.0
    mask: float = 0.0


class StepLosses(NamedTuple):
    """Scalars float32: `mil`, `crf`, `logit` and `mask` with their weights applied, `total` their sum."""

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
    """Losses of a batch (§4 of the method), in float32 whatever the networks computed in.

    Args:
        student_N1HW: the student's logits; gradients flow through these alone.
        teacher_N1HW: the teacher's; None where the mean-field loss has no weight, which leaves that loss out.
        guide_N3SS: normalized picture whose colors steer the mean field.
        box_mask_NSS: the box on the crop, 0/1, any number type.
        refine: the mean field; sees the mean of both networks' probabilities.
        weights: of this step.
        compat: `tao` divides the MIL sum by N + 10⁻⁴ instead of N.
        crf_size_ratio: the mean field's grid, as a multiple of the logits' grid.
    """
    student_N1HW = student_N1HW.float()
    side = student_N1HW.shape[-2:]
    box_N1SS = box_mask_NSS[:, None].float()
    student_NHW = student_N1HW[:, 0].sigmoid()
    mil_N = mil_loss(student_NHW, resize(box_N1SS, side)[:, 0])
    count = mil_N.shape[0] + (1e-4 if compat is Compat.TAO else 0.0)
    mil = mil_N.sum() / count * weights.mil

    none = torch.zeros_like(mil)
    # Left out, not times 0: a logit that overflowed is a probability of 1 to the other losses, but 0 · ∞ is no number.
    logit = logit_excess(student_N1HW[:, 0]).mean() * weights.logit if weights.logit else none
    if teacher_N1HW is None:
        return StepLosses(mil + logit, mil, none, logit, none)
    teacher_NHW = teacher_N1HW[:, 0].detach().float().sigmoid()
    if crf_size_ratio != 1:
        side = torch.Size(crf_size_ratio * length for length in side)
        student_NHW = resize(student_NHW[:, None], side)[:, 0]
        teacher_NHW = resize(teacher_NHW[:, None], side)[:, 0]
    with torch.no_grad():
        start_NHW = (student_NHW + teacher_NHW) / 2
        target_NHW = refine(resize(guide_N3SS.float(), side), start_NHW, resize(box_N1SS, side)[:, 0])
    crf = crf_loss(student_NHW, target_NHW).mean() * weights.crf
    return StepLosses(mil + crf + logit, mil, crf, logit, none)


def pseudo_label_losses(
    student_N1HW: Tensor,
    mask_MSS: Tensor,
    masked_M: Tensor,
    *,
    mask_weight_M: Tensor,
    weight: float,
    boxes: StepLosses,
) -> StepLosses:
    """Losses of a batch whose masks are an earlier model's guesses: they add to what all the boxes say.

    Args:
        student_N1HW: the student's logits.
        mask_MSS: the guessed masks, 0/1, any number type.
        masked_M: which crops have one.
        mask_weight_M: how far each is trusted, float32, 1 on average.
        weight: of the mask loss.
        boxes: `step_losses` of the whole batch.
    """
    mask_M = mask_loss(*_against_mask(student_N1HW, mask_MSS, masked_M))
    mask = (mask_M * mask_weight_M).sum() / student_N1HW.shape[0] * weight
    return boxes._replace(total=boxes.total + mask, mask=mask)


def mixed_losses(
    student_N1HW: Tensor,
    mask_MSS: Tensor,
    masked_M: Tensor,
    weight: float,
    of_boxes: Callable[[Tensor], StepLosses],
) -> StepLosses:
    """Losses of a batch of which some crops have a mask: these learn from it, the others from their boxes.

    A crop counts alike however it is supervised.

    Args:
        student_N1HW: the student's logits.
        mask_MSS: masks of those that have one, 0/1, any number type.
        masked_M: which these are.
        weight: of the mask loss.
        of_boxes: `step_losses` of the crops with the given numbers.
    """
    count = student_N1HW.shape[0]
    mask = mask_loss(*_against_mask(student_N1HW, mask_MSS, masked_M)).sum() / count * weight
    is_box_N = torch.ones(count, dtype=torch.bool)
    is_box_N[masked_M] = False
    if not is_box_N.any():
        zero = torch.zeros_like(mask)
        return StepLosses(mask, zero, zero, zero, mask)
    boxes = of_boxes(is_box_N.nonzero()[:, 0])
    share = float(is_box_N.sum()) / count
    mil, crf, logit = boxes.mil * share, boxes.crf * share, boxes.logit * share
    return StepLosses(mil + crf + logit + mask, mil, crf, logit, mask)


def _against_mask(student_N1HW: Tensor, mask_MSS: Tensor, masked_M: Tensor) -> tuple[Tensor, Tensor]:
    """(M, H, W) logits of the crops that have a mask, and the share of each of their cells that is object."""
    logit_MHW = student_N1HW[masked_M, 0].float()
    height, width = logit_MHW.shape[-2:]
    return logit_MHW, functional.adaptive_avg_pool2d(mask_MSS[:, None].float(), (height, width))[:, 0]


def resize(x_NCHW: Tensor, side: torch.Size) -> Tensor:
    """Bilinear, half-pixel centers, no antialias: how the published code brings pictures to the logits' grid."""
    if x_NCHW.shape[-2:] == side:
        return x_NCHW
    return functional.interpolate(x_NCHW, size=tuple(side), mode="bilinear", align_corners=False)
