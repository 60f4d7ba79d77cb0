"""Defines the multiple-instance loss, which needs only the box of an object. Independent of network and schedule.

Letters: N crops, H rows, W columns.
"""

import torch
from torch import Tensor

_SMOOTH = 1e-3
"""Added to each sum of squares, so that the distance and its gradient exist for two empty inputs."""


def dice_distance(pred_N: Tensor, target_N: Tensor) -> Tensor:
    """Returns the dice distance 1 − 2Σxy / (Σx² + 10⁻³ + Σy² + 10⁻³) of each sample.

    Source: MAL (Lan et al., CVPR 2023), section 3.3; the squared denominator is V-Net's (Milletari et al., 2016).

    Args:
        pred_N: (N, ...) floating, 0..1.
        target_N: same shape, any dtype, 0..1. Its gradient is not stopped.

    Returns:
        (N,) float32, 0..1: 0 for equal binary inputs up to the smoothing, 1 for disjoint ones and for two empty ones.

    >>> dice_distance(torch.tensor([[1.0, 1.0, 0.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0, 0.0]])).round(decimals=3)
    tensor([0.3340])
    """
    with torch.autocast(pred_N.device.type, enabled=False):
        pred_NP, target_NP = pred_N.float().flatten(1), target_N.float().flatten(1)
        overlap_N = (pred_NP * target_NP).sum(1)
        squares_N = (pred_NP.square().sum(1) + _SMOOTH) + (target_NP.square().sum(1) + _SMOOTH)
        return 1 - 2 * overlap_N / squares_N


def mil_loss(prob_NHW: Tensor, box_mask_NHW: Tensor) -> Tensor:
    """Returns the box tightness loss: every row and column of the crop is a bag, positive iff it crosses the box.

    A bag's score is its largest probability and its label the largest value of the box mask, so a row through the box
    must have some foreground and a row outside it none. Loss = D(row scores, row labels) + D(column scores, labels).
    The gradient reaches one arg-max pixel per bag, even if several are equal; `amax` would distribute it.

    Source: MAL, section 3.3, on the bags of Hsu et al. (NeurIPS 2019). The formula printed there squares the maximum in
    the numerator; the published code and this function do not.

    Args:
        prob_NHW: (N, H, W) foreground probability.
        box_mask_NHW: (N, H, W), 1 inside the box and 0 outside; fractions at its border are allowed.

    Returns:
        (N,) float32, 0..2.

    >>> box_mask = torch.zeros(1, 4, 4)
    >>> box_mask[0, 1:3, 1:3] = 1
    >>> diagonal = torch.eye(4)[None] * box_mask  # touches all four sides of the box, so it is as good as the full box
    >>> mil_loss(diagonal, box_mask).round(decimals=3)
    tensor([0.0010])
    """
    row_score, row_label = prob_NHW.max(dim=2).values, box_mask_NHW.max(dim=2).values
    column_score, column_label = prob_NHW.max(dim=1).values, box_mask_NHW.max(dim=1).values
    return dice_distance(row_score, row_label) + dice_distance(column_score, column_label)
