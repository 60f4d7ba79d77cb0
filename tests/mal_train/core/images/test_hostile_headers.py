"""Files that consist of headers, small ones here: what the decoder accepts and refuses."""

import pytest

from mal_train.core.errors import BadImage
from mal_train.core.images.decoder import decode_image
from mal_train.core.images.header import read_header
from tests.mal_train.core.images.hostile import HOSTILE, jpeg_of_scans, jpeg_with, saved, segment, tiff, tiff_of_pages


@pytest.mark.parametrize("name", HOSTILE)
def test_the_header_of_such_a_file_is_read_or_refused(name: str) -> None:
    try:
        outcome = "read" if min(read_header(HOSTILE[name](50_000)).size_wh) > 0 else "empty"
    except BadImage as error:
        outcome = error.reason
    assert outcome in {"read", "IMAGE_TOO_LARGE", "IMAGE_DECODE_FAILED", "IMAGE_FORMAT"}


def refused(data: bytes) -> str:
    with pytest.raises(BadImage) as caught:
        decode_image(data)
    return caught.value.reason


def test_two_frame_headers_are_refused_since_readers_disagree_on_the_size() -> None:
    frame = segment(0xC0, b"\x08\x00\x10\x00\x10\x01\x01\x11\x00")
    assert refused(jpeg_with(frame)) == "IMAGE_DECODE_FAILED"


def test_more_scans_are_allowed_for_a_small_image_than_for_a_large_one() -> None:
    assert decode_image(jpeg_of_scans(80, (64, 64))).shape == (64, 64, 3)
    assert refused(jpeg_of_scans(80, (5_000, 5_000))) == "IMAGE_TOO_LARGE"


def test_a_long_row_of_fill_bytes_is_refused_within_the_scans_only() -> None:
    fill = b"\xff" * 100_000
    assert refused(jpeg_with(fill, at=-2)) == "IMAGE_TOO_LARGE"
    assert decode_image(jpeg_with(fill)).shape == (8, 8, 3)
    assert decode_image(saved("JPEG") + fill).shape == (8, 8, 3)


@pytest.mark.parametrize(
    "tags",
    [
        ((273, 3, 70_000, 0xFFFFFFF0),),
        ((257, 4, 0xFFFFFFFF, 8),),
        ((256, 16, 1, 8),),
        ((278, 3, 1, 0),),
        ((322, 3, 1, 0), (323, 3, 1, 16), (324, 4, 1, 8)),
        ((322, 3, 1, 16), (323, 3, 1, 16)),
        ((256, 4, 1, 0),),
        ((259, 3, 1, 34677),),
        ((277, 9, 1, 1),),
        ((279, 9, 1, 1),),
    ],
    ids=[
        *("outside", "many heights", "64-bit width", "no rows", "no width", "no tiles", "empty", "compression"),
        *("signed samples", "signed byte counts"),
    ],
)
def test_a_tiff_of_invalid_numbers_is_refused(tags: tuple[tuple[int, int, int, int], ...]) -> None:
    assert refused(tiff(bytes(16), *tags)) in {"IMAGE_DECODE_FAILED", "IMAGE_TOO_LARGE", "IMAGE_FORMAT"}


def test_tiles_that_reach_far_beyond_the_image_are_refused() -> None:
    assert refused(HOSTILE["TIFF of tiles larger than the image"](0)) == "IMAGE_TOO_LARGE"


def test_a_chain_of_pages_that_returns_to_its_start_ends() -> None:
    pages = bytearray(tiff_of_pages(600))
    pages[-10:-6] = pages[4:8]
    assert read_header(bytes(pages)).frames == 101
