"""Fills COCO polygons exactly as pycocotools does, with memory that follows the number of crossed pixel columns.

pycocotools draws every edge point by point at five times the size, so that one edge between distant coordinates takes
80 MB. Only the points where an edge passes the center line of a pixel column decide the result; they are computed here
directly, and only for the columns of the frame.
"""

from collections.abc import Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]

_SCALE = 5
"""Subdivision of a pixel in pycocotools' rleFrPoly; points are rounded to this grid."""
_LEFT = 2
"""Grid column just left of the center line of pixel column 0."""


class TooManyCrossings(ValueError):
    """Edges that pass more pixel columns than allowed; the argument is their number."""


def polygon_bounds(
    polygons: Sequence[Sequence[float]], height: int, width: int, max_crossings: int
) -> tuple[Integers, Integers]:
    """Returns starts and ends (N,), column-major in px, of the runs inside any of the polygons; ascending and disjoint.

    Args:
        polygons: flat lists x, y, x, y … in px, each coordinate below 1e8 in size.
        height: rows of the frame.
        width: columns of the frame.
        max_crossings: see below.

    Raises:
        TooManyCrossings: edges pass more than `max_crossings` columns in all; found before they are drawn.
    """
    edges, polygon = _edges(polygons)
    first, count = _passed_columns(edges[0], edges[2], width)
    crossings = int(count.sum())
    if crossings > max_crossings:
        raise TooManyCrossings(crossings)
    edge = np.repeat(np.arange(count.size), count)
    column = np.arange(crossings) - np.repeat(np.cumsum(count) - count - first, count)
    row = _rows(edges[:, edge], _SCALE * column + _LEFT)
    position = column * height + np.clip(-((_LEFT - row) // _SCALE), 0, height)
    # Each crossing exchanges inside and outside for the rest of its polygon. Two at one pixel cancel; an even number
    # remains in each polygon, because every polygon is closed.
    flip = np.sort(polygon[edge] * (height * width + 1) + position)
    is_new = np.append(True, flip[1:] != flip[:-1]) if flip.size else np.zeros(0, dtype=np.bool_)
    index = np.flatnonzero(is_new)
    flip = flip[index[np.diff(index, append=flip.size) % 2 == 1]] % (height * width + 1)
    return union(flip[0::2], flip[1::2])


def _edges(polygons: Sequence[Sequence[float]]) -> tuple[Integers, Integers]:
    """Returns x0, y0, x1, y1 (4, E) of the edges on the fine grid, and the number of the polygon of each (E,)."""
    points = np.fromiter(chain.from_iterable(polygons), dtype=np.float64)
    # Conversion truncates towards zero, as in C.
    x, y = ((_SCALE * points[axis::2] + 0.5).astype(np.int64) for axis in (0, 1))
    sizes = np.array([len(polygon) // 2 for polygon in polygons])
    following = np.arange(1, x.size + 1)
    last = np.cumsum(sizes) - 1
    following[last] = last + 1 - sizes
    return np.stack((x, y, x[following], y[following])), np.repeat(np.arange(sizes.size), sizes)


def _passed_columns(x0: Integers, x1: Integers, width: int) -> tuple[Integers, Integers]:
    """Returns the first pixel column whose center line each edge passes, and the number of them; within the frame."""
    first = np.maximum(-((_LEFT - np.minimum(x0, x1)) // _SCALE), 0)
    last = np.minimum((np.maximum(x0, x1) - _LEFT - 1) // _SCALE, width - 1)
    return first, np.maximum(last + 1 - first, 0)


def _rows(edges: Integers, left: Integers) -> Integers:
    """Returns the upper grid row of each edge (4, E) where it passes from grid column `left` (E,) to `left` + 1."""
    x0, y0, x1, y1 = edges
    row = np.empty_like(left)
    is_flat = np.abs(x1 - x0) >= np.abs(y1 - y0)
    for chosen, rows_of in ((is_flat, _rows_of_flat), (~is_flat, _rows_of_steep)):
        row[chosen] = rows_of(edges[:, chosen], left[chosen])
    return row


def _rows_of_flat(edges: Integers, left: Integers) -> Integers:
    """Returns the rows of edges that have one point in each column."""
    x0, y0, x1, y1 = np.where(edges[0] > edges[2], edges[[2, 3, 0, 1]], edges)
    slope = (y1 - y0) / (x1 - x0)
    before, after = ((y0 + slope * (left + step - x0) + 0.5).astype(np.int64) for step in (0, 1))
    upper: Integers = np.minimum(before, after)
    return upper


def _rows_of_steep(edges: Integers, left: Integers) -> Integers:
    """Returns the rows of edges that have one point in each row: the last one before the column changes."""
    x0, y0, x1, y1 = np.where(edges[1] > edges[3], edges[[2, 3, 0, 1]], edges)
    slope = (x1 - x0) / (y1 - y0)

    def stays_left(step: Integers) -> NDArray[np.bool_]:
        column = (x0 + slope * step + 0.5).astype(np.int64)
        is_before: NDArray[np.bool_] = (column <= left) == (slope > 0)
        return is_before

    # The quotient may be off by the rounding of pycocotools' expression; its neighbors decide.
    step: Integers = np.floor((left + 0.5 - x0) / slope).astype(np.int64)
    for _ in range(2):
        step -= ~stays_left(step)
    for _ in range(2):
        step += stays_left(step + 1)
    row: Integers = y0 + step
    return row


def union(starts: Integers, ends: Integers) -> tuple[Integers, Integers]:
    """Returns the union of half-open intervals, ascending, without empty ones; intervals that touch are joined."""
    is_full = starts < ends
    starts, ends = starts[is_full], ends[is_full]
    order = np.argsort(starts, kind="stable")
    starts, ends = starts[order], np.maximum.accumulate(ends[order])
    is_apart = starts[1:] > ends[:-1]
    return starts[np.append(True, is_apart)[: starts.size]], ends[np.append(is_apart, True)[: starts.size]]
