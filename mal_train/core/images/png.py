"""Walks through the chunks of a PNG file (ISO/IEC 15948), up to the end of its first image."""

from mal_train.core.images import exif
from mal_train.core.images.container import RESULT_BYTES, Container, Damaged, ImageHeader, check_count, joined
from mal_train.core.images.pixels import STRETCHING_BYTES, PixelFormat

SIGNATURE = b"\x89PNG\r\n\x1a\n"

MAX_DATA_CHUNKS = 100_000
"""Chunks of pixel data. Encoders write 8 KB and more at a time: 4000 chunks for 32 MiB. Pillow needs 3 µs for each."""

_END = b"\0\0\0\0IEND\xaeB`\x82"
DEPTH_AT, COLOR_TYPE_AT = 24, 25
"""Positions in the file."""
GRAY, RGB, PALETTE, GRAY_ALPHA, RGBA = 0, 2, 3, 4, 6
"""Color types."""
_BANDS = {GRAY: 1, RGB: 3, PALETTE: 1, GRAY_ALPHA: 2, RGBA: 4}


def read(data: bytes) -> Container:
    """Walks through a PNG. Raises Damaged or TooManyParts."""
    if data[12:16] != b"IHDR" or len(data) < 33:
        raise Damaged("no image header")
    walk = _Walk(data)
    start = walk.before_data(len(SIGNATURE))
    kept = [(0, len(SIGNATURE)), *walk.kept, (start, _end_of_data(data, start))]
    width, height = int.from_bytes(data[16:20]), int.from_bytes(data[20:24])
    depth, color = data[DEPTH_AT], data[COLOR_TYPE_AT]
    pixel_format = PixelFormat(16 if depth == 16 else 8, bands=_BANDS.get(color, 3))
    header = ImageHeader((width, height), walk.orientation or 1, walk.frames(), pixel_format)
    pixels = width * height
    parts: tuple[bytes | memoryview, ...] = (*joined(data, kept), _END)
    decode_bytes = pixels * (_decoded_bytes(depth, color) + RESULT_BYTES)
    if pixel_format.is_stretched and color != GRAY:
        decode_bytes += 2 * sum(map(len, parts)) + STRETCHING_BYTES
    return Container(header, "PNG", pixels, decode_bytes, parts)


class _Walk:
    """State of a walk through the chunks before the pixel data."""

    def __init__(self, data: bytes) -> None:
        self.kept: list[tuple[int, int]] = []
        self.orientation: int | None = None
        self._data = data
        self._animated_frames = 0
        self._is_first_frame_animated = False

    def before_data(self, position: int) -> int:
        """Takes notice of the chunks from `position` on; returns the position of the first one with pixel data."""
        data, chunks = self._data, 0
        while (kind := data[position + 4 : position + 8]) != b"IDAT":
            end = position + 12 + int.from_bytes(data[position : position + 4])
            if end > len(data) or kind == b"IEND":
                raise Damaged(f"chunk {kind!r} at byte {position} ends after the file, or there is no pixel data")
            chunks += 1
            check_count(chunks, "chunks")
            self._chunk(kind, position, end)
            position = end
        return position

    def frames(self) -> int:
        """Returns the number of frames of an animation, counting an image beside it; 1 for a plain image."""
        if not self._animated_frames:
            return 1
        return self._animated_frames + (not self._is_first_frame_animated)

    def _chunk(self, kind: bytes, position: int, end: int) -> None:
        if kind in {b"IHDR", b"PLTE"}:
            self.kept.append((position, end))
        elif kind == b"eXIf" and self.orientation is None:
            self.orientation = exif.orientation(self._data[position + 8 : end - 4])
        elif kind == b"acTL":
            self._animated_frames = int.from_bytes(self._data[position + 8 : position + 12])
        elif kind == b"fcTL":
            self._is_first_frame_animated = True


def _end_of_data(data: bytes, position: int) -> int:
    """Returns the end of consecutive chunks of pixel data, or of the file if that comes first."""
    chunks = 0
    while data[position + 4 : position + 8] == b"IDAT":
        position += 12 + int.from_bytes(data[position : position + 4])
        chunks += 1
        check_count(chunks, "chunks of pixel data", MAX_DATA_CHUNKS)
    return min(position, len(data))


def _decoded_bytes(depth: int, color: int) -> int:
    """Returns the bytes per px of Pillow's images."""
    if color == PALETTE:
        return 1
    if color == GRAY:
        return 2 if depth == 16 else 1
    return 8 if depth == 16 and color != GRAY_ALPHA else 4
