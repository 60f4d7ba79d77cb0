"""The ViT family of backbones: maps a crop to one feature vector per patch.

Its members are rows of `backbones`. Knows nothing of masks, teachers or files.

Letters: N crops, S crop side in px, P patch side in px, h = w = S / P, C width, H heads, D = C / H,
L tokens: h·w patches, one class token and, in the distilled variant, one distillation token.
Source: Dosovitskiy et al., "An image is worth 16x16 words", 2021 (arXiv 2010.11929), section 3.1.
"""

import copy
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from mal_train.core.errors import ConfigError
from mal_train.kernel.networks.layers import DropPath, LayerNorm, LayerScale, Mlp, drop_path_rates, init_linear_layers
from mal_train.kernel.networks.recomputation import recomputed

MLP_RATIO = 4


@dataclass(frozen=True)
class VitSize:
    """One backbone of the family.

    Attributes:
        width: C, channels of a token; a multiple of `heads`.
        depth: number of transformer blocks.
        heads: attention heads.
        patch: P, side of a patch in px. The crop size must be a multiple of it.
        grid: side of the learned position table in patches; it is resampled for other crop sizes.
        stem: `linear` is one P×P convolution, as in the published DeiT and MAE weights; `conv` is log2(P) 3×3
            convolutions of stride 2 (`ConvStem`), which train faster from scratch but match no published weights.
        variant: `plain`; `distilled` has a distillation token with its own position (Touvron et al., "Training
            data-efficient image transformers", 2021); `deit3` has a learned scale at the end of each half of a block
            and no position for the class token (Touvron et al., "DeiT III", 2022).
        resample: method to resample the position table: `antialias`, or `by_factor` as in NVlabs and TAO up to 6.0
            (`_positions_by_factor`).
        pretrained: timm's name of its published weights; None if timm has none.
        license: SPDX name of the license of its published weights; None if there are no weights or none is stated.
    """

    width: int
    depth: int
    heads: int
    patch: int = 16
    grid: int = 14
    stem: Literal["linear", "conv"] = "linear"
    variant: Literal["plain", "distilled", "deit3"] = "plain"
    resample: Literal["antialias", "by_factor"] = "antialias"
    pretrained: str | None = None
    license: str | None = None

    def build(self, drop_path: float = 0.0) -> "Vit":
        """Builds a randomly initialized network; `drop_path` as in `backbones.build_backbone`."""
        return Vit(self, drop_path)


class LinearStem(nn.Module):
    """Patch embedding by one convolution of the size and stride of a patch."""

    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, stride=patch)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Maps crops (N, 3, S, S) to patches (N, h, w, C)."""
        patches: Tensor = self.proj(x_NCHW).permute(0, 2, 3, 1)
        return patches


class ConvStem(nn.Module):
    """Patch embedding by 3×3 convolutions of stride 2, each with GroupNorm and GELU, and a 1×1 convolution.

    Xiao et al., "Early convolutions help transformers see better", 2021 (arXiv 2106.14881), with GroupNorm instead of
    BatchNorm: the features of a crop do not depend on its batch, and the teacher has no running statistics.
    """

    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        halvings = patch.bit_length() - 1
        if 2**halvings != patch or width % 2 ** (halvings - 1):
            raise ConfigError(
                f"conv stem: patch {patch}, width {width}; patch must be a power of two, and width a multiple of "
                "patch / 2"
            )
        stages: list[nn.Module] = []
        channels = 3
        for i in range(halvings):
            wider = width >> (halvings - 1 - i)
            convolution = nn.Conv2d(channels, wider, 3, stride=2, padding=1, bias=False)
            stages.append(nn.Sequential(convolution, nn.GroupNorm(1, wider, eps=1e-6), nn.GELU()))
            channels = wider
        self.proj = nn.Sequential(*stages, nn.Conv2d(width, width, 1))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Maps crops (N, 3, S, S) to patches (N, h, w, C)."""
        patches: Tensor = self.proj(x_NCHW).permute(0, 2, 3, 1)
        return patches


