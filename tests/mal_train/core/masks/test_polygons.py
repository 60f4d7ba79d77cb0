"""Polygon rings: round trips with holes, tolerances, and bridges that pycocotools reads."""

import time
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from mal_train.core.masks import polygons, rle
from mal_train.core.masks.polygons import Ring, fill, merge_holes, to_rings
from mal_train.core.masks.rle import decode_patch, encode_mask
from tests.mal_train.core.masks.random_masks import random_mask

SEEDS = st.integers(0, 2**32 - 1)


def rings(mask: NDArray[np.bool_], tolerance_px: float = 0.0) -> list[Ring]:
    return list(to_rings(decode_patch(encode_mask(mask)), tolerance_px))


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
def test_rings_without_tolerance_restore_the_exact_mask(seed: int) -> None:
    mask = random_mask(seed)
    np.testing.assert_array_equal(filled(rings(mask), mask), mask)


@given(SEEDS)
@settings(max_examples=300, deadline=None)
def test_pycocotools_restores_holes_from_merged_polygons(seed: int) -> None:
    mask = random_mask(seed)
    polygons = [polygon.ravel().astype(float).tolist() for polygon in merge_holes(rings(mask))]
    if not polygons:
        assert not mask.any()
        return
    decoded = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, *mask.shape)))
    np.testing.assert_array_equal(decoded.astype(bool), mask)


def test_a_hole_is_flagged_and_follows_its_outer_ring() -> None:
    mask = np.zeros((20, 40), bool)
    mask[2:12, 2:12] = mask[2:12, 20:36] = True
    mask[5:8, 5:8] = mask[4:6, 22:24] = mask[4:6, 28:31] = False
    mask[6, 6] = True  # an island in a hole is a separate component
    found = rings(mask)
    assert sorted(ring.is_hole for ring in found) == [False] * 3 + [True] * 3
    for index, ring in enumerate(found):
        if ring.is_hole:
            outer = next(other for other in found[index::-1] if not other.is_hole)
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
def test_a_tolerance_reduces_points_at_a_bounded_loss(tolerance_px: float, most_points: int) -> None:
    radius = 80
    mask = disc(radius)
    exact, simplified = rings(mask), rings(mask, tolerance_px)
    assert sum(len(ring.points) for ring in simplified) <= most_points < sum(len(ring.points) for ring in exact)
    # A line within t of an edge of length p changes at most t p px²: here 2 pi r t of pi r².
    assert overlap(filled(simplified, mask), mask) >= 1 - 2 * tolerance_px / radius


@given(SEEDS)
@settings(max_examples=100, deadline=None)
def test_pycocotools_restores_holes_that_are_connected_to_each_other(seed: int) -> None:
    mask = random_mask(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(polygons, "_MAX_PAIRS", -1)
        merged = [polygon.ravel().astype(float).tolist() for polygon in merge_holes(rings(mask))]
    if merged:
        decoded = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(merged, *mask.shape)))
        np.testing.assert_array_equal(decoded.astype(bool), mask)


def test_the_work_of_merging_the_holes_of_a_noisy_mask_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    def compared(*_: Any) -> Any:
        raise AssertionError("each of 60 000 holes was compared with all points")

    monkeypatch.setattr(polygons, "_nearest", compared)
    mask = np.ones((513, 513), np.bool_)
    mask[1::2, 1::2] = False
    found = to_rings(decode_patch(encode_mask(mask)))
    (merged,) = merge_holes(found)
    assert len(found) == 1 + 256**2
    assert len(merged) == len(found.points) + 2 * 256**2


def seconds_of_rings(side: int) -> float:
    """Returns the CPU time to trace a mask with a hole for every other pixel, the shorter one of two."""
    mask = np.ones((side, side), np.bool_)
    mask[1::2, 1::2] = False
    patch = decode_patch(encode_mask(mask))
    taken = []
    for _ in range(2):
        began = time.thread_time()
        to_rings(patch)
        taken.append(time.thread_time() - began)
    return min(taken)


def test_the_time_of_tracing_grows_with_the_number_of_holes_and_not_with_its_square() -> None:
    assert seconds_of_rings(1025) < 12 * seconds_of_rings(513)  # for four times the holes; 22 with RETR_CCOMP


def test_rings_take_the_memory_of_their_points() -> None:
    mask = np.ones((513, 513), np.bool_)
    mask[1::2, 1::2] = False
    found = to_rings(decode_patch(encode_mask(mask)))
    assert found.nbytes == len(found.points) * 8 + len(found) * 9


@given(SEEDS, st.floats(0.1, 50))
@settings(max_examples=200, deadline=None)
def test_a_tolerance_keeps_every_component_and_hole(seed: int, tolerance_px: float) -> None:
    mask = random_mask(seed)
    exact, simplified = rings(mask), rings(mask, tolerance_px)
    assert [ring.is_hole for ring in simplified] == [ring.is_hole for ring in exact]
    assert all(len(ring.points) >= 3 for ring in simplified)


def test_slanted_lines_are_filled_by_pixel_centers() -> None:
    triangle = np.array([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]])
    expected = [[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    # Centers on the slanted line itself are outside, as in a half-open range.
    assert fill([triangle], 4, 4).astype(int).tolist() == expected


def test_parts_outside_the_frame_are_clipped() -> None:
    square = np.array([[-3, -3], [2, -3], [2, 2], [-3, 2]])
    assert fill([square], 4, 4).astype(int).tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]


def test_memory_of_merging_a_long_outline_with_a_long_hole_does_not_follow_their_product() -> None:
    steps = np.arange(4000, dtype=np.int32)
    outline = np.concatenate((np.stack((steps, steps % 2), axis=1), [[4000, 9], [0, 9]])).astype(np.int32)
    hole = np.stack((steps % 3990 + 2, 3 + steps % 2), axis=1).astype(np.int32)
    tracemalloc.start()
    try:
        (merged,) = merge_holes([Ring(outline), Ring(hole, is_hole=True)])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(merged) == len(outline) + len(hole) + 2
    assert peak < 32 << 20


@pytest.mark.parametrize("pairs", [1, 7, 1 << 18])
def test_the_nearest_points_are_the_first_of_equal_distance(pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(polygons, "_PAIRS", pairs)
    rng = np.random.default_rng(0)
    for _ in range(50):
        outline, hole = (rng.integers(0, 6, (int(size), 2)).astype(np.int32) for size in rng.integers(3, 12, 2))
        distance = ((outline[:, None] - hole[None]) ** 2).sum(axis=2)
        assert polygons._nearest(outline, hole) == np.unravel_index(distance.argmin(), distance.shape)


def test_tracing_a_mask_uses_no_copy_that_stops_other_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def held(*_: Any, **__: Any) -> Any:
        raise AssertionError("np.repeat holds the GIL: 0.4 s for a mask of 36 megapixels")

    patch = decode_patch(encode_mask(np.eye(5)))
    monkeypatch.setattr(np, "repeat", held)
    assert to_rings(patch)
