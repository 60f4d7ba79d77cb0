"""Recognizes the format of an encoded image and reads its header, without decoding pixels."""

from collections.abc import Callable
from dataclasses import dataclass

from mal_train.core.errors import BadImage
from mal_train.core.images import bmp, jpeg, png, tiff, tiff_directory, webp
from mal_train.core.images.container import Container, ImageHeader, refusal

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")

MAX_PIXELS = 178_956_970
"""Area of the largest image that Pillow opens, in px; no limit can be higher."""

MAX_PADDING = 2
"""Tiles of a TIFF may reach beyond the image, up to this multiple of the maximum area."""


@dataclass(frozen=True)
class ImageLimits:
    """Limits checked before decoding: file size in bytes, area in px and longest side in px."""

    max_bytes: int = 32 * 1024 * 1024
    max_pixels: int = 64_000_000
    max_side: int = 16_384


DEFAULT_LIMITS = ImageLimits()


def read_header(data: bytes, name: str = "image") -> ImageHeader:
    """Reads the header of an encoded image of any size. Raises BadImage like `read_container`."""
    return _walk(data, name).header


def read_container(data: bytes, *, limits: ImageLimits = DEFAULT_LIMITS, name: str = "image") -> Container:
    """Walks through an encoded image, in time that does not depend on what its metadata holds.

    Raises:
        BadImage: the file is empty, larger than the limits, of another format, of too many parts, or its structure is
            damaged; pixels may still prove damaged when they are decoded.
    """
    if len(data) > limits.max_bytes:
        raise BadImage(f"{name}: {len(data)} bytes; the limit is {limits.max_bytes}", "IMAGE_TOO_LARGE")
    container = _walk(data, name)
    _check_size(container, limits, name)
    return container


def _walk(data: bytes, name: str) -> Container:
    if not data:
        raise BadImage(f"{name}: 0 bytes; send the encoded file")
    read = _reader(data)
    if read is None:
        raise BadImage(f"{name}: not a supported image format; use {', '.join(FORMATS)}", "IMAGE_FORMAT")
    try:
        return read(data)
    except ValueError as error:
        raise refusal(name, error) from None


def _reader(data: bytes) -> Callable[[bytes], Container] | None:
    if data.startswith(jpeg.SIGNATURE):
        return jpeg.read
    if data.startswith(png.SIGNATURE):
        return png.read
    if webp.is_webp(data):
        return webp.read
    if data.startswith(tiff_directory.SIGNATURES):
        return tiff.read
    return bmp.read if data.startswith(bmp.SIGNATURE) else None


def _check_size(container: Container, limits: ImageLimits, name: str) -> None:
    width, height = container.header.size_wh
    if not width or not height:
        raise BadImage(f"{name}: {width}x{height} px; the file is damaged")
    if max(width, height) > limits.max_side or width * height > limits.max_pixels:
        raise BadImage(
            f"{name}: {width}x{height} px; the limit is {limits.max_side} px a side, {limits.max_pixels} px in total",
            "IMAGE_TOO_LARGE",
        )
    if container.pixels > MAX_PADDING * limits.max_pixels:
        raise BadImage(
            f"{name}: tiles of {container.pixels} px for {width}x{height} px; the limit is "
            f"{MAX_PADDING * limits.max_pixels} px; save it with smaller tiles",
            "IMAGE_TOO_LARGE",
        )
