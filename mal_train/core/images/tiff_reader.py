"""Reads any region of a TIFF as RGB pixels, block by block, and so images of any size.

libtiff, behind Pillow, decompresses: it gets small files of some blocks each, either with the tags that tell their
colors, or, for values that Pillow has no mode for, as rows of bytes. Those become values here (TIFF 6.0, section 14;
floating-point predictor: Adobe, TIFF Technical Note 3).
"""

import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mal_train.core.errors import BadImage
from mal_train.core.images.container import Damaged, refusal
from mal_train.core.images.pillow_pixels import opened, rgb_of_pillow
from mal_train.core.images.pixels import RangeFinder, ValueRange, Values, divided_by_alpha, rows_of_strips
from mal_train.core.images.tiff_directory import (
    BITS,
    COMPRESSION,
    FILL_ORDER,
    HEIGHT,
    PHOTOMETRIC,
    ROWS_PER_STRIP,
    SAMPLES,
    STRIP_BYTES,
    STRIP_OFFSETS,
    TILE_HEIGHT,
    TILE_WIDTH,
    WIDTH,
    Source,
)
from mal_train.core.images.tiff_page import RECTANGLE_PIXELS, WHITE_IS_ZERO, TiffPage, rectangles

Tags = dict[int, tuple[int, int, bytes]]
"""Type, number and bytes of the values of each tag."""

_LONG = 4


