"""Every encoding gives the same mask back, and refuses what is none."""

import dataclasses
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mal_train.core.errors import BadDataset, BadImage
from mal_train.core.masks.encodings import Runs, decode, encode, encode_bitmap, to_png, to_runs
from mal_train.core.masks.rle import decode_mask, decode_patch, encode_mask
from mal_train.core.settings import MaskFormat
from tests.mal_train.core.masks.random_masks import random_mask


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=200, deadline=None)
def test_every_encoding_gives_the_mask_back(seed: int) -> None:
    code = encode_mask(random_mask(seed))
    found = encode(code, MaskFormat)
    assert [decode(one) for one in found] == [code] * len(MaskFormat)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=200, deadline=None)
def test_a_patch_is_the_tight_crop(seed: int) -> None:
    mask = random_mask(seed)
    patch = decode_patch(encode_mask(mask))
    rows, columns = np.nonzero(mask)
    if not rows.size:
        assert patch.mask.shape == (0, 0)
        return
    np.testing.assert_array_equal(patch.mask, mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1])
    assert (patch.row0, patch.col0) == (rows.min(), columns.min())


def test_the_png_is_the_tight_crop_in_one_bit() -> None:
    mask = np.zeros((30, 40), bool)
    mask[5:9, 7:20] = True
    mask[6, 8] = False
    crop = to_png(encode_mask(mask))
    assert (crop.x, crop.y, crop.crop_width, crop.crop_height) == (7, 5, 13, 4)
    with Image.open(io.BytesIO(crop.content)) as picture:
        assert (picture.format, picture.mode) == ("PNG", "1")
        np.testing.assert_array_equal(np.asarray(picture), mask[5:9, 7:20])


def test_an_empty_mask_has_an_empty_png() -> None:
    crop = to_png(encode_mask(np.zeros((3, 4), bool)))
    assert (crop.crop_width, crop.crop_height, crop.content) == (0, 0, b"")


def test_runs_are_those_of_the_compressed_code() -> None:
    mask = np.zeros((3, 3), bool)
    mask[1, 0:2] = True
    assert to_runs(encode_mask(mask)).counts == (1, 1, 2, 1, 4)


def test_runs_that_do_not_fill_the_frame_are_refused() -> None:
    with pytest.raises(BadDataset, match="runs sum to 5 px but the frame has 6"):
        decode(Runs(2, 3, (2, 3)))


@pytest.mark.parametrize("content", [b"no png", encode_bitmap(np.ones((8, 8), bool))[:40]])
def test_a_damaged_png_is_refused(content: bytes) -> None:
    good = to_png(encode_mask(np.ones((8, 8), bool)))
    with pytest.raises(BadImage, match="no PNG that can be decoded"):
        decode(dataclasses.replace(good, content=content))


def test_a_png_of_another_size_than_stated_is_refused_before_it_is_decoded() -> None:
    good = to_png(encode_mask(np.ones((8, 8), bool)))
    with pytest.raises(BadImage, match="a PNG of 900x900 px, stated as 8x8"):
        decode(dataclasses.replace(good, content=encode_bitmap(np.ones((900, 900), bool))))


def test_a_full_frame_png_reads_as_the_mask() -> None:
    mask = random_mask(3)
    with Image.open(io.BytesIO(encode_bitmap(decode_mask(encode_mask(mask))))) as picture:
        np.testing.assert_array_equal(np.asarray(picture), mask)
