"""The ViT backbones: one table of sizes, and the network that turns a crop into one feature vector a patch.

Adding a backbone of this family is adding a row to `VIT_SIZES`. Knows nothing of masks, teachers or files.

Letters: N crops, S crop side in px, P patch side in px, h = w = S / P, C width, H heads, L tokens (1 + h·w), D = C / H.
"""

import difflib
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from mal_train.errors import ConfigError


@dataclass(frozen=True)
class VitSize:
    """One backbone.

    Attributes:
        width: C, channels of a token; a multiple of `heads`.
        depth: number of transformer blocks.
        heads: attention heads.
        patch: P, side of a patch in px. A crop side must be a multiple of it.
        grid: side of the learned position table in patches; other crop sizes resample it (bicubic, antialiased).
        stem: `linear` is one P×P convolution, as published DeiT and MAE weights have it; `conv` is log2(P) 3×3
            convolutions of stride 2, which learn faster from scratch and fit no published weights.
        pretrained: timm's name of the weights published for it, None where there are none.
    """

    width: int
    depth: int
    heads: int
    patch: int = 16
    grid: int = 14
    stem: Literal["linear", "conv"] = "linear"
    pretrained: str | None = None


VIT_SIZES: dict[str, VitSize] = {
    "vit-deit-tiny/16": VitSize(192, 12, 3, pretrained="deit_tiny_patch16_224.fb_in1k"),
    "vit-deit-small/16": VitSize(384, 12, 6, pretrained="deit_small_patch16_224.fb_in1k"),
    "vit-deit-base/16": VitSize(768, 12, 12, pretrained="deit_base_patch16_224.fb_in1k"),
    "vit-mae-base/16": VitSize(768, 12, 12, pretrained="vit_base_patch16_224.mae"),
    "vit-mae-large/16": VitSize(1024, 24, 16, pretrained="vit_large_patch16_224.mae"),
    # The two below are for tests and for the demo, which trains from scratch on a CPU in minutes.
    "vit-micro/16": VitSize(48, 2, 3, grid=8),
    "vit-demo/8": VitSize(192, 4, 3, patch=8, grid=12, stem="conv"),
}


def vit_size(arch: str) -> VitSize:
    """The row of `arch`; ConfigError names the nearest one otherwise."""
    size = VIT_SIZES.get(arch)
    if size is None:
        near = difflib.get_close_matches(arch, VIT_SIZES, n=1, cutoff=0.0)[0]
        raise ConfigError(f"model.arch: {arch!r} is no backbone; did you mean {near!r}? One of {', '.join(VIT_SIZES)}")
    return size


