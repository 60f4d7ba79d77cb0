"""COCO RLE: equality with pycocotools, and rejection of malformed RLE."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from mal_train.core.errors import BadDataset
from mal_train.core.masks import rle
from mal_train.core.masks.rle import Rle


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=400, deadline=None)
def test_the_rle_of_a_region_equals_pycocotools_on_the_full_frame(seed: int) -> None:
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 40, 2)
    rows = height if rng.random() < 0.3 else rng.integers(1, height + 1)
    columns = rng.integers(1, width + 1)
    row0, col0 = rng.integers(0, height - rows + 1), rng.integers(0, width - columns + 1)
    mask = rng.random((rows, columns)) < rng.choice([0, 0.1, 0.5, 0.95, 1])
    full = np.zeros((height, width), np.uint8)
    full[row0 : row0 + rows, col0 : col0 + columns] = mask
    code = rle.encode_region(mask, int(row0), int(col0), (int(height), int(width)))
    assert code.counts == coco_mask.encode(np.asfortranarray(full))["counts"]
    np.testing.assert_array_equal(rle.decode_mask(code), full.astype(bool))
    assert rle.area(code) == full.sum()
    runs = rle.run_lengths(code.counts)
    np.testing.assert_array_equal(np.repeat(np.arange(runs.size) % 2, runs), full.T.ravel())


def test_a_region_outside_the_frame_is_rejected() -> None:
    with pytest.raises(ValueError, match="row 2, column 0"):
        rle.encode_region(np.ones((3, 3), bool), 2, 0, (4, 4))


def test_an_empty_mask_has_no_box_and_no_overlap() -> None:
    empty = rle.encode_mask(np.zeros((5, 7)))
    assert rle.to_box(empty) is None
    assert rle.area(empty) == 0
    assert rle.iou(empty, empty) == 0.0


def test_rle_survives_a_round_trip_through_coco_json() -> None:
    code = rle.encode_mask(np.eye(9))
    assert Rle.from_coco(code.to_coco()) == code
    assert Rle.from_coco({"size": [9, 9], "counts": rle.run_lengths(code.counts).tolist()}) == code


@pytest.mark.parametrize(
    ("code", "named"),
    [
        ({"size": [5, 5], "counts": b"\xff\xff\xff"}, "counts"),
        ({"size": [5, 5], "counts": "é"}, "counts"),
        ({"size": [5, 5], "counts": "0120"}, "4 px"),
        ({"size": [5, 5], "counts": "o"}, "truncated"),
        ({"size": [5, 5], "counts": "o" * 20 + "1"}, "longer"),
        ({"size": [2, 2], "counts": "61J"}, "negative"),
        ({"size": [100000, 100000], "counts": "0"}, "400000000 px"),
        ({"size": [5, 5], "counts": [25, -3, 3]}, "runs"),
        ({"size": [5, 5], "counts": [1, 2]}, "3 px"),
        ({"size": [0, 5], "counts": "0"}, r"size \[0, 5\]"),
        ({"size": [5, 5]}, "'size' and 'counts'"),
        ("0120", "'size' and 'counts'"),
    ],
)
def test_malformed_rle_is_rejected_by_name(code: object, named: str) -> None:
    with pytest.raises(BadDataset, match="annotation 3.*" + named):
        Rle.from_coco(code, "annotation 3")


def test_polygons_are_merged_and_malformed_ones_rejected() -> None:
    square = rle.from_segmentation([[0, 0, 4, 0, 4, 4, 0, 4], [6, 6, 8, 6, 8, 8, 6, 8]], 10, 10)
    assert rle.area(square) == 16 + 4
    for broken in ([], [[0, 0, 1, 1]], [[0, 0, 1, 1, 2]], [[0, 0, 1, 1, 2, float("nan")]], None, "x"):
        with pytest.raises(BadDataset):
            rle.from_segmentation(broken, 10, 10)


def test_a_mask_of_another_frame_is_rejected() -> None:
    with pytest.raises(BadDataset, match=r"4x4 px.* 10x10 px"):
        rle.from_segmentation(rle.encode_mask(np.eye(4)).to_coco(), 10, 10)
