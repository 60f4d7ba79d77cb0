"""Pixels of partial overlaps are assigned to one box of their image."""

import tracemalloc
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mal_train.core.masks.geometry import Region, Window
from mal_train.core.settings import LabelerConfig, ScoreType
from mal_train.kernel.labeler.overlaps import (
    DOMINATED_SHARE,
    NESTED_SHARE,
    SIZE_WEIGHT,
    MaskClaim,
    Overlap,
    PixelOwners,
    logits,
)
from mal_train.kernel.labeler.scoring import mask_score
from mal_train.kernel.labeler.types import Crop, Prediction
from tests.mal_server.fakes import BrightPredictor

HW = (12, 16)


def claim(region: Region, value: float, threshold: float = 0.5) -> MaskClaim:
    shape = (region.row1 - region.row0, region.col1 - region.col0)
    return MaskClaim(region, np.full(shape, value, np.float32), threshold)


def owners_of(claims: Sequence[MaskClaim], image_hw: tuple[int, int]) -> PixelOwners:
    owners = PixelOwners(image_hw)
    for index, one in enumerate(claims):
        owners.add(index, one)
    return owners


def assign_pixels(claims: Sequence[MaskClaim], image_hw: tuple[int, int]) -> list[NDArray[np.bool_]]:
    owners = owners_of(claims, image_hw)
    return [owners.kept(index, one).mask for index, one in enumerate(claims)]


def dominated(claims: Sequence[MaskClaim]) -> list[bool]:
    owners = owners_of(claims, HW)
    return [owners.kept(index, one).overlap.is_dominated for index, one in enumerate(claims)]


def test_a_mask_on_another_one_leaves_both_complete() -> None:
    table, plate = claim(Region(0, 0, 16, 12), 0.9), claim(Region(4, 4, 8, 8), 0.8)
    assert all(kept.all() for kept in assign_pixels([table, plate], HW))
    assert all(kept.all() for kept in assign_pixels([plate, table], HW))


def test_pixels_of_a_partial_overlap_go_to_the_smaller_mask() -> None:
    large, small = claim(Region(0, 0, 10, 12), 0.9), claim(Region(8, 2, 16, 6), 0.85)
    kept = assign_pixels([large, small], HW)
    assert kept[1].all()
    assert not kept[0][2:6, 8:].any()
    assert kept[0].sum() == 10 * 12 - 2 * 4


@pytest.mark.parametrize(("columns", "is_nested"), [(3, False), (4, True)])
def test_from_a_share_of_the_smaller_mask_on_one_is_within_the_other(columns: int, is_nested: bool) -> None:
    large, small = claim(Region(0, 0, 6, 12), 0.9), claim(Region(6 - columns, 0, 16 - columns, 1), 0.85)
    kept = assign_pixels([large, small], HW)
    assert kept[1].all()
    assert kept[0].all() == is_nested


@pytest.mark.parametrize(("columns", "is_dominated"), [(3, False), (4, True)])
def test_from_a_share_of_its_claim_that_another_box_owns_a_box_is_dominated(columns: int, is_dominated: bool) -> None:
    weak, strong = claim(Region(0, 0, 10, 1), 0.8), claim(Region(10 - columns, 0, 16, 1), 0.95)
    assert dominated([weak, strong]) == [is_dominated, False]
    assert dominated([strong, weak]) == [False, is_dominated]


def test_the_shares_of_all_other_boxes_count_also_where_the_mask_keeps_them() -> None:
    group = claim(Region(0, 0, 10, 10), 0.9)
    members = [claim(Region(column, 0, column + 2, 10), 0.9) for column in (0, 4)]
    assert dominated([group, members[0]]) == [False, False]
    assert dominated([group, *members]) == [True, False, False]
    assert assign_pixels([group, *members], HW)[0].all()


def test_pixels_are_contested_by_any_number_of_boxes() -> None:
    boxes = [claim(Region(0, 0, 4, 4), 0.9)] * 256
    owners = owners_of([*boxes, claim(Region(8, 0, 12, 4), 0.9)], HW)
    assert owners.kept(0, boxes[0]).overlap.contested == 1.0
    assert owners.kept(256, claim(Region(8, 0, 12, 4), 0.9)).overlap == Overlap(0.0, 0.0)


def test_a_box_alone_and_an_empty_claim_are_not_dominated() -> None:
    nothing = MaskClaim(Region(5, 5, 5, 5), np.zeros((0, 0), np.float32), 0.5)
    below = claim(Region(0, 0, 4, 4), 0.3)
    assert dominated([claim(Region(2, 1, 7, 9), 0.6), nothing, below]) == [False, False, False]


