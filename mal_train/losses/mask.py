"""The loss of a box whose mask is known: binary cross-entropy and dice on the logits' grid. Pure functions on tensors.

Letters: N crops, H and W of the logit map.
"""

from torch import Tensor
from torch.nn import functional

from mal_train.losses.mil import dice_distance


def mask_loss(logit_NHW: Tensor, target_NHW: Tensor) -> Tensor:
    """(N,) float32: mean cross-entropy of the pixels plus the dice distance of the whole, both 0 for a perfect mask.

    Args:
        logit_NHW: of the student; float32.
        target_NHW: share of each cell that is object, in [0, 1].
    """
    entropy_NHW = functional.binary_cross_entropy_with_logits(logit_NHW, target_NHW, reduction="none")
    distance_N = dice_distance(logit_NHW.sigmoid(), target_NHW)
    return entropy_NHW.flatten(1).mean(1) + distance_N