class TiffReader:
    """The pixels of a TIFF's first page; safe in threads. Slices `reader[rows, columns]` are (h, w, 3) uint8.

    Args:
        source: the file.
        page: its layout.
        name: name of the image in messages.

    Attributes:
        name: the same.
        shape: (H, W, 3).
        dtype: uint8.
    """

    def __init__(self, source: Source, page: TiffPage, name: str = "image") -> None:
        self._source = source
        self._page = page
        self.name = name
        self._lock = threading.Lock()
        self.shape = (page.size_wh[1], page.size_wh[0], 3)
        self.dtype = np.dtype(np.uint8)

    def read(self) -> NDArray[np.uint8]:
        """Returns all pixels. Raises BadImage for damaged blocks."""
        return self[0 : self.shape[0], 0 : self.shape[1]]

    def __getitem__(self, region: tuple[slice, slice]) -> NDArray[np.uint8]:
        rows, columns = (slice(*part.indices(size)) for part, size in zip(region, self.shape, strict=False))
        pixels = np.zeros((max(rows.stop - rows.start, 0), max(columns.stop - columns.start, 0), 3), np.uint8)
        if not pixels.size:
            return pixels
        with self._refusing():
            for down, across in rectangles(self._page, rows, columns, RECTANGLE_PIXELS):
                found, top, left = self._rgb(down, across), *self._corner(down, across)
                inside = _overlap(rows, top, len(found)), _overlap(columns, left, found.shape[1])
                here = _moved(inside[0], rows.start), _moved(inside[1], columns.start)
                pixels[here] = found[_moved(inside[0], top), _moved(inside[1], left)]
        return pixels

    def check(self) -> None:
        """Decodes every block. Raises BadImage for damaged ones."""
        with self._refusing():
            for down, across in self._all():
                self._rgb(down, across)

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """Converts errors on damaged files to BadImage."""
        try:
            yield
        except (OSError, ValueError, OverflowError, MemoryError) as error:
            raise refusal(self.name, error) from None

    @property
    def _range(self) -> ValueRange:
        """The range of all values; found once, by a pass over the image. Raises BadImage, also at once later."""
        with self._lock:
            found = self._found_range
        if isinstance(found, BadImage):
            raise found.with_traceback(None)
        return found

    @cached_property
    def _found_range(self) -> ValueRange | BadImage:
        page = self._page
        finder = RangeFinder(page.size_wh[0] * page.size_wh[1] * page.used_bands, page.nodata)
        try:
            with self._refusing():
                for down, across in self._all():
                    finder.add(self._values(down, across))
            return replace(finder.range(self.name), is_inverted=page.photometric == WHITE_IS_ZERO)
        except BadImage as error:
            return error

    def _all(self) -> Iterator[tuple[slice, slice]]:
        height, width, _ = self.shape
        return rectangles(self._page, slice(0, height), slice(0, width), RECTANGLE_PIXELS)

    def _corner(self, down: slice, across: slice) -> tuple[int, int]:
        block_width, block_height = self._page.block_wh
        return down.start * block_height, across.start * block_width

    def _rgb(self, down: slice, across: slice) -> NDArray[np.uint8]:
        """Returns the colors (rows, columns, 3) of a rectangle of blocks, of its pixels inside the image."""
        page = self._page
        if page.has_pillow_mode:
            return self._colors(down, across)
        values = self._values(down, across)
        if page.format.is_stretched:
            values = self._range.stretch(values)
        elif page.photometric == WHITE_IS_ZERO:
            values = 255 - values
        return np.broadcast_to(values, (*values.shape[:2], 3))

    def _colors(self, down: slice, across: slice) -> NDArray[np.uint8]:
        page, (width, height) = self._page, self._page.block_wh
        stacked = np.zeros((len(self._rows(down, across)), height, width, 3), np.uint8)
        stored, *others = (self._stored_numbers(plane, down, across) for plane in range(page.planes))
        if any(other != stored for other in others):
            raise Damaged("a strip or tile is stored in some planes only")
        if stored:
            file = self._small_file(range(page.planes), down, across, page.tags, width)
            with opened([file], "TIFF", self.name) as image:
                image.load()
                self._put(stacked, stored, rgb_of_pillow(image, self.name), self._rows(down, across))
        return self._assembled(stacked, down, across)

    def _values(self, down: slice, across: slice) -> Values:
        """Returns the stored values (rows, columns, bands) of a rectangle of blocks, of the bands that are used."""
        page = self._page
        if page.planes == 1:
            bands = self._plane(0, down, across)
            colors, alpha = bands[:, :, : page.used_bands], bands[:, :, -1:]
        else:
            colors = np.concatenate([self._plane(band, down, across) for band in range(page.used_bands)], -1)
            alpha = self._plane(page.planes - 1, down, across) if page.is_premultiplied else colors
        if not page.is_premultiplied:
            return colors
        return divided_by_alpha(colors, alpha, 1 if page.kind == "float" else (1 << page.bits) - 1, page.nodata)

    def _plane(self, plane: int, down: slice, across: slice) -> Values:
        page, (width, height) = self._page, self._page.block_wh
        rows = self._rows(down, across)
        bands, kind = page.samples // page.planes, page.dtype
        stacked = np.full((len(rows), height, width, bands), self._fill(kind), kind.newbyteorder("="))
        stored = self._stored_numbers(plane, down, across)
        if stored:
            content = self._bytes(plane, down, across)
            self._put(stacked, stored, _values_of_bytes(content, page), rows)
        return self._assembled(stacked, down, across)

    def _fill(self, kind: np.dtype[Any]) -> float:
        """Returns the value of blocks that are not stored."""
        nodata = self._page.nodata
        if nodata is None or (kind.kind != "f" and not _fits(nodata, kind)):
            return 0
        return nodata

    def _bytes(self, plane: int, down: slice, across: slice) -> NDArray[np.uint8]:
        """Returns the decompressed rows (rows, bytes) of the stored blocks, one below the other."""
        page = self._page
        if page.compression == 1:
            rows = [count for count, (_, size) in self._counted(plane, down, across) if size]
            blocks = zip(self._stored(plane, down, across), rows, strict=True)
            data = b"".join(block[: count * page.row_bytes] for block, count in blocks)
            if len(data) != sum(rows) * page.row_bytes:
                raise Damaged("a strip or tile has fewer bytes than its pixels")
            return np.frombuffer(data, np.uint8).reshape(-1, page.row_bytes)
        tags: Tags = {
            **{tag: page.tags[tag] for tag in (COMPRESSION, FILL_ORDER) if tag in page.tags},
            **{tag: _long(value, page.order) for tag, value in ((BITS, 8), (SAMPLES, 1), (PHOTOMETRIC, 1))},
        }
        file = self._small_file(range(plane, plane + 1), down, across, tags, page.row_bytes)
        with opened([file], "TIFF", self.name) as image:
            image.load()
            return np.asarray(image)

    def _stored(self, plane: int, down: slice, across: slice) -> list[bytes]:
        """Returns the stored bytes of the blocks of a rectangle, of those that are stored."""
        blocks = []
        for offset, size in self._spans(plane, down, across):
            block = self._source[offset : offset + size]
            if len(block) < size:
                raise Damaged(f"a strip or tile at byte {offset} ends after the file")
            if block:
                blocks.append(block)
        return blocks

    def _stored_numbers(self, plane: int, down: slice, across: slice) -> list[int]:
        """Returns the numbers of the blocks of a rectangle that are stored."""
        return [number for number, (_, size) in enumerate(self._spans(plane, down, across)) if size]

    def _spans(self, plane: int, down: slice, across: slice) -> list[tuple[int, int]]:
        return [(int(offset), int(size)) for offset, size in self._page.blocks[plane, down, across].reshape(-1, 2)]

    def _rows(self, down: slice, across: slice) -> list[int]:
        """Returns the rows that each block of a rectangle stores."""
        return [self._page.rows(row) for row in range(down.start, down.stop) for _ in range(across.start, across.stop)]

    def _counted(self, plane: int, down: slice, across: slice) -> Iterator[tuple[int, tuple[int, int]]]:
        """Yields rows and span of each block of a rectangle."""
        return zip(self._rows(down, across), self._spans(plane, down, across), strict=True)

    def _small_file(self, planes: range, down: slice, across: slice, tags: Tags, width: int) -> bytes:
        """Returns a TIFF of the stored blocks of a rectangle, as strips, one below the other, plane after plane."""
        height = sum(count for count, (_, size) in self._counted(planes[0], down, across) if size)
        shape = {WIDTH: width, HEIGHT: height, ROWS_PER_STRIP: self._page.block_wh[1]}
        kept = {tag: value for tag, value in tags.items() if tag not in (TILE_WIDTH, TILE_HEIGHT)}
        all_tags = {**kept, **{tag: _long(value, self._page.order) for tag, value in shape.items()}}
        strips = [strip for plane in planes for strip in self._stored(plane, down, across)]
        return _packed(self._page.order, all_tags, strips)

    def _put(self, stacked: Values, stored: list[int], found: Values, rows: list[int]) -> None:
        """Fills the blocks that are stored from rows one below the other."""
        top = 0
        if sum(rows[number] for number in stored) != len(found):
            raise Damaged("a strip or tile has other rows than its header states")
        for number in stored:
            stacked[number, : rows[number]] = found[top : top + rows[number]]
            top += rows[number]

    def _assembled(self, stacked: Values, down: slice, across: slice) -> Values:
        """Returns blocks (N, h, w, bands) beside each other, without what lies beyond the image."""
        (width, height), bands = self._page.block_wh, stacked.shape[-1]
        counts = down.stop - down.start, across.stop - across.start
        grid = stacked.reshape(*counts, height, width, bands).swapaxes(1, 2)
        pixels = grid.reshape(counts[0] * height, counts[1] * width, bands)
        top, left = self._corner(down, across)
        return pixels[: self.shape[0] - top, : self.shape[1] - left]


