"""Reads directories of TIFF and BigTIFF files (TIFF 6.0; BigTIFF of libtiff); each holds the tags of a page."""

import struct
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mal_train.core.images.container import Damaged, check_count

MAX_STRIPS = 100_000
"""Strips or tiles of a page. Pillow needs 7 µs for each. Strips of one row are 16 384 at most by default."""

MAX_TAG_VALUES = 1 << 16
"""Values of any other tag that describes pixels; a palette has 768."""

WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER = 256, 257, 258, 259, 262, 266
STRIP_OFFSETS, ORIENTATION, SAMPLES, ROWS_PER_STRIP, STRIP_BYTES, PLANAR = 273, 274, 277, 278, 279, 284
PREDICTOR, TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_BYTES = 317, 322, 323, 324, 325
EXTRA_SAMPLES, SAMPLE_FORMAT, GDAL_NODATA = 338, 339, 42113

_STRIP_ARRAYS = frozenset({STRIP_OFFSETS, STRIP_BYTES, TILE_OFFSETS, TILE_BYTES})
_NUMBERS = _STRIP_ARRAYS | {
    *(WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, SAMPLES, ROWS_PER_STRIP, PLANAR),
    *(TILE_WIDTH, TILE_HEIGHT),
}
# Also fax options, palette, inks, JPEG tables, YCbCr.
PIXEL_TAGS = _NUMBERS | {
    *(FILL_ORDER, 292, 293, PREDICTOR, 318, 319, 320, 332, 334, EXTRA_SAMPLES, SAMPLE_FORMAT, 347),
    *(*range(512, 522), 529, 530, 531, 532),
}

_TYPE_BYTES = {
    **dict.fromkeys((1, 2, 6, 7), 1),
    **dict.fromkeys((3, 8), 2),
    **dict.fromkeys((4, 9, 11, 13), 4),
    **dict.fromkeys((5, 10, 12, 16, 17, 18), 8),
}
_LONG, _LONG8 = 4, 16
_UNSIGNED = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q"}


class Source(Protocol):
    """The bytes of a file, in memory or read when they are needed."""

    def __len__(self) -> int:
        """Returns the size of the file."""

    def __getitem__(self, part: slice, /) -> bytes:
        """Returns some bytes; fewer where the file ends."""


@dataclass(frozen=True)
class Layout:
    """Formats of `struct`, and the first bytes of a file."""

    order: str
    count: str
    entry: str
    offset: str
    signature: bytes

    def unpack(self, form: str, data: Source, at: int) -> int:
        """Returns the number at a byte of the file. Raises Damaged where the file ends before it."""
        size = struct.calcsize(self.order + form)
        try:
            number: int = struct.unpack(self.order + form, data[at : at + size])[0]
        except struct.error:
            raise Damaged(f"the directory at byte {at} ends after the file") from None
        return number

    def first_offset(self, data: Source) -> int:
        """Returns the position of the first directory."""
        return self.unpack(self.offset, data, struct.calcsize(self.offset))


_LITTLE = Layout("<", "H", "HHI4s", "I", b"II*\0")
_BIG = Layout(">", "H", "HHI4s", "I", b"MM\0*")
_LITTLE_64 = Layout("<", "Q", "HHQ8s", "Q", b"II+\0\x08\0\0\0")
_BIG_64 = Layout(">", "Q", "HHQ8s", "Q", b"MM\0+\0\x08\0\0")
# Pillow also reads the two with a swapped version number.
_LAYOUTS = {
    b"II*\0": _LITTLE,
    b"II\0*": _LITTLE,
    b"MM\0*": _BIG,
    b"MM*\0": _BIG,
    b"II+\0": _LITTLE_64,
    b"MM\0+": _BIG_64,
}

SIGNATURES = tuple(_LAYOUTS)


def layout_of(data: Source) -> Layout:
    """Returns the layout of a TIFF. Raises Damaged for any other file."""
    layout = _LAYOUTS.get(data[:4])
    if layout is None:
        raise Damaged(f"signature {data[:4]!r}")
    return layout


@dataclass(frozen=True, slots=True)
class _Entry:
    type: int
    count: int
    value: bytes


