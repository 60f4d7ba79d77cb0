"""The table of backbones: what `model.arch` may name, and the way from a name to a network.

Adding a backbone is one file, with a class that has the members of `BackboneSize`, and one row here.
"""

import difflib
from dataclasses import replace
from typing import Any, Protocol

from torch import nn

from mal_train.core.errors import ConfigError
from mal_train.kernel.networks.fan import FanSize
from mal_train.kernel.networks.vit import VitSize


class BackboneSize(Protocol):
    """What the rest of the project asks of a row."""

    @property
    def width(self) -> int:
        """C, channels of the feature map."""

    @property
    def patch(self) -> int:
        """P, px of the crop to a step of the feature map; a crop side must be a multiple of it."""

    @property
    def pretrained(self) -> str | None:
        """Name in timm of the weights published for it, None where timm has none."""

    @property
    def license(self) -> str | None:
        """SPDX name of the license of the weights published for it, None where none are or it is not stated."""

    def build(self, drop_path: float) -> nn.Module:
        """A module from normalized crops (N, 3, S, S) to the feature map (N, C, S / P, S / P).

        It has children `patch_embed` and `blocks` (a sequence), which `model.frozen_stages` counts.
        """


DEIT = "Apache-2.0"
DINO = "Apache-2.0"
FOR_RESEARCH = "CC-BY-NC-4.0"
"""MAE and MoCo v3."""

TINY = VitSize(192, 12, 3)
SMALL = VitSize(384, 12, 6)
BASE = VitSize(768, 12, 12)
LARGE = VitSize(1024, 24, 16)
HUGE = VitSize(1280, 32, 16, patch=14, grid=16)
NVLABS: dict[str, Any] = {"stem": "conv", "resample": "by_factor"}

BACKBONES: dict[str, BackboneSize] = {
    "vit-deit-tiny/16": replace(TINY, pretrained="deit_tiny_patch16_224.fb_in1k", license=DEIT),
    "vit-deit-small/16": replace(SMALL, pretrained="deit_small_patch16_224.fb_in1k", license=DEIT),
    "vit-deit-base/16": replace(BASE, pretrained="deit_base_patch16_224.fb_in1k", license=DEIT),
    "vit-deit-base-distilled/16": replace(
        BASE, variant="distilled", pretrained="deit_base_distilled_patch16_224.fb_in1k", license=DEIT
    ),
    "vit-deit-iii-base-224/16": replace(
        BASE, variant="deit3", pretrained="deit3_base_patch16_224.fb_in22k_ft_in1k", license=DEIT
    ),
    "vit-dino-small/16": replace(SMALL, pretrained="vit_small_patch16_224.dino", license=DINO),
    "vit-dino-base/16": replace(BASE, pretrained="vit_base_patch16_224.dino", license=DINO),
    "vit-mocov3-base/16": replace(BASE, license=FOR_RESEARCH),
    "vit-mae-base/16": replace(BASE, pretrained="vit_base_patch16_224.mae", license=FOR_RESEARCH),
    "vit-mae-large/16": replace(LARGE, pretrained="vit_large_patch16_224.mae", license=FOR_RESEARCH),
    "vit-mae-huge/14": replace(HUGE, pretrained="vit_huge_patch14_224.mae", license=FOR_RESEARCH),
    # NVlabs' networks, and TAO's up to 6.0: published weights fill everything but the stem, which starts random.
    "vit-deit-tiny/16-convstem": replace(TINY, **NVLABS, pretrained="deit_tiny_patch16_224.fb_in1k", license=DEIT),
    "vit-deit-small/16-convstem": replace(SMALL, **NVLABS, pretrained="deit_small_patch16_224.fb_in1k", license=DEIT),
    "vit-mae-base/16-convstem": replace(BASE, **NVLABS, pretrained="vit_base_patch16_224.mae", license=FOR_RESEARCH),
    "vit-mae-large/16-convstem": replace(LARGE, **NVLABS, pretrained="vit_large_patch16_224.mae", license=FOR_RESEARCH),
    # Built for huge's patches of 14 px, the published stem steps by 16 all the same.
    "vit-mae-huge/16-convstem": replace(
        HUGE, **NVLABS, patch=16, pretrained="vit_huge_patch14_224.mae", license=FOR_RESEARCH
    ),
    "fan_tiny_12_p16_224": FanSize(192, 12, 4),
    "fan_small_12_p16_224": FanSize(384, 12, 8),
    "fan_base_18_p16_224": FanSize(448, 18, 8),
    "fan_large_24_p16_224": FanSize(480, 24, 10),
    "fan_tiny_8_p4_hybrid": FanSize(192, 8, 8, hybrid=(3, 3)),
    "fan_small_12_p4_hybrid": FanSize(384, 10, 8, hybrid=(3, 3)),
    "fan_base_16_p4_hybrid": FanSize(448, 16, 8, hybrid=(3, 3)),
    "fan_large_16_p4_hybrid": FanSize(480, 22, 10, hybrid=(3, 5)),
    # The two below are for tests and for the demo, which trains from scratch on a CPU in minutes.
    "vit-micro/16": VitSize(48, 2, 3, grid=8),
    "vit-demo/8": VitSize(192, 4, 3, patch=8, grid=12, stem="conv"),
}


def backbone_size(arch: str) -> BackboneSize:
    """The row of `arch`; ConfigError names the nearest one otherwise."""
    size = BACKBONES.get(arch)
    if size is None:
        near = difflib.get_close_matches(arch, BACKBONES, n=1, cutoff=0.0)[0]
        raise ConfigError(f"model.arch: {arch!r} is no backbone; did you mean {near!r}? One of {', '.join(BACKBONES)}")
    return size


def build_backbone(arch: str, drop_path: float = 0.0) -> nn.Module:
    """A randomly initialized backbone, see `BackboneSize.build`.

    Args:
        arch: a row of the table; ConfigError otherwise.
        drop_path: stochastic depth rate of the last block, rising linearly from 0 at the first.
    """
    return backbone_size(arch).build(drop_path)


LARGEST_OWN_CROP_SIZE = 512
"""px; the published crop size."""


def own_crop_size(arch: str) -> int:
    """Side in px of the crops of `arch` where nobody gives another: the largest multiple of its patch up to 512.

    For patches of 14 px that is 504, not the nearer 518: a map of 36 × 36 halves exactly in the branch for small boxes
    (37 × 37 does not), and has 5 % fewer tokens.

    >>> own_crop_size("vit-mae-base/16"), own_crop_size("vit-mae-huge/14")
    (512, 504)
    """
    return LARGEST_OWN_CROP_SIZE - LARGEST_OWN_CROP_SIZE % backbone_size(arch).patch


def check_crop_size(arch: str, crop_size: int) -> None:
    """ConfigError, with the nearest sizes that fit, unless `crop_size` px is a positive multiple of the patch size."""
    patch = backbone_size(arch).patch
    if crop_size >= patch and crop_size % patch == 0:
        return
    below = max(crop_size // patch, 1) * patch
    near = f"{below} or {below + patch}" if crop_size > patch else str(patch)
    raise ConfigError(
        f"crop_size: {crop_size} px; {arch} cuts crops into patches of {patch} px, so it must be a positive multiple "
        f"of {patch}: take {near}"
    )
