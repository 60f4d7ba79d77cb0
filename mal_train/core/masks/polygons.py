"""Converts masks to polygon rings on pixel corners, with holes, and back.

Rings follow pixel edges, so filling the pixels whose centers lie inside gives the exact mask. OpenCV traces contours
through pixel centers, which shrinks a mask by half a pixel on each side. Here it traces a mask of twice the size, whose
contour pixels correspond to the corners of the original pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from mal_train.core.masks.rle import MaskPatch

Points = NDArray[np.int32]
"""(N, 2) x, y in px of the stored image; integers, because vertices are pixel corners."""

_PAIRS = 1 << 18
"""Pairs of points whose distances are in memory at once; outlines of large masks have a hundred thousand points."""
_PARENT = 3
"""Column of OpenCV's contour hierarchy with the outer contour of a hole; -1 for an outer contour."""


@dataclass(frozen=True, eq=False)
class Ring:
    """Closed polygon; the last point connects to the first.

    Attributes:
        points: (N, 2) int32 x, y in px, N >= 3; (0, 0) is the top left corner of the top left pixel.
        is_hole: the ring is a hole of the nearest outer ring before it.
    """

    points: Points
    is_hole: bool = False


def to_rings(patch: MaskPatch, tolerance_px: float = 0.0) -> list[Ring]:
    """Returns one ring per 8-connected component, each followed by its 4-connected holes; [] for an empty mask.

    Args:
        patch: the mask.
        tolerance_px: maximum distance between a ring and the edge of the mask (Douglas-Peucker); 0 removes only points
            on straight lines, and `fill` restores the exact mask. A ring that would have fewer than three points stays
            exact, so no component and no hole is lost.
    """
    if not patch.mask.size:
        return []
    # Unlike np.repeat, this lets other threads run.
    doubled = cv2.resize(patch.mask.view(np.uint8), None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
    contours, tree = cv2.findContours(doubled, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    offset = np.array([patch.col0, patch.row0], dtype=np.int32)
    groups: dict[int, list[Ring]] = {}
    for index, contour in enumerate(contours):
        corners = _vertices((np.asarray(contour[:, 0, :], dtype=np.int32) + 1) // 2)
        parent = int(tree[0, index, _PARENT])
        group = groups.setdefault(index if parent < 0 else parent, [])
        ring = Ring((_simplified(corners, tolerance_px) + offset).astype(np.int32), is_hole=parent >= 0)
        group.insert(len(group) if ring.is_hole else 0, ring)
    return [ring for group in groups.values() for ring in group]


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


def merge_holes(rings: Sequence[Ring]) -> list[Points]:
    """Returns one polygon per outer ring, with its holes connected by bridges, in the order of the outer rings.

    For formats without holes (COCO polygons, YOLO). The polygon passes each bridge twice, so a bridge has no width, and
    readers that fill by parity, such as pycocotools, restore the hole.
    """
    components: list[tuple[Points, list[Points]]] = []
    for ring in rings:
        if ring.is_hole:
            components[-1][1].append(ring.points)
        else:
            components.append((ring.points, []))
    return [_joined(outline, holes) for outline, holes in components]


def single_polygon(rings: Sequence[Ring]) -> Points:
    """Returns all components and holes as one polygon, for formats with one polygon per object (YOLO)."""
    first, *others = merge_holes(rings)
    return _joined(first, others)


def _joined(outline: Points, holes: list[Points]) -> Points:
    """Connects each hole to the nearest point of the polygon so far; the leftmost hole first."""
    for hole in sorted(holes, key=lambda points: tuple(points.min(axis=0))):
        nearest, start = _nearest(outline, hole)
        rotated = np.roll(hole, -start, axis=0)
        outline = np.concatenate((outline[: nearest + 1], rotated, rotated[:1], outline[nearest:]))
    return outline


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


def _vertices(corners: Points) -> Points:
    """Returns the points at which a closed line along pixel edges changes direction."""
    is_new = np.any(corners != np.roll(corners, 1, axis=0), axis=1)
    corners = corners[is_new]
    before, after = corners - np.roll(corners, 1, axis=0), np.roll(corners, -1, axis=0) - corners
    turns = before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]
    vertices: Points = corners[turns]
    return vertices


def _simplified(corners: Points, tolerance_px: float) -> Points:
    if tolerance_px <= 0:
        return corners
    simplified = np.asarray(cv2.approxPolyDP(corners[:, None, :], tolerance_px, True), dtype=np.int32)[:, 0, :]
    return simplified if len(simplified) >= 3 and cv2.contourArea(simplified) > 0 else corners


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
