"""Walks through the tags of a TIFF or BigTIFF file's first page, and counts its pages.

Tags point into the file, so it cannot be cut as other formats are. It gets a new directory at its end instead, of those
tags that describe pixels: neither Pillow nor libtiff sees EXIF, profiles, orientation or further pages.
"""

import struct
from collections.abc import Iterator
from dataclasses import astuple, dataclass

import numpy as np

from mal_train.core.images.container import (
    RESULT_BYTES,
    Container,
    Damaged,
    ImageHeader,
    TooManyParts,
    check_count,
)

MAX_STRIPS = 100_000
"""Strips or tiles of a page. Pillow needs 7 µs for each. Strips of one row are 16 384 at most by default."""

MAX_TAG_VALUES = 1 << 16
"""Values of any other tag that describes pixels; a palette has 768."""

SHARED_STRIP_BYTES = 32 * 1024 * 1024
"""Strips may share data, as equal ones of some writers do, but all together read the file's size and this at most."""

COMPRESSIONS = {
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

_ORIENTATION = 274
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC = 256, 257, 258, 259, 262
_STRIP_OFFSETS, _SAMPLES, _ROWS_PER_STRIP, _STRIP_BYTES, _PLANAR = 273, 277, 278, 279, 284
_TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_BYTES = 322, 323, 324, 325
_STRIP_ARRAYS = frozenset({_STRIP_OFFSETS, _STRIP_BYTES, _TILE_OFFSETS, _TILE_BYTES})
_NUMBERS = _STRIP_ARRAYS | {
    *(_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _SAMPLES, _ROWS_PER_STRIP, _PLANAR),
    *(_TILE_WIDTH, _TILE_HEIGHT),
}
# Also fill order, fax options, predictor, palette, inks, extra samples, sample format, JPEG tables, YCbCr.
_PIXEL_TAGS = _NUMBERS | {
    *(266, 292, 293, 317, 318, 319, 320, 332, 334, 338, 339, 347),
    *(*range(512, 522), 529, 530, 531, 532),
}
_JPEG_COMPRESSIONS = frozenset({6, 7})
_YCBCR = 6

_TYPE_BYTES = {
    **dict.fromkeys((1, 2, 6, 7), 1),
    **dict.fromkeys((3, 8), 2),
    **dict.fromkeys((4, 9, 11, 13), 4),
    **dict.fromkeys((5, 10, 12, 16, 17, 18), 8),
}
_UNSIGNED = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q"}


@dataclass(frozen=True)
class _Layout:
    """Formats of `struct`, and the first bytes of a file."""

    order: str
    count: str
    entry: str
    offset: str
    signature: bytes

    def unpack(self, form: str, data: bytes, at: int) -> int:
        try:
            value: int = struct.unpack_from(self.order + form, data, at)[0]
        except (struct.error, OverflowError):
            raise Damaged(f"the directory at byte {at} ends after the file") from None
        return value


_LITTLE = _Layout("<", "H", "HHI4s", "I", b"II*\0")
_BIG = _Layout(">", "H", "HHI4s", "I", b"MM\0*")
_LITTLE_64 = _Layout("<", "Q", "HHQ8s", "Q", b"II+\0\x08\0\0\0")
# Pillow also reads the two with a swapped version number, but no big-endian BigTIFF.
_LAYOUTS = {b"II*\0": _LITTLE, b"II\0*": _LITTLE, b"MM\0*": _BIG, b"MM*\0": _BIG, b"II+\0": _LITTLE_64}

SIGNATURES = tuple(_LAYOUTS)


@dataclass(frozen=True, slots=True)
class _Entry:
    type: int
    count: int
    value: bytes


class Directory:
    """Tags of one page. The first of equal tags counts, as for other readers.

    Attributes:
        entries: entry by tag.
    """

    def __init__(self, data: bytes, layout: _Layout, offset: int) -> None:
        self._data = data
        self._layout = layout
        count = layout.unpack(layout.count, data, offset)
        check_count(count, "tags")
        start = offset + struct.calcsize(layout.order + layout.count)
        entry = struct.Struct(layout.order + layout.entry)
        end = start + count * entry.size
        if end > len(data):
            raise Damaged(f"the directory at byte {offset} ends after the file")
        self.entries: dict[int, _Entry] = {}
        for tag, *fields in entry.iter_unpack(memoryview(data)[start:end]):
            self.entries.setdefault(tag, _Entry(*fields))

    @staticmethod
    def first(data: bytes) -> "Directory":
        """Returns the tags of the first page. Raises Damaged or TooManyParts."""
        layout = _layout(data)
        return Directory(data, layout, _first_offset(data, layout))

    def number(self, tag: int, default: int) -> int:
        """Returns the first value of a tag of unsigned integers; the default if there is none."""
        entry = self.entries.get(tag)
        if entry is None or entry.type not in _UNSIGNED or not entry.count:
            return default
        return self._layout.unpack(_UNSIGNED[entry.type], *self._location(entry))

    def total(self, tag: int, largest: int) -> int:
        """Returns the sum of a tag's values, each counted as `largest` at most; 0 if there is no such tag."""
        entry = self.entries.get(tag)
        if entry is None or entry.type not in _UNSIGNED:
            return 0
        kind = np.dtype(_UNSIGNED[entry.type]).newbyteorder("<" if self._layout.order == "<" else ">")
        source, at = self._location(entry)
        # Unsigned 64-bit integers hold the sum of any file's values once each is bounded.
        values = np.frombuffer(source, kind, entry.count, at).astype(np.uint64)
        return int(np.minimum(values, np.uint64(largest)).sum())

    def check(self) -> None:
        """Checks the tags that describe pixels.

        Raises:
            Damaged: a tag is of a type that other readers would take for another number, or lies outside the file.
            TooManyParts: a tag of too many values.
        """
        for tag in _PIXEL_TAGS & self.entries.keys():
            entry = self.entries[tag]
            if tag in _STRIP_ARRAYS:
                check_count(entry.count, "strips or tiles", MAX_STRIPS)
            else:
                check_count(entry.count, f"values of tag {tag}", MAX_TAG_VALUES)
            if entry.type not in (_UNSIGNED if tag in _NUMBERS else _TYPE_BYTES):
                raise Damaged(f"tag {tag} of type {entry.type}")
            source, at = self._location(entry)
            if at + entry.count * _TYPE_BYTES[entry.type] > len(source):
                raise Damaged(f"values of tag {tag} end after the file")

    def packed(self) -> bytes:
        """Returns a directory of the tags that describe pixels only, followed by no other page."""
        layout = self._layout
        kept = sorted(_PIXEL_TAGS & self.entries.keys())
        entries = b"".join(struct.pack(layout.order + layout.entry, tag, *astuple(self.entries[tag])) for tag in kept)
        return (
            struct.pack(layout.order + layout.count, len(kept)) + entries + struct.pack(layout.order + layout.offset, 0)
        )

    def _location(self, entry: _Entry) -> tuple[bytes, int]:
        """Returns the bytes that hold an entry's values, and their position in these."""
        if entry.count * _TYPE_BYTES.get(entry.type, 1) <= len(entry.value):
            return entry.value, 0
        return self._data, self._layout.unpack(self._layout.offset, entry.value, 0)


def read(data: bytes) -> Container:
    """Walks through a TIFF. Raises Damaged or TooManyParts."""
    layout = _layout(data)
    page = Directory.first(data)
    page.check()
    if page.number(_COMPRESSION, 1) not in COMPRESSIONS:
        names = ", ".join(dict.fromkeys(COMPRESSIONS.values()))
        raise Damaged(f"compression {page.number(_COMPRESSION, 1)}; supported are {names}")
    if page.total(_STRIP_BYTES, len(data)) + page.total(_TILE_BYTES, len(data)) > len(data) + SHARED_STRIP_BYTES:
        raise TooManyParts("bytes in strips that share data", len(data) + SHARED_STRIP_BYTES)
    size_wh = width, height = page.number(_WIDTH, 0), page.number(_HEIGHT, 0)
    block, decoded = _block(page, width, height)
    orientation = page.number(_ORIENTATION, 1)
    header = ImageHeader(size_wh, orientation if orientation in range(2, 9) else 1, _pages(data, layout))
    decode_bytes = width * height * (_image_bytes(page) + RESULT_BYTES) + block * _block_bytes(page)
    return Container(header, "TIFF", decoded, decode_bytes, _rewritten(data, layout, page))


def _layout(data: bytes) -> _Layout:
    layout = _LAYOUTS.get(data[:4])
    if layout is None:
        raise Damaged(f"signature {data[:4]!r}")
    return layout


def _first_offset(data: bytes, layout: _Layout) -> int:
    return layout.unpack(layout.offset, data, struct.calcsize(layout.offset))


def _rewritten(data: bytes, layout: _Layout, page: Directory) -> tuple[bytes | memoryview, ...]:
    start = 2 * struct.calcsize(layout.offset)
    padding = bytes(len(data) % 2)
    offset = struct.pack(layout.order + layout.offset, len(data) + len(padding))
    return layout.signature + offset, memoryview(data)[start:], padding, page.packed()


def _block(page: Directory, width: int, height: int) -> tuple[int, int]:
    """Returns the px of a strip or tile, and those of all of them, which may reach beyond the image."""
    if not page.entries.keys() & {_TILE_WIDTH, _TILE_HEIGHT}:
        rows = page.number(_ROWS_PER_STRIP, height)
        if not rows:
            raise Damaged("strips without rows")
        return width * min(rows, height), width * height
    tile_width, tile_height = page.number(_TILE_WIDTH, 0), page.number(_TILE_HEIGHT, 0)
    if not tile_width or not tile_height or _STRIP_OFFSETS in page.entries:
        raise Damaged("tiles without a size, or beside strips")
    across, down = -(-width // tile_width), -(-height // tile_height)
    return tile_width * tile_height, across * tile_width * down * tile_height


def _image_bytes(page: Directory) -> int:
    """Returns the bytes per px of Pillow's image."""
    samples, bits = page.number(_SAMPLES, 1), page.number(_BITS, 1)
    if samples == 1 and bits <= 16 and page.number(_PHOTOMETRIC, 0) != _YCBCR:
        return 1 if bits <= 8 else 2
    return 4


def _block_bytes(page: Directory) -> int:
    """Returns the bytes per px of the buffers for a strip or tile."""
    samples, bits = page.number(_SAMPLES, 1), page.number(_BITS, 1)
    decoded = max(-(-samples * bits // 8), 4 if page.number(_PHOTOMETRIC, 0) == _YCBCR else 1)
    # A progressive JPEG keeps two bytes of coefficients for each sample.
    return decoded + (2 * samples if page.number(_COMPRESSION, 1) in _JPEG_COMPRESSIONS else 0)


def _pages(data: bytes, layout: _Layout) -> int:
    return sum(1 for _ in _offsets(data, layout))


def _offsets(data: bytes, layout: _Layout) -> Iterator[int]:
    """Yields the offset of each page's directory; ends at one that was seen before, or lies outside the file."""
    offset, seen = _first_offset(data, layout), set[int]()
    entry_bytes, count_bytes = (
        struct.calcsize(layout.order + layout.entry),
        struct.calcsize(layout.order + layout.count),
    )
    while offset and offset not in seen:
        seen.add(offset)
        check_count(len(seen), "pages")
        yield offset
        try:
            count = layout.unpack(layout.count, data, offset)
            offset = layout.unpack(layout.offset, data, offset + count_bytes + count * entry_bytes)
        except Damaged:
            return
