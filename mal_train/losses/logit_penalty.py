"""Keeps logits where the sigmoid has a slope: our addition to the published losses, off under `compat: tao`.

Both published losses see probabilities alone. Once a step drives every logit far above 0 (all foreground is a fair
first answer to the multiple-instance loss), their gradients vanish, Adam goes on along its momentum, and the run never
comes back: seen on photographs at the rates that otherwise train best, with logits beyond 1 000 within 60 steps.
"""

from torch import Tensor

LOGIT_BOUND = 8.0
"""Probabilities of 0.0003 and 0.9997; further out the losses have nothing to say."""


def logit_excess(logits_NHW: Tensor, bound: float = LOGIT_BOUND) -> Tensor:
    """Mean squared distance (N,) float32 of logits (N, H, W) from [−bound, bound].

    >>> import torch
    >>> logit_excess(torch.tensor([[[0.0, 9.0]], [[-10.0, 8.0]]]))
    tensor([0.5000, 2.0000])
    """
    return (logits_NHW.float().abs() - bound).relu().square().mean((1, 2))
