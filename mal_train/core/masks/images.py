"""Bytes become RGB pixels here and nowhere else in the repository.

Pillow decodes, behind an allow-list of formats and a look at the header's size before any pixel is read: OpenCV takes
4 GiB for a forged 49-byte PNG and rotates by EXIF, Pillow does neither. Pixels stay as stored (EXIF orientation is
ignored), because COCO boxes refer to stored pixels.
"""

import io
import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from mal_train.core.errors import BadImage

RgbImage = NDArray[np.uint8]
"""(H, W, 3), uint8, RGB, C-contiguous."""

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
EXIF_ORIENTATION = 0x0112
STRIP_PIXELS = 1 << 18
"""Taken out of Pillow at a time: 1 MB, which stays in a core's cache."""

MAX_JPEG_SCANS = 100
"""A progressive JPEG has about ten passes over its pixels. A pass that adds nothing takes 14 bytes of a file and, at 64
million pixels, 40 ms: without a bound, a file of 100 KB would keep a thread for five minutes."""

# What begins a segment. 0xFF may also be followed by 0 (it is data), by a mark without a segment, or by more filling.
_JPEG_SEGMENT = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")
_JPEG_START = b"\xff\xd8"
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9


@dataclass(frozen=True)
class ImageLimits:
    """What is refused before it is decoded: file size in bytes, area and longest side in px."""

    max_bytes: int = 32 * 1024 * 1024
    max_pixels: int = 64_000_000
    max_side: int = 16_384


DEFAULT_LIMITS = ImageLimits()


def decode_image(
    data: bytes,
    *,
    expected_wh: tuple[int, int] | None = None,
    limits: ImageLimits = DEFAULT_LIMITS,
    name: str = "image",
) -> RgbImage:
    """RGB pixels (H, W, 3) uint8 of an encoded JPEG, PNG, WebP, BMP or TIFF; of several frames the first.

    Gray becomes three equal channels, CMYK is converted, alpha is dropped (the color under it stays), 16-bit gray
    keeps its upper byte.

    Args:
        data: the file's bytes.
        expected_wh: (width, height) that COCO or the request states; another stored size is an error, since boxes
            would be applied to a rotated or re-encoded picture.
        limits: what to refuse.
        name: how messages call the image.

    Raises:
        BadImage: with a `reason`; see `mal_train.core.errors.BadImage`.
    """
    if not data:
        raise BadImage(f"{name}: 0 bytes; send the encoded file")
    if len(data) > limits.max_bytes:
        raise BadImage(f"{name}: {len(data)} bytes; the limit is {limits.max_bytes}", "IMAGE_TOO_LARGE")
    with _picture_of(data, name) as picture:
        _check_size(picture.size, expected_wh, limits, name)
        if data.startswith(_JPEG_START):
            _check_scans(data, name)
        return _to_rgb(picture)


def stored_size(data: bytes, *, name: str = "image") -> tuple[int, int]:
    """Width and height in px that an encoded picture claims, before any pixel is read. Raises BadImage."""
    with _picture_of(data, name) as picture:
        return picture.size


def read_image(
    path: Path, *, expected_wh: tuple[int, int] | None = None, limits: ImageLimits = DEFAULT_LIMITS
) -> RgbImage:
    """`decode_image` of a file. A missing or unreadable file is a `BadImage` with reason IMAGE_NOT_FOUND."""
    try:
        if path.stat().st_size > limits.max_bytes:
            raise BadImage(f"{path}: {path.stat().st_size} bytes; the limit is {limits.max_bytes}", "IMAGE_TOO_LARGE")
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise BadImage(f"{path}: cannot be read ({reason}); check the image folder", "IMAGE_NOT_FOUND") from None
    return decode_image(data, expected_wh=expected_wh, limits=limits, name=str(path))


@dataclass(frozen=True)
class ImageHeader:
    """What a file says of its picture before any pixel is read.

    Attributes:
        size_wh: stored width and height in px.
        orientation: EXIF's; 1 is upright, 2–8 mean that viewers turn or mirror what is stored.
        frames: pictures in the file; only the first is used.
    """

    size_wh: tuple[int, int]
    orientation: int = 1
    frames: int = 1


def read_header(data: bytes, name: str = "image") -> ImageHeader:
    """The header of an encoded picture. Raises BadImage as `decode_image`, but for what only its pixels would show."""
    with _picture_of(data, name) as picture:
        return ImageHeader(picture.size, _orientation(picture), int(getattr(picture, "n_frames", 1)))


