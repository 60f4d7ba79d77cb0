"""TurboJPEG returns the pixels of Pillow, and leaves to it what it does not read without a warning."""

import io

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from mal_train.core.errors import BadImage
from mal_train.core.images.decoder import decode_image
from mal_train.core.images.header import read_container
from mal_train.core.images.jpeg_pixels import rgb_of_jpeg
from tests.reference import shared


def jpeg(mode: str = "RGB", size_wh: tuple[int, int] = (129, 67), **options: object) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (*size_wh[::-1], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def pillow_pixels(content: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def turbo_pixels(content: bytes) -> NDArray[np.uint8] | None:
    container = read_container(content)
    return rgb_of_jpeg(container.parts, container.header.size_wh)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"subsampling": "4:4:4"},
        {"subsampling": "4:2:2"},
        {"subsampling": "4:2:0"},
        {"keep_rgb": True},
        {"restart_marker_blocks": 3},
        {"quality": 5},
        {"mode": "L"},
        {"size_wh": (1, 1)},
    ],
)
def test_the_pixels_are_those_of_pillow(options: dict[str, object], progressive: bool) -> None:
    content = jpeg(**options, progressive=progressive)  # type: ignore[arg-type]
    found = turbo_pixels(content)
    assert found is not None
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, pillow_pixels(content))


def test_photographs_have_the_pixels_of_pillow() -> None:
    for path in sorted(shared("data").rglob("*.jpg"))[:40]:
        content = path.read_bytes()
        np.testing.assert_array_equal(turbo_pixels(content), pillow_pixels(content), err_msg=path.name)


def test_other_color_spaces_and_warnings_are_left_to_pillow() -> None:
    first_restart = b"\xff\xd0"
    with_extra_bytes = jpeg(restart_marker_blocks=3).replace(first_restart, b"\x11\x22\x33" + first_restart, 1)
    for content in (jpeg("CMYK"), with_extra_bytes):
        assert turbo_pixels(content) is None
        np.testing.assert_array_equal(decode_image(content), pillow_pixels(content))


def test_a_truncated_file_is_refused() -> None:
    content = jpeg()
    cut = content[: len(content) * 2 // 3]
    assert turbo_pixels(cut) is None
    with pytest.raises(BadImage):
        decode_image(cut)


def test_a_size_that_the_walk_did_not_find_is_left_to_pillow() -> None:
    container = read_container(jpeg(size_wh=(40, 30)))
    assert rgb_of_jpeg(container.parts, (30, 40)) is None
