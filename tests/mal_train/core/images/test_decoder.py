"""Image decoding: accepted formats, rejected files, and the cost of hostile files."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mal_train.core.errors import BadImage
from mal_train.core.images import pixels
from mal_train.core.images.decoder import decode_image, encode_png
from mal_train.core.images.files import read_image
from mal_train.core.images.header import MAX_PIXELS, ImageLimits
from mal_train.core.images.jpeg import MAX_SCANS
from mal_train.core.images.pixels import STRIP_PIXELS


def encoded(image: Image.Image, format_name: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format_name, **options)
    return buffer.getvalue()


def noise(height: int = 40, width: int = 60) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png_header(width: int, height: int, idat_length: int = 0) -> bytes:
    def chunk(name: bytes, body: bytes, length: int | None = None) -> bytes:
        size = len(body) if length is None else length
        return struct.pack(">I", size) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"", idat_length)


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF"])
def test_lossless_formats_keep_every_pixel(form: str) -> None:
    image = noise()
    np.testing.assert_array_equal(decode_image(encoded(Image.fromarray(image), form)), image)


@pytest.mark.parametrize("height", [700, 1311])
def test_an_image_copied_in_strips_keeps_every_pixel(height: int) -> None:
    image = noise(height, 400)
    assert height > STRIP_PIXELS // 400
    assert height % (STRIP_PIXELS // 400)
    found = decode_image(encoded(Image.fromarray(image), "PNG"))
    np.testing.assert_array_equal(found, image)
    assert found.flags.c_contiguous


def test_a_row_longer_than_a_strip_keeps_every_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixels, "STRIP_PIXELS", 50)
    image = noise()
    np.testing.assert_array_equal(decode_image(encoded(Image.fromarray(image), "PNG")), image)


def test_png_round_trip() -> None:
    image = noise()
    np.testing.assert_array_equal(decode_image(encode_png(image)), image)


def test_every_mode_becomes_three_channels() -> None:
    rgb = Image.fromarray(noise())
    for converted, form in [
        (rgb.convert("L"), "PNG"),
        (rgb.convert("CMYK"), "JPEG"),
        (rgb.convert("P"), "PNG"),
        (rgb.convert("1"), "PNG"),
        (rgb.convert("LA"), "PNG"),
    ]:
        image = decode_image(encoded(converted, form))
        assert image.shape == (40, 60, 3)
        assert image.dtype == np.uint8
        assert image.flags.c_contiguous


def test_alpha_is_dropped_and_the_color_is_kept() -> None:
    image = Image.new("RGBA", (3, 3), (200, 10, 20, 0))
    assert decode_image(encoded(image, "PNG"))[0, 0].tolist() == [200, 10, 20]


def test_exif_orientation_is_ignored_and_named_for_a_rotated_size() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.fromarray(noise(40, 80)), "JPEG", exif=exif.tobytes())
    assert decode_image(data).shape == (40, 80, 3)
    with pytest.raises(BadImage, match="EXIF") as caught:
        decode_image(data, expected_wh=(40, 80))
    assert caught.value.reason == "IMAGE_SIZE_MISMATCH"


def test_a_swapped_size_of_an_image_without_orientation_is_not_blamed_on_exif() -> None:
    with pytest.raises(BadImage, match="swapped") as caught:
        decode_image(encoded(Image.fromarray(noise(40, 80)), "JPEG"), expected_wh=(40, 80))
    assert caught.value.reason == "IMAGE_SIZE_MISMATCH"
    assert "EXIF" not in str(caught.value)


def test_the_first_page_of_a_tiff_is_decoded() -> None:
    first, second = Image.new("RGB", (5, 5), (1, 2, 3)), Image.new("RGB", (5, 5), (9, 9, 9))
    data = encoded(first, "TIFF", save_all=True, append_images=[second])
    assert decode_image(data)[0, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize("cut", [0.02, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
def test_truncated_files_are_rejected(cut: float, form: str) -> None:
    data = encoded(Image.fromarray(noise(200, 300)), form)
    with pytest.raises(BadImage) as caught:
        decode_image(data[: int(len(data) * cut)], name="image 12")
    assert "image 12" in str(caught.value)
    assert caught.value.reason in ("IMAGE_DECODE_FAILED", "IMAGE_FORMAT")


def test_other_formats_and_text_are_rejected() -> None:
    animated = encoded(Image.fromarray(noise()), "GIF", save_all=True, append_images=[Image.fromarray(noise()[::-1])])
    for data in (animated, b"this is not an image", b"<svg xmlns='http://www.w3.org/2000/svg'/>"):
        with pytest.raises(BadImage, match="JPEG, PNG, WEBP, BMP, TIFF") as caught:
            decode_image(data)
        assert caught.value.reason == "IMAGE_FORMAT"
    with pytest.raises(BadImage, match="0 bytes"):
        decode_image(b"")


def test_nine_hundred_megapixels_are_rejected_from_the_header() -> None:
    with pytest.raises(BadImage) as caught:
        decode_image(png_header(30_000, 30_000))
    assert caught.value.reason == "IMAGE_TOO_LARGE"


def test_every_limit_of_pixels_that_can_be_set_is_one_that_pillow_keeps() -> None:
    assert Image.MAX_IMAGE_PIXELS is not None
    assert MAX_PIXELS == 2 * Image.MAX_IMAGE_PIXELS


def test_a_forged_chunk_length_is_a_decode_error() -> None:
    with pytest.raises(BadImage):
        decode_image(png_header(8, 8, 0xFFFFFFF0))


def test_an_exceeded_limit_is_named() -> None:
    data = encode_png(noise())
    cases = (
        (ImageLimits(max_bytes=10), "10"),
        (ImageLimits(max_pixels=100), "100 px"),
        (ImageLimits(max_side=50), "50 px"),
    )
    for limits, named in cases:
        with pytest.raises(BadImage, match=named) as caught:
            decode_image(data, limits=limits)
        assert caught.value.reason == "IMAGE_TOO_LARGE"


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.jpg", tmp_path):
        with pytest.raises(BadImage, match=path.name) as caught:
            read_image(path)
        assert caught.value.reason == "IMAGE_NOT_FOUND"


def test_mutated_files_raise_only_bad_image() -> None:
    rng = np.random.default_rng(7)
    for form in ("JPEG", "PNG", "WEBP", "BMP", "TIFF"):
        data = np.frombuffer(encoded(Image.fromarray(noise()), form), dtype=np.uint8)
        for _ in range(150):
            mutant = data.copy()
            positions = rng.integers(0, mutant.size, rng.integers(1, 9))
            mutant[positions] = rng.integers(0, 256, positions.size)
            try:
                image = decode_image(mutant.tobytes())
            except BadImage:
                continue
            assert image.ndim == 3
            assert image.shape[2] == 3


def jpeg_with_scans(count: int, before: bytes = b"") -> bytes:
    """Returns a progressive JPEG whose last scan is repeated `count` times, each time after `before`."""
    data = encoded(Image.new("L", (64, 64), 128), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + (before + data[last:-2]) * count + data[-2:]


@pytest.mark.parametrize(
    "before",
    [b"", b"\xff\x01", b"\xff\xff", b"\xff\xd0", b"garbage\xff\x00", b"\xff\xe1\x00\x04\xff\xd9"],
    ids=["bare", "TEM", "fill bytes", "restart", "garbage", "end marker inside a segment"],
)
def test_a_jpeg_of_too_many_scans_is_rejected_before_it_is_decoded(before: bytes) -> None:
    with pytest.raises(BadImage, match="100 scans") as caught:
        decode_image(jpeg_with_scans(MAX_SCANS + 1, before))
    assert caught.value.reason == "IMAGE_TOO_LARGE"


def test_scans_in_thumbnails_and_after_the_image_are_not_counted() -> None:
    image = Image.fromarray(noise())
    plain = encoded(image, "JPEG", progressive=True)
    looks_like_scans = b"\xff\xda\x00\x02" * 2 * MAX_SCANS
    thumbnail = encoded(image, "JPEG", progressive=True, exif=b"Exif\0\0" + looks_like_scans)
    for data in (plain, thumbnail, plain + looks_like_scans):
        np.testing.assert_array_equal(decode_image(data), decode_image(plain))
    assert decode_image(jpeg_with_scans(MAX_SCANS // 2)).shape == (64, 64, 3)


def test_scans_of_an_mpo_file_are_counted() -> None:
    """Pillow reports the format as MPO instead of JPEG."""
    buffer = io.BytesIO()
    image = Image.fromarray(noise())
    image.save(buffer, "MPO", save_all=True, append_images=[image], progressive=True)
    data = buffer.getvalue()
    assert decode_image(data).shape == (40, 60, 3)
    first_end = data.index(b"\xff\xd9")
    last = data.rindex(b"\xff\xda", 0, first_end)
    with pytest.raises(BadImage, match="scans"):
        decode_image(data[:first_end] + data[last:first_end] * (MAX_SCANS + 1) + data[first_end:])
