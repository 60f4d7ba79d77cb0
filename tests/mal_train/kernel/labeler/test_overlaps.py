"""Each contested pixel is assigned to one box of its image."""

import tracemalloc
from collections.abc import Sequence

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mal_train.core.masks.geometry import Region
from mal_train.kernel.labeler.overlaps import SIZE_WEIGHT, MaskClaim, PixelOwners, logits
from mal_train.kernel.labeler.types import Crop, Prediction
from tests.mal_server.fakes import BrightPredictor

HW = (12, 16)


def claim(region: Region, value: float, threshold: float = 0.5) -> MaskClaim:
    shape = (region.row1 - region.row0, region.col1 - region.col0)
    return MaskClaim(region, np.full(shape, value, np.float32), threshold)


def assign_pixels(claims: Sequence[MaskClaim], image_hw: tuple[int, int]) -> list[NDArray[np.bool_]]:
    owners = PixelOwners(image_hw)
    for index, one in enumerate(claims):
        owners.add(index, one)
    return [owners.mask(index, one) for index, one in enumerate(claims)]


def test_contested_pixels_go_to_the_smaller_mask() -> None:
    table, plate = claim(Region(0, 0, 16, 12), 0.9), claim(Region(4, 4, 8, 8), 0.8)
    kept = assign_pixels([table, plate], HW)
    assert kept[1].all()
    assert not kept[0][4:8, 4:8].any()
    assert kept[0].sum() == 12 * 16 - 16


def test_of_two_equal_sizes_the_higher_probability_wins() -> None:
    low, high = claim(Region(0, 0, 6, 4), 0.6), claim(Region(3, 0, 9, 4), 0.95)
    kept = assign_pixels([low, high], HW)
    assert not kept[0][:, 3:].any()
    assert kept[1].all()


def test_an_uncontested_mask_is_unchanged_even_below_one_half() -> None:
    alone = claim(Region(2, 1, 7, 9), 0.2, threshold=0.1)
    assert assign_pixels([alone], HW)[0].all()


def test_probabilities_of_one_and_empty_regions_are_accepted() -> None:
    empty = MaskClaim(Region(5, 5, 5, 5), np.zeros((0, 0), np.float32), 0.5)
    inverted = MaskClaim(Region(9, 3, 5, 3), np.zeros((0, 0), np.float32), 0.5)
    kept = assign_pixels([claim(Region(0, 0, 4, 4), 1.0), empty, inverted, claim(Region(0, 0, 4, 4), 1.0)], HW)
    assert kept[0].all()
    assert not kept[3].any()
    assert kept[1].size == 0


@given(st.integers(0, 10_000), st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_every_claimed_pixel_is_assigned_exactly_once(seed: int, number: int) -> None:
    rng = np.random.default_rng(seed)
    claims = []
    for _ in range(number):
        (c0, c1), (r0, r1) = np.sort(rng.integers(0, HW[1] + 1, 2)), np.sort(rng.integers(0, HW[0] + 1, 2))
        values = rng.random((r1 - r0, c1 - c0), dtype=np.float32)
        claims.append(MaskClaim(Region(int(c0), int(r0), int(c1), int(r1)), values, 0.4))
    times_kept, claimed = np.zeros(HW, int), np.zeros(HW, bool)
    for one, kept in zip(claims, assign_pixels(claims, HW), strict=True):
        part = np.s_[one.region.row0 : one.region.row1, one.region.col0 : one.region.col1]
        assert not (kept & ~one.mask).any()
        times_kept[part] += kept
        claimed[part] |= one.mask
    assert (times_kept == claimed).all()


@given(st.integers(0, 10_000), st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_pixels_go_to_the_same_boxes_as_by_comparing_all_claims_at_once(seed: int, number: int) -> None:
    rng = np.random.default_rng(seed)
    claims, strengths = [], np.full((number, *HW), -np.inf, np.float32)
    for index in range(number):
        (c0, c1), (r0, r1) = np.sort(rng.integers(0, HW[1] + 1, 2)), np.sort(rng.integers(0, HW[0] + 1, 2))
        values = rng.random((r1 - r0, c1 - c0), dtype=np.float32)
        claims.append(MaskClaim(Region(int(c0), int(r0), int(c1), int(r1)), values, 0.4))
        mask = claims[-1].mask
        if mask.any():
            strength = logits(values) - np.float32(SIZE_WEIGHT * np.log(mask.sum()))
            strengths[index, r0:r1, c0:c1] = np.where(mask, strength, -np.inf)
    owner = np.where(np.isfinite(strengths).any(axis=0), strengths.argmax(axis=0), -1)
    for index, (one, kept) in enumerate(zip(claims, assign_pixels(claims, HW), strict=True)):
        part = np.s_[one.region.row0 : one.region.row1, one.region.col0 : one.region.col1]
        assert (kept == (owner[part] == index)).all()


def test_the_memory_of_shared_pixels_does_not_grow_with_the_boxes() -> None:
    labeler = BrightPredictor()
    image: NDArray[np.uint8] = np.random.default_rng(0).integers(0, 256, (1000, 1000, 3), dtype=np.uint8)
    (crop,) = labeler.prepare(image, [(0, 0, 1000, 1000)])
    assert isinstance(crop, Crop)
    prediction = Prediction(np.random.default_rng(1).random((16, 16), dtype=np.float32))

    def peak_bytes(boxes: int) -> int:
        tracemalloc.start()
        try:
            assert len(labeler.finish_without_overlaps([(crop, prediction)] * boxes)) == boxes
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak_bytes(12) <= 1.2 * peak_bytes(2)
