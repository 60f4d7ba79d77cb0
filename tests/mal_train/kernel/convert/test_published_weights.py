"""Published weights of each backbone, in the layout of timm, load into the complete backbone.

The values are random: the tests prove names, shapes and the destination of each tensor.
"""

from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from mal_train.kernel.convert.pretrained import load_pretrained
from mal_train.kernel.networks import backbones
from mal_train.kernel.networks.backbones import BACKBONES, build_backbone
from mal_train.kernel.networks.network import MalNetwork, ModelConfig
from mal_train.kernel.networks.vit import VitSize

DEPTH = 1
"""Blocks of each network in these tests. More blocks have the same names and shapes; the huge network takes 2.5 GB."""
CLASSIFIERS = {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}
MOCO = {"vit-mocov3-base/16": "vit_base_patch16_224"}
"""Backbones whose published file timm lacks. It holds a plain ViT-B with the prefix MOCO_PREFIX."""
MOCO_PREFIX = "module.base_encoder."
VITS = sorted(
    arch
    for arch, row in BACKBONES.items()
    if (row.pretrained or arch in MOCO) and isinstance(row, VitSize) and row.stem == "linear"
)


def published_file(arch: str, path: Path) -> dict[str, Tensor]:
    """Writes a file like the published one of `arch` with DEPTH blocks; returns its weights under timm's names."""
    name = BACKBONES[arch].pretrained or MOCO[arch]
    with torch.device("meta"):
        shapes = {key: tensor.shape for key, tensor in timm.create_model(name, depth=DEPTH).state_dict().items()}
    generator = torch.Generator().manual_seed(1)
    weights = {key: torch.rand(shape, generator=generator) for key, shape in shapes.items()}
    prefix = MOCO_PREFIX if arch in MOCO else ""
    stored = {prefix + key: tensor for key, tensor in weights.items()}
    if path.suffix == ".safetensors":
        save_file(stored, path)
    else:
        torch.save({"model": stored}, path)
    return weights


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("arch", VITS)
def test_a_published_file_loads_into_the_complete_backbone(
    arch: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = cast(VitSize, BACKBONES[arch])
    # A larger grid, as for a larger crop: the position table must be resampled from the published one.
    monkeypatch.setitem(backbones.BACKBONES, arch, replace(row, depth=DEPTH, grid=row.grid + 2))
    network = MalNetwork(ModelConfig(arch, mask_head_num_convs=1, mask_head_hidden_channel=4, mask_head_out_channel=4))
    weights = published_file(arch, tmp_path / f"published{suffix}")
    report = load_pretrained(network, str(tmp_path / f"published{suffix}"))

    assert not any(name.startswith("backbone.") for name in report.missing)
    assert set(report.unused) <= CLASSIFIERS
    assert report.resampled == ("backbone.pos_embed",)
    loaded = network.student.backbone.state_dict()
    loaded["dist_token"] = loaded.pop("reg_token", torch.empty(0))
    for name in weights.keys() - CLASSIFIERS - {"pos_embed"}:
        assert torch.equal(loaded[name], weights[name]), name
    extra = weights["pos_embed"].shape[1] - row.grid**2
    assert loaded["pos_embed"].shape[1] == extra + (row.grid + 2) ** 2
    assert torch.equal(loaded["pos_embed"][:, :extra], weights["pos_embed"][:, :extra])


SHAPES = {
    "vit-deit-tiny/16": (192, 12, 3, 16),
    "vit-deit-small/16": (384, 12, 6, 16),
    "vit-deit-base/16": (768, 12, 12, 16),
    "vit-deit-base-distilled/16": (768, 12, 12, 16),
    "vit-deit-iii-base-224/16": (768, 12, 12, 16),
    "vit-dino-small/16": (384, 12, 6, 16),
    "vit-dino-base/16": (768, 12, 12, 16),
    "vit-mocov3-base/16": (768, 12, 12, 16),
    "vit-mae-base/16": (768, 12, 12, 16),
    "vit-mae-large/16": (1024, 24, 16, 16),
    "vit-mae-huge/14": (1280, 32, 16, 14),
    "fan_tiny_12_p16_224": (192, 12, 4, 16),
    "fan_small_12_p16_224": (384, 12, 8, 16),
    "fan_base_18_p16_224": (448, 18, 8, 16),
    "fan_large_24_p16_224": (480, 24, 10, 16),
    "fan_tiny_8_p4_hybrid": (192, 8, 8, 16),
    "fan_small_12_p4_hybrid": (384, 10, 8, 16),
    "fan_base_16_p4_hybrid": (448, 16, 8, 16),
    "fan_large_16_p4_hybrid": (480, 22, 10, 16),
}
"""Width, depth, heads and patch size of the published networks."""


@pytest.mark.parametrize("arch", sorted(SHAPES))
def test_a_backbone_has_the_published_width_depth_heads_and_patch_size(arch: str) -> None:
    width, depth, heads, patch = SHAPES[arch]
    row = BACKBONES[arch]
    assert (row.width, row.patch) == (width, patch)
    assert getattr(row, "heads", None) == heads
    with torch.device("meta"):
        network = build_backbone(arch).eval()
        assert len(list(network.get_submodule("blocks").children())) == depth
        assert network(torch.zeros(2, 3, 6 * patch, 6 * patch)).shape == (2, width, 6, 6)