class Directory:
    """Tags of one page. The first of equal tags counts, as for other readers.

    Attributes:
        entries: entry by tag.
        layout: of the file.
    """

    def __init__(self, data: Source, layout: Layout, offset: int) -> None:
        self._data = data
        self.layout = layout
        count = layout.unpack(layout.count, data, offset)
        check_count(count, "tags")
        start = offset + struct.calcsize(layout.order + layout.count)
        entry = struct.Struct(layout.order + layout.entry)
        end = start + count * entry.size
        if end > len(data):
            raise Damaged(f"the directory at byte {offset} ends after the file")
        self.entries: dict[int, _Entry] = {}
        for tag, *fields in entry.iter_unpack(data[start:end]):
            self.entries.setdefault(tag, _Entry(*fields))

    @staticmethod
    def first(data: Source) -> "Directory":
        """Returns the tags of the first page. Raises Damaged or TooManyParts."""
        layout = layout_of(data)
        return Directory(data, layout, layout.first_offset(data))

    def number(self, tag: int, default: int) -> int:
        """Returns the first value of a tag of unsigned integers; the default if there is none."""
        entry = self.entries.get(tag)
        if entry is None or entry.type not in _UNSIGNED or not entry.count:
            return default
        source, at = self._location(entry)
        return self.layout.unpack(_UNSIGNED[entry.type], source, at)

    def numbers(self, tag: int) -> NDArray[np.uint64]:
        """Returns all values of a tag of unsigned integers, after `check`; none if there is no such tag."""
        entry = self.entries.get(tag)
        if entry is None or entry.type not in _UNSIGNED:
            return np.empty(0, np.uint64)
        kind = np.dtype(self.layout.order + _UNSIGNED[entry.type])
        return np.frombuffer(self._content(entry), kind).astype(np.uint64)

    def total(self, tag: int, largest: int) -> int:
        """Returns the sum of a tag's values, each counted as `largest` at most; 0 if there is no such tag."""
        # Unsigned 64-bit integers hold the sum of any file's values once each is bounded.
        return int(np.minimum(self.numbers(tag), np.uint64(largest)).sum())

    def text(self, tag: int) -> str:
        """Returns the text of a tag, or of its first `MAX_TAG_VALUES` characters; empty if there is no such tag."""
        entry = self.entries.get(tag)
        if entry is None or entry.type != 2 or entry.count > MAX_TAG_VALUES:
            return ""
        return self._content(entry).split(b"\0")[0].decode("ascii", "replace")

    def check(self) -> None:
        """Checks the tags that describe pixels.

        Raises:
            Damaged: a tag is of a type that other readers would take for another number, or lies outside the file.
            TooManyParts: a tag of too many values.
        """
        for tag in PIXEL_TAGS & self.entries.keys():
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

    def pixel_tags(self) -> dict[int, tuple[int, int, bytes]]:
        """Returns type, number and bytes of the values of each tag that describes pixels, after `check`."""
        tags = {}
        for tag in self.entries.keys() & (PIXEL_TAGS - _STRIP_ARRAYS):
            entry = self.entries[tag]
            content = self._content(entry)
            if entry.type == _LONG8:  # which only BigTIFF has
                numbers = np.minimum(self.numbers(tag), 0xFFFFFFFF).astype(f"{self.layout.order}u4")
                tags[tag] = (_LONG, entry.count, numbers.tobytes())
            else:
                tags[tag] = (entry.type, entry.count, content)
        return tags

    def packed(self) -> bytes:
        """Returns a directory of the tags that describe pixels only, followed by no other page."""
        layout = self.layout
        kept = sorted(PIXEL_TAGS & self.entries.keys())
        entries = b"".join(struct.pack(layout.order + layout.entry, tag, *astuple(self.entries[tag])) for tag in kept)
        return (
            struct.pack(layout.order + layout.count, len(kept)) + entries + struct.pack(layout.order + layout.offset, 0)
        )

    def _content(self, entry: _Entry) -> bytes:
        source, at = self._location(entry)
        return source[at : at + entry.count * _TYPE_BYTES[entry.type]]

    def _location(self, entry: _Entry) -> tuple[Source, int]:
        """Returns the bytes that hold an entry's values, and their position in these."""
        if entry.count * _TYPE_BYTES.get(entry.type, 1) <= len(entry.value):
            return entry.value, 0
        return self._data, self.layout.unpack(self.layout.offset, entry.value, 0)


def page_count(data: Source, layout: Layout) -> int:
    """Returns the number of pages. Raises TooManyParts."""
    return sum(1 for _ in _offsets(data, layout))


def _offsets(data: Source, layout: Layout) -> Iterator[int]:
    """Yields the offset of each page's directory; ends at one that was seen before, or lies outside the file."""
    offset, seen = layout.first_offset(data), set[int]()
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
