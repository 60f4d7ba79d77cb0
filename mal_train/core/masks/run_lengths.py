"""Decodes the compressed strings of COCO's run-length codes.

COCO writes each run in base 32, low digits first; from the fourth run on, the difference to the run two before.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mal_train.core.errors import BadDataset

RUN_BYTES = 7
"""Maximum bytes of a run: a difference of two runs of at most 2^30 px."""

Integers = NDArray[np.int64]


def run_lengths(counts: bytes, name: str = "mask") -> Integers:
    """Decodes a compressed string to run lengths: alternating background and foreground, background first.

    Raises:
        BadDataset: bytes outside the alphabet, an incomplete number, or a negative run.
    """
    if not counts:
        return np.zeros(0, dtype=np.int64)
    values, _ = _numbers(counts, name)
    # Values have at most 35 bits, and there are fewer than 2**28 of them, so these sums cannot overflow.
    for first in (1, 2):
        np.add.accumulate(values[first::2], out=values[first::2])
    return _not_negative(values, name)


def joined_run_lengths(codes: Sequence[bytes], name: str = "mask") -> tuple[Integers, Integers]:
    """Decodes several compressed strings, none of them empty, in a fraction of the time of one after the other.

    Returns:
        Run lengths of all codes, one code after the other, and the place (N + 1,) of the first run of each.

    Raises:
        BadDataset: one of the codes is not what `run_lengths` accepts.
    """
    values, ends = _numbers(b"".join(codes), name)
    last_bytes = np.fromiter(map(len, codes), np.int64, len(codes)).cumsum() - 1
    last_runs = ends.searchsorted(last_bytes)
    if (ends[last_runs] != last_bytes).any():
        raise BadDataset(f"{name}: the RLE is truncated")
    starts = np.zeros(len(codes) + 1, dtype=np.int64)
    starts[1:] = last_runs + 1
    sizes = starts[1:] - starts[:-1]
    # Two columns, the even and the odd runs; each code begins in a row of its own.
    rows = (sizes + 1) // 2
    first_rows = rows.cumsum() - rows
    place = np.arange(values.size) + (2 * first_rows - starts[:-1]).repeat(sizes)
    columns = np.zeros(2 * int(rows.sum()), dtype=np.int64)
    columns[place] = values
    columns[2 * first_rows] = 0  # the third run is no difference
    sums = columns.reshape(-1, 2).cumsum(axis=0)
    before = sums[first_rows - 1]
    before[0] = 0
    runs = (sums - before.repeat(rows, axis=0)).ravel()[place]
    runs[starts[:-1]] = values[starts[:-1]]
    return _not_negative(runs, name), starts


def _numbers(counts: bytes, name: str) -> tuple[Integers, Integers]:
    """Decodes base 32; returns the numbers and the place of the last byte of each."""
    digits = np.frombuffer(counts, dtype=np.uint8) - np.uint8(48)
    if digits.max() > 63:
        raise BadDataset(f"{name}: counts has characters outside the RLE alphabet")
    (ends,) = (digits < 32).nonzero()
    if not ends.size or ends[-1] != digits.size - 1:
        raise BadDataset(f"{name}: the RLE is truncated")
    length = ends.copy()
    length[0] += 1
    length[1:] -= ends[:-1]
    longest = int(length.max())
    if longest > RUN_BYTES:
        raise BadDataset(f"{name}: a run is longer than any image")
    # The last digit is the highest and has the sign.
    values = ((digits[ends] & 31).astype(np.int64) ^ 16) - 16
    for back in range(1, longest):
        (longer,) = (length > back).nonzero()
        values[longer] = (values[longer] << 5) | (digits[ends[longer] - back] & 31)
    return values, ends


def _not_negative(runs: Integers, name: str) -> Integers:
    if runs.min() < 0:
        raise BadDataset(f"{name}: the RLE has a negative run")
    return runs
