"""Simulates int8 arithmetic: observes the ranges of a network's activations, and builds a copy that rounds to them.

An engine with int8 kernels computes the rounded layers of the copy in integers. Activations are asymmetric uint8 with
one scale for a tensor; weights are symmetric with one scale for each output channel.
Source: Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference", 2018 (arXiv 1806.08342),
sections 2 and 3.
"""

import contextlib
import copy
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from mal_train.core.errors import ConfigError
from mal_train.kernel.networks.heads import ConvRelu
from mal_train.kernel.networks.network import MaskNetwork

Ranges: TypeAlias = dict[str, tuple[float, float]]
"""Name of a layer → least and greatest entry of its inputs."""

ACTIVATION_LEVELS = 255
QUANTIZED_PARTS = ("backbone", "mask_head")
"""The RoI head stays in float32: it takes no time, and every logit is a product with its result."""


@dataclass(frozen=True)
class Int8Calibration:
    """Ranges that a checkpoint stores so that its network can compute in int8.

    Attributes:
        ranges: ranges of the layers' inputs by the names of the weights, `student.backbone.…`.
        crops: number of crops that they were observed on.

    Raises:
        ConfigError: a range is not finite, or its end is below its start.
    """

    ranges: Mapping[str, tuple[float, float]]
    crops: int

    def __post_init__(self) -> None:
        for name, (low, high) in self.ranges.items():
            if not (math.isfinite(low) and math.isfinite(high) and low <= high):
                raise ConfigError(
                    f"int8: {name[:100]}: range {low} to {high}; both must be finite, and in order: the weights or "
                    "the file are damaged"
                )

    def of(self, prefix: str) -> Ranges:
        """Returns the ranges of one network, `student` or `teacher`; empty if it was not calibrated."""
        start = f"{prefix}."
        return {name.removeprefix(start): bounds for name, bounds in self.ranges.items() if name.startswith(start)}

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON form that checkpoints store."""
        return {"crops": self.crops, "ranges": {name: list(bounds) for name, bounds in self.ranges.items()}}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Int8Calibration":
        """Inverse of `to_dict`; raises ConfigError for other fields."""
        if set(data) != {"crops", "ranges"} or type(data["crops"]) is not int:
            raise ConfigError(f"int8: fields {sorted(data)[:5]}; it has an integer 'crops', and 'ranges'")
        return cls({name: (float(low), float(high)) for name, (low, high) in data["ranges"].items()}, data["crops"])


def quantizable(network: MaskNetwork) -> dict[str, nn.Linear | nn.Conv2d]:
    """Returns the layers that int8 makes faster by name: linear layers, and convolutions that are not depthwise."""
    return {
        f"{part}.{name}": layer
        for part in QUANTIZED_PARTS
        for name, layer in network.get_submodule(part).named_modules()
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)
    }


@contextlib.contextmanager
def observed_ranges(network: MaskNetwork) -> Iterator[Ranges]:
    """Collects the ranges of all quantizable layers' inputs over the forward passes in the block."""
    ranges: Ranges = {}

    def observe(name: str, _layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        low, high = (float(bound) for bound in torch.aminmax(inputs[0]))
        before = ranges.get(name, (low, high))
        # Unlike min and max, these keep NaN.
        ranges[name] = (float(np.minimum(low, before[0])), float(np.maximum(high, before[1])))

    hooks = [layer.register_forward_pre_hook(partial(observe, name)) for name, layer in quantizable(network).items()]
    try:
        yield ranges
    finally:
        for hook in hooks:
            hook.remove()


def quantized(
    network: MaskNetwork,
    ranges: Ranges,
    *,
    weight_levels: int = 127,
    kinds: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d),
) -> MaskNetwork:
    """Returns a copy whose layers round their inputs and weights as in int8; it shares the weights.

    Args:
        network: a network in evaluation mode.
        ranges: from `observed_ranges`.
        weight_levels: greatest integer of a weight.
        kinds: types of the layers to quantize; the others stay in float32.

    Raises:
        ConfigError: a layer has no range.
    """
    layers = {name: layer for name, layer in quantizable(network).items() if isinstance(layer, kinds)}
    _check_complete(layers, ranges)
    rounded = {layers[name]: QuantizedLayer(layers[name], *ranges[name], weight_levels) for name in layers}
    copied = _copied(network, rounded)
    assert isinstance(copied, MaskNetwork)
    return copied


def _check_complete(layers: Collection[str], ranges: Ranges) -> None:
    missing = [name for name in layers if name not in ranges]
    if missing:
        raise ConfigError(
            f"precision: int8; the checkpoint has no int8 range of {len(missing)} of {len(layers)} layers "
            f"({missing[0]}, …); write it again with `mal-train export --int8`"
        )


class QuantizedLayer(nn.Module):
    """A linear layer or a convolution that rounds inputs and weights to integers and back.

    Args:
        layer: the layer; its weights are shared.
        low: least entry of its inputs.
        high: greatest entry of its inputs.
        weight_levels: greatest integer of a weight.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, low: float, high: float, weight_levels: int) -> None:
        super().__init__()
        self.layer, self.weight_levels = layer, weight_levels
        # Zero must be an integer: it pads, and half of the activations after ReLU are zero.
        low, high = min(low, 0.0), max(high, 0.0)
        least_scale = torch.finfo(torch.float32).tiny  # its inverse is finite
        self._scale = max((high - low) / ACTIVATION_LEVELS, least_scale)
        self._zero_point = round(-low / self._scale)
        weight = layer.weight.detach()
        greatest = weight.abs().amax(tuple(range(1, weight.ndim)))
        self._weight_scales = (greatest / weight_levels).clamp_min(least_scale)
        self._weight_zero_points = torch.zeros(len(weight), dtype=torch.int32)

    def forward(self, x: Tensor) -> Tensor:
        """Maps what the layer maps, to the same shape."""
        x = torch.fake_quantize_per_tensor_affine(x, self._scale, self._zero_point, 0, ACTIVATION_LEVELS)
        weight = torch.fake_quantize_per_channel_affine(
            self.layer.weight, self._weight_scales, self._weight_zero_points, 0, -self.weight_levels, self.weight_levels
        )
        if isinstance(self.layer, nn.Linear):
            return functional.linear(x, weight, self.layer.bias)
        out: Tensor = self.layer._conv_forward(x, weight, self.layer.bias)
        return out.relu_() if isinstance(self.layer, ConvRelu) else out


def _copied(module: nn.Module, replacements: Mapping[nn.Linear | nn.Conv2d, "QuantizedLayer"]) -> nn.Module:
    """Returns a copy of a module with other submodules; it shares all parameters."""
    if isinstance(module, (nn.Linear, nn.Conv2d)) and module in replacements:
        return replacements[module]
    clone = copy.copy(module)
    clone._modules = {name: child and _copied(child, replacements) for name, child in module._modules.items()}
    return clone
