"""The table of backbones: names, sizes, crop sizes and licenses."""

import pytest
import timm
import torch

from mal_train.core.errors import ConfigError
from mal_train.kernel.convert.pretrained import UNKNOWN_ARCH_LICENSE, published_license
from mal_train.kernel.networks.backbones import (
    BACKBONES,
    backbone_size,
    build_backbone,
    check_crop_size,
    default_crop_size,
)


@pytest.mark.parametrize(
    ("arch", "millions"),
    [
        ("vit-deit-tiny/16", 5.5),
        ("vit-deit-small/16", 21.7),
        ("vit-deit-base/16", 85.8),
        ("vit-deit-base-distilled/16", 85.8),
        ("vit-deit-iii-base-224/16", 85.8),
        ("vit-dino-small/16", 21.7),
        ("vit-dino-base/16", 85.8),
        ("vit-mocov3-base/16", 85.8),
        ("vit-mae-base/16", 85.8),
        ("vit-mae-large/16", 303.3),
        ("vit-mae-huge/14", 630.8),
    ],
)
def test_published_backbones_have_the_published_number_of_parameters(arch: str, millions: float) -> None:
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build_backbone(arch).parameters())
    assert parameters / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize("arch", sorted(arch for arch, row in BACKBONES.items() if row.pretrained))
def test_timm_knows_the_weights_of_a_row_and_their_license(arch: str) -> None:
    name = BACKBONES[arch].pretrained
    assert name is not None
    config = timm.models.get_pretrained_cfg(name)
    assert config is not None
    assert (config.license or "").casefold() == (BACKBONES[arch].license or "").casefold()
    with torch.device("meta"):
        timm_weights, weights = (
            timm.create_model(name, pretrained=False).state_dict(),
            build_backbone(arch).state_dict(),
        )
    timm_weights["reg_token"] = timm_weights.pop("dist_token", torch.empty(0))
    different = {key for key in weights if key not in timm_weights or weights[key].shape != timm_weights[key].shape}
    stem = {key for key in weights if key.startswith("patch_embed.")}
    assert different == (stem if arch.endswith("-convstem") else set())


def test_the_error_of_an_unknown_arch_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="vit-deit-small/16"):
        backbone_size("vit-diet-small/16")


@pytest.mark.parametrize("arch", sorted(BACKBONES))
def test_a_crop_size_must_be_a_multiple_of_the_patch_size(arch: str) -> None:
    check_crop_size(arch, 14 * BACKBONES[arch].patch)
    with pytest.raises(ConfigError, match="crop_size"):
        check_crop_size(arch, 14 * BACKBONES[arch].patch + 1)


@pytest.mark.parametrize("arch", sorted(BACKBONES))
def test_the_default_crop_size_is_a_multiple_of_the_patch_size(arch: str) -> None:
    size = default_crop_size(arch)
    check_crop_size(arch, size)
    assert size == (504 if BACKBONES[arch].patch == 14 else 512)


@pytest.mark.parametrize("arch", sorted(BACKBONES))
def test_every_row_has_the_stages_that_can_be_frozen(arch: str) -> None:
    with torch.device("meta"):
        network = build_backbone(arch)
    assert any(True for _ in network.get_submodule("patch_embed").parameters())
    assert all(any(True for _ in block.parameters()) for block in network.get_submodule("blocks").children())


def test_the_error_of_a_crop_size_names_the_nearest_valid_sizes() -> None:
    with pytest.raises(ConfigError, match="504 or 518"):
        check_crop_size("vit-mae-huge/14", 512)


@pytest.mark.parametrize(
    ("arch", "license"),
    [
        ("vit-dino-small/16", "Apache-2.0"),
        ("vit-mocov3-base/16", "CC-BY-NC-4.0"),
        ("vit-micro/16", UNKNOWN_ARCH_LICENSE),
    ],
)
def test_the_license_of_published_weights_is_known_by_arch(arch: str, license: str) -> None:
    assert published_license(arch) == license
