"""Round trips of mask encodings, and rejection of invalid ones."""

import dataclasses
import io
import zlib
from array import array

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mal_train.core.errors import BadDataset, BadImage
from mal_train.core.masks.encodings import Runs, decode, encode, encode_bitmap, to_png, to_runs
from mal_train.core.masks.rle import decode_mask, decode_patch, encode_mask
from mal_train.core.settings import MaskFormat
from tests.mal_train.core.images.hostile import chunk
from tests.mal_train.core.masks.random_masks import random_mask


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=200, deadline=None)
def test_every_encoding_restores_the_mask(seed: int) -> None:
    code = encode_mask(random_mask(seed))
    encodings = encode(code, MaskFormat)
    assert [decode(encoding) for encoding in encodings] == [code] * len(MaskFormat)


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
    with Image.open(io.BytesIO(crop.content)) as image:
        assert (image.format, image.mode) == ("PNG", "1")
        np.testing.assert_array_equal(np.asarray(image), mask[5:9, 7:20])


def test_an_empty_mask_has_an_empty_png() -> None:
    crop = to_png(encode_mask(np.zeros((3, 4), bool)))
    assert (crop.crop_width, crop.crop_height, crop.content) == (0, 0, b"")


def test_plain_runs_equal_those_of_the_compressed_rle() -> None:
    mask = np.zeros((3, 3), bool)
    mask[1, 0:2] = True
    assert to_runs(encode_mask(mask)).counts == array("i", (1, 1, 2, 1, 4))


def test_runs_that_do_not_fill_the_frame_are_rejected() -> None:
    with pytest.raises(BadDataset, match=r"5 px.* 6 px"):
        decode(Runs(2, 3, array("i", (2, 3))))


@pytest.mark.parametrize("content", [b"not a png", encode_bitmap(np.ones((8, 8), bool))[:40]])
def test_a_damaged_png_is_rejected(content: bytes) -> None:
    good = to_png(encode_mask(np.ones((8, 8), bool)))
    with pytest.raises(BadImage, match="mask"):
        decode(dataclasses.replace(good, content=content))


@pytest.mark.parametrize(("side", "reason"), [(900, "IMAGE_TOO_LARGE"), (7, "IMAGE_SIZE_MISMATCH")])
def test_a_png_of_a_wrong_size_is_rejected_before_it_is_decoded(side: int, reason: str) -> None:
    good = to_png(encode_mask(np.ones((8, 8), bool)))
    with pytest.raises(BadImage) as caught:
        decode(dataclasses.replace(good, content=encode_bitmap(np.ones((side, side), bool))))
    assert caught.value.reason == reason


def test_a_png_of_metadata_is_decoded_without_it() -> None:
    good = to_png(encode_mask(np.ones((8, 8), bool)))
    bomb = chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(70_000_000)))
    content = good.content[:33] + bomb + good.content[33:]
    assert decode(dataclasses.replace(good, content=content)) == decode(good)


def test_a_full_frame_png_restores_the_mask() -> None:
    mask = random_mask(3)
    with Image.open(io.BytesIO(encode_bitmap(decode_mask(encode_mask(mask))))) as image:
        np.testing.assert_array_equal(np.asarray(image), mask)
