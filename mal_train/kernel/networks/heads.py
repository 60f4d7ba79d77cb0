"""The two heads on a backbone's feature map: the mask head gives pixels (V), the RoI head the one filter (K) for them.

Letters: N crops, C backbone width, D output width shared by both heads, h w feature grid.
"""

import itertools

from torch import Tensor, nn
from torch.nn import functional

UPSAMPLE_BEFORE = 3
"""The published head upsamples before its fourth convolution; a shorter one before its last."""


def resize(map_NCHW: Tensor, ratio: float) -> Tensor:
    """Bilinear, without antialias or aligned corners, to floor(side · ratio), at least 1. A ratio of 1 is free."""
    if ratio == 1.0:
        return map_NCHW
    if min(map_NCHW.shape[-2:]) * ratio < 1.0:
        return functional.interpolate(map_NCHW, size=(1, 1), mode="bilinear")
    # By factor, not by size: on odd grids the two sample at different places, and the published code goes by factor.
    return functional.interpolate(map_NCHW, scale_factor=ratio, mode="bilinear")


class MaskHead(nn.Module):
    """3×3 convolutions, each followed by ReLU (also the last, so pixels are ≥ 0), with one upsampling in between."""

    def __init__(self, in_channels: int, hidden: int, out: int, num_convs: int, scale_ratio: float) -> None:
        super().__init__()
        widths = [in_channels, *[hidden] * (num_convs - 1), out]
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, 3, padding=1) for before, after in itertools.pairwise(widths)
        )
        self.scale_ratio = scale_ratio
        self.upsample_before = min(UPSAMPLE_BEFORE, num_convs - 1)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.kaiming_normal_(parameter, mode="fan_out", nonlinearity="relu")
            else:
                nn.init.zeros_(parameter)

    def forward(self, feat_NCHW: Tensor) -> Tensor:
        """(N, D, floor(h·scale_ratio), floor(w·scale_ratio)), all ≥ 0."""
        x = feat_NCHW
        for i, convolution in enumerate(self.convs):
            if i == self.upsample_before:
                x = resize(x, self.scale_ratio)
            # In place is safe: ReLU's gradient needs its result only, and a convolution's needs its input only.
            x = convolution(x).relu_()
        return x


class RoiHead(nn.Module):
    """The filter of a crop, from the mean of its feature map."""

    def __init__(self, in_channels: int, out: int) -> None:
        super().__init__()
        self.mlp1 = nn.Linear(in_channels, out)
        self.mlp2 = nn.Linear(out, out)

    def forward(self, feat_NCHW: Tensor) -> Tensor:
        """(N, D)."""
        out: Tensor = self.mlp2(self.mlp1(feat_NCHW.mean((2, 3))).relu())
        return out
