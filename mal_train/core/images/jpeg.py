"""Walks through the segments of a JPEG file (ITU-T T.81, annex B), up to its end-of-image marker."""

import re

from mal_train.core.images import exif
from mal_train.core.images.container import (
    MAX_PARTS,
    RESULT_BYTES,
    Container,
    Damaged,
    ImageHeader,
    TooManyParts,
    Unsupported,
    check_count,
    joined,
)
from mal_train.core.images.pixels import PixelFormat

SIGNATURE = b"\xff\xd8\xff"

MAX_SCANS = 100
"""Maximum number of scans, of which a progressive JPEG normally has about ten. A scan of 14 bytes costs the decoder as
much as one with data: at 64 million pixels 40 ms."""

MAX_SCANNED_PIXELS = 1_600_000_000
"""Maximum of scans times pixels, if these are more than LARGE_IMAGE_SCANS scans; a second of the decoder."""

LARGE_IMAGE_SCANS = 25
"""Scans that an image of any size may have."""

MAX_TABLE_BYTES = 1 << 16
"""Bytes of all quantization and Huffman tables before the first scan. Four of each take 3 KB; Pillow reads quantization
tables in Python, which takes 20 ms for each 64 KB."""

MAX_FILL_BYTES = 4096
"""Fill bytes in a row within the scans, where encoders write none. Pillow's decoder reads a long row again with each
block of 64 KB: 5 s for 32 MiB."""

# Start of a segment. 0xFF is also followed by 0 (data), by a marker without a segment, or by fill bytes.
_SEGMENT = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")
_START_OF_IMAGE, _END_OF_IMAGE, _START_OF_SCAN = 0xD8, 0xD9, 0xDA
_HUFFMAN, _ARITHMETIC, _QUANTIZATION, _RESTART_INTERVAL = 0xC4, 0xCC, 0xDB, 0xDD
_TABLES = frozenset({_HUFFMAN, _ARITHMETIC, _QUANTIZATION, _RESTART_INTERVAL})
_FRAMES = frozenset(range(0xC0, 0xD0)) - {_HUFFMAN, _ARITHMETIC, 0xC8}
_PROGRESSIVE = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
_APP0, _APP1, _APP2, _APP14 = 0xE0, 0xE1, 0xE2, 0xEE
# Ultra HDR: the second image is a gain map, not a frame.
_GAIN_MAP = b' hdrgm:Version="'


class _Walk:
    """State of a walk after some segments."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.kept = [(0, 2)]
        self.frame: tuple[int, bytes] | None = None
        self.table_bytes = self.first_scan = self.scans = self.scan_components = 0
        # The first of each kind counts.
        self.orientation: int | None = None
        self.images: int | None = None
        self.has_gain_map = False

    def segment(self, marker: int, start: int, end: int) -> None:
        """Takes notice of a segment before the first scan; `start` is at the marker, 4 bytes before the content."""
        content = self.data[start + 4 : end]
        if marker in _FRAMES:
            if self.frame is not None or len(content) < 6:
                raise Damaged("two frame headers, or a short one")
            self.frame = (marker, content)
        elif marker in _TABLES:
            self.table_bytes += len(content)
            if self.table_bytes > MAX_TABLE_BYTES:
                raise TooManyParts("bytes of tables", MAX_TABLE_BYTES)
        elif marker == _APP1:
            if content.startswith(exif.PREFIX) and self.orientation is None:
                self.orientation = exif.orientation(content)
            self.has_gain_map |= _GAIN_MAP in content
            return
        elif marker == _APP2:
            if content.startswith(b"MPF\0") and self.images is None:
                self.images = exif.images_of_mpf(content[4:])
            return
        elif not (marker == _APP0 and content.startswith(b"JFIF")) and not (
            marker == _APP14 and content.startswith(b"Adobe")  # together, these tell the color space
        ):
            return
        self.kept.append((start, end))

    def scan(self, start: int) -> None:
        """Takes notice of a scan."""
        if not self.scans:
            self.first_scan = start
            self.scan_components = self.data[start + 4] if start + 4 < len(self.data) else 0
        self.scans += 1

    def container(self, end: int) -> Container:
        """Returns the outcome for an image that ends at a position."""
        if self.frame is None or not self.scans:
            raise Damaged("no frame header or no scan")
        if self.data.find(b"\xff" * (MAX_FILL_BYTES + 1), self.first_scan, end) >= 0:
            raise TooManyParts("fill bytes in a row", MAX_FILL_BYTES)
        self.kept.append((self.first_scan, end))
        marker, content = self.frame
        if content[0] != 8:
            raise Unsupported(f"JPEG of {content[0]} bits; save it as a 16-bit PNG or TIFF")
        height, width = int.from_bytes(content[1:3]), int.from_bytes(content[3:5])
        pixels = width * height
        _check_scans(self.scans, pixels)
        components = content[5]
        frames = 1 if self.has_gain_map else self.images or 1
        pixel_format = PixelFormat(bands=components)
        header = ImageHeader((width, height), self.orientation or 1, frames, pixel_format)
        result_bytes = RESULT_BYTES
        if marker in _PROGRESSIVE or self.scan_components < components:
            # The decoder frees its coefficients before the result is made.
            result_bytes = max(result_bytes, _coefficient_bytes(content))
        pixel_bytes = (1 if components == 1 else 4) + result_bytes
        return Container(header, "JPEG", pixels, pixels * pixel_bytes, tuple(joined(self.data, self.kept)))


def read(data: bytes) -> Container:
    """Walks through a JPEG. Raises Damaged or TooManyParts."""
    walk, position, parts = _Walk(data), 2, 0
    while (found := _SEGMENT.search(data, position)) is not None:
        marker, start = data[found.end() - 1], found.start()
        if marker == _END_OF_IMAGE:
            return walk.container(found.end())
        parts += 1
        check_count(parts, "segments", MAX_PARTS)
        # Every segment begins with its length, including the header of a scan.
        length = int.from_bytes(data[found.end() : found.end() + 2])
        if marker == _START_OF_SCAN:
            walk.scan(start)
            check_count(walk.scans, "scans", MAX_SCANS)
        elif not walk.scans:
            if length < 2 or marker == _START_OF_IMAGE:
                raise Damaged(f"segment 0x{marker:02X} of {length} bytes at byte {start}")
            walk.segment(marker, start, start + 2 + length)
        position = start + 2 + length
    return walk.container(len(data))


def _check_scans(scans: int, pixels: int) -> None:
    allowed = min(MAX_SCANS, max(LARGE_IMAGE_SCANS, MAX_SCANNED_PIXELS // max(pixels, 1)))
    check_count(scans, f"scans of {pixels} px", allowed)


def _coefficient_bytes(frame: bytes) -> int:
    """Returns the bytes per px of coefficients that a decoder keeps between scans: two for each sample."""
    sampling = [(byte >> 4, byte & 15) for byte in frame[7 : 6 + 3 * frame[5] : 3]]
    widest = max((h for h, _ in sampling), default=1) * max((v for _, v in sampling), default=1)
    samples = sum(h * v for h, v in sampling)
    return -(-2 * samples // max(widest, 1))
