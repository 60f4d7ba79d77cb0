"""Converts masks to polygon rings on pixel corners, with holes, and back.

Rings follow pixel edges, so filling the pixels whose centers lie inside gives the exact mask. OpenCV traces contours
through pixel centers, which shrinks a mask by half a pixel on each side. Here it traces a mask of twice the size, whose
contour pixels correspond to the corners of the original pixels.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from mal_train.core.masks.rle import MaskPatch

Points = NDArray[np.int32]
"""(N, 2) x, y in px of the stored image; integers, because vertices are pixel corners."""

_PAIRS = 1 << 18
"""Pairs of points whose distances are in memory at once; outlines of large masks have a hundred thousand points."""
_MAX_PAIRS = 1 << 27
"""Pairs of points whose distances are compared for one polygon, in about a second; a noisy mask has 10¹¹."""
_CONTOURS_AT_ONCE = 1000
"""Contours copied by one call of NumPy."""


@dataclass(frozen=True, eq=False)
class Ring:
    """Closed polygon; the last point connects to the first.

    Attributes:
        points: (N, 2) int32 x, y in px, N >= 3; (0, 0) is the top left corner of the top left pixel.
        is_hole: the ring is a hole of the nearest outer ring before it.
    """

    points: Points
    is_hole: bool = False


@dataclass(frozen=True, eq=False)
class Rings:
    """Rings of a mask in three arrays: outer rings, each followed by its holes.

    The mask of a noisy image has a hundred thousand rings. As objects they would take a hundred times the memory of
    their points, and stop all other threads while they are freed.

    Attributes:
        points: (N, 2) int32 x, y in px, of all rings.
        ends: (R,) end of each ring in `points`.
        is_hole: (R,) as in `Ring`.
    """

    points: Points
    ends: NDArray[np.int64]
    is_hole: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.ends)

    def __iter__(self) -> Iterator[Ring]:
        start = 0
        for end, is_hole in zip(self.ends.tolist(), self.is_hole.tolist(), strict=True):
            yield Ring(self.points[start:end], is_hole)
            start = end

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return self.points.nbytes + self.ends.nbytes + self.is_hole.nbytes


def to_rings(patch: MaskPatch, tolerance_px: float = 0.0) -> Rings:
    """Returns one ring per 8-connected component, each followed by its 4-connected holes; none for an empty mask.

    Takes time in proportion to the pixels and to the points of the rings.

    Args:
        patch: the mask.
        tolerance_px: maximum distance between a ring and the edge of the mask (Douglas-Peucker); 0 removes only points
            on straight lines, and `fill` restores the exact mask. A ring that would have fewer than three points stays
            exact, so no component and no hole is lost.
    """
    if not patch.mask.any():
        return Rings(np.zeros((0, 2), np.int32), np.zeros(0, np.int64), np.zeros(0, np.bool_))
    # Unlike np.repeat, this lets other threads run.
    doubled = cv2.resize(patch.mask.view(np.uint8), None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
    # Not RETR_CCOMP: to find the outline of each hole, it takes time in proportion to the square of their number.
    contours, _ = cv2.findContours(doubled, cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
    order, is_hole = _outer_before_holes(*_concatenated(contours), patch.mask)
    traced, ends = _concatenated([contours[index] for index in order.tolist()])
    del contours  # an object for each takes most of the memory
    points, ends = _vertices((traced + 1) // 2, ends)
    exact = Rings(points + np.array([patch.col0, patch.row0], np.int32), ends, is_hole)
    return exact if tolerance_px <= 0 else _simplified(exact, tolerance_px)


def fill(rings: Sequence[NDArray[np.generic]], height: int, width: int) -> NDArray[np.bool_]:
    """Returns the mask (height, width) of pixels whose centers lie inside an odd number of rings (N, 2) x, y in px.

    Holes need no flag: a pixel in a hole lies inside two rings. Parts outside the frame are clipped.

    >>> fill([np.array([[1, 0], [3, 0], [3, 2], [1, 2]])], 2, 4).astype(int).tolist()
    [[0, 1, 1, 0], [0, 1, 1, 0]]
    """
    # Each edge that crosses the center line of a row flips all pixels to the right of the crossing.
    flips = np.zeros((height, width + 1), dtype=np.uint8)
    for ring in rings:
        points = np.asarray(ring, dtype=np.float64)
        rows, columns = _crossings(points, np.roll(points, -1, axis=0), height, width)
        np.bitwise_xor.at(flips, (rows, columns), 1)
    inside: NDArray[np.bool_] = np.bitwise_xor.accumulate(flips, axis=1)[:, :width].astype(np.bool_)
    return inside


def merge_holes(rings: Iterable[Ring]) -> list[Points]:
    """Returns one polygon per outer ring, with its holes connected by bridges, in the order of the outer rings.

    For formats without holes (COCO polygons, YOLO). The polygon passes each bridge twice, so a bridge has no width, and
    readers that fill by parity, such as pycocotools, restore the hole. Bridges are as short as possible, except in a
    mask of many thousand holes.
    """
    components: list[tuple[Points, list[Points]]] = []
    for ring in rings:
        if ring.is_hole:
            components[-1][1].append(ring.points)
        else:
            components.append((ring.points, []))
    return [_joined(outline, holes) for outline, holes in components]


def single_polygon(rings: Iterable[Ring]) -> Points:
    """Returns all components and holes as one polygon, for formats with one polygon per object (YOLO)."""
    first, *others = merge_holes(rings)
    return _joined(first, others)


def _joined(outline: Points, holes: list[Points]) -> Points:
    """Connects each hole to the nearest point of the polygon so far; the leftmost hole first.

    Holes with more than _MAX_PAIRS pairs of points are connected to each other instead.
    """
    holes = sorted(holes, key=lambda points: tuple(points.min(axis=0)))
    hole_points = sum(map(len, holes))
    if (len(outline) + hole_points) * hole_points > _MAX_PAIRS:
        return _chained(outline, holes)
    for hole in holes:
        nearest, start = _nearest(outline, hole)
        rotated = np.roll(hole, -start, axis=0)
        outline = np.concatenate((outline[: nearest + 1], rotated, rotated[:1], outline[nearest:]))
    return outline


def _chained(outline: Points, holes: list[Points]) -> Points:
    """Connects the first points of the outline and all holes by one line, there and back again."""
    rings = [outline, *holes]
    there = [part for ring in rings for part in (ring, ring[:1])]
    back = [ring[:1] for ring in rings[-2:0:-1]]
    return np.concatenate(there + back)


def _nearest(outline: Points, hole: Points) -> tuple[int, int]:
    """Returns the indices of the two points nearest to each other; the first in the outline of equal distance."""
    step = max(1, _PAIRS // len(hole))
    best, indices = np.inf, (0, 0)
    for first in range(0, len(outline), step):
        part = outline[first : first + step, None, :].astype(np.int64)
        squared_distance = ((part - hole[None, :, :]) ** 2).sum(axis=2)
        nearest, start = divmod(int(squared_distance.argmin()), len(hole))
        if squared_distance[nearest, start] < best:
            best, indices = squared_distance[nearest, start], (first + nearest, start)
    return indices


def _outer_before_holes(
    points: Points, ends: NDArray[np.int64], mask: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Returns the order of contours in which the holes of a component follow its outer contour, and which are holes.

    Args:
        points: points of all contours, on the pixels of a mask of twice the size.
        ends: end of each contour in `points`.
        mask: the mask.
    """
    starts = np.concatenate(([0], ends[:-1]))
    # OpenCV traces outer contours and holes in opposite directions.
    x, y = points[:, 0], points[:, 1]
    _, after = _neighbors(ends)
    twice_area = np.multiply(x, y[after], dtype=np.int64)
    twice_area -= np.multiply(x[after], y, dtype=np.int64)
    is_hole = np.add.reduceat(twice_area, starts) > 0
    _, labels = cv2.connectedComponents(mask.view(np.uint8), connectivity=8)
    component = labels[y[starts] // 2, x[starts] // 2]
    order = np.lexsort((y[starts], is_hole, component)).astype(np.int64)
    return order, is_hole[order]


def _concatenated(contours: Sequence[NDArray[Any]]) -> tuple[Points, NDArray[np.int64]]:
    """Returns the points of contours of OpenCV, each (N, 1, 2), and the end of each among all points."""
    # In parts, since NumPy holds the GIL for each.
    parts = [
        np.concatenate(contours[first : first + _CONTOURS_AT_ONCE])
        for first in range(0, len(contours), _CONTOURS_AT_ONCE)
    ]
    sizes = np.fromiter(map(len, contours), np.int64, len(contours))
    return np.concatenate(parts)[:, 0, :].astype(np.int32, copy=False), np.cumsum(sizes)


def _vertices(corners: Points, ends: NDArray[np.int64]) -> tuple[Points, NDArray[np.int64]]:
    """Returns the points at which closed lines along pixel edges change direction, and the end of each line."""
    before, _ = _neighbors(ends)
    corners, ends = _selected(corners, ends, np.any(corners != corners[before], axis=1))
    before, after = _neighbors(ends)
    last, following = corners - corners[before], corners[after] - corners
    return _selected(corners, ends, last[:, 0] * following[:, 1] != last[:, 1] * following[:, 0])


def _neighbors(ends: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns the indices of the points before and after each point of closed lines, of which none is empty."""
    starts = np.concatenate((ends[:1] * 0, ends[:-1]))
    index = np.arange(ends[-1])
    before, after = index - 1, index + 1
    before[starts], after[ends - 1] = ends - 1, starts
    return before, after


def _selected(points: Points, ends: NDArray[np.int64], is_kept: NDArray[np.bool_]) -> tuple[Points, NDArray[np.int64]]:
    return points[is_kept], np.cumsum(is_kept, dtype=np.int64)[ends - 1]


def _simplified(rings: Rings, tolerance_px: float) -> Rings:
    found = [_approximated(ring.points[:, None, :], tolerance_px) for ring in rings]
    return Rings(*_concatenated(found), rings.is_hole)


def _approximated(contour: NDArray[np.int32], tolerance_px: float) -> NDArray[np.int32]:
    simplified = np.asarray(cv2.approxPolyDP(contour, tolerance_px, True), dtype=np.int32)
    return simplified if len(simplified) >= 3 and cv2.contourArea(simplified) > 0 else contour


def _crossings(
    a: NDArray[np.float64], b: NDArray[np.float64], height: int, width: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns row and first column to the right of each crossing of edges a-b (N, 2) with row center lines."""
    # Rows whose center lies in [low, high): half-open, so that a point shared by two edges counts once.
    first = np.clip(np.ceil(np.minimum(a[:, 1], b[:, 1]) - 0.5), 0, height).astype(np.int64)
    end = np.clip(np.ceil(np.maximum(a[:, 1], b[:, 1]) - 0.5), 0, height).astype(np.int64)
    count = end - first
    edge = np.repeat(np.arange(len(a)), count)
    row = np.arange(len(edge)) - np.repeat(np.cumsum(count) - count, count) + first[edge]
    (ax, ay), (bx, by) = a[edge].T, b[edge].T
    x = ax + (row + 0.5 - ay) * (bx - ax) / (by - ay)
    return row, np.clip(np.ceil(x - 0.5), 0, width).astype(np.int64)
