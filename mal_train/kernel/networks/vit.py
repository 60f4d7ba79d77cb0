"""The ViT family of backbones: maps a crop to one feature vector per patch.

Its members are rows of `backbones`. Knows nothing of masks, teachers or files.

Letters: N crops, S crop side in px, P patch side in px, h = w = S / P, C width, H heads, D = C / H,
L tokens: h·w patches, one class token and, in the distilled variant, one distillation token.
Source: Dosovitskiy et al., "An image is worth 16x16 words", 2021 (arXiv 2010.11929), section 3.1.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from mal_train.core.errors import ConfigError


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


class ConvStem(PatchEmbed):
    """Patch embedding by 3×3 convolutions of stride 2, each with GroupNorm and GELU, and a 1×1 convolution.

    Xiao et al., "Early convolutions help transformers see better", 2021 (arXiv 2106.14881), with GroupNorm instead of
    BatchNorm: the features of a crop do not depend on its batch, and the teacher has no running statistics.
    """

    def __init__(self, *, patch_size: int, in_chans: int, embed_dim: int, **rest: Any) -> None:
        super().__init__(patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim, **rest)
        halvings = patch_size.bit_length() - 1
        if 2**halvings != patch_size or embed_dim % 2 ** (halvings - 1):
            raise ConfigError(
                f"conv stem: patch {patch_size}, width {embed_dim}; patch must be a power of two, and width a multiple "
                "of patch / 2"
            )
        stages: list[nn.Module] = []
        channels = in_chans
        for i in range(halvings):
            wider = embed_dim >> (halvings - 1 - i)
            convolution = nn.Conv2d(channels, wider, 3, stride=2, padding=1, bias=False)
            stages.append(nn.Sequential(convolution, nn.GroupNorm(1, wider, eps=1e-6), nn.GELU()))
            channels = wider
        # add_module, not assignment: the base class declares `proj` as one convolution.
        self.add_module("proj", nn.Sequential(*stages, nn.Conv2d(embed_dim, embed_dim, 1)))


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
    """Multi-head self-attention; its weights have timm's names."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens_NLC: Tensor, **_unused: object) -> Tensor:
        """Maps tokens (N, L, C) to (N, L, C). timm's block also passes an attention mask, which is always None."""
        qkv = self.qkv(tokens_NLC).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out: Tensor = self.proj(attention(*qkv.unbind(0)).transpose(1, 2).flatten(2))
        return out


class VitBlock(Block):
    """timm's transformer block with `SelfAttention`."""

    def __init__(self, dim: int, num_heads: int, **rest: Any) -> None:
        super().__init__(dim, num_heads, **rest)
        self.add_module("attn", SelfAttention(dim, num_heads))


class Vit(VisionTransformer):
    """A ViT whose output is the map of its patch tokens.

    MLP ratio 4, biases in qkv, LayerNorm eps 1e-6, a class token and a learned position table. The class token and the
    distillation token take part in attention and are dropped at the end, as in the published method.
    """

    def __init__(self, size: VitSize, drop_path: float = 0.0) -> None:
        super().__init__(
            img_size=size.grid * size.patch,
            patch_size=size.patch,
            embed_dim=size.width,
            depth=size.depth,
            num_heads=size.heads,
            num_classes=0,
            drop_path_rate=drop_path,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            block_fn=VitBlock,
            embed_layer=ConvStem if size.stem == "conv" else PatchEmbed,
            dynamic_img_size=True,
            # A distillation token is the same as timm's register token: one more token with a position.
            reg_tokens=1 if size.variant == "distilled" else 0,
            no_embed_class=size.variant == "deit3",
            init_values=LAYER_SCALE_INIT if size.variant == "deit3" else None,
        )
        self.patch = size.patch
        self.resamples_by_factor = size.resample == "by_factor"

    def forward(self, x_NCHW: Tensor) -> Tensor:  # type: ignore[override]  # timm's takes an attention mask too
        """Returns the feature map (N, C, h, w) of crops (N, 3, S, S), after the final LayerNorm.

        Its memory format is channels-last, like that of the tokens, so the mask head needs no copy.
        """
        grid = x_NCHW.shape[-1] // self.patch
        tokens_NLC = self.forward_features(x_NCHW)[:, self.num_prefix_tokens :]
        return tokens_NLC.view(x_NCHW.shape[0], grid, grid, -1).permute(0, 3, 1, 2)

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Maps patches (N, h, w, C) to tokens (N, L, C): prepends the class token and adds the position table.

        A table of another size is first resampled to h·w patches, by timm or by `_positions_by_factor`.
        """
        if not self.resamples_by_factor:
            return super()._pos_embed(x)
        assert self.cls_token is not None
        assert self.pos_embed is not None
        crops, side = x.shape[0], x.shape[1]
        table: Tensor = self.pos_embed
        if side * side != table.shape[1] - 1:
            table = torch.cat([table[:, :1], _positions_by_factor(table[:, 1:], side)], dim=1)
        return torch.cat([self.cls_token.expand(crops, -1, -1), x.flatten(1, 2)], dim=1) + table


def _positions_by_factor(table_1LC: Tensor, side: int) -> Tensor:
    """Resamples a position table (1, L, C) to side² patches: bicubic, no antialias, by (side + 0.1) / its own side.

    The published code adds 0.1 so that rounding does not lose a row; this also shifts the sampling points.
    """
    own = math.isqrt(table_1LC.shape[1])
    map_1CHW = table_1LC.view(1, own, own, -1).permute(0, 3, 1, 2)
    factor = (side + 0.1) / own
    return functional.interpolate(map_1CHW, scale_factor=factor, mode="bicubic").flatten(2).transpose(1, 2)
