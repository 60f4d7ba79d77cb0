"""The FAN family of backbones: attention over tokens, then attention over channels instead of a plain MLP.

Its members are rows of `backbones`. The output is the map of patch tokens, as in TAO up to 6.0.
Source: Zhou et al., "Understanding the robustness in vision transformers", 2022 (arXiv 2204.12451), section 3.

Letters: N crops, S crop side in px, h = w = S / 16, L = h·w tokens, C width, H heads, D = C / H.
"""

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from mal_train.kernel.networks.layers import DropPath, LayerNorm, drop_path_rates, init_linear_layers
from mal_train.kernel.networks.recomputation import recomputed
from mal_train.kernel.networks.vit import attention

PATCH = 16
"""Stride of both stems in px."""
MLP_RATIO = 4
CLASS_BLOCKS = 2
HYBRID_WIDTHS = (128, 256)
FREQUENCIES = 32
"""Entries of the position encoding for each of the two directions."""


@dataclass(frozen=True)
class FanSize:
    """One backbone of the family.

    Attributes:
        width: C, channels of a token; a multiple of `heads`, and of 8 with the plain stem.
        depth: number of blocks.
        heads: attention heads, over tokens and over channels.
        hybrid: depths of the two ConvNeXt stages of the hybrid stem; None for the plain stem.
        pretrained: always None: timm has no weights of this family.
        license: always None: none is stated for the published weights.
    """

    width: int
    depth: int
    heads: int
    hybrid: tuple[int, int] | None = None
    pretrained: str | None = None
    license: str | None = None

    @property
    def patch(self) -> int:
        """Stride of the feature map in px of the crop."""
        return PATCH

    def build(self, drop_path: float = 0.0) -> "Fan":
        """Builds a randomly initialized network; `drop_path` as in `backbones.build_backbone`."""
        return Fan(self, drop_path)


