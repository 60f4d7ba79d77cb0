"""The two heads on a backbone's feature map: the mask head computes pixel features V, the RoI head one filter K.

Letters: N crops, C backbone width, D output width shared by both heads, h × w feature grid.
Source: Lan et al., "Vision transformers are good mask auto-labelers", 2023 (arXiv 2301.03992), section 3.
"""

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional

from mal_train.core.masks.geometry import Region
from mal_train.kernel.networks.regions import bilinear_sources, cut, grown, scaled, whole

UPSAMPLE_BEFORE = 3
"""Index of the convolution before which the published head upsamples; a shorter head upsamples before its last one."""


def resize(map_NCHW: Tensor, ratio: float) -> Tensor:
    """Resizes (N, C, h, w) bilinearly to sides floor(side · ratio), at least 1. No antialias, no aligned corners."""
    if ratio == 1.0:
        return map_NCHW
    if min(map_NCHW.shape[-2:]) * ratio < 1.0:
        return functional.interpolate(map_NCHW, size=(1, 1), mode="bilinear")
    # By factor, not by size: for odd sides the sampling points differ, and the published code resizes by factor.
    return functional.interpolate(map_NCHW, scale_factor=ratio, mode="bilinear")


class ConvRelu(nn.Conv2d):
    """A convolution followed by ReLU."""

    def forward(self, input: Tensor) -> Tensor:
        """Maps (N, C, h, w) to a map whose entries are ≥ 0."""
        # In place is safe: the gradient of ReLU needs only its output, that of a convolution only its input.
        return super().forward(input).relu_()


class MaskHead(nn.Module):
    """3×3 convolutions with one upsampling in between. Each is followed by ReLU, also the last: features are ≥ 0."""

    def __init__(self, in_channels: int, hidden: int, out: int, num_convs: int, scale_ratio: float) -> None:
        super().__init__()
        widths = [in_channels, *[hidden] * (num_convs - 1), out]
        self.convs = nn.ModuleList(
            ConvRelu(before, after, 3, padding=1) for before, after in itertools.pairwise(widths)
        )
        self.scale_ratio = scale_ratio
        self.upsample_before = min(UPSAMPLE_BEFORE, num_convs - 1)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.kaiming_normal_(parameter, mode="fan_out", nonlinearity="relu")
            else:
                nn.init.zeros_(parameter)

    def output_side(self, side: int) -> int:
        """Returns the side of the pixel features of a map with `side`."""
        return max(int(side * self.scale_ratio), 1)

    def forward(self, feat_NCHW: Tensor) -> Tensor:
        """Returns pixel features (N, D, floor(h·scale_ratio), floor(w·scale_ratio)), all ≥ 0, of a map (N, C, h, w)."""
        if _learns_in_float32_on_cpu(feat_NCHW):
            feat_NCHW = feat_NCHW.contiguous()
        return self._after_upsampling(resize(self._before_upsampling(feat_NCHW), self.scale_ratio))

    def part(self, feat_NCHW: Tensor, needed: Region) -> tuple[Tensor, Region]:
        """Returns the pixel features (N, D, rows, columns) of a region, and that region, which contains `needed`.

        Within `needed` they are those of `forward`; beyond, they may differ.

        Args:
            feat_NCHW: square feature map.
            needed: region of the map that `forward` returns.
        """
        side = feat_NCHW.shape[-1]
        if not self.scale_ratio.is_integer():
            return self.forward(feat_NCHW), whole(self.output_side(side))
        # At the border of a part, a convolution sees zeros instead of neighbors. Every part therefore extends beyond
        # the needed entries by one for each convolution.
        ratio, first = int(self.scale_ratio), self.upsample_before
        upsampled = grown(needed, len(self.convs) - first, ratio * side)
        source = bilinear_sources(upsampled, ratio * side, side)
        held = grown(source, first, side)
        x = cut(self._before_upsampling(cut(feat_NCHW, whole(side), held)), held, source)
        x = cut(resize(x, self.scale_ratio), scaled(source, ratio), upsampled)
        return self._after_upsampling(x), upsampled

    def _before_upsampling(self, x_NCHW: Tensor) -> Tensor:
        for convolution in self.convs[: self.upsample_before]:
            x_NCHW = convolution(x_NCHW)
        return x_NCHW

    def _after_upsampling(self, x_NCHW: Tensor) -> Tensor:
        for convolution in self.convs[self.upsample_before :]:
            x_NCHW = convolution(x_NCHW)
        return x_NCHW


def _learns_in_float32_on_cpu(map_NCHW: Tensor) -> bool:
    """Returns True where a convolution's backward pass is faster on contiguous maps than on channels-last ones.

    With AVX2, forward and backward pass together by 1.23 times at crop 224 and 2.07 times at crop 512.
    """
    on_cpu = map_NCHW.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    return on_cpu and map_NCHW.dtype is torch.float32 and map_NCHW.requires_grad


class RoiHead(nn.Module):
    """Two linear layers with ReLU in between, on the spatial mean of the feature map: one filter for each crop."""

    def __init__(self, in_channels: int, out: int) -> None:
        super().__init__()
        self.mlp1 = nn.Linear(in_channels, out)
        self.mlp2 = nn.Linear(out, out)

    def forward(self, feat_NCHW: Tensor) -> Tensor:
        """Returns filters (N, D) of a map (N, C, h, w)."""
        out: Tensor = self.mlp2(self.mlp1(feat_NCHW.mean((2, 3))).relu())
        return out
