"""The teacher: an exponential moving average (EMA) of the student, updated after every optimizer step."""

import torch
from torch import nn


@torch.no_grad()
def update_ema(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Sets each teacher parameter to momentum · teacher + (1 − momentum) · student, and copies the buffers.

    Args:
        teacher: changed in place.
        student: a network of the same architecture.
        momentum: in [0, 1]; TAO uses 0.996.
    """
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1.0 - momentum)
    buffers = list(teacher.buffers())
    if buffers:
        torch._foreach_copy_(buffers, list(student.buffers()))