class Fan(nn.Module):
    """Stem, sine positions, blocks, and the parts of the two class-attention blocks that change patch tokens.

    In the published class-attention blocks a class token attends to the patches, but patches attend to nothing, and the
    class token is dropped at the end. Only the norms and scales of these blocks are therefore built. Crops may have any
    size, because there is no learned position table.
    """

    def __init__(self, size: FanSize, drop_path: float = 0.0) -> None:
        super().__init__()
        self.patch_embed = PlainStem(size.width) if size.hybrid is None else HybridStem(size.width, size.hybrid)
        self.pos_embed = SinePositions(size.width)
        rates = drop_path_rates(drop_path, size.depth)
        self.blocks = nn.ModuleList(FanBlock(size.width, size.heads, rate) for rate in rates)
        self.cls_attn_blocks = nn.ModuleList(ClassBlock(size.width) for _ in range(CLASS_BLOCKS))
        self.grad_checkpointing = False
        self.norm = LayerNorm(size.width)
        init_linear_layers(self)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Returns the feature map (N, C, h, w), in memory format channels-last, of crops (N, 3, S, S)."""
        map_NCHW = self.patch_embed(x_NCHW)
        map_NCHW = map_NCHW + self.pos_embed(map_NCHW)
        grid = (map_NCHW.shape[2], map_NCHW.shape[3])
        tokens_NLC = map_NCHW.flatten(2).transpose(1, 2)
        for block in self.blocks:
            tokens_NLC = recomputed(block, tokens_NLC, grid) if self.grad_checkpointing else block(tokens_NLC, grid)
        for block in self.cls_attn_blocks:
            tokens_NLC = block(tokens_NLC)
        out: Tensor = self.norm(tokens_NLC).unflatten(1, grid).permute(0, 3, 1, 2)
        return out


class PlainStem(nn.Module):
    """Four 3×3 convolutions of stride 2, each with BatchNorm, and GELU in between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        widths = [3, width // 8, width // 4, width // 2, width]
        stages: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            convolution = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
            stages += [nn.Sequential(convolution, nn.BatchNorm2d(after)), nn.GELU()]
        self.proj = nn.Sequential(*stages[:-1])

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Maps crops (N, 3, S, S) to (N, C, h, w)."""
        out: Tensor = self.proj(x_NCHW)
        return out


class HybridStem(nn.Module):
    """The first two stages of ConvNeXt (Liu et al., 2022, arXiv 2201.03545), of stride 8, and a 2×2 convolution."""

    def __init__(self, width: int, depths: tuple[int, int]) -> None:
        super().__init__()
        self.backbone = TwoStages(depths)
        self.proj = nn.Conv2d(HYBRID_WIDTHS[1], width, 2, stride=2)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Maps crops (N, 3, S, S) to (N, C, h, w)."""
        out: Tensor = self.proj(self.backbone(x_NCHW))
        return out


class TwoStages(nn.Module):
    """ConvNeXt stem of stride 4 and two stages, the second of stride 2."""

    def __init__(self, depths: tuple[int, int]) -> None:
        super().__init__()
        first, second = HYBRID_WIDTHS
        self.stem = nn.Sequential(nn.Conv2d(3, first, 4, stride=4), ChannelNorm(first))
        halving = nn.Sequential(UnbiasedChannelNorm(first), nn.Conv2d(first, second, 2, stride=2))
        self.stages = nn.Sequential(Stage(first, depths[0], nn.Identity()), Stage(second, depths[1], halving))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Maps crops (N, 3, S, S) to (N, 256, S / 8, S / 8)."""
        out: Tensor = self.stages(self.stem(x_NCHW))
        return out


class Stage(nn.Module):
    """A ConvNeXt stage: a change of width and resolution, followed by blocks."""

    def __init__(self, width: int, depth: int, downsample: nn.Module) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*(ConvNextBlock(width) for _ in range(depth)))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Maps (N, ·, h, w) to (N, width, ·, ·)."""
        out: Tensor = self.blocks(self.downsample(x_NCHW))
        return out


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of each pixel of a map (N, C, h, w)."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Keeps the shape of the input."""
        return super().forward(x_NCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class UnbiasedChannelNorm(ChannelNorm):
    """A `ChannelNorm` whose variance is divided by C − 1, as in the published code for channels-last maps.

    All of its maps after the norm of the stem are channels-last. At 128 channels this changes the features by 1 % of
    their standard deviation.
    """

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Keeps the shape of the input."""
        variance, mean = torch.var_mean(x_NCHW, dim=1, keepdim=True)
        out: Tensor = (x_NCHW - mean) * torch.rsqrt(variance + self.eps)
        return out * self.weight[:, None, None] + self.bias[:, None, None]


class ConvNextBlock(nn.Module):
    """x + γ · MLP(norm(7×7 depthwise convolution of x)); the MLP consists of 1×1 convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), 1e-6))
        self.conv_dw = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = UnbiasedChannelNorm(width)
        self.mlp = nn.ModuleDict(
            {
                "fc1": nn.Conv2d(width, MLP_RATIO * width, 1),
                "fc2": nn.Conv2d(MLP_RATIO * width, width, 1),
            }
        )

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Keeps the shape of the input."""
        hidden = functional.gelu(self.mlp["fc1"](self.norm(self.conv_dw(x_NCHW))))
        change: Tensor = self.mlp["fc2"](hidden)
        return x_NCHW + self.gamma[:, None, None] * change


class SinePositions(nn.Module):
    """Sines and cosines of a pixel's coordinates, scaled to (0, 2π], followed by a learned 1×1 convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.token_projection = nn.Conv2d(2 * FREQUENCIES, width, 1)

    def forward(self, map_NCHW: Tensor) -> Tensor:
        """Returns the encoding (1, C, h, w) for a map (N, C, h, w)."""
        height, width = map_NCHW.shape[-2:]
        rows, columns = (self._waves(length, map_NCHW.device) for length in (height, width))
        both = torch.cat(
            [rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)],
            dim=2,
        )
        out: Tensor = self.token_projection(both.permute(2, 0, 1)[None])
        return out

    @staticmethod
    def _waves(length: int, device: torch.device) -> Tensor:
        """Returns (length, 32) float32: sine and cosine, alternating, of 16 frequencies from 1 down to about 1e-4."""
        position = torch.arange(1, length + 1, device=device, dtype=torch.float32) / (length + 1e-6) * (2.0 * math.pi)
        octave = torch.arange(FREQUENCIES // 2, device=device, dtype=torch.float32) * 2.0 / FREQUENCIES
        angle = position[:, None] / 10_000.0**octave
        return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)


