"""Which parameters learn, how fast, and with how much decay."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mal_train.kernel.networks.network import MalNetwork, MaskNetwork


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW and its groups.

    Attributes:
        betas: both betas.
        eps: epsilon.
        weight_decay: of every parameter …
        decay_norm_bias: … unless this is false: then not of biases and norm weights.
        head_lr_mult: rate of mask head and RoI head, relative to the backbone's.
    """

    betas: tuple[float, float] = (0.9, 0.9)
    eps: float = 1e-8
    weight_decay: float = 5e-4
    decay_norm_bias: bool = True
    head_lr_mult: float = 1.0


def build_optimizer(network: MalNetwork, settings: OptimizerSettings, *, fused: bool = True) -> torch.optim.AdamW:
    """AdamW over what the student may learn, in as few groups as the settings need.

    Each group carries `lr_scale`; whoever sets the rate multiplies by it. The rate itself starts at 0. `fused` is the
    faster kernel; with it a gradient scaler leaves the unscaling to the optimizer, too late to look at gradients.
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
    """Give every group its share of the rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


def freeze_stages(network: MalNetwork, stages: Sequence[int]) -> list[str]:
    """Stop the student's stages from learning: 0 the patch embedding, i the i-th block; −1 and unknown ones nothing.

    Returns the names of what was frozen. Class token and position table always learn, as in the published code.
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
