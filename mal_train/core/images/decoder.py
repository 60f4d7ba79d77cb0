"""Decodes images to RGB pixels; the only decoder of the repository.

Uses Pillow with an allow-list of formats and checks the size in the header before any pixel is decoded. OpenCV would
allocate 4 GiB for a forged 49-byte PNG, and rotates by EXIF. Pixels are returned as stored, without EXIF rotation,
because COCO boxes refer to stored pixels.
"""

import io
import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mal_train.core.errors import BadImage
from mal_train.core.images.header import DEFAULT_LIMITS, ImageLimits, open_image

RgbImage = NDArray[np.uint8]
"""(H, W, 3), uint8, RGB, C-contiguous."""

STRIP_PIXELS = 1 << 18
"""Pixels copied out of Pillow at a time: 1 MB, which fits into the cache of a core."""

MAX_JPEG_SCANS = 100
"""Maximum number of scans of a progressive JPEG, which normally has about ten. An empty scan takes 14 bytes of the file
and, at 64 million pixels, 40 ms: without a limit, a file of 100 KB would occupy a thread for five minutes."""

# Start of a segment. 0xFF is also followed by 0 (data), by a marker without a segment, or by fill bytes.
_JPEG_SEGMENT = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")
_JPEG_START = b"\xff\xd8"
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9


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
    if not data:
        raise BadImage(f"{name}: 0 bytes; send the encoded file")
    if len(data) > limits.max_bytes:
        raise BadImage(f"{name}: {len(data)} bytes; the limit is {limits.max_bytes}", "IMAGE_TOO_LARGE")
    with open_image(data, name) as image:
        _check_size(image.size, expected_wh, limits, name)
        if data.startswith(_JPEG_START):
            _check_scans(data, name)
        return _to_rgb(image)


def read_image(
    path: Path, *, expected_wh: tuple[int, int] | None = None, limits: ImageLimits = DEFAULT_LIMITS
) -> RgbImage:
    """Decodes a file; see `decode_image`. A missing or unreadable file is a BadImage with reason IMAGE_NOT_FOUND."""
    try:
        if path.stat().st_size > limits.max_bytes:
            raise BadImage(f"{path}: {path.stat().st_size} bytes; the limit is {limits.max_bytes}", "IMAGE_TOO_LARGE")
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise BadImage(f"{path}: cannot be read ({reason}); check the image folder", "IMAGE_NOT_FOUND") from None
    return decode_image(data, expected_wh=expected_wh, limits=limits, name=str(path))


def encode_png(image: RgbImage) -> bytes:
    """Encodes an RGB (H, W, 3) or gray (H, W) uint8 array as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def _check_size(size_wh: tuple[int, int], expected_wh: tuple[int, int] | None, limits: ImageLimits, name: str) -> None:
    width, height = size_wh
    if max(width, height) > limits.max_side or width * height > limits.max_pixels:
        raise BadImage(
            f"{name}: {width}x{height} px; the limit is {limits.max_side} px a side, {limits.max_pixels} px in total",
            "IMAGE_TOO_LARGE",
        )
    if expected_wh is not None and expected_wh != (width, height):
        hint = "; it is rotated by EXIF, but boxes refer to stored pixels" if expected_wh == (height, width) else ""
        raise BadImage(
            f"{name}: stored as {width}x{height} px, stated as {expected_wh[0]}x{expected_wh[1]}{hint}",
            "IMAGE_SIZE_MISMATCH",
        )


def _check_scans(data: bytes, name: str) -> None:
    """Raises BadImage for a JPEG of more than MAX_JPEG_SCANS scans. Reads only markers, up to the end of the image."""
    scans, position = 0, 2
    while (marker := _JPEG_SEGMENT.search(data, position)) is not None and data[marker.end() - 1] != _END_OF_IMAGE:
        scans += data[marker.end() - 1] == _START_OF_SCAN
        if scans > MAX_JPEG_SCANS:
            raise BadImage(
                f"{name}: a JPEG of more than {MAX_JPEG_SCANS} scans takes minutes to decode; save it again",
                "IMAGE_TOO_LARGE",
            )
        # Every segment at this position begins with its length, including the header of a scan.
        position = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2])


def _to_rgb(image: Image.Image) -> RgbImage:
    if image.mode.startswith("I;16") or image.mode == "I":
        # Pillow would clip 16-bit gray at 255.
        gray16 = np.asarray(image)
        if image.mode == "I":
            gray16 = np.minimum(gray16.astype(np.uint32), 65535)
        gray = (gray16 >> 8).astype(np.uint8)
        return np.ascontiguousarray(np.repeat(gray[:, :, None], 3, axis=2))
    if image.mode == "F":
        raise ValueError("floating-point pixels have no standard range; convert to 8 bits per channel")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    # convert() copies an image that is RGB already: 256 MB at 64 million pixels.
    return _unpacked(image if image.mode == "RGB" else image.convert("RGB"))


def _unpacked(image: Image.Image) -> RgbImage:
    """Copies the pixels of an RGB image in strips. In one piece, Pillow fills two more buffers, three times slower."""
    width, height = image.size
    rows = max(STRIP_PIXELS // width, 1)
    pixels: RgbImage = np.empty((height, width, 3), np.uint8)
    for row in range(0, height, rows):
        pixels[row : row + rows] = np.asarray(image.crop((0, row, width, min(row + rows, height))))
    return pixels
