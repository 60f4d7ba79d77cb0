"""Reads the header of a BMP file, whose only parts are header, palette and pixels."""

import struct

from mal_train.core.images.container import RESULT_BYTES, Container, Damaged, ImageHeader, TooManyParts

SIGNATURE = b"BM"

MAX_RUN_LENGTH_CODED = 4_000_000
"""Bytes and pixels together of a run-length coded file. Pillow decodes it in Python: 1 µs for each."""

_HEADER_SIZES = frozenset({12, 40, 52, 56, 64, 108, 124})
_RUN_LENGTH_CODES = frozenset({1, 2})


def read(data: bytes) -> Container:
    """Reads the header of a BMP. Raises Damaged or TooManyParts."""
    header_size = int.from_bytes(data[14:18], "little")
    if header_size not in _HEADER_SIZES or len(data) < 14 + header_size:
        raise Damaged(f"a header of {header_size} bytes")
    if header_size == 12:
        width, height, _, bits = struct.unpack_from("<HHHH", data, 18)
        compression = 0
    else:
        width, height, _, bits, compression = struct.unpack_from("<IiHHI", data, 18)
    pixels = width * abs(height)
    if compression in _RUN_LENGTH_CODES and len(data) + pixels > MAX_RUN_LENGTH_CODED:
        raise TooManyParts("bytes and pixels in a run-length coded BMP", MAX_RUN_LENGTH_CODED)
    # Run lengths are expanded into two buffers before they become Pillow's image.
    pixel_bytes = (1 if bits <= 8 else 4) + RESULT_BYTES + (2 if compression in _RUN_LENGTH_CODES else 0)
    return Container(ImageHeader((width, abs(height))), "BMP", pixels, pixels * pixel_bytes, (data,))