MAX_CACHED_SCORES = 1 << 20
"""Attention scores (L² for each head) of one product: 2 MiB, which fits into the cache of a core. Products of all crops
and heads at once leave it; one product for each head is small at 224 px and takes up to 1.5 times as long."""


def attention(q_NHLD: Tensor, k_NHLD: Tensor, v_NHLD: Tensor) -> Tensor:
    """Returns softmax(q·kᵀ/√D)·v, (N, H, L, D), for q, k and v of the same shape.

    Uses torch's fused kernel, except in bfloat16 on a CPU: there the kernel is no faster than in float32, and plain
    matrix products take a third of its time, with or without gradients.
    """
    if q_NHLD.device.type != "cpu" or q_NHLD.dtype != torch.bfloat16:
        return functional.scaled_dot_product_attention(q_NHLD, k_NHLD, v_NHLD)
    crops, heads, tokens, depth = q_NHLD.shape
    heads_at_once = max(MAX_CACHED_SCORES // tokens**2, 1)
    q = (q_NHLD * depth**-0.5).reshape(crops * heads, tokens, depth)
    k = k_NHLD.reshape(crops * heads, tokens, depth)
    v = v_NHLD.reshape(crops * heads, tokens, depth)
    chunks = zip(*(torch.split(x, heads_at_once) for x in (q, k, v)), strict=True)
    parts = [torch.bmm(torch.bmm(a, b.transpose(1, 2)).softmax(-1), c) for a, b, c in chunks]
    return torch.cat(parts).view_as(q_NHLD)


LAYER_SCALE_INIT = 1e-6
"""Initial value of DeiT III's learned scales."""


class SelfAttention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens_NLC: Tensor) -> Tensor:
        """Maps tokens (N, L, C) to (N, L, C)."""
        qkv = self.qkv(tokens_NLC).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out: Tensor = self.proj(attention(*qkv.unbind(0)).transpose(1, 2).flatten(2))
        return out


class VitBlock(nn.Module):
    """Attention and an MLP, each after a LayerNorm and added to its input."""

    def __init__(self, size: VitSize, drop_path: float) -> None:
        super().__init__()
        self.norm1 = LayerNorm(size.width)
        self.attn = SelfAttention(size.width, size.heads)
        self.ls1 = _layer_scale(size)
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = LayerNorm(size.width)
        self.mlp = Mlp(size.width, MLP_RATIO * size.width)
        self.ls2 = _layer_scale(size)
        self.drop_path2 = DropPath(drop_path)

    def forward(self, tokens_NLC: Tensor) -> Tensor:
        """Maps tokens (N, L, C) to (N, L, C)."""
        tokens_NLC = tokens_NLC + self.drop_path1(self.ls1(self.attn(self.norm1(tokens_NLC))))
        out: Tensor = tokens_NLC + self.drop_path2(self.ls2(self.mlp(self.norm2(tokens_NLC))))
        return out


def _layer_scale(size: VitSize) -> nn.Module:
    return LayerScale(size.width, LAYER_SCALE_INIT) if size.variant == "deit3" else nn.Identity()


