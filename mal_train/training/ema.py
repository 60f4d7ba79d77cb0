"""The teacher follows the student: one fused update after every optimizer step."""

import torch
from torch import nn


@torch.no_grad()
def update_ema(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Teacher ← momentum · teacher + (1 − momentum) · student, parameter by parameter; buffers are copied.

    Args:
        teacher: changed in place.
        student: of the same architecture.
        momentum: in [0, 1]; TAO uses 0.996.
    """
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1.0 - momentum)
    buffers = list(teacher.buffers())
    if buffers:
        torch._foreach_copy_(buffers, list(student.buffers()))
