"""Opens files with Pillow, and converts its images, of any mode, to RGB pixels."""

import io
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

from mal_train.core.errors import BadImage
from mal_train.core.images.container import refusal
from mal_train.core.images.pixels import Values, rows_of_strips, stretched
from mal_train.core.images.png import COLOR_TYPE_AT, DEPTH_AT, GRAY_ALPHA, RGBA

_PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}
"""Modes whose colors are multiplied by alpha, and those without."""


@contextmanager
def opened(parts: Sequence[bytes | memoryview], format_name: str, name: str) -> Iterator[ImageFile.ImageFile]:
    """Yields the image of a file that was walked through; converts errors here and in the block to BadImage."""
    try:
        # Pillow warns about large images; ImageLimits decides instead.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(b"".join(parts)), formats=[format_name]) as image:
                yield image
    except Image.DecompressionBombError as error:
        # The message of Pillow states the number of pixels in the header.
        raise BadImage(f"{name}: {error}", "IMAGE_TOO_LARGE") from None
    # Errors of Pillow's decoders on damaged files: also SyntaxError for broken PNG chunks, and MemoryError for invalid
    # sizes in sub-headers.
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, IndexError, KeyError, TypeError, MemoryError,
            OverflowError, ZeroDivisionError) as error:  # fmt: skip
        raise refusal(name, error) from None


def rgb_of_pillow(image: Image.Image, name: str = "image") -> NDArray[np.uint8]:
    """Returns (H, W, 3) uint8 of an image of any mode.

    Colors are converted, alpha is dropped, and modes of more than 8 bits are stretched. In strips: in one piece, Pillow
    would fill up to three buffers, three times slower. Raises BadImage, as `stretched`.
    """
    width, height = image.size
    if image.mode.startswith("I") or image.mode == "F":
        return stretched(lambda: map(np.asarray, _crops(image)), image.size, 1, name)
    pixels = np.empty((height, width, 3), np.uint8)
    for rows, strip in zip(rows_of_strips(image.size), _crops(image), strict=True):
        pixels[rows] = _colors(strip)
    return pixels


def rgb_of_wide_png(parts: Sequence[bytes | memoryview], name: str) -> NDArray[np.uint8]:
    """Returns (H, W, 3) uint8 of a PNG of several bands of 16 bits, of which Pillow's modes hold the upper bytes only.

    Pillow reads colors twice, the second time in the other byte order: then it finds the lower bytes. Gray with alpha
    is read as RGBA of 8 bits, whose red and green are the two bytes of gray.
    """
    file = b"".join(parts)
    if file[COLOR_TYPE_AT] == GRAY_ALPHA:
        with opened([_as_rgba(file)], "PNG", name) as image:
            image.load()

            def gray() -> Iterator[Values]:
                for pair in map(np.asarray, _crops(image)):
                    yield _joined(pair[:, :, :1], pair[:, :, 1:2])

            return stretched(gray, image.size, 1, name)
    with opened([file], "PNG", name) as upper, opened([file], "PNG", name) as lower:
        upper.load()
        (tile,) = lower.tile
        lower.tile = [tile._replace(args=f"{lower.mode};16L")]
        lower.load()

        def strips() -> Iterator[Values]:
            for high, low in zip(_crops(upper), _crops(lower), strict=True):
                yield _joined(np.asarray(high)[:, :, :3], np.asarray(low)[:, :, :3])

        return stretched(strips, upper.size, 3, name)


def _joined(high: NDArray[np.uint8], low: NDArray[np.uint8]) -> NDArray[np.uint16]:
    joined: NDArray[np.uint16] = high.astype(np.uint16) << np.uint16(8) | low
    return joined


def _as_rgba(file: bytes) -> bytes:
    """Returns a PNG with a header of RGBA and 8 bits, whose pixels have the same number of bytes."""
    header = file[12:DEPTH_AT] + bytes([8, RGBA]) + file[COLOR_TYPE_AT + 1 : 29]
    return file[:12] + header + struct.pack(">I", zlib.crc32(header)) + file[33:]


def _crops(image: Image.Image) -> Iterator[Image.Image]:
    for rows in rows_of_strips(image.size):
        yield image.crop((0, rows.start, image.width, rows.stop))


def _colors(image: Image.Image) -> NDArray[np.uint8]:
    """Returns the pixels (H, W, 3) of an image of 8 bits."""
    if image.mode in _PREMULTIPLIED:
        image = image.convert(_PREMULTIPLIED[image.mode])
    # convert() copies an image that is RGB already.
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
