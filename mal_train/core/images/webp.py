"""Walks through the chunks of a WebP file (RFC 9649)."""

import struct

from mal_train.core.images import exif
from mal_train.core.images.container import Container, Damaged, ImageHeader, check_count, joined

_PIXEL_BYTES = 8 + 4 + 4
"""Peak per px: two canvases on which libwebp composes the frames of any file, its output and Pillow's image. The output
is freed before the result is made, which is smaller."""

_KEPT = frozenset({b"VP8X", b"ANIM", b"ALPH", b"VP8 ", b"VP8L"})


def is_webp(data: bytes) -> bool:
    """Returns True for a file that begins like a WebP."""
    return data.startswith(b"RIFF") and data[8:12] == b"WEBP"


def read(data: bytes) -> Container:
    """Walks through a WebP. Raises Damaged or TooManyParts."""
    end_of_file = min(8 + int.from_bytes(data[4:8], "little"), len(data))
    kept, frames, chunks, position = list[tuple[int, int]](), 0, 0, 12
    orientation: int | None = None
    while position + 8 <= end_of_file:
        kind, length = data[position : position + 4], int.from_bytes(data[position + 4 : position + 8], "little")
        end = min(position + 8 + length + length % 2, end_of_file)
        chunks += 1
        check_count(chunks, "chunks")
        if kind == b"ANMF":
            frames += 1
        if kind in _KEPT or (kind == b"ANMF" and frames == 1):
            kept.append((position, end))
        elif kind == b"EXIF" and orientation is None:
            orientation = exif.orientation(data[position + 8 : position + 8 + length])
        position = end
    width, height = size_wh = _size(data)
    pixels = width * height
    pieces = joined(data, kept)
    riff = struct.pack("<4sI4s", b"RIFF", 4 + sum(map(len, pieces)), b"WEBP")
    header = ImageHeader(size_wh, orientation or 1, max(frames, 1))
    return Container(header, "WEBP", pixels, pixels * _PIXEL_BYTES, (riff, *pieces))


def _size(data: bytes) -> tuple[int, int]:
    """Returns width and height from the first chunk, which is at byte 12."""
    kind = data[12:16]
    if kind == b"VP8X" and len(data) >= 30:
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if kind == b"VP8L" and len(data) >= 25 and data[20] == 0x2F:
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 " and len(data) >= 30 and data[23:26] == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    raise Damaged(f"first chunk {kind!r}")
