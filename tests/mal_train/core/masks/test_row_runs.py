"""Masks whose runs go row by row: equality with the encoding of their pixels, and bounded work for any stated size."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mal_train.core.errors import BadDataset
from mal_train.core.masks.rle import MAX_RUNS, area, encode_mask, encode_region
from mal_train.core.masks.row_runs import check_frame, encode_row_bounds


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=400, deadline=None)
def test_the_code_equals_that_of_the_pixels(seed: int) -> None:
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 20, 2).tolist()
    rows, columns = int(rng.integers(1, height + 1)), int(rng.integers(1, width + 1))
    top, left = int(rng.integers(0, height - rows + 1)), int(rng.integers(0, width - columns + 1))
    mask = rng.random((rows, columns)) < rng.choice([0, 0.1, 0.5, 0.95, 1])
    flat = np.concatenate(([False], mask.ravel(), [False]))
    bounds = np.flatnonzero(flat[1:] != flat[:-1])
    code = encode_row_bounds(bounds, (left, top, columns, rows), (width, height))
    assert code == encode_region(mask, top, left, (height, width))


def test_equal_bounds_cancel_each_other() -> None:
    code = encode_row_bounds(np.array([0, 1, 1, 2, 3, 3]), (0, 0, 2, 2), (2, 2))
    assert code == encode_mask(np.array([[1, 1], [0, 0]]))


@pytest.mark.parametrize("size_wh", [(20_000, 10_000), (200_000_000, 1), (1, 200_000_000)])
def test_a_short_code_of_a_large_image_takes_little_memory(size_wh: tuple[int, int]) -> None:
    pixels = size_wh[0] * size_wh[1]
    tracemalloc.start()
    code = encode_row_bounds(np.array([0, pixels]), (0, 0, *size_wh), size_wh)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert area(code) == pixels
    assert peak < 4 << 20


def test_a_mask_of_too_many_runs_in_columns_is_refused() -> None:
    width, height = 20_000, 10_000
    stripes = np.arange(0, width * height, width)  # every other row
    assert width * (height - 1) > MAX_RUNS
    with pytest.raises(BadDataset):
        encode_row_bounds(stripes, (0, 0, width, height), (width, height))


@pytest.mark.parametrize("size_wh", [(0, 5), (1 << 16, 1 << 16)])
def test_a_frame_without_pixels_or_of_too_many_is_refused(size_wh: tuple[int, int]) -> None:
    with pytest.raises(BadDataset):
        check_frame(size_wh, "mask")