def _values_of_bytes(content: NDArray[np.uint8], page: TiffPage) -> Values:
    """Returns the values (rows, columns, bands) of decompressed rows (rows, bytes)."""
    bands, kind = page.samples // page.planes, page.dtype
    rows, width = len(content), page.block_wh[0]
    if page.bits % 8:
        return _unpacked(content, page.bits, width * bands).reshape(rows, width, bands)
    if page.predictor == 3:
        sums = np.cumsum(content.reshape(rows, -1, bands), axis=1, dtype=np.uint8)
        # The first bytes of all values come first, then the second ones.
        of_values = sums.reshape(rows, kind.itemsize, width * bands).swapaxes(1, 2)
        values: Values = np.ascontiguousarray(of_values).view(kind.newbyteorder(">"))
        return values.reshape(rows, width, bands).astype(kind.newbyteorder("="))
    values = np.ascontiguousarray(content).view(kind).reshape(rows, width, bands).astype(kind.newbyteorder("="))
    if page.predictor == 2:
        unsigned = values.view(f"u{kind.itemsize}")
        np.cumsum(unsigned, axis=1, dtype=unsigned.dtype, out=unsigned)
    return values


def _unpacked(content: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.uint16]:
    """Returns the values (rows, count) of 9 to 15 bits that rows of bytes (rows, bytes) hold."""
    values = np.empty((len(content), count), np.uint16)
    weights = 1 << np.arange(bits - 1, -1, -1, dtype=np.uint16)
    for rows in rows_of_strips((bits * count, len(content))):  # a bit takes two bytes while it is weighted
        each = np.unpackbits(content[rows], axis=1)[:, : bits * count].reshape(-1, count, bits)
        values[rows] = each @ weights
    return values


def _fits(number: float, kind: np.dtype[Any]) -> bool:
    limits = np.iinfo(kind)
    return number.is_integer() and limits.min <= number <= limits.max


def _long(value: int, order: str) -> tuple[int, int, bytes]:
    return _LONG, 1, struct.pack(f"{order}I", value)


def _packed(order: str, tags: Tags, strips: list[bytes]) -> bytes:
    """Returns a TIFF of one page: strips, values of tags, and a directory."""
    content = bytearray(8)
    offsets = []
    for strip in strips:
        offsets.append(len(content))
        content += strip
    content += bytes(len(content) % 2)
    sizes = [len(strip) for strip in strips]
    arrays = ((STRIP_OFFSETS, offsets), (STRIP_BYTES, sizes))
    values = {tag: (_LONG, len(array), struct.pack(f"{order}{len(array)}I", *array)) for tag, array in arrays}
    entries = []
    for tag, (kind, count, value) in sorted({**tags, **values}.items()):
        place = value.ljust(4, b"\0")
        if len(value) > 4:
            place = struct.pack(f"{order}I", len(content))
            content += value + bytes(len(value) % 2)
        entries.append(struct.pack(f"{order}HHI", tag, kind, count) + place)
    start = struct.pack(f"{order}HI", 42, len(content))
    content[:8] = (b"II" if order == "<" else b"MM") + start
    return bytes(content + struct.pack(f"{order}H", len(entries)) + b"".join(entries) + bytes(4))


def _overlap(wanted: slice, start: int, count: int) -> slice:
    return slice(max(wanted.start, start), min(wanted.stop, start + count))


def _moved(part: slice, start: int) -> slice:
    return slice(part.start - start, part.stop - start)