def test_pixels_of_others_are_not_counted_as_unstable() -> None:
    large, small = claim(Region(0, 0, 10, 12), 0.9), claim(Region(8, 2, 16, 6), 0.85)
    mask = assign_pixels([large, small], HW)[0]
    assert not mask.all()
    again = claim(large.region, 0.9)
    crop = Crop(np.zeros((8, 8, 3), np.uint8), (0, 0, 10, 12), (0, 0, 10, 12), Window(0, 0, 10, 12), HW, 120.0)
    stability = LabelerConfig(score=ScoreType.STABILITY)
    assert mask_score(stability, crop, large, mask) == mask_score(stability, crop, again, mask)
    assert large.mask.all()


def test_of_two_equal_sizes_the_higher_probability_wins() -> None:
    low, high = claim(Region(0, 0, 6, 4), 0.6), claim(Region(4, 0, 10, 4), 0.95)
    kept = assign_pixels([low, high], HW)
    assert not kept[0][:, 4:].any()
    assert kept[0][:, :4].all()
    assert kept[1].all()


def test_an_uncontested_mask_is_unchanged_even_below_one_half() -> None:
    alone = claim(Region(2, 1, 7, 9), 0.2, threshold=0.1)
    assert assign_pixels([alone], HW)[0].all()


def test_probabilities_of_one_and_empty_regions_are_accepted() -> None:
    empty = MaskClaim(Region(5, 5, 5, 5), np.zeros((0, 0), np.float32), 0.5)
    inverted = MaskClaim(Region(9, 3, 5, 3), np.zeros((0, 0), np.float32), 0.5)
    kept = assign_pixels([claim(Region(0, 0, 4, 4), 1.0), empty, inverted, claim(Region(0, 0, 4, 4), 1.0)], HW)
    assert kept[0].all()
    assert kept[3].all()  # each lies within the other
    assert kept[1].size == 0


def random_claims(seed: int, number: int) -> list[MaskClaim]:
    rng = np.random.default_rng(seed)
    claims = []
    for _ in range(number):
        (c0, c1), (r0, r1) = np.sort(rng.integers(0, HW[1] + 1, 2)), np.sort(rng.integers(0, HW[0] + 1, 2))
        values = rng.random((r1 - r0, c1 - c0), dtype=np.float32)
        claims.append(MaskClaim(Region(int(c0), int(r0), int(c1), int(r1)), values, 0.4))
    return claims


def on_image(region: Region, values: NDArray[Any], empty: float) -> NDArray[Any]:
    image = np.full(HW, empty, values.dtype)
    image[region.row0 : region.row1, region.col0 : region.col1] = values
    return image


@given(st.integers(0, 10_000), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_masks_are_those_of_comparing_all_claims_at_once(seed: int, number: int) -> None:
    claims = random_claims(seed, number)
    masks = [on_image(one.region, one.mask, False) for one in claims]
    areas = [int(mask.sum()) for mask in masks]
    strengths = [
        np.where(
            mask, on_image(one.region, logits(one.prob), 0) - np.float32(SIZE_WEIGHT * np.log(max(area, 1))), -np.inf
        )
        for one, mask, area in zip(claims, masks, areas, strict=True)
    ]
    owner = np.where(np.any(masks, axis=0), np.argmax(strengths, axis=0), -1)
    others = [int((mask & (owner != index)).sum()) for index, mask in enumerate(masks)]
    assert dominated(claims) == [
        area > 0 and other >= DOMINATED_SHARE * area for other, area in zip(others, areas, strict=True)
    ]
    for index, kept in enumerate(assign_pixels(claims, HW)):
        expected = masks[index].copy()
        for other in set(range(number)) - {index}:
            lost = masks[index] & (owner == other)
            if lost.sum() < NESTED_SHARE * min(areas[index], areas[other]):
                expected &= ~lost
        assert (on_image(claims[index].region, kept, False) == expected).all()


@given(st.integers(0, 10_000), st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_no_claimed_pixel_is_lost_and_none_is_added(seed: int, number: int) -> None:
    claims = random_claims(seed, number)
    masks = [on_image(one.region, one.mask, False) for one in claims]
    kept = [on_image(one.region, m, False) for one, m in zip(claims, assign_pixels(claims, HW), strict=True)]
    assert (np.any(kept, axis=0) == np.any(masks, axis=0)).all()
    assert not any((after & ~before).any() for after, before in zip(kept, masks, strict=True))


def test_the_memory_of_shared_pixels_does_not_grow_with_the_boxes() -> None:
    labeler = BrightPredictor()
    image: NDArray[np.uint8] = np.random.default_rng(0).integers(0, 256, (1000, 1000, 3), dtype=np.uint8)
    (crop,) = labeler.prepare(image, [(0, 0, 1000, 1000)])
    assert isinstance(crop, Crop)
    prediction = Prediction(np.random.default_rng(1).random((16, 16), dtype=np.float32))

    def peak_bytes(boxes: int) -> int:
        tracemalloc.start()
        try:
            owners = PixelOwners(crop.image_hw)
            for index in range(boxes):
                owners.add(index, labeler.claim(crop, prediction))
            for index in range(boxes):
                labeler.finish(crop, prediction, owners=owners, index=index)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak_bytes(12) <= 1.2 * peak_bytes(2)
