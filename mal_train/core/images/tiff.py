"""Walks through the tags of a TIFF or BigTIFF file's first page, and counts its pages.

Tags point into the file, so it cannot be cut as other formats are. It gets a new directory at its end instead, of those
tags that describe pixels: neither Pillow nor libtiff sees EXIF, profiles, orientation or further pages. A page that
Pillow does not read by itself is read block by block (`tiff_reader`).
"""

import struct
from dataclasses import dataclass

from mal_train.core.images.container import RESULT_BYTES, Container, ImageHeader, TooManyParts
from mal_train.core.images.tiff_directory import (
    ORIENTATION,
    STRIP_BYTES,
    TILE_BYTES,
    Directory,
    Source,
    layout_of,
    page_count,
)
from mal_train.core.images.tiff_page import JPEG_COMPRESSIONS, RECTANGLE_PIXELS, YCBCR, TiffPage, read_page

SHARED_STRIP_BYTES = 32 * 1024 * 1024
"""Strips may share data, as equal ones of some writers do, but all together read the file's size and this at most."""

COPIES, STRETCHED_COPIES = 3, 5
"""Copies of the values of a rectangle of blocks while they become colors, and while they are stretched."""


@dataclass(frozen=True)
class TiffContainer(Container):
    """A TIFF that Pillow does not read by itself, and that is read block by block; its only part is the file.

    Attributes:
        page: layout of its pixels.
    """

    page: TiffPage

    @property
    def peak_bytes(self) -> int:
        """Memory that decoding takes beside the file itself."""
        return self.decode_bytes


def read(data: bytes) -> Container:
    """Walks through a TIFF. Raises Damaged, Unsupported or TooManyParts."""
    header, page = walk(data)
    width, height = page.size_wh
    across, down = page.grid
    block = page.block_wh[0] * page.block_wh[1]
    pixels = across * down * block if page.is_tiled else width * height
    if page.is_for_pillow:
        decode_bytes = width * height * (_image_bytes(page) + RESULT_BYTES) + block * _block_bytes(page)
        return Container(header, "TIFF", pixels, decode_bytes, _rewritten(data, page.directory))
    decode_bytes = width * height * RESULT_BYTES + rectangle_bytes(page)
    return TiffContainer(header, "TIFF", pixels, decode_bytes, (data,), page)


def walk(data: Source) -> tuple[ImageHeader, TiffPage]:
    """Returns header and layout of a TIFF. Raises Damaged, Unsupported or TooManyParts."""
    directory = Directory.first(data)
    directory.check()
    page = read_page(directory)
    stored = directory.total(STRIP_BYTES, len(data)) + directory.total(TILE_BYTES, len(data))
    if stored > len(data) + SHARED_STRIP_BYTES:
        raise TooManyParts("bytes in strips that share data", len(data) + SHARED_STRIP_BYTES)
    orientation = directory.number(ORIENTATION, 1)
    pages = page_count(data, layout_of(data))
    return ImageHeader(page.size_wh, orientation if orientation in range(2, 9) else 1, pages, page.format), page


def _rewritten(data: bytes, directory: Directory) -> tuple[bytes | memoryview, ...]:
    layout = directory.layout
    start = 2 * struct.calcsize(layout.offset)
    padding = bytes(len(data) % 2)
    offset = struct.pack(layout.order + layout.offset, len(data) + len(padding))
    return layout.signature + offset, memoryview(data)[start:], padding, directory.packed()


def _image_bytes(page: TiffPage) -> int:
    """Returns the bytes per px of Pillow's image."""
    return 1 if page.samples == 1 and page.photometric != YCBCR else 4


def _block_bytes(page: TiffPage) -> int:
    """Returns the bytes per px of the buffers for a strip or tile."""
    decoded = max(-(-page.samples * page.bits // 8), 4 if page.photometric == YCBCR else 1)
    # A progressive JPEG keeps two bytes of coefficients for each sample.
    return decoded + (2 * page.samples if page.compression in JPEG_COMPRESSIONS else 0)


def rectangle_bytes(page: TiffPage) -> int:
    """Returns the memory of the blocks that are decoded at a time when a page is read block by block."""
    across, down = page.grid
    block = page.block_wh[0] * page.block_wh[1]
    pixels = max(block, min(RECTANGLE_PIXELS, across * down * block))
    values = page.samples * page.value_bytes
    copies = (STRETCHED_COPIES if page.format.is_stretched else COPIES) + page.is_premultiplied
    return pixels * (copies * values + RESULT_BYTES)
