"""Reads the headers of encoded images, without decoding pixels."""

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from PIL import Image, UnidentifiedImageError

from mal_train.core.errors import BadImage

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True)
class ImageLimits:
    """Limits checked before decoding: file size in bytes, area in px and longest side in px."""

    max_bytes: int = 32 * 1024 * 1024
    max_pixels: int = 64_000_000
    max_side: int = 16_384


DEFAULT_LIMITS = ImageLimits()


@dataclass(frozen=True)
class ImageHeader:
    """Header of an encoded image.

    Attributes:
        size_wh: stored width and height in px.
        orientation: EXIF orientation; 1 is upright, viewers rotate or mirror the stored pixels for 2–8.
        frames: number of frames in the file; only the first is used.
    """

    size_wh: tuple[int, int]
    orientation: int = 1
    frames: int = 1


def read_header(data: bytes, name: str = "image") -> ImageHeader:
    """Reads the header of an encoded image. Raises BadImage like `decode_image`, but not for damaged pixels."""
    with open_image(data, name) as image:
        return ImageHeader(image.size, _orientation(image), int(getattr(image, "n_frames", 1)))


def stored_size(data: bytes, *, name: str = "image") -> tuple[int, int]:
    """Returns width and height in px from the header of an encoded image. Raises BadImage."""
    with open_image(data, name) as image:
        return image.size


@contextmanager
def open_image(data: bytes, name: str) -> Iterator[Image.Image]:
    """Yields the opened image without decoding it; converts errors here and in the block to BadImage."""
    try:
        # Pillow warns about large images; ImageLimits decides instead.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                yield image
    except UnidentifiedImageError:
        raise BadImage(f"{name}: not a supported image format; use {', '.join(FORMATS)}", "IMAGE_FORMAT") from None
    except Image.DecompressionBombError as error:
        # The message of Pillow states the number of pixels in the header.
        raise BadImage(f"{name}: {error}", "IMAGE_TOO_LARGE") from None
    # Errors of Pillow's decoders on damaged files: also SyntaxError for broken PNG chunks, and MemoryError for invalid
    # sizes in sub-headers.
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, IndexError, KeyError, TypeError, MemoryError,
            OverflowError, ZeroDivisionError) as error:  # fmt: skip
        raise BadImage(f"{name}: cannot be decoded ({error}); the file is damaged or truncated") from None


def _orientation(image: Image.Image) -> int:
    if image.format == "PNG" and "exif" not in image.info:
        # getexif would decode all pixels to search the end of the file, where cameras do not write EXIF.
        return 1
    orientation = image.getexif().get(EXIF_ORIENTATION, 1)
    return orientation if orientation in range(2, 9) else 1