def encode_png(image: RgbImage) -> bytes:
    """Lossless PNG bytes of an RGB (H, W, 3) or gray (H, W) uint8 array."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


@contextmanager
def _picture_of(data: bytes, name: str) -> Iterator[Image.Image]:
    """The opened picture, none of its pixels read yet; what goes wrong in here or inside is a BadImage."""
    try:
        # Pillow warns of large pictures by itself; our own limit is the one that decides.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
                yield picture
    except UnidentifiedImageError:
        raise BadImage(f"{name}: not a picture we read; use {', '.join(FORMATS)}", "IMAGE_FORMAT") from None
    except Image.DecompressionBombError as error:
        # Pillow's message begins with the number of pixels, which the header claims.
        raise BadImage(f"{name}: {error}", "IMAGE_TOO_LARGE") from None
    # What Pillow's decoders raise on damaged files, SyntaxError for broken PNG chunks and MemoryError for absurd
    # sizes in sub-headers included.
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, IndexError, KeyError, TypeError, MemoryError,
            OverflowError, ZeroDivisionError) as error:  # fmt: skip
        raise BadImage(f"{name}: cannot be decoded ({error}); the file is damaged or cut off") from None


def _check_size(size_wh: tuple[int, int], expected_wh: tuple[int, int] | None, limits: ImageLimits, name: str) -> None:
    width, height = size_wh
    if max(width, height) > limits.max_side or width * height > limits.max_pixels:
        raise BadImage(
            f"{name}: {width}x{height} px; at most {limits.max_side} px a side and {limits.max_pixels} px in all",
            "IMAGE_TOO_LARGE",
        )
    if expected_wh is not None and expected_wh != (width, height):
        hint = "; it looks rotated by EXIF: boxes refer to stored pixels" if expected_wh == (height, width) else ""
        raise BadImage(
            f"{name}: stored as {width}x{height} px but stated as {expected_wh[0]}x{expected_wh[1]}{hint}",
            "IMAGE_SIZE_MISMATCH",
        )


def _check_scans(data: bytes, name: str) -> None:
    """Raises BadImage for a JPEG of more than MAX_JPEG_SCANS scans. Reads markers alone, none behind the image."""
    scans, at = 0, 2
    while (found := _JPEG_SEGMENT.search(data, at)) is not None and data[found.end() - 1] != _END_OF_IMAGE:
        scans += data[found.end() - 1] == _START_OF_SCAN
        if scans > MAX_JPEG_SCANS:
            raise BadImage(
                f"{name}: a JPEG of more than {MAX_JPEG_SCANS} scans, which would take minutes to decode; save it anew",
                "IMAGE_TOO_LARGE",
            )
        # Every segment that may stand here says its length, the header of a scan included.
        at = found.end() + int.from_bytes(data[found.end() : found.end() + 2])


def _orientation(picture: Image.Image) -> int:
    if picture.format == "PNG" and "exif" not in picture.info:
        # getexif would decode the pixels to look behind them, where no camera writes it.
        return 1
    orientation = picture.getexif().get(EXIF_ORIENTATION, 1)
    return orientation if orientation in range(2, 9) else 1


def _to_rgb(picture: Image.Image) -> RgbImage:
    if picture.mode.startswith("I;16") or picture.mode == "I":
        # Pillow would clip 16-bit gray at 255; the upper byte keeps the picture.
        wide = np.asarray(picture)
        if picture.mode == "I":
            wide = np.minimum(wide.astype(np.uint32), 65535)
        gray = (wide >> 8).astype(np.uint8)
        return np.ascontiguousarray(np.repeat(gray[:, :, None], 3, axis=2))
    if picture.mode == "F":
        raise ValueError("floating-point pixels have no agreed range; convert to 8 bits a channel")
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")
    # A picture that is RGB already would be copied: at 64 million pixels, 256 MB.
    return _unpacked(picture if picture.mode == "RGB" else picture.convert("RGB"))


def _unpacked(picture: Image.Image) -> RgbImage:
    """The pixels of an RGB picture. In strips: whole, Pillow fills two more such buffers, three times slower."""
    width, height = picture.size
    rows = max(STRIP_PIXELS // width, 1)
    pixels: RgbImage = np.empty((height, width, 3), np.uint8)
    for row in range(0, height, rows):
        pixels[row : row + rows] = np.asarray(picture.crop((0, row, width, min(row + rows, height))))
    return pixels
