"""Decodes images to RGB pixels; the only decoder of the repository.

Walks through the file first (`header`), and gives decoders only the parts that pixels need, of an allow-list of
formats: TurboJPEG those of a JPEG (`jpeg_pixels`), and Pillow those of all other formats and of what TurboJPEG leaves.
OpenCV would allocate 4 GiB for a forged 49-byte PNG, and rotates by EXIF. Pixels are returned as stored, without EXIF
rotation, because COCO boxes refer to stored pixels.
"""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mal_train.core.errors import BadImage
from mal_train.core.images.container import Container, ImageHeader
from mal_train.core.images.header import DEFAULT_LIMITS, ImageLimits, read_container
from mal_train.core.images.jpeg_pixels import rgb_of_jpeg
from mal_train.core.images.pillow_pixels import opened, rgb_of_pillow, rgb_of_wide_png
from mal_train.core.images.tiff import TiffContainer
from mal_train.core.images.tiff_reader import TiffReader

RgbImage = NDArray[np.uint8]
"""(H, W, 3), uint8, RGB, C-contiguous."""


def decode_image(
    data: bytes,
    *,
    expected_wh: tuple[int, int] | None = None,
    limits: ImageLimits = DEFAULT_LIMITS,
    name: str = "image",
) -> RgbImage:
    """Decodes the first frame of a JPEG, PNG, WebP, BMP or TIFF to RGB pixels (H, W, 3) uint8.

    Gray is repeated in three channels, other colors are converted, alpha is dropped (the color below it is kept), and
    values of more than 8 bits are stretched; `pixels` states the rule.

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
    check_expected_size(container.header, expected_wh, name)
    if isinstance(container, TiffContainer):
        return TiffReader(bytes(container.parts[0]), container.page, name).read()
    pixels = rgb_of_jpeg(container.parts, size_wh) if container.format == "JPEG" else None
    if pixels is not None:
        return pixels
    with opened(container.parts, container.format, name) as image:
        if image.size != size_wh:  # the memory was charged for the size that the walk found
            raise BadImage(f"{name}: its headers state {width}x{height} and {image.width}x{image.height} px")
        if container.is_wide_png:
            return rgb_of_wide_png(container.parts, name)
        image.load()
        return rgb_of_pillow(image, name)


def check_expected_size(header: ImageHeader, expected_wh: tuple[int, int] | None, name: str) -> None:
    """Raises BadImage for an image of another (width, height) than stated (reason IMAGE_SIZE_MISMATCH)."""
    width, height = header.size_wh
    if expected_wh is not None and expected_wh != header.size_wh:
        hint = f"; {header.reason_of_swap()}" if expected_wh == (height, width) else ""
        raise BadImage(
            f"{name}: stored as {width}x{height} px, stated as {expected_wh[0]}x{expected_wh[1]}{hint}",
            "IMAGE_SIZE_MISMATCH",
        )


def encode_png(image: RgbImage) -> bytes:
    """Encodes an RGB (H, W, 3) or gray (H, W) uint8 array as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
