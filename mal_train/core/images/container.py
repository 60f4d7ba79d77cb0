"""The outcome of walking through an image file, which all formats share.

A walk reads lengths and seeks: it looks at no pixel and inflates nothing. It bounds the number of a file's parts, and
selects those that pixels need. Pillow sees only these, so metadata costs nothing, however much of it there is, and a
file cannot keep a thread busy with what no label depends on.
"""

from dataclasses import dataclass

from mal_train.core.errors import BadImage
from mal_train.core.images.pixels import RGB_8_BIT, PixelFormat

MAX_PARTS = 20_000
"""Segments, chunks, pages or tags of one file. A photograph has some ten; a JPEG of 32 MiB whose metadata comes in full
segments 500. At this limit a walk takes about 20 ms."""

_TRANSPOSED = range(5, 9)
"""EXIF orientations whose viewers show stored rows as columns."""

RESULT_BYTES = 3
"""Bytes of an RGB pixel, which decoding returns."""


@dataclass(frozen=True)
class ImageRegion:
    """The place of an image in a larger one, which boxes and masks refer to.

    Attributes:
        x0: column of the larger image that the first column shows.
        y0: row of the larger image that the first row shows.
        image_wh: width and height of the larger image in px.
    """

    x0: int
    y0: int
    image_wh: tuple[int, int]


@dataclass(frozen=True)
class ImageHeader:
    """Header of an encoded image.

    Attributes:
        size_wh: stored width and height in px.
        orientation: EXIF orientation; 1 is upright, viewers rotate or mirror the stored pixels for 2–8.
        frames: number of frames in the file; only the first is used.
        pixel_format: format of the stored values.
    """

    size_wh: tuple[int, int]
    orientation: int = 1
    frames: int = 1
    pixel_format: PixelFormat = RGB_8_BIT

    def reason_of_swap(self) -> str:
        """Returns why the width and the height may be stated in reverse."""
        if self.orientation in _TRANSPOSED:
            return "it is rotated by EXIF, but boxes refer to stored pixels"
        return "width and height are swapped"


@dataclass(frozen=True)
class Container:
    """An image file after the walk.

    Attributes:
        header: size, orientation and frames.
        format: Pillow's name of the format.
        pixels: px that the decoder produces: those of the image, or more if its tiles reach beyond it.
        decode_bytes: peak memory of decoding, result included.
        parts: the file without metadata, as pieces of it.
    """

    header: ImageHeader
    format: str
    pixels: int
    decode_bytes: int
    parts: tuple[bytes | memoryview, ...]

    @property
    def is_wide_png(self) -> bool:
        """True for a PNG of several bands of 16 bits."""
        pixel_format = self.header.pixel_format
        return self.format == "PNG" and pixel_format.is_stretched and pixel_format.bands > 1

    @property
    def peak_bytes(self) -> int:
        """Memory that decoding takes beside the file itself: also the copy of its parts that Pillow reads."""
        return self.decode_bytes + sum(map(len, self.parts))


class Damaged(ValueError):
    """A file whose structure is invalid."""


class Unsupported(ValueError):
    """A valid file whose values or bands form no image, or that no decoder here reads."""


class TooManyParts(ValueError):
    """A file of more parts than any image has: decoding it would take minutes."""

    def __init__(self, part: str, limit: int) -> None:
        super().__init__(f"more than {limit} {part}; save the image again, without metadata")


def check_count(count: int, part: str, limit: int = MAX_PARTS) -> None:
    """Raises TooManyParts above the limit; `part` names the parts, in the plural."""
    if count > limit:
        raise TooManyParts(part, limit)


def joined(data: bytes, ranges: list[tuple[int, int]]) -> list[memoryview]:
    """Returns the (start, end) ranges of a file as few pieces: adjacent ranges become one."""
    pieces: list[tuple[int, int]] = []
    for start, end in ranges:
        if pieces and pieces[-1][1] == start:
            pieces[-1] = (pieces[-1][0], end)
        else:
            pieces.append((start, end))
    view = memoryview(data)
    return [view[start:end] for start, end in pieces]


def refusal(name: str, error: Exception) -> BadImage:
    """Returns the error that names the image, for an error of a walk, of Pillow or of the disk."""
    if isinstance(error, OSError) and error.errno is not None:  # decoders raise OSError without a number
        return BadImage(
            f"{name}: cannot be read ({error.strerror}); check the image folder and its disk", "IMAGE_NOT_FOUND"
        )
    if isinstance(error, TooManyParts):
        return BadImage(f"{name}: {error}", "IMAGE_TOO_LARGE")
    if isinstance(error, Unsupported):
        return BadImage(f"{name}: {error}", "IMAGE_FORMAT")
    return BadImage(f"{name}: cannot be decoded ({error}); the file is damaged or truncated")
