"""Edge refinement, compared with a slow implementation that visits every pixel."""

import math
import statistics
import tracemalloc
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mal_train.config.labeling import EvaluateConfig
from mal_train.offline.edge_refinement import DISTANCES, ITERATIONS, SHARPNESS, refine_edges

Array = NDArray[Any]


def around(row: int, column: int, height: int, width: int) -> list[tuple[int, int]]:
    """Returns the neighbors of a pixel; those outside are replaced by the nearest pixel inside."""
    steps = [(dy, dx) for d in DISTANCES for dy in (-d, 0, d) for dx in (-d, 0, d) if (dy, dx) != (0, 0)]
    return [(min(max(row + dy, 0), height - 1), min(max(column + dx, 0), width - 1)) for dy, dx in steps]


def refined_pixel_by_pixel(prob: Array, pixels: Array, box_mask: Array) -> Array:
    """Refines every pixel, without a band."""
    height, width = prob.shape
    current = prob.astype(np.float64) * box_mask
    weights: dict[tuple[int, int], list[float]] = {}
    for row in range(height):
        for column in range(width):
            similarity = [0.0] * len(around(row, column, height, width))
            for channel in range(3):
                colors = [int(pixels[y, x, channel]) for y, x in around(row, column, height, width)]
                unit = SHARPNESS * statistics.stdev(colors) + 1e-6
                center = int(pixels[row, column, channel])
                similarity = [
                    part - abs(color - center) / unit / 3 for part, color in zip(similarity, colors, strict=True)
                ]
            total = sum(math.exp(part) for part in similarity)
            weights[row, column] = [math.exp(part) / total for part in similarity]
    for _ in range(ITERATIONS):
        following = np.zeros_like(current)
        for (row, column), parts in weights.items():
            neighbors = around(row, column, height, width)
            following[row, column] = sum(part * current[pixel] for part, pixel in zip(parts, neighbors, strict=True))
        current = following * box_mask
    return current


@pytest.mark.parametrize("gray", [False, True])
def test_within_the_band_a_pixel_is_the_mean_of_neighbors_of_similar_color(gray: bool) -> None:
    rng = np.random.default_rng(7)
    pixels = rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)
    pixels[:, :5] //= 8
    if gray:
        pixels[:, :, 1:] = 90  # two channels without any difference
    prob = rng.random((9, 12), dtype=np.float32) * np.float32(0.3)
    prob[:, 6] += np.float32(0.7)  # an edge with a band of one pixel on each side
    box_mask = np.ones((9, 12), np.uint8)
    box_mask[:, :2] = 0
    refined = refine_edges(prob, pixels, box_mask, 0.5)
    expected = refined_pixel_by_pixel(prob, pixels, box_mask)
    np.testing.assert_allclose(refined[:, 5:8], expected[:, 5:8], atol=2e-5)
    assert np.array_equal(refined[:, :5], prob[:, :5])
    assert np.array_equal(refined[:, 8:], prob[:, 8:])


def test_an_isolated_pixel_becomes_the_mean_of_its_flat_surroundings() -> None:
    pixels = np.full((75, 75, 3), 40, np.uint8)
    pixels[37, 37] = 255
    prob = np.full((75, 75), 0.2, np.float32)
    prob[37, 37] = 1.0
    refined = refine_edges(prob, pixels, np.ones((75, 75), np.uint8), 0.5)
    assert np.isfinite(refined).all()
    assert refined.max() < 0.5


def striped(side: int) -> Array:
    pixels = np.zeros((side, side, 3), np.uint8)
    pixels[:, side // 2 :] = 200
    return pixels


@pytest.mark.parametrize(("side", "reach"), [(64, 1), (224, 3), (512, 7)])
def test_the_width_of_the_band_grows_with_the_crop_size(side: int, reach: int) -> None:
    prob = np.full((side, side), 0.1, np.float32)
    prob[:, side // 2 + 20 :] = 0.9
    moved = refine_edges(prob, striped(side), np.ones((side, side), np.uint8), 0.5) > 0.5
    assert int((prob[0] > 0.5).argmax()) - int(moved[0].argmax()) in range(reach + 1)
    changed = np.flatnonzero(refine_edges(prob, striped(side), np.ones((side, side), np.uint8), 0.5)[0] != prob[0])
    assert changed.min() == side // 2 + 20 - reach
    assert changed.max() == side // 2 + 20 + reach - 1


def test_refining_a_crop_of_512_takes_the_documented_memory() -> None:
    prob = np.full((512, 512), 0.1, np.float32)
    prob[:, 256:] = 0.9
    box_mask = np.ones((512, 512), np.uint8)
    tracemalloc.start()
    try:
        refine_edges(prob, striped(512), box_mask, 0.5)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 100e6 < peak < 200e6
    assert "150 MB" in str(EvaluateConfig.model_fields["refine_edges"].description)


def test_a_mask_edge_moves_to_the_color_edge() -> None:
    for predicted in (110, 112, 114):
        prob = np.full((224, 224), 0.1, np.float32)
        prob[:, predicted:] = 0.9
        moved = refine_edges(prob, striped(224), np.ones((224, 224), np.uint8), 0.5) > 0.5
        assert moved[:, 112:].all()
        assert not moved[:, :112].any()


def test_no_pixel_of_the_band_outside_the_box_stays_foreground() -> None:
    box_mask = np.zeros((224, 224), np.uint8)
    box_mask[50:150, 50:150] = 1
    prob = np.full((224, 224), 0.05, np.float32)
    prob[48:152, 48:152] = 0.9
    refined = refine_edges(prob, np.zeros((224, 224, 3), np.uint8), box_mask, 0.5)
    assert not (refined > 0.5)[box_mask == 0].any()


@pytest.mark.parametrize("value", [0.1, 0.9])
def test_a_mask_without_an_edge_is_unchanged(value: float) -> None:
    prob = np.full((32, 32), value, np.float32)
    pixels = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert np.array_equal(refine_edges(prob, pixels, np.ones((32, 32), np.uint8), 0.5), prob)