class FanBlock(nn.Module):
    """x + γ₁ · token attention, then x + γ₂ · channel attention, each after a LayerNorm."""

    def __init__(self, width: int, heads: int, drop_path: float) -> None:
        super().__init__()
        self.gamma1 = nn.Parameter(torch.ones(width))
        self.gamma2 = nn.Parameter(torch.ones(width))
        self.norm1 = LayerNorm(width)
        self.attn = TokenAttention(width, heads)
        self.norm2 = LayerNorm(width)
        self.mlp = ChannelAttention(width, heads)
        self.drop_path = DropPath(drop_path)

    def forward(self, tokens_NLC: Tensor, grid: tuple[int, int]) -> Tensor:
        """Maps tokens (N, L, C) to (N, L, C); `grid` is (h, w)."""
        tokens_NLC = tokens_NLC + self.drop_path(self.gamma1 * self.attn(self.norm1(tokens_NLC)))
        change: Tensor = self.drop_path(self.gamma2 * self.mlp(self.norm2(tokens_NLC), grid))
        return tokens_NLC + change


class TokenAttention(nn.Module):
    """Multi-head self-attention with separate layers for queries and for keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens_NLC: Tensor) -> Tensor:
        """Maps tokens (N, L, C) to (N, L, C)."""
        q_NHLD = self.q(tokens_NLC).unflatten(2, (self.heads, -1)).transpose(1, 2)
        k_NHLD, v_NHLD = self.kv(tokens_NLC).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        out: Tensor = self.proj(attention(q_NHLD, k_NHLD, v_NHLD).transpose(1, 2).flatten(2))
        return out


class ChannelAttention(nn.Module):
    """A convolutional MLP whose output channels are multiplied by learned gates.

    The gates of a head are g = τ · sigmoid(softmax(Q)ᵀ · mean over channels of softmax(X)), one number per channel;
    both softmaxes are over the tokens.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.mlp_v = ConvMlp(width)
        self.norm_v = LayerNorm(width)
        self.q = nn.Linear(width, width)

    def forward(self, tokens_NLC: Tensor, grid: tuple[int, int]) -> Tensor:
        """Maps tokens (N, L, C) to (N, L, C)."""
        q_NLHD = self.q(tokens_NLC).unflatten(2, (self.heads, -1)).softmax(1)
        weight_NLH = tokens_NLC.view_as(q_NLHD).softmax(1).mean(3)
        gate_NHD = torch.einsum("nlhd,nlh->nhd", q_NLHD, weight_NLH).sigmoid() * self.temperature[:, :, 0]
        out: Tensor = self.norm_v(self.mlp_v(tokens_NLC, grid)) * gate_NHD.flatten(1)[:, None]
        return out


class ConvMlp(nn.Module):
    """fc2(u + γ · DepthwisePair(u)) with u = fc1(x)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = MLP_RATIO * width
        self.gamma = nn.Parameter(torch.ones(hidden))
        self.fc1 = nn.Linear(width, hidden)
        self.dwconv = DepthwisePair(hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, tokens_NLC: Tensor, grid: tuple[int, int]) -> Tensor:
        """Maps tokens (N, L, C) to (N, L, C)."""
        hidden_NLC = self.fc1(tokens_NLC)
        out: Tensor = self.fc2(hidden_NLC + self.gamma * self.dwconv(hidden_NLC, grid))
        return out


class DepthwisePair(nn.Module):
    """Two 3×3 depthwise convolutions, with GELU and BatchNorm in between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.bn = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, groups=width)

    def forward(self, tokens_NLC: Tensor, grid: tuple[int, int]) -> Tensor:
        """Maps tokens (N, L, C) to (N, L, C)."""
        map_NCHW = tokens_NLC.view(len(tokens_NLC), *grid, -1).permute(0, 3, 1, 2)
        out: Tensor = self.conv2(self.bn(functional.gelu(self.conv1(map_NCHW))))
        return out.flatten(2).transpose(1, 2)


class ClassBlock(nn.Module):
    """The effect of a class-attention block on a patch token: x ← x + γ₁ · norm(x), then x ← 2 · norm(x)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma1 = nn.Parameter(torch.ones(width))
        self.norm1 = LayerNorm(width)
        self.norm2 = LayerNorm(width)

    def forward(self, tokens_NLC: Tensor) -> Tensor:
        """Maps tokens (N, L, C) to (N, L, C)."""
        out: Tensor = 2.0 * self.norm2(tokens_NLC + self.gamma1 * self.norm1(tokens_NLC))
        return out
