"""COCO polygons: equality with pycocotools, and bounded memory where pycocotools has none."""

import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from mal_train.core.errors import BadDataset
from mal_train.core.masks import rle
from mal_train.core.masks.rasterize import polygon_bounds
from tests.reference import shared


def expected(polygons: list[list[float]], height: int, width: int) -> bytes:
    counts: bytes = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))["counts"]
    return counts


def filled(polygons: list[list[float]], height: int, width: int) -> bytes:
    starts, ends = polygon_bounds(polygons, height, width, rle.MAX_RUNS)
    return rle.encode_bounds(starts, ends, height, width).counts


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=300, deadline=None)
def test_polygons_inside_and_outside_the_frame_are_filled_as_by_pycocotools(seed: int) -> None:
    rng = np.random.default_rng(seed)
    height, width = (int(side) for side in rng.integers(1, 60, 2))
    polygons = []
    for _ in range(int(rng.integers(1, 5))):
        size, span = int(rng.integers(3, 9)), rng.choice([1, 1.5, 3, 30])
        points = (rng.random((size, 2)) * span - (span - 1) / 2) * (width, height)
        # Rounded coordinates lie on the grid, where ties and repeated points are frequent.
        polygons.append(np.round(points * 2).ravel().tolist() if rng.random() < 0.3 else points.ravel().tolist())
        if rng.random() < 0.5:
            polygons[-1] = np.round(polygons[-1], int(rng.integers(0, 3))).tolist()
    assert filled(polygons, height, width) == expected(polygons, height, width)
    assert rle.from_segmentation(polygons, height, width).counts == expected(polygons, height, width)


def test_real_polygons_are_filled_as_by_pycocotools() -> None:
    coco = json.loads(shared("data", "coco_train_mini", "annotations.json").read_text())
    sizes = {row["id"]: (row["height"], row["width"]) for row in coco["images"]}
    rows = [row for row in coco["annotations"] if isinstance(row["segmentation"], list)][:400]
    for row in rows:
        frame = sizes[row["image_id"]]
        assert filled(row["segmentation"], *frame) == expected(row["segmentation"], *frame)
        assert rle.from_segmentation(row["segmentation"], *frame).counts == expected(row["segmentation"], *frame)
    assert len(rows) == 400


@pytest.mark.parametrize("polygons", [60, 5000])
def test_memory_of_polygons_follows_the_frame_not_their_coordinates(polygons: int) -> None:
    far = [[sign * 999_000.0 for sign in (1, 1, -1, -1)] + [0.0, 999_000.0 - n] for n in range(polygons)]
    if polygons == 60:
        far = [[value for polygon in far for value in polygon]]
    tracemalloc.start()
    try:
        mask = rle.from_segmentation(far, 20, 20)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (mask.height, mask.width) == (20, 20)
    assert peak < (1 << 20) + 10_000 * polygons


def test_edges_that_cross_too_many_columns_are_rejected_before_they_are_drawn() -> None:
    zigzag = [float(value) for n in range(600) for value in ((n % 2) * 2000, n)]
    tracemalloc.start()
    try:
        with pytest.raises(BadDataset):
            rle.from_segmentation([zigzag], 1000, 2000)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20