def check_crop_size(arch: str, crop_size: int) -> None:
    """ConfigError, with the nearest sizes that fit, unless `crop_size` px is a positive multiple of the patch size."""
    patch = vit_size(arch).patch
    if crop_size >= patch and crop_size % patch == 0:
        return
    below = max(crop_size // patch, 1) * patch
    near = f"{below} or {below + patch}" if crop_size > patch else str(patch)
    raise ConfigError(
        f"crop_size: {crop_size} px; {arch} cuts crops into patches of {patch} px, so it must be a positive multiple "
        f"of {patch}: take {near}"
    )


class ConvStem(PatchEmbed):
    """Patch embedding by 3×3 convolutions of stride 2, each with GroupNorm and GELU, and a 1×1 convolution.

    Xiao et al., "Early convolutions help transformers see better", 2021; GroupNorm instead of BatchNorm, so that a
    crop's features depend on no other crop and the teacher has no running statistics to follow.
    """

    def __init__(self, *, patch_size: int, in_chans: int, embed_dim: int, **rest: Any) -> None:
        super().__init__(patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim, **rest)
        halvings = patch_size.bit_length() - 1
        if 2**halvings != patch_size or embed_dim % 2 ** (halvings - 1):
            raise ConfigError(
                f"conv stem: patch {patch_size}, width {embed_dim}; the patch must be a power of two, "
                "and half of it must divide the width"
            )
        stages: list[nn.Module] = []
        channels = in_chans
        for i in range(halvings):
            wider = embed_dim >> (halvings - 1 - i)
            convolution = nn.Conv2d(channels, wider, 3, stride=2, padding=1, bias=False)
            stages.append(nn.Sequential(convolution, nn.GroupNorm(1, wider, eps=1e-6), nn.GELU()))
            channels = wider
        # add_module, not assignment: the base class declares one convolution.
        self.add_module("proj", nn.Sequential(*stages, nn.Conv2d(embed_dim, embed_dim, 1)))


SCORES_THAT_FIT_THE_CACHE = 1 << 20
"""Attention scores (N·H·L²) up to which one batched product beats a loop over crops and heads, in bfloat16 on a CPU."""


def attention(q_NHLD: Tensor, k_NHLD: Tensor, v_NHLD: Tensor) -> Tensor:
    """softmax(q·kᵀ/√D)·v, (N, H, L, D).

    torch's fused kernel, except in bfloat16 on a CPU: there it is no faster than in float32, and plain products take
    a third of its time, with or without gradients.
    """
    if q_NHLD.device.type != "cpu" or q_NHLD.dtype != torch.bfloat16:
        return functional.scaled_dot_product_attention(q_NHLD, k_NHLD, v_NHLD)
    crops, heads, tokens, depth = q_NHLD.shape
    q = (q_NHLD * depth**-0.5).reshape(crops * heads, tokens, depth)
    k = k_NHLD.reshape(crops * heads, tokens, depth)
    v = v_NHLD.reshape(crops * heads, tokens, depth)
    if crops * heads * tokens**2 <= SCORES_THAT_FIT_THE_CACHE:
        return torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v).view_as(q_NHLD)
    each = [torch.mm(torch.mm(a, b.t()).softmax(-1), c) for a, b, c in zip(q, k, v, strict=True)]
    return torch.stack(each).view_as(q_NHLD)


class SelfAttention(nn.Module):
    """Multi-head self-attention with timm's names for its weights."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens_NLC: Tensor, **_unused: object) -> Tensor:
        """(N, L, C). timm's block also hands over an attention mask, which this network never has."""
        qkv = self.qkv(tokens_NLC).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out: Tensor = self.proj(attention(*qkv.unbind(0)).transpose(1, 2).flatten(2))
        return out


class VitBlock(Block):
    """timm's transformer block around our attention."""

    def __init__(self, dim: int, num_heads: int, **rest: Any) -> None:
        super().__init__(dim, num_heads, **rest)
        self.add_module("attn", SelfAttention(dim, num_heads))


class Vit(VisionTransformer):
    """A plain ViT whose output is the map of its patch tokens.

    MLP ratio 4, biases in qkv, LayerNorm eps 1e-6, a class token, a learned position table. The class token takes
    part in attention and is dropped at the end, as the published method does.
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
        )
        self.patch = size.patch

    def forward(self, x_NCHW: Tensor) -> Tensor:  # type: ignore[override]  # timm's takes an attention mask too
        """Feature map (N, C, h, w) of crops (N, 3, S, S) after the final LayerNorm.

        Stored channels-last, as the tokens lie in memory: the convolutions of the mask head take it without a copy.
        """
        grid = x_NCHW.shape[-1] // self.patch
        tokens_NLC = self.forward_features(x_NCHW)[:, self.num_prefix_tokens :]
        return tokens_NLC.view(x_NCHW.shape[0], grid, grid, -1).permute(0, 3, 1, 2)


def build_vit(arch: str, drop_path: float = 0.0) -> Vit:
    """A randomly initialised backbone. `drop_path`: stochastic depth rate of the last block, rising linearly from 0."""
    return Vit(vit_size(arch), drop_path)
