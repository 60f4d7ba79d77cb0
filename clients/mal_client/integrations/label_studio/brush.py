"""Encodes masks in Label Studio's brush format: the RLE of thi.ng's rle-pack over RGBA values, as a list of bytes.

A header (32 bits: number of values; 5 bits: bits per value minus 1; 4 x 4 bits: bits per run length minus 1) precedes
the runs: one bit for "repeated", 2 bits that select one of the four length sizes, the length minus 1, the value. Label
Studio paints alpha, so each pixel has four equal values, 0 or 255. `label_studio_sdk.converter.brush` writes the same
bytes (a test compares them) in four times the time, but the SDK installs opencv-python, which overwrites the files of
opencv-python-headless, and some thirty other packages.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from mal_train.core.masks.rle import Rle, decode_mask

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
