"""Polygon rings give the mask back, holes included; what a tolerance costs; bridges that pycocotools reads."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from mal_train.core.masks import rle
from mal_train.core.masks.polygons import Ring, fill, merge_holes, to_rings
from mal_train.core.masks.rle import decode_patch, encode_mask
from tests.mal_train.core.masks.random_masks import random_mask

SEEDS = st.integers(0, 2**32 - 1)


def rings(mask: NDArray[np.bool_], tolerance_px: float = 0.0) -> list[Ring]:
    return to_rings(decode_patch(encode_mask(mask)), tolerance_px)


def filled(found: list[Ring], like: NDArray[np.bool_]) -> NDArray[np.bool_]:
    return fill([ring.points for ring in found], *like.shape)


def overlap(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    return rle.iou(encode_mask(a), encode_mask(b))


def disc(radius: float, side: int = 200) -> NDArray[np.bool_]:
    y, x = np.mgrid[:side, :side] - side / 2 + 0.5
    inside: NDArray[np.bool_] = x**2 + y**2 < radius**2
    return inside


@given(SEEDS)
@settings(max_examples=300, deadline=None)
def test_rings_without_tolerance_give_the_mask_back_exactly(seed: int) -> None:
    mask = random_mask(seed)
    np.testing.assert_array_equal(filled(rings(mask), mask), mask)


@given(SEEDS)
@settings(max_examples=300, deadline=None)
def test_pycocotools_reads_bridged_rings_as_the_mask_with_its_holes(seed: int) -> None:
    mask = random_mask(seed)
    polygons = [line.ravel().astype(float).tolist() for line in merge_holes(rings(mask))]
    if not polygons:
        assert not mask.any()
        return
    read = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, *mask.shape)))
    np.testing.assert_array_equal(read.astype(bool), mask)


def test_a_hole_is_marked_and_stands_behind_its_ring() -> None:
    mask = np.zeros((20, 40), bool)
    mask[2:12, 2:12] = mask[2:12, 20:36] = True
    mask[5:8, 5:8] = mask[4:6, 22:24] = mask[4:6, 28:31] = False
    mask[6, 6] = True  # an island in a hole is a part of its own
    found = rings(mask)
    assert sorted(ring.is_hole for ring in found) == [False] * 3 + [True] * 3
    for at, ring in enumerate(found):
        if ring.is_hole:
            outer = next(other for other in found[at::-1] if not other.is_hole)
            assert (ring.points.min(axis=0) >= outer.points.min(axis=0)).all()
            assert (ring.points.max(axis=0) <= outer.points.max(axis=0)).all()


def test_a_rectangle_has_four_points_on_pixel_corners() -> None:
    mask = np.zeros((10, 10), bool)
    mask[2:5, 3:9] = True
    (ring,) = rings(mask)
    assert {tuple(point) for point in ring.points.tolist()} == {(3, 2), (9, 2), (9, 5), (3, 5)}


def test_an_empty_mask_has_no_rings() -> None:
    assert rings(np.zeros((4, 4), bool)) == []
    assert merge_holes([]) == []


@pytest.mark.parametrize(("tolerance_px", "most_points"), [(1.0, 90), (1.5, 40), (3.0, 20)])
def test_a_tolerance_buys_fewer_points_at_a_bounded_loss(tolerance_px: float, most_points: int) -> None:
    radius = 80
    mask = disc(radius)
    exact, fewer = rings(mask), rings(mask, tolerance_px)
    assert sum(len(ring.points) for ring in fewer) <= most_points < sum(len(ring.points) for ring in exact)
    # A line at most t beside an edge of length p moves at most t p px²: here 2 pi r t of pi r².
    assert overlap(filled(fewer, mask), mask) >= 1 - 2 * tolerance_px / radius


@given(SEEDS, st.floats(0.1, 50))
@settings(max_examples=200, deadline=None)
def test_no_part_and_no_hole_is_lost_to_a_tolerance(seed: int, tolerance_px: float) -> None:
    mask = random_mask(seed)
    exact, fewer = rings(mask), rings(mask, tolerance_px)
    assert [ring.is_hole for ring in fewer] == [ring.is_hole for ring in exact]
    assert all(len(ring.points) >= 3 for ring in fewer)


def test_slanted_lines_are_filled_by_pixel_centers() -> None:
    triangle = np.array([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]])
    expected = [[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    # Centers on the slanted line itself belong to it from the left, as in a half-open range.
    assert fill([triangle], 4, 4).astype(int).tolist() == expected


def test_what_leaves_the_frame_is_cut_off() -> None:
    square = np.array([[-3, -3], [2, -3], [2, 2], [-3, 2]])
    assert fill([square], 4, 4).astype(int).tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
