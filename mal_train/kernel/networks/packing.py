"""Copies a network for inference on one device: its weights are cast to the compute dtype only once.

Otherwise autocast casts every weight in every pass. On CPUs with AVX-512 the weights are also packed: else oneDNN, the
matrix library of torch on CPUs, reorders them into blocks in every pass. The kernels of packed layers also add the bias
and apply GELU or ReLU.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from mal_train.kernel.networks.heads import ConvRelu
from mal_train.kernel.networks.layers import Mlp


def packed(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Returns a copy of a network in evaluation mode whose linear layers and convolutions compute in `dtype`.

    It shares all other parameters with the network, such as those of norms, and keeps their dtype. It needs autocast
    like the network, unless `dtype` is float32.
    """
    is_on_cpu = all(parameter.device.type == "cpu" for parameter in module.parameters())
    return _copied(module, dtype, can_pack=is_on_cpu and _onednn_supports(dtype) and _is_packing_faster())


def _onednn_supports(dtype: torch.dtype) -> bool:
    """Returns True if this build of torch has oneDNN's packed layers, and this CPU their kernels for `dtype`."""
    is_built_in = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not is_built_in or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return dtype is torch.float32 or (dtype is torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _is_packing_faster() -> bool:
    """Returns True on CPUs with AVX-512.

    Time of a plain pass ÷ time of a packed one, one float32 crop of 224 px and one thread: 1.07 with AVX-512, 0.74 on a
    Zen 3 with AVX2, whose packed convolutions take three times as long (docs/experiments/speed.md).
    """
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def _copied(module: nn.Module, dtype: torch.dtype, *, can_pack: bool) -> nn.Module:
    if can_pack and isinstance(module, Mlp):
        return nn.Sequential(PackedLinear(module.fc1, dtype, "gelu"), PackedLinear(module.fc2, dtype))
    if can_pack and isinstance(module, nn.Linear):
        return PackedLinear(module, dtype)
    if can_pack and isinstance(module, ConvRelu):
        return PackedConvRelu(module, dtype)
    clone = copy.copy(module)
    clone._modules = {
        name: child and _copied(child, dtype, can_pack=can_pack) for name, child in module._modules.items()
    }
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        clone._parameters = {name: _cast(parameter, dtype) for name, parameter in module._parameters.items()}
    return clone


def _cast(parameter: Tensor | None, dtype: torch.dtype) -> Any:
    return None if parameter is None else nn.Parameter(parameter.detach().to(dtype), requires_grad=False)


class PackedLinear(nn.Module):
    """A linear layer with packed weights, and with GELU if `activation` is "gelu"; for inference on a CPU."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype, activation: str = "none") -> None:
        super().__init__()
        self._dtype, self._activation = dtype, activation
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().to(dtype))
        self._bias = _cast(linear.bias, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (…, K) of any floating-point dtype to (…, C) of the layer's dtype."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(
            x.to(self._dtype), self._weight, self._bias, self._activation, [], "none"
        )
        return out


class PackedConvRelu(nn.Module):
    """A `ConvRelu` with packed weights, for inference on a CPU."""

    def __init__(self, convolution: ConvRelu, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype, self._bias = dtype, _cast(convolution.bias, dtype)
        self._geometry = (
            list(convolution.padding),
            list(convolution.stride),
            list(convolution.dilation),
            convolution.groups,
        )
        # For kernels of stride 1, the blocks do not depend on the side of the maps, which oneDNN asks for.
        map_size = [1, convolution.in_channels, _ANY_SIDE, _ANY_SIDE]
        weight = convolution.weight.detach().to(dtype)
        self._weight = torch.ops.mkldnn._reorder_convolution_weight(weight, *self._geometry, map_size)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Maps (N, C, h, w) of any floating-point dtype to a map of the layer's dtype whose entries are ≥ 0."""
        out: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x_NCHW.to(self._dtype), self._weight, self._bias, *self._geometry, "relu", [], ""
        )
        return out


_ANY_SIDE = 64
