"""Layout of the pixels of a TIFF's page: its bands, values and blocks, which are strips or tiles."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mal_train.core.images.container import Damaged, Unsupported
from mal_train.core.images.pixels import PixelFormat
from mal_train.core.images.tiff_directory import (
    BITS,
    COMPRESSION,
    EXTRA_SAMPLES,
    FILL_ORDER,
    GDAL_NODATA,
    HEIGHT,
    PHOTOMETRIC,
    PLANAR,
    PREDICTOR,
    ROWS_PER_STRIP,
    SAMPLE_FORMAT,
    SAMPLES,
    STRIP_BYTES,
    STRIP_OFFSETS,
    TILE_BYTES,
    TILE_HEIGHT,
    TILE_OFFSETS,
    TILE_WIDTH,
    WIDTH,
    Directory,
)
from mal_train.core.numbers import counted

COMPRESSIONS: Final = {
    1: "none",
    2: "CCITT",
    3: "CCITT group 3",
    4: "CCITT group 4",
    5: "LZW",
    6: "old JPEG",
    7: "JPEG",
    8: "deflate",
    32773: "PackBits",
    32946: "deflate",
    34925: "LZMA",
    50000: "Zstandard",
    50001: "WebP",
}
"""Supported compressions: those that libtiff decodes to 8 or 16 bits."""

JPEG_COMPRESSIONS: Final = frozenset({6, 7})
_NONE: Final = 1
_OF_BYTES: Final = frozenset({_NONE, 5, 8, 32773, 32946, 34925, 50000})
"""Compressions that know nothing of pixels, so that any values can be read."""

WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, CMYK, YCBCR, LAB = 0, 1, 2, 3, 5, 6, 8
_COLORS: Final = {
    **{WHITE_IS_ZERO: "gray", BLACK_IS_ZERO: "gray", RGB: "RGB", PALETTE: "palette", CMYK: "CMYK"},
    **{YCBCR: "YCbCr", LAB: "CIELAB"},
}
_KINDS: Final = {1: "unsigned", 2: "signed", 3: "float", 4: "unsigned"}
_VALUE_BITS: Final = {
    "unsigned": frozenset({8, *range(9, 17), 32, 64}),
    "signed": frozenset({8, 16, 32, 64}),
    "float": frozenset({16, 32, 64}),
}

RECTANGLE_PIXELS: Final = 1 << 20
"""About the most pixels of blocks that are decoded at a time; at least one block."""

ROW_BYTES: Final = 1 << 18
"""An uncompressed image in one strip is read as strips of about this size."""


@dataclass(frozen=True)
class TiffPage:
    """Layout of the pixels of a page.

    Attributes:
        order: byte order, "<" or ">".
        size_wh: width and height in px.
        block_wh: width and height of a block in px; the last strip may have fewer rows.
        planes: number of planes that hold a band each; 1 if the bands of a pixel lie together.
        is_tiled: True for tiles, which all have the full size.
        compression: see `COMPRESSIONS`.
        photometric: meaning of the bands.
        predictor: 1 none, 2 differences of integers, 3 of floating-point numbers.
        bits: of a value.
        kind: unsigned, signed or float.
        samples: bands, alpha included.
        alpha: True if the last band is alpha.
        is_premultiplied: True if the colors are multiplied by alpha.
        nodata: value that stands for none.
        tags: type, number and values of the tags that describe pixels.
    """

    order: str
    size_wh: tuple[int, int]
    block_wh: tuple[int, int]
    planes: int
    is_tiled: bool
    compression: int
    photometric: int
    predictor: int
    bits: int
    kind: str
    samples: int
    alpha: bool
    is_premultiplied: bool
    nodata: float | None
    tags: dict[int, tuple[int, int, bytes]]
    directory: Directory = field(repr=False)

    @property
    def bands(self) -> int:
        """Number of bands without alpha."""
        return self.samples - self.alpha

    @property
    def used_bands(self) -> int:
        """Number of bands that are used: the first, or the first three."""
        return 1 if self.bands == 1 else 3

    @property
    def format(self) -> PixelFormat:
        """Format of the stored values."""
        is_color = self.photometric not in (WHITE_IS_ZERO, BLACK_IS_ZERO, RGB)
        dropped = 0 if is_color else self.bands - self.used_bands
        return PixelFormat(self.bits, self.kind, self.samples, dropped)

    @property
    def grid(self) -> tuple[int, int]:
        """Number of blocks across and down."""
        (width, height), (block_width, block_height) = self.size_wh, self.block_wh
        return -(-width // block_width), -(-height // block_height)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of decompressed values; of 9 to 15 bits, that of unpacked ones."""
        if self.bits % 8:
            return np.dtype(np.uint16)
        letter = {"unsigned": "u", "signed": "i", "float": "f"}[self.kind]
        return np.dtype(f"{self.order}{letter}{self.bits // 8}")

    @property
    def value_bytes(self) -> int:
        """Bytes of a value while it is decoded: 9 to 15 bits take two bytes, floating-point values four at least."""
        return max(-(-self.bits // 8), 4 if self.kind == "float" else 1)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of a decompressed block."""
        return -(-self.block_wh[0] * self.samples // self.planes * self.bits // 8)

    @property
    def has_pillow_mode(self) -> bool:
        """True if Pillow has a mode for these bands, of 8 bits or fewer (CMYK also of 16), and converts it to RGB."""
        if self.photometric in (PALETTE, CMYK, YCBCR, LAB):
            return True
        if self.kind != "unsigned" or self.bits not in (1, 2, 4, 8):
            return False
        if self.photometric == RGB:
            return self.bits == 8 and self.samples in (3, 4) and (self.planes == 1 or self.compression not in _OF_BYTES)
        return self.samples == 1 or (self.photometric == BLACK_IS_ZERO and self.samples == 2 and self.bits == 8)

    @property
    def is_for_pillow(self) -> bool:
        """True if Pillow reads the complete page: it reads neither sparse files nor big-endian BigTIFF."""
        if not self.has_pillow_mode or (self.order == ">" and self.directory.layout.offset == "Q"):
            return False
        stored = self.directory.numbers(TILE_BYTES if self.is_tiled else STRIP_BYTES)
        return not stored.size or bool(stored.min())

    @cached_property
    def blocks(self) -> NDArray[np.int64]:
        """Position and bytes of each block (planes, down, across, 2); 0 bytes for a block that is not stored.

        Raises:
            Damaged: blocks are missing.
        """
        across, down = self.grid
        arrays = (TILE_OFFSETS, TILE_BYTES) if self.is_tiled else (STRIP_OFFSETS, STRIP_BYTES)
        offsets, sizes = (self.directory.numbers(tag).astype(np.int64) for tag in arrays)
        if not self.is_tiled and self.compression == _NONE:
            offsets, sizes = self._uncompressed(offsets)
        count = self.planes * across * down
        if min(offsets.size, sizes.size) < count or min(offsets.min(initial=0), sizes.min(initial=0)) < 0:
            raise Damaged(f"{offsets.size} positions and {sizes.size} lengths of {count} strips or tiles")
        return np.stack([offsets[:count], sizes[:count]], -1).reshape(self.planes, down, across, 2)

    def rows(self, down: int) -> int:
        """Returns the number of rows that a block stores."""
        return self.block_wh[1] if self.is_tiled else min(self.block_wh[1], self.size_wh[1] - down * self.block_wh[1])

    def _uncompressed(self, offsets: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns positions and bytes of uncompressed strips, which the file may store as one for each plane.

        A strip at byte 0, where the file's header is, is not stored.
        """
        down = self.grid[1]
        sizes = np.array([self.rows(row) * self.row_bytes for row in range(down)], np.int64)
        starts = np.zeros_like(sizes)
        if offsets.size == self.planes and down > 1:
            offsets, starts = offsets.repeat(down), np.cumsum(sizes) - sizes
        offsets = offsets[: self.planes * down]
        sizes, starts = (np.resize(values, offsets.size) for values in (sizes, starts))
        return offsets + starts, sizes * (offsets != 0)


def read_page(directory: Directory) -> TiffPage:
    """Returns the layout of a page, after `Directory.check`.

    Raises:
        Damaged: the tags contradict each other.
        Unsupported: a compression, or bands or values that form no image.
    """
    number = directory.number
    compression, photometric = number(COMPRESSION, 1), number(PHOTOMETRIC, WHITE_IS_ZERO)
    if compression not in COMPRESSIONS:
        names = ", ".join(dict.fromkeys(COMPRESSIONS.values()))
        raise Unsupported(f"compression {compression}; supported are {names}")
    if compression == 6:
        photometric = YCBCR  # as Pillow reads old JPEG
    samples = number(SAMPLES, 3 if compression == 6 else 1)
    extra = [int(value) for value in directory.numbers(EXTRA_SAMPLES)]
    size_wh = number(WIDTH, 0), number(HEIGHT, 0)
    if not all(size_wh) or not samples:
        raise Damaged(f"{size_wh[0]}x{size_wh[1]} px of {samples} bands")
    planes = samples if number(PLANAR, 1) == 2 else 1
    is_tiled = bool(directory.entries.keys() & {TILE_WIDTH, TILE_HEIGHT})
    page = TiffPage(
        order=directory.layout.order,
        size_wh=size_wh,
        block_wh=_tile(directory) if is_tiled else (size_wh[0], _strip_rows(directory, size_wh[1])),
        planes=planes,
        is_tiled=is_tiled,
        compression=compression,
        photometric=photometric,
        predictor=number(PREDICTOR, 1),
        bits=number(BITS, 1),
        kind=_kind(directory),
        samples=samples,
        # Four bands of RGB without a word on the fourth are red, green, blue and alpha for Pillow, too.
        alpha=samples > 1 and (extra[-1] in (1, 2) if extra else photometric == RGB and samples == 4),
        is_premultiplied=samples > 1 and extra[-1:] == [1],
        nodata=_nodata(directory.text(GDAL_NODATA)),
        tags=directory.pixel_tags(),
        directory=directory,
    )
    _check_supported(page)
    return _with_short_strips(page)


def _tile(directory: Directory) -> tuple[int, int]:
    width, height = directory.number(TILE_WIDTH, 0), directory.number(TILE_HEIGHT, 0)
    if not width or not height or STRIP_OFFSETS in directory.entries:
        raise Damaged("tiles without a size, or beside strips")
    return width, height


def _strip_rows(directory: Directory, height: int) -> int:
    rows = directory.number(ROWS_PER_STRIP, height)
    if not rows:
        raise Damaged("strips without rows")
    return min(rows, height)


def _kind(directory: Directory) -> str:
    formats = {int(value) for value in directory.numbers(SAMPLE_FORMAT)} or {1}
    names = {_KINDS.get(value) for value in formats}
    name = names.pop()
    if names or name is None:
        raise Unsupported(f"complex or mixed values (sample formats {sorted(formats)}); save real numbers of one type")
    return name


def _nodata(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _check_supported(page: TiffPage) -> None:
    """Raises Unsupported for bands or values that form no image; names them."""
    color = _COLORS.get(page.photometric)
    if color is None:
        raise Unsupported(f"photometric interpretation {page.photometric}; save it as RGB or gray")
    if page.photometric not in (WHITE_IS_ZERO, BLACK_IS_ZERO, RGB):
        if page.kind != "unsigned" or page.bits > (16 if page.photometric == CMYK else 8):
            raise Unsupported(f"{page.format} in {color}; save it as RGB or gray")
        return
    if (page.photometric == RGB and page.bands < 3) or (page.photometric != RGB and page.bands not in (1, 3, 4)):
        example = "-b 1" if page.bands <= 2 else "-b 3 -b 2 -b 1"
        raise Unsupported(
            f"{counted(page.bands, 'band')}; 1 (gray), 3 or 4 (the first three) are used; save one or three of its "
            f"bands, for example with gdal_translate {example}"
        )
    if page.has_pillow_mode:
        return
    if page.compression not in _OF_BYTES:
        raise Unsupported(f"{page.format} with {COMPRESSIONS[page.compression]} compression; use deflate")
    bits = {int(value) for value in page.directory.numbers(BITS)}
    if len(bits) > 1 or page.bits not in _VALUE_BITS[page.kind]:
        raise Unsupported(f"{page.kind} values of {', '.join(map(str, sorted(bits)))} bits; use 8, 16 or 32")
    if page.is_premultiplied and (page.kind == "signed" or page.bits == 64):
        raise Unsupported(f"{page.format} multiplied by alpha; save it with colors that are not premultiplied")
    if page.predictor not in (1, 2, 3) or (page.predictor != 1 and page.bits % 8):
        raise Unsupported(f"predictor {page.predictor} of {page.format}; save it without a predictor")
    if page.predictor == 3 and page.kind != "float":
        raise Damaged("a floating-point predictor of integers")
    if page.directory.number(FILL_ORDER, 1) != 1 and page.compression == _NONE:
        raise Unsupported("reversed bits (fill order 2); save it again without them")


def _with_short_strips(page: TiffPage) -> TiffPage:
    """Returns an uncompressed page in one strip as one in short strips."""
    is_one_strip = not page.is_tiled and page.block_wh[1] == page.size_wh[1]
    if not is_one_strip or page.compression != _NONE:
        return page
    rows = min(max(ROW_BYTES // page.row_bytes, 1), page.size_wh[1])
    return replace(page, block_wh=(page.size_wh[0], rows))


def rectangles(page: TiffPage, rows: slice, columns: slice, pixels: int) -> Iterator[tuple[slice, slice]]:
    """Yields rows and columns of blocks, a rectangle at a time, that together cover some pixels of the image.

    Args:
        page: the page.
        rows: rows of pixels.
        columns: columns of pixels.
        pixels: about the most pixels of a rectangle, which has at least one block.
    """
    block_width, block_height = page.block_wh
    down = range(rows.start // block_height, -(-rows.stop // block_height))
    across = range(columns.start // block_width, -(-columns.stop // block_width))
    count = max(pixels // (block_width * block_height), 1)
    step_across = min(count, len(across))
    step_down = max(count // step_across, 1) if step_across == len(across) else 1
    for top in down[::step_down]:
        for left in across[::step_across]:
            yield (
                slice(top, min(top + step_down, down.stop)),
                slice(left, min(left + step_across, across.stop)),
            )
