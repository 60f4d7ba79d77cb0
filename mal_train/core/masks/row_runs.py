"""Encodes masks whose runs go row by row, as annotation tools store them; COCO's go column by column.

The cost follows the runs of both orders, not the pixels: a short code from outside may state an image of any size.
"""

import numpy as np
from numpy.typing import NDArray

from mal_train.core.errors import BadDataset
from mal_train.core.masks.rle import MAX_PIXELS, MAX_RUNS, Rle, encode_bounds


def check_frame(size_wh: tuple[int, int], name: str) -> None:
    """Raises BadDataset for an image without pixels, or with more than MAX_PIXELS; `name` begins the message."""
    width, height = size_wh
    if not 0 < width * height <= MAX_PIXELS:
        raise BadDataset(f"{name}: image of {width}x{height} px; a mask has at most {MAX_PIXELS} px")


def encode_row_bounds(
    bounds: NDArray[np.int64], region: tuple[int, int, int, int], size_wh: tuple[int, int], name: str = "mask"
) -> Rle:
    """Encodes the mask of a region of an image.

    >>> encode_row_bounds(np.array([1, 3]), (1, 0, 2, 2), (3, 2)).to_coco()  # rows 01, 10 from column 1 on
    {'size': [2, 3], 'counts': '321'}

    Args:
        bounds: ascending positions in px in row order inside the region at which background and foreground alternate,
            background first; an even number. Two equal ones cancel each other.
        region: left, top, width, height in px, inside the image.
        size_wh: width and height of the image in px.
        name: begins every message.

    Raises:
        BadDataset: the mask has more than MAX_RUNS runs in columns.
    """
    left, top, region_width, _ = region
    width, height = size_wh
    rows, columns = np.divmod(bounds, region_width)
    # A bound inverts all later pixels. Against the row above, these are the pixels from its column on in its own row,
    # and those before its column in the next row: four ends of spans, of which equal ones of several bounds cancel.
    first, last = np.zeros_like(columns), np.full_like(columns, region_width)
    ends = ((rows, columns), (rows, last), (rows + 1, first), (rows + 1, columns))
    stride = width + 2
    spans = _odd(np.concatenate([_span_end(row + top, column + left, height, stride) for row, column in ends]))
    starts, lengths = spans[0::2], spans[1::2] - spans[0::2]
    count = int(lengths.sum())
    if count >= MAX_RUNS:
        raise BadDataset(f"{name}: {count + 1} runs in columns; the limit is {MAX_RUNS}")
    flips = np.repeat(starts - np.cumsum(lengths) + lengths, lengths) + np.arange(count)
    positions = np.sort(flips % stride * height + flips // stride)
    return encode_bounds(positions[0::2], positions[1::2], height, width)


def _span_end(row: NDArray[np.int64], column: NDArray[np.int64], height: int, stride: int) -> NDArray[np.int64]:
    """Returns a number for each place; below the last row is the first row of the next column."""
    is_below = row == height
    place: NDArray[np.int64] = np.where(is_below, 0, row) * stride + column + is_below
    return place


def _odd(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns the values that occur an odd number of times, ascending."""
    found, counts = np.unique(values, return_counts=True)
    odd: NDArray[np.int64] = found[counts % 2 == 1]
    return odd
