"""Decodes images to RGB pixels; the only decoder of the repository.

Walks through the file first (`header`), and gives Pillow only the parts that pixels need, of an allow-list of formats.
OpenCV would allocate 4 GiB for a forged 49-byte PNG, and rotates by EXIF. Pixels are returned as stored, without EXIF
rotation, because COCO boxes refer to stored pixels.
"""

import io
import os
import stat
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mal_train.core.errors import BadImage
from mal_train.core.images.container import Container, refusal
from mal_train.core.images.header import DEFAULT_LIMITS, ImageLimits, read_container

RgbImage = NDArray[np.uint8]
"""(H, W, 3), uint8, RGB, C-contiguous."""

STRIP_PIXELS = 1 << 18
"""Pixels converted and copied out of Pillow at a time: 1 MB, which fits into the cache of a core."""


def decode_image(
    data: bytes,
    *,
    expected_wh: tuple[int, int] | None = None,
    limits: ImageLimits = DEFAULT_LIMITS,
    name: str = "image",
) -> RgbImage:
    """Decodes the first frame of a JPEG, PNG, WebP, BMP or TIFF to RGB pixels (H, W, 3) uint8.

    Gray is repeated in three channels, CMYK is converted, alpha is dropped (the color below it is kept), and 16-bit
    gray keeps its upper byte.

    Args:
        data: bytes of the file.
        expected_wh: (width, height) stated by the COCO file or the request. A different stored size is an error, since
            the boxes would refer to a rotated or resized image.
        limits: limits of the image.
        name: name of the image in messages.

    Raises:
        BadImage: the image is unusable; `reason` tells why.
    """
    return decode_container(read_container(data, limits=limits, name=name), expected_wh=expected_wh, name=name)


def decode_container(
    container: Container, *, expected_wh: tuple[int, int] | None = None, name: str = "image"
) -> RgbImage:
    """Decodes a file after its walk; see `decode_image`. Takes `container.peak_bytes` of memory at most."""
    size_wh = width, height = container.header.size_wh
    if expected_wh is not None and expected_wh != size_wh:
        hint = "; it is rotated by EXIF, but boxes refer to stored pixels" if expected_wh == (height, width) else ""
        raise BadImage(
            f"{name}: stored as {width}x{height} px, stated as {expected_wh[0]}x{expected_wh[1]}{hint}",
            "IMAGE_SIZE_MISMATCH",
        )
    with _opened(container, name) as image:
        if image.size != size_wh:  # the memory was charged for the size that the walk found
            raise BadImage(f"{name}: its headers state {width}x{height} and {image.width}x{image.height} px")
        image.load()
        return _to_rgb(image)


def read_image(
    path: Path, *, expected_wh: tuple[int, int] | None = None, limits: ImageLimits = DEFAULT_LIMITS
) -> RgbImage:
    """Decodes a file; see `decode_image`. A missing or unreadable file is a BadImage with reason IMAGE_NOT_FOUND."""
    return decode_image(_read(path, limits.max_bytes), expected_wh=expected_wh, limits=limits, name=str(path))


def encode_png(image: RgbImage) -> bytes:
    """Encodes an RGB (H, W, 3) or gray (H, W) uint8 array as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def _read(path: Path, max_bytes: int) -> bytes:
    """Reads a regular file of at most `max_bytes`. Raises BadImage."""
    try:
        # Non-blocking: opening a named pipe would wait for a writer.
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ValueError("not a regular file")
            data = file.read(max_bytes + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise BadImage(f"{path}: cannot be read ({reason}); check the image folder", "IMAGE_NOT_FOUND") from None
    if len(data) > max_bytes:
        raise BadImage(f"{path}: larger than the limit of {max_bytes} bytes", "IMAGE_TOO_LARGE")
    return data


@contextmanager
def _opened(container: Container, name: str) -> Iterator[Image.Image]:
    """Yields the image opened by Pillow; converts errors here and in the block to BadImage."""
    try:
        # Pillow warns about large images; ImageLimits decides instead.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(b"".join(container.parts)), formats=[container.format]) as image:
                yield image
    except Image.DecompressionBombError as error:
        # The message of Pillow states the number of pixels in the header.
        raise BadImage(f"{name}: {error}", "IMAGE_TOO_LARGE") from None
    # Errors of Pillow's decoders on damaged files: also SyntaxError for broken PNG chunks, and MemoryError for invalid
    # sizes in sub-headers.
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, IndexError, KeyError, TypeError, MemoryError,
            OverflowError, ZeroDivisionError) as error:  # fmt: skip
        raise refusal(name, error) from None


def _to_rgb(image: Image.Image) -> RgbImage:
    """Converts and copies pixels in strips. In one piece, Pillow would fill up to three buffers, three times slower."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no standard range; convert to 8 bits per channel")
    width, height = image.size
    rows = max(STRIP_PIXELS // width, 1)
    pixels: RgbImage = np.empty((height, width, 3), np.uint8)
    for row in range(0, height, rows):
        strip = image.crop((0, row, width, min(row + rows, height)))
        pixels[row : row + rows] = _channels(strip)
    return pixels


def _channels(image: Image.Image) -> NDArray[np.uint8]:
    """Returns the pixels as (H, W, 3), or (H, W, 1) to be repeated."""
    if image.mode.startswith("I"):
        return _gray(image)[:, :, None]
    # convert() copies an image that is RGB already.
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _gray(image: Image.Image) -> NDArray[np.uint8]:
    """Returns the upper byte of 16-bit gray (H, W), which Pillow would clip at 255."""
    gray = np.asarray(image)
    if image.mode == "I":
        gray = np.minimum(gray.astype(np.uint32), 65535)
    return (gray >> 8).astype(np.uint8)
