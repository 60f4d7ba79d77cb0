"""Layers that the backbones share, with timm's names for their weights, so that published weights fit."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

LayerNorm = partial(nn.LayerNorm, eps=1e-6)
"""LayerNorm over the last dimension, as in the published backbones."""


class DropPath(nn.Module):
    """Stochastic depth: in training, drops a branch for some crops and scales it for the others.

    Huang et al., "Deep networks with stochastic depth", 2016 (arXiv 1603.09382).

    Args:
        rate: probability of dropping, in [0, 1).
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Returns x (N, …), in training with 0 for dropped crops and the others divided by 1 − rate."""
        if not self.training or not self.rate:
            return x
        kept = 1.0 - self.rate
        scale = x.new_empty((len(x),) + (1,) * (x.ndim - 1)).bernoulli_(kept).div_(kept)
        return x * scale


def drop_path_rates(last: float, depth: int) -> list[float]:
    """Returns the rate of each of `depth` blocks: linear from 0 at the first to `last`.

    >>> drop_path_rates(0.2, 3)
    [0.0, 0.1, 0.2]
    """
    return [last * i / max(depth - 1, 1) for i in range(depth)]


class LayerScale(nn.Module):
    """A learned factor for each channel."""

    def __init__(self, width: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), init))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (…, C) to (…, C)."""
        return x * self.gamma


class Mlp(nn.Module):
    """Two linear layers with the exact GELU in between."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (…, C) to (…, C)."""
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out


def init_linear_layers(module: nn.Module) -> None:
    """Sets the weights of all linear layers to a normal distribution of σ 0.02, cut at ±2, and their biases to 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)


class WithoutInitialization(TorchFunctionMode):
    """Context in which new layers keep their weights as they were allocated, for weights that are assigned afterwards.

    On the meta device the normal distribution imports torch's compiler, which takes as long as importing torch.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Returns the tensor itself for initializations, and the result of any other function."""
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return kwargs["tensor"]
        return args[0] if func is Tensor.normal_ else func(*args, **kwargs)
