"""Recognizes the format of an encoded image and reads its header, without decoding pixels."""

from collections.abc import Callable
from dataclasses import dataclass

from mal_train.core.errors import BadImage
from mal_train.core.images import bmp, jpeg, png, tiff, tiff_directory, webp
from mal_train.core.images.container import Container, ImageHeader, refusal

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")

MAX_PIXELS = 178_956_970
"""Area of the largest image that Pillow opens, in px; no limit can be higher."""

PIXEL_BYTES = 32
"""Memory of decoding for each px of the largest image. Most formats take half of it or less; wide values in one block
of a TIFF would take any multiple."""

LEAST_MEMORY = 64 * 1024 * 1024
"""Memory of decoding that any image may take."""

MAX_FRAME_PIXELS = 1 << 30
"""Area of the largest image that masks are made for, in px. Such images are read by windows."""

LIMIT_REMEDY = "raise the limit in the settings of the server or the spec of mal-train, or shrink or cut the image"

MAX_PADDING = 2
"""Tiles of a TIFF may reach beyond the image, up to this multiple of the maximum area."""


@dataclass(frozen=True)
class ImageLimits:
    """Limits checked before decoding: file size in bytes, area in px and longest side in px."""

    max_bytes: int = 32 * 1024 * 1024
    max_pixels: int = 64_000_000
    max_side: int = 16_384

    def accepts(self, size_wh: tuple[int, int]) -> bool:
        """Returns True for a width and height in px within the limits."""
        width, height = size_wh
        return max(width, height) <= self.max_side and width * height <= self.max_pixels

    def __str__(self) -> str:
        return f"{self.max_side} px a side (limits.max_side) and {self.max_pixels} px in total (limits.max_pixels)"


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
        raise bytes_error(f"{len(data)} bytes", limits.max_bytes, name)
    container = _walk(data, name)
    _check_size(container, limits, name)
    return container


def check_size(size_wh: tuple[int, int], limits: ImageLimits, name: str = "image") -> None:
    """Raises BadImage for a width and height in px above the limits (reason IMAGE_TOO_LARGE)."""
    if not limits.accepts(size_wh):
        raise size_error(size_wh, limits, name)


def size_error(size_wh: tuple[int, int], limits: ImageLimits, name: str) -> BadImage:
    """Returns the error of an image of too many px: the only message about this limit."""
    return BadImage(
        f"{name}: {size_wh[0]}x{size_wh[1]} px; the limit is {limits}; {LIMIT_REMEDY}, or save it as a TIFF in tiles, "
        "which mal-client label and evaluate, and mal-train, read by windows from a local folder",
        "IMAGE_TOO_LARGE",
    )


def check_memory(size_bytes: int, limits: ImageLimits, name: str) -> None:
    """Raises BadImage for an image that takes more memory to decode than any of `max_pixels` should."""
    limit = max(PIXEL_BYTES * limits.max_pixels, LEAST_MEMORY)
    if size_bytes > limit:
        raise BadImage(
            f"{name}: {size_bytes} bytes to decode; the limit is {limit}, {PIXEL_BYTES} for each px of "
            "limits.max_pixels; save it in smaller tiles (gdal_translate -co TILED=YES), or raise the limit",
            "IMAGE_TOO_LARGE",
        )


def bytes_error(size: str, max_bytes: int, name: str) -> BadImage:
    """Returns the error of a file of too many bytes: the only message about this limit."""
    return BadImage(
        f"{name}: {size}; the limit is {max_bytes} bytes (limits.max_request_bytes of the server, "
        "limits.max_image_bytes of the spec of mal-train); raise it, or compress, shrink or cut the image",
        "IMAGE_TOO_LARGE",
    )


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
    check_size((width, height), limits, name)
    check_memory(container.decode_bytes, limits, name)
    if container.pixels > MAX_PADDING * limits.max_pixels:
        raise BadImage(
            f"{name}: tiles of {container.pixels} px for {width}x{height} px; the limit is "
            f"{MAX_PADDING * limits.max_pixels} px; save it with smaller tiles",
            "IMAGE_TOO_LARGE",
        )
