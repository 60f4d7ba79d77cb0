"""Label Studio's brush code: the RLE of thi.ng's rle-pack over the RGBA values of a mask, as a list of byte values.

A header (32 bits: number of values; 5 bits: bits of a value less 1; four times 4 bits: bits of a run's length less 1),
then runs: a bit that says "repeated", 2 bits that choose one of the four length sizes, the length less 1, the value.
Label Studio paints alpha, so each pixel is four equal values, 0 or 255. `label_studio_sdk.converter.brush` writes the
same bytes (a test holds the two together) in four times the time, but the SDK brings opencv-python, whose files replace
those of opencv-python-headless, and some thirty other packages.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from mal_train.core.masks.rle import Rle, decode_mask

CHANNELS: Final = 4
VALUE_BITS: Final = 8
LENGTH_BITS: Final = (3, 4, 8, 16)
MOST: Final = tuple(2**bits for bits in LENGTH_BITS)
"""Longest run of each size, in values."""

HEADER_BITS: Final = 32 + 5 + 4 * len(LENGTH_BITS)


def encode_brush(rle: Rle) -> list[int]:
    """The `rle` field of a brush region: bytes as numbers.

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


def _header(count: int) -> int:
    header = count << 5 | (VALUE_BITS - 1)
    for bits in LENGTH_BITS:
        header = header << 4 | (bits - 1)
    return header


def _runs(lengths: NDArray[np.int64], values: NDArray[np.int64]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """(code word, its number of bits) of each run; a run too long for one word takes several."""
    kinds = np.minimum(np.searchsorted(MOST, lengths), len(MOST) - 1)
    pieces = -(-lengths // MOST[-1])
    of_run = np.repeat(np.arange(lengths.size), pieces)
    is_last = np.append(of_run[1:] != of_run[:-1], True)
    sizes = np.where(is_last, lengths[of_run] - (pieces[of_run] - 1) * MOST[-1], MOST[-1])
    kind = kinds[of_run]
    length_bits = np.asarray(LENGTH_BITS)[kind]
    words = (4 | kind) << (length_bits + VALUE_BITS) | (sizes - 1) << VALUE_BITS | values[of_run]
    return words.astype(np.uint64), 3 + length_bits + VALUE_BITS


def _bits(words: NDArray[np.uint64], widths: NDArray[np.int64]) -> NDArray[np.uint8]:
    """The words one after the other, highest bit first, each with its own width."""
    word = np.repeat(np.arange(words.size), widths)
    place = np.arange(word.size) - np.repeat(np.cumsum(widths) - widths, widths)
    shift = (widths[word] - 1 - place).astype(np.uint64)
    return (words[word] >> shift & np.uint64(1)).astype(np.uint8)
