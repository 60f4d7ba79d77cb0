"""Layers computed for a region of a map, compared with the same region of the whole map."""

import numpy as np
import pytest
import torch

from mal_train.core.masks.geometry import Region
from mal_train.kernel.networks.heads import MaskHead, resize
from mal_train.kernel.networks.network import OUTSIDE, MalNetwork, ModelConfig
from mal_train.kernel.networks.regions import bilinear_sources, cut, mirrored, whole

MAPS = [
    ModelConfig("vit-micro/16", mask_head_hidden_channel=16, mask_head_out_channel=8, **shape)
    for shape in (
        {},
        {"mask_head_num_convs": 1},
        {"mask_head_num_convs": 6, "mask_scale_ratio": 3.0},
        {"mask_scale_ratio": 1.5},
        {"mask_scale_ratio": 0.5},
        {"mask_scale_ratio_pre": 2},
        {"not_adjust_scale": True},
        {"not_adjust_scale": True, "mask_scale_ratio": 1.0},
    )
]


def random_region(rng: np.random.Generator, side: int) -> Region:
    (col0, col1), (row0, row1) = (sorted(rng.choice(side + 1, 2, replace=False).tolist()) for _ in range(2))
    return Region(col0, row0, col1, row1)


@pytest.mark.parametrize(("source", "target"), [(4, 8), (8, 4), (5, 20), (7, 24), (6, 6), (56, 224), (1, 16)])
def test_bilinear_resampling_reads_only_the_sources(source: int, target: int) -> None:
    rng = np.random.default_rng(source)
    values = torch.from_numpy(rng.random((1, 1, source, source), dtype=np.float32))
    expected = torch.nn.functional.interpolate(values, size=(target, target), mode="bilinear")
    for _ in range(20):
        region = random_region(rng, target)
        poisoned = torch.full_like(values, 1e6)
        read = bilinear_sources(region, target, source)
        cut(poisoned, whole(source), read).copy_(cut(values, whole(source), read))
        found = torch.nn.functional.interpolate(poisoned, size=(target, target), mode="bilinear")
        assert torch.equal(cut(found, whole(target), region), cut(expected, whole(target), region))


@pytest.mark.parametrize("ratio", [0.5, 1.0, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("convolutions", [1, 2, 4, 6])
def test_features_of_a_part_equal_those_of_the_map(ratio: float, convolutions: int) -> None:
    torch.manual_seed(0)
    head = MaskHead(8, 16, 8, convolutions, ratio).eval()
    rng = np.random.default_rng(1)
    feat = torch.randn(2, 8, 15, 15).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        expected = head(feat)
        assert expected.shape[-1] == head.output_side(15)
        for _ in range(10):
            region = random_region(rng, expected.shape[-1])
            features, held = head.part(feat, region)
            torch.testing.assert_close(
                cut(features, held, region), cut(expected, whole(expected.shape[-1]), region), atol=1e-5, rtol=1e-5
            )


@pytest.mark.parametrize("config", MAPS, ids=lambda config: str(config.to_dict())[-120:])
@pytest.mark.parametrize("size_classes", [[0], [1], [2], [2, 0, 1, 2], [-1, 1]])
def test_needed_logits_equal_those_of_the_whole_map(config: ModelConfig, size_classes: list[int]) -> None:
    torch.manual_seed(0)
    network = MalNetwork(config).eval()
    rng = np.random.default_rng(2)
    x, sizes = torch.randn(len(size_classes), 3, 96, 96), torch.tensor(size_classes)
    with torch.inference_mode():
        expected = network.logits(x, sizes)
        for _ in range(5):
            needed = [random_region(rng, 96) for _ in size_classes]
            found = network.logits(x, sizes, needed=needed)
            assert found.shape == expected.shape
            for n, region in enumerate(needed):
                read = bilinear_sources(region, 96, expected.shape[-1])
                torch.testing.assert_close(
                    cut(found[n : n + 1], whole(found.shape[-1]), read),
                    cut(expected[n : n + 1], whole(expected.shape[-1]), read),
                    atol=1e-5,
                    rtol=1e-5,
                )


def test_logits_far_from_the_needed_ones_are_not_computed() -> None:
    network = MalNetwork(MAPS[0]).eval()
    with torch.inference_mode():
        logits = network.logits(torch.zeros(1, 3, 256, 256), torch.tensor([2]), needed=[Region(100, 100, 140, 140)])
    assert float(logits[0, 0, 0, 0]) == OUTSIDE
    assert float(logits.sigmoid()[0, 0, 0, 0]) == 0.0


def test_a_mirrored_region_is_that_of_the_flipped_map() -> None:
    values = torch.arange(36.0).view(1, 1, 6, 6)
    region = Region(1, 2, 4, 6)
    flipped = cut(values.flip(-1), whole(6), mirrored(region, 6)).flip(-1)
    assert torch.equal(flipped, cut(values, whole(6), region))


def test_resizing_a_part_equals_the_part_of_the_resized_map() -> None:
    feat = torch.randn(1, 4, 9, 9)
    part = resize(cut(feat, whole(9), Region(2, 3, 7, 8)), 2.0)
    assert torch.equal(part[..., 1:-1, 1:-1], resize(feat, 2.0)[..., 7:15, 5:13])
