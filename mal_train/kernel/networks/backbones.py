"""Lists the backbones that `model.arch` may name, and builds them.

To add a backbone, write a class that implements `BackboneSize` and add one row to `BACKBONES`.
"""

import difflib
from dataclasses import replace
from typing import Any, Protocol

from mal_train.core.errors import ConfigError
from mal_train.kernel.networks.fan import Fan, FanSize
from mal_train.kernel.networks.vit import Vit, VitSize

Backbone = Vit | Fan


class BackboneSize(Protocol):
    """A row of the table."""

    @property
    def width(self) -> int:
        """C: channels of the feature map."""

    @property
    def patch(self) -> int:
        """P: stride of the feature map in px of the crop. The crop size must be a multiple of it."""

    @property
    def pretrained(self) -> str | None:
        """Timm's name of its published weights; None if timm has none."""

    @property
    def license(self) -> str | None:
        """SPDX name of the license of its published weights; None if there are no weights or no license is stated."""

    def build(self, drop_path: float) -> Backbone:
        """Builds a module that maps normalized crops (N, 3, S, S) to a feature map (N, C, S / P, S / P).

        Its children `patch_embed` and `blocks` (a sequence) are the stages of `model.frozen_stages`.
        """


DEIT = "Apache-2.0"
DINO = "Apache-2.0"
NON_COMMERCIAL = "CC-BY-NC-4.0"
"""License of MAE and MoCo v3."""

TINY = VitSize(192, 12, 3)
SMALL = VitSize(384, 12, 6)
BASE = VitSize(768, 12, 12)
LARGE = VitSize(1024, 24, 16)
HUGE = VitSize(1280, 32, 16, patch=14, grid=16)
NVLABS: dict[str, Any] = {"stem": "conv", "resample": "by_factor"}

MAX_NAME_SHOWN = 64
"""Characters of an unknown name that are compared with the known ones and repeated."""

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
    "vit-mocov3-base/16": replace(BASE, license=NON_COMMERCIAL),
    "vit-mae-base/16": replace(BASE, pretrained="vit_base_patch16_224.mae", license=NON_COMMERCIAL),
    "vit-mae-large/16": replace(LARGE, pretrained="vit_large_patch16_224.mae", license=NON_COMMERCIAL),
    "vit-mae-huge/14": replace(HUGE, pretrained="vit_huge_patch14_224.mae", license=NON_COMMERCIAL),
    # The networks of NVlabs, and of TAO up to 6.0. Published weights fill all but the stem, which starts random.
    "vit-deit-tiny/16-convstem": replace(TINY, **NVLABS, pretrained="deit_tiny_patch16_224.fb_in1k", license=DEIT),
    "vit-deit-small/16-convstem": replace(SMALL, **NVLABS, pretrained="deit_small_patch16_224.fb_in1k", license=DEIT),
    "vit-mae-base/16-convstem": replace(BASE, **NVLABS, pretrained="vit_base_patch16_224.mae", license=NON_COMMERCIAL),
    "vit-mae-large/16-convstem": replace(
        LARGE, **NVLABS, pretrained="vit_large_patch16_224.mae", license=NON_COMMERCIAL
    ),
    # The published stem has stride 16 although the network's patches are of 14 px.
    "vit-mae-huge/16-convstem": replace(
        HUGE, **NVLABS, patch=16, pretrained="vit_huge_patch14_224.mae", license=NON_COMMERCIAL
    ),
    "fan_tiny_12_p16_224": FanSize(192, 12, 4),
    "fan_small_12_p16_224": FanSize(384, 12, 8),
    "fan_base_18_p16_224": FanSize(448, 18, 8),
    "fan_large_24_p16_224": FanSize(480, 24, 10),
    "fan_tiny_8_p4_hybrid": FanSize(192, 8, 8, hybrid=(3, 3)),
    "fan_small_12_p4_hybrid": FanSize(384, 10, 8, hybrid=(3, 3)),
    "fan_base_16_p4_hybrid": FanSize(448, 16, 8, hybrid=(3, 3)),
    "fan_large_16_p4_hybrid": FanSize(480, 22, 10, hybrid=(3, 5)),
    # For tests and for the demo, which trains from scratch on a CPU in minutes.
    "vit-micro/16": VitSize(48, 2, 3, grid=8),
    "vit-demo/8": VitSize(192, 4, 3, patch=8, grid=12, stem="conv"),
}


def backbone_size(arch: str) -> BackboneSize:
    """Returns the row of `arch`; raises ConfigError with the most similar name if there is none."""
    size = BACKBONES.get(arch)
    if size is None:
        shown = arch[:MAX_NAME_SHOWN]
        near = difflib.get_close_matches(shown, BACKBONES, n=1, cutoff=0.0)[0]
        raise ConfigError(f"model.arch: {shown!r}; did you mean {near!r}? It must be one of {', '.join(BACKBONES)}")
    return size


def build_backbone(arch: str, drop_path: float = 0.0) -> Backbone:
    """Builds a randomly initialized backbone; see `BackboneSize.build`.

    Args:
        arch: name of a row; ConfigError otherwise.
        drop_path: stochastic depth rate of the last block, rising linearly from 0 at the first.
    """
    return backbone_size(arch).build(drop_path)


MAX_DEFAULT_CROP_SIZE = 512
"""The published crop size in px."""


def default_crop_size(arch: str) -> int:
    """Returns the default crop size of `arch` in px: the largest multiple of its patch size up to 512.

    For patches of 14 px this is 504, not the nearer 518: a feature map of 36 × 36 halves exactly for small boxes, while
    one of 37 × 37 does not, and it has 5 % fewer tokens.

    >>> default_crop_size("vit-mae-base/16"), default_crop_size("vit-mae-huge/14")
    (512, 504)
    """
    return MAX_DEFAULT_CROP_SIZE - MAX_DEFAULT_CROP_SIZE % backbone_size(arch).patch


def check_crop_size(arch: str, crop_size: int) -> None:
    """Raises ConfigError unless `crop_size` px is a positive multiple of the patch size of `arch`."""
    patch = backbone_size(arch).patch
    if crop_size >= patch and crop_size % patch == 0:
        return
    below = max(crop_size // patch, 1) * patch
    near = f"{below} or {below + patch}" if crop_size > patch else str(patch)
    raise ConfigError(
        f"crop_size: {crop_size} px; {arch} has patches of {patch} px, so it must be a positive multiple of {patch}; "
        f"use {near}"
    )
