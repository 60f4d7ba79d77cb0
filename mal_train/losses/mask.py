"""Defines the loss of a box with a known mask: binary cross-entropy and dice distance on the grid of the logits.

Letters: N crops, H and W of the logit map.
"""

from torch import Tensor
from torch.nn import functional

from mal_train.losses.mil import dice_distance


def mask_loss(logit_NHW: Tensor, target_NHW: Tensor) -> Tensor:
    """Returns mean cross-entropy plus dice distance (N,) float32, both 0 for a perfect mask.

    Args:
        logit_NHW: logits of the student, float32.
        target_NHW: fraction of each cell that is foreground, in [0, 1].
    """
    entropy_NHW = functional.binary_cross_entropy_with_logits(logit_NHW, target_NHW, reduction="none")
    distance_N = dice_distance(logit_NHW.sigmoid(), target_NHW)
    return entropy_NHW.flatten(1).mean(1) + distance_N
