"""Encodes and decodes Label Studio's brush masks: the RLE of thi.ng's rle-pack over RGBA values, as a list of bytes.

A header (32 bits: number of values; 5 bits: bits per value minus 1; 4 x 4 bits: bits per run length minus 1) precedes
the runs: one bit for "repeated", 2 bits that select one of the four length sizes, the length minus 1, the value. Label
Studio paints alpha, so each pixel has four equal values, 0 or 255. `label_studio_sdk.converter.brush` writes the same
bytes (a test compares them) in four times the time, but the SDK installs opencv-python, which overwrites the files of
opencv-python-headless, and some thirty other packages.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mal_train.core.errors import BadDataset
from mal_train.core.masks.rle import Rle, decode_mask
from mal_train.core.masks.row_runs import check_frame, encode_row_bounds

CHANNELS: Final = 4
VALUE_BITS: Final = 8
LENGTH_BITS: Final = (3, 4, 8, 16)
MAX_RUNS: Final = tuple(2**bits for bits in LENGTH_BITS)
"""Longest run of each length size, in values."""

HEADER_BITS: Final = 32 + 5 + 4 * len(LENGTH_BITS)


def encode_brush(rle: Rle) -> list[int]:
    """Encodes a mask as the `rle` field of a brush region, bytes as integers.

    >>> from mal_train.core.masks.rle import encode_mask
    >>> encode_brush(encode_mask(np.array([[0, 1]])))
    [0, 0, 0, 8, 57, 27, 252, 96, 17, 255, 128]
    """
    flat = decode_mask(rle).ravel()
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    bounds = np.concatenate(([0], edges, [flat.size]))
    lengths = np.diff(bounds) * CHANNELS
    values = np.where(flat[bounds[:-1]], 255, 0)
    codes, widths = _runs(lengths, values)
    header = np.array([_header(flat.size * CHANNELS)], dtype=np.uint64)
    bits = np.concatenate([_bits(header, np.array([HEADER_BITS])), _bits(codes, widths)])
    packed: list[int] = np.packbits(bits).tolist()
    return packed


def decode_brush(code: Any, size_wh: tuple[int, int], name: str = "mask") -> Rle:
    """Decodes the `rle` field of a brush region: a pixel is foreground where its alpha is above 0.

    >>> from mal_train.core.masks.rle import encode_mask
    >>> decode_brush([0, 0, 0, 8, 57, 27, 252, 96, 17, 255, 128], (2, 1)) == encode_mask(np.array([[0, 1]]))
    True

    Args:
        code: bytes as integers, from outside.
        size_wh: width and height of the image in px.
        name: begins every message.

    Raises:
        BadDataset: not such bytes, another number of values than the image has, a code that ends early, or a mask of
            too many runs.
    """
    width, height = size_wh
    check_frame(size_wh, name)
    try:
        content = bytes(code) if isinstance(code, list) else b""
    except (TypeError, ValueError):
        content = b""
    if not content:
        raise BadDataset(f"{name}: rle is not a list of bytes, integers from 0 to 255")
    lengths, values = zip(*_decoded_runs(_BitReader(content, name), width * height * CHANNELS), strict=True)
    ends = np.cumsum(np.concatenate(lengths))
    is_bound = np.diff(np.concatenate(values), prepend=False, append=False)
    return encode_row_bounds(np.concatenate(([0], ends))[is_bound], (0, 0, width, height), size_wh, name)


def _decoded_runs(bits: _BitReader, count: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.bool_]]]:
    """Yields (lengths in px, foreground) of the runs of alpha values, in row order."""
    total, value_bits = bits.read(32), bits.read(5) + 1
    sizes = [bits.read(4) + 1 for _ in LENGTH_BITS]
    if total != count:
        raise BadDataset(f"{bits.name}: rle of {total} values; the image has {count}, {CHANNELS} for each pixel")
    done = 0
    while done < total:
        is_run = bits.read(1)
        end = done + bits.read(sizes[bits.read(2)]) + 1
        if end > total:
            raise BadDataset(f"{bits.name}: rle has more values than its header states")
        # Alpha is the last of the values of a pixel.
        if is_run:
            yield np.array([end // CHANNELS - done // CHANNELS]), np.array([bits.read(value_bits) > 0])
        else:
            alphas = bits.read_many(end - done, value_bits)[CHANNELS - 1 - done % CHANNELS :: CHANNELS]
            yield np.ones(alphas.size, np.int64), alphas > 0
        done = end


class _BitReader:
    """Reads numbers from bytes, most significant bit first; `name` begins its messages."""

    def __init__(self, content: bytes, name: str) -> None:
        self.name = name
        self._content = content
        self._position = 0

    def read(self, width: int) -> int:
        """Returns the next number of up to 32 bits."""
        start, end = self._position, self._advance(width)
        part = int.from_bytes(self._content[start // 8 : (end + 7) // 8], "big")
        return part >> -end % 8 & (1 << width) - 1

    def read_many(self, count: int, width: int) -> NDArray[np.int64]:
        """Returns the next `count` numbers."""
        start, end = self._position, self._advance(count * width)
        part = np.frombuffer(self._content, np.uint8)[start // 8 : (end + 7) // 8]
        bits = np.unpackbits(part)[start % 8 :][: count * width].reshape(count, width)
        return bits @ (1 << np.arange(width - 1, -1, -1, dtype=np.int64))

    def _advance(self, width: int) -> int:
        self._position += width
        if self._position > 8 * len(self._content):
            raise BadDataset(f"{self.name}: rle ends before its last value")
        return self._position


def _header(count: int) -> int:
    header = count << 5 | (VALUE_BITS - 1)
    for bits in LENGTH_BITS:
        header = header << 4 | (bits - 1)
    return header


def _runs(lengths: NDArray[np.int64], values: NDArray[np.int64]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Returns (code word, its number of bits) of each run; a run too long for one word takes several."""
    size_index = np.minimum(np.searchsorted(MAX_RUNS, lengths), len(MAX_RUNS) - 1)
    pieces = -(-lengths // MAX_RUNS[-1])
    of_run = np.repeat(np.arange(lengths.size), pieces)
    is_last = np.append(of_run[1:] != of_run[:-1], True)
    piece_lengths = np.where(is_last, lengths[of_run] - (pieces[of_run] - 1) * MAX_RUNS[-1], MAX_RUNS[-1])
    selector = size_index[of_run]
    length_bits = np.asarray(LENGTH_BITS)[selector]
    words = (4 | selector) << (length_bits + VALUE_BITS) | (piece_lengths - 1) << VALUE_BITS | values[of_run]
    return words.astype(np.uint64), 3 + length_bits + VALUE_BITS


def _bits(words: NDArray[np.uint64], widths: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Concatenates the bits of the words, each with its own width, most significant bit first."""
    word = np.repeat(np.arange(words.size), widths)
    offset = np.arange(word.size) - np.repeat(np.cumsum(widths) - widths, widths)
    shift = (widths[word] - 1 - offset).astype(np.uint64)
    return (words[word] >> shift & np.uint64(1)).astype(np.uint8)
