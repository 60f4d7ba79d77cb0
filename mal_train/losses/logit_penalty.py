"""Penalizes logits outside the range where the sigmoid has a slope. Not part of the published losses; off for `tao`.

Both published losses depend only on probabilities. If a step moves all logits far above 0 (all foreground is a fair
first solution of the multiple-instance loss), their gradients vanish, Adam continues along its momentum, and the run
does not recover: observed on photographs at the learning rates that are otherwise best, with logits above 1000 within
60 steps.
"""

from torch import Tensor

LOGIT_BOUND = 8.0
"""Logits of the probabilities 0.0003 and 0.9997; the losses have hardly any gradient beyond."""


def logit_excess(logits_NHW: Tensor, bound: float = LOGIT_BOUND) -> Tensor:
    """Returns the mean squared distance (N,) float32 of logits (N, H, W) from [−bound, bound].

    >>> import torch
    >>> logit_excess(torch.tensor([[[0.0, 9.0]], [[-10.0, 8.0]]]))
    tensor([0.5000, 2.0000])
    """
    return (logits_NHW.float().abs() - bound).relu().square().mean((1, 2))