class Vit(nn.Module):
    """A ViT whose output is the map of its patch tokens. Its weights have timm's names.

    MLP ratio 4, biases in qkv, LayerNorm eps 1e-6, a class token and a learned position table. The class token and the
    distillation token take part in attention and are dropped at the end, as in the published method.
    """

    def __init__(self, size: VitSize, drop_path: float = 0.0) -> None:
        super().__init__()
        self.patch = size.patch
        self.embed_dim = size.width
        self.grid = size.grid
        self.resamples_by_factor = size.resample == "by_factor"
        self.patch_embed = (ConvStem if size.stem == "conv" else LinearStem)(size.width, size.patch)
        self.cls_token = nn.Parameter(torch.empty(1, 1, size.width))
        # timm loads a distillation token as a register token: one more token with a position.
        has_register = size.variant == "distilled"
        self.reg_token = nn.Parameter(torch.empty(1, 1, size.width)) if has_register else None
        self.num_prefix_tokens = 2 if has_register else 1
        self.num_prefix_positions = 0 if size.variant == "deit3" else self.num_prefix_tokens
        self.pos_embed = nn.Parameter(torch.empty(1, self.num_prefix_positions + size.grid**2, size.width))
        rates = drop_path_rates(drop_path, size.depth)
        self.blocks = nn.Sequential(*(VitBlock(size, rate) for rate in rates))
        self.grad_checkpointing = False
        self.norm = LayerNorm(size.width)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for token in (self.cls_token, self.reg_token):
            if token is not None:
                nn.init.normal_(token, std=1e-6)
        init_linear_layers(self)

    def for_grid(self, side: int) -> "Vit":
        """Returns a copy whose position table has side² patches; it shares the other parameters.

        For graph formats without an operator that resamples it.
        """
        clone = copy.copy(self)
        with torch.no_grad():
            table = nn.Parameter(self._positions(side), requires_grad=False)
        clone._parameters = {**self._parameters, "pos_embed": table}
        clone.grid = side
        return clone

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Returns the feature map (N, C, h, w) of crops (N, 3, S, S), after the final LayerNorm.

        Its memory format is channels-last, like that of the tokens, so the mask head needs no copy.
        """
        grid = x_NCHW.shape[-1] // self.patch
        tokens_NLC: Tensor = self._pos_embed(self.patch_embed(x_NCHW))
        for block in self.blocks:
            tokens_NLC = recomputed(block, tokens_NLC) if self.grad_checkpointing else block(tokens_NLC)
        map_NhwC: Tensor = self.norm(tokens_NLC)[:, self.num_prefix_tokens :].unflatten(1, (grid, grid))
        return map_NhwC.permute(0, 3, 1, 2)

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Maps patches (N, h, w, C) to tokens (N, L, C): prepends the extra tokens and adds the position table."""
        prefix = [token.expand(len(x), -1, -1) for token in (self.cls_token, self.reg_token) if token is not None]
        table_1LC, patches_NLC = self._positions(x.shape[1]), x.flatten(1, 2)
        if self.num_prefix_positions == 0:
            return torch.cat([*prefix, patches_NLC + table_1LC], dim=1)
        return torch.cat([*prefix, patches_NLC], dim=1) + table_1LC

    def _positions(self, side: int) -> Tensor:
        """Returns the position table (1, L, C), resampled to side² patches if it has another size."""
        if side == self.grid:
            return self.pos_embed
        resample = _positions_by_factor if self.resamples_by_factor else resampled_positions
        extra = self.num_prefix_positions
        return torch.cat([self.pos_embed[:, :extra], resample(self.pos_embed[:, extra:], side)], dim=1)


def resampled_positions(table_1LC: Tensor, side: int) -> Tensor:
    """Resamples a position table (1, L, C) to side² patches: antialiased bicubic, in float32, as timm does."""
    own = math.isqrt(table_1LC.shape[1])
    map_1CHW = table_1LC.float().view(1, own, own, -1).permute(0, 3, 1, 2)
    resampled = functional.interpolate(map_1CHW, size=(side, side), mode="bicubic", antialias=True)
    return resampled.permute(0, 2, 3, 1).flatten(1, 2).to(table_1LC.dtype)


def _positions_by_factor(table_1LC: Tensor, side: int) -> Tensor:
    """Resamples a position table (1, L, C) to side² patches: bicubic, no antialias, by (side + 0.1) / its own side.

    The published code adds 0.1 so that rounding does not lose a row; this also shifts the sampling points.
    """
    own = math.isqrt(table_1LC.shape[1])
    map_1CHW = table_1LC.view(1, own, own, -1).permute(0, 3, 1, 2)
    factor = (side + 0.1) / own
    return functional.interpolate(map_1CHW, scale_factor=factor, mode="bicubic").flatten(2).transpose(1, 2)
