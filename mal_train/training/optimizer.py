"""Parameter groups of AdamW: learning rate, weight decay and frozen stages."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mal_train.kernel.networks.network import MalNetwork, MaskNetwork


@dataclass(frozen=True)
class OptimizerSettings:
    """Settings of AdamW and its parameter groups.

    Attributes:
        betas: coefficients of the running averages of gradient and squared gradient.
        eps: added to the denominator.
        weight_decay: decoupled weight decay.
        decay_norm_bias: if False, biases and normalization weights are not decayed.
        head_lr_mult: learning rate of mask head and RoI head, relative to the backbone's.
    """

    betas: tuple[float, float] = (0.9, 0.9)
    eps: float = 1e-8
    weight_decay: float = 5e-4
    decay_norm_bias: bool = True
    head_lr_mult: float = 1.0


def build_optimizer(network: MalNetwork, settings: OptimizerSettings, *, fused: bool = True) -> torch.optim.AdamW:
    """Builds AdamW for the trainable parameters of the student, with as few groups as the settings need.

    Each group has an `lr_scale`, by which `set_rate` multiplies the learning rate. The rate starts at 0.

    Args:
        network: student and teacher.
        settings: settings of AdamW and its groups.
        fused: use the fused kernel. It is faster, but a gradient scaler then unscales the gradients inside the
            optimizer step, too late to check them.
    """
    members: defaultdict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in network.student.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = 1.0 if name.startswith("backbone.") else settings.head_lr_mult
        decays = settings.decay_norm_bias or parameter.ndim > 1
        members[scale, settings.weight_decay if decays else 0.0].append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": parameters, "lr_scale": scale, "weight_decay": decay}
        for (scale, decay), parameters in members.items()
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=settings.betas, eps=settings.eps, fused=fused)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the learning rate of every group, scaled by its `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


def freeze_stages(network: MalNetwork, stages: Sequence[int]) -> list[str]:
    """Freezes stages of the student's backbone and returns their names.

    Stage 0 is the patch embedding, stage i is block i; −1 and unknown stages are ignored. Class token and position
    embedding are always trained, as in the published code.
    """
    frozen = []
    for stage, name, part in _stages(network.student):
        if stage in stages:
            part.requires_grad_(False)
            frozen.append(name)
    return frozen


def _stages(network: MaskNetwork) -> Iterator[tuple[int, str, nn.Module]]:
    yield 0, "patch_embed", network.backbone.get_submodule("patch_embed")
    for index, block in enumerate(network.backbone.get_submodule("blocks").children()):
        yield index + 1, f"blocks.{index}", block
