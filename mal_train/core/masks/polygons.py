"""Masks as polygon rings on the corners of pixels, holes told apart, and back.

A ring runs along pixel edges, so filling it by the rule "a pixel belongs to it when its center lies inside" gives the
mask back exactly. OpenCV follows contours through pixel CENTERS, which loses half a pixel all round; here it follows
them on a grid of half pixels, and each half pixel stands for the corner next to it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from mal_train.core.masks.rle import MaskPatch

Points = NDArray[np.int32]
"""(N, 2) x, y in px of the stored image; whole numbers, because rings turn at pixel corners only."""

_PARENT = 3
"""Column of OpenCV's contour tree that tells a hole's outer contour; -1 for an outer one."""


@dataclass(frozen=True, eq=False)
class Ring:
    """A closed line; the last point joins the first.

    Attributes:
        points: (N, 2) int32 x, y in px, N >= 3; (0, 0) is the top left corner of the top left pixel.
        is_hole: cuts a hole into the last ring before it that is none.
    """

    points: Points
    is_hole: bool = False


def to_rings(patch: MaskPatch, tolerance_px: float = 0.0) -> list[Ring]:
    """Rings of a mask: one for each 8-connected part, behind it one for each 4-connected hole; [] for an empty mask.

    Args:
        patch: the mask.
        tolerance_px: how far in px a ring may run beside the mask's edge, to have fewer points (Douglas-Peucker);
            0: only points on straight lines are left out and `fill` gives the mask back exactly. A ring of which less
            than a triangle would be left stays exact: no part and no hole is lost.
    """
    if not patch.mask.size:
        return []
    doubled = np.repeat(np.repeat(patch.mask.view(np.uint8), 2, axis=0), 2, axis=1)
    contours, tree = cv2.findContours(doubled, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    offset = np.array([patch.col0, patch.row0], dtype=np.int32)
    groups: dict[int, list[Ring]] = {}
    for at, contour in enumerate(contours):
        corners = _turns((np.asarray(contour[:, 0, :], dtype=np.int32) + 1) // 2)
        parent = int(tree[0, at, _PARENT])
        group = groups.setdefault(at if parent < 0 else parent, [])
        ring = Ring((_simplified(corners, tolerance_px) + offset).astype(np.int32), is_hole=parent >= 0)
        group.insert(len(group) if ring.is_hole else 0, ring)
    return [ring for group in groups.values() for ring in group]


def fill(rings: Sequence[NDArray[np.generic]], height: int, width: int) -> NDArray[np.bool_]:
    """(height, width) bool: the pixels whose centers lie inside an odd number of rings (N, 2) x, y in px.

    Holes need no mark: a pixel in a hole lies inside two rings. Parts outside the frame are cut off.

    >>> fill([np.array([[1, 0], [3, 0], [3, 2], [1, 2]])], 2, 4).astype(int).tolist()
    [[0, 1, 1, 0], [0, 1, 1, 0]]
    """
    # Each edge that crosses a row's middle flips everything to the right of the crossing.
    flips = np.zeros((height, width + 1), dtype=np.uint8)
    for ring in rings:
        points = np.asarray(ring, dtype=np.float64)
        rows, columns = _crossings(points, np.roll(points, -1, axis=0), height, width)
        np.bitwise_xor.at(flips, (rows, columns), 1)
    inside: NDArray[np.bool_] = np.bitwise_xor.accumulate(flips, axis=1)[:, :width].astype(np.bool_)
    return inside


def merge_holes(rings: Sequence[Ring]) -> list[Points]:
    """One closed line for each outer ring, its holes joined to it by bridges that are walked there and back.

    For formats without holes (COCO polygons, YOLO): a bridge has no width, so readers that fill by parity, pycocotools
    among them, get the hole back. In the order of the outer rings.
    """
    parts: list[tuple[Points, list[Points]]] = []
    for ring in rings:
        if ring.is_hole:
            parts[-1][1].append(ring.points)
        else:
            parts.append((ring.points, []))
    return [_joined(outline, holes) for outline, holes in parts]


def single_polygon(rings: Sequence[Ring]) -> Points:
    """All parts and holes as a single closed line, for formats with one polygon an object (YOLO); see `bridged`."""
    first, *others = merge_holes(rings)
    return _joined(first, others)


def _joined(outline: Points, holes: list[Points]) -> Points:
    """Joins every hole where it comes nearest to what has been joined so far; the leftmost first."""
    for hole in sorted(holes, key=lambda points: tuple(points.min(axis=0))):
        apart = ((outline[:, None, :].astype(np.int64) - hole[None, :, :]) ** 2).sum(axis=2)
        at, start = np.unravel_index(int(apart.argmin()), apart.shape)
        walked = np.roll(hole, -int(start), axis=0)
        outline = np.concatenate((outline[: at + 1], walked, walked[:1], outline[at:]))
    return outline


def _turns(corners: Points) -> Points:
    """The points at which a closed line along pixel edges turns."""
    moved = np.any(corners != np.roll(corners, 1, axis=0), axis=1)
    corners = corners[moved]
    before, after = corners - np.roll(corners, 1, axis=0), np.roll(corners, -1, axis=0) - corners
    turns = before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]
    turning: Points = corners[turns]
    return turning


def _simplified(corners: Points, tolerance_px: float) -> Points:
    if tolerance_px <= 0:
        return corners
    fewer = np.asarray(cv2.approxPolyDP(corners[:, None, :], tolerance_px, True), dtype=np.int32)[:, 0, :]
    return fewer if len(fewer) >= 3 and cv2.contourArea(fewer) > 0 else corners


def _crossings(
    a: NDArray[np.float64], b: NDArray[np.float64], height: int, width: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row and first column to the right of each crossing of the edges a-b (N, 2) with the middles of rows."""
    # Rows whose middle lies in [low, high): half open, so that a point shared by two edges counts once.
    first = np.clip(np.ceil(np.minimum(a[:, 1], b[:, 1]) - 0.5), 0, height).astype(np.int64)
    end = np.clip(np.ceil(np.maximum(a[:, 1], b[:, 1]) - 0.5), 0, height).astype(np.int64)
    count = end - first
    edge = np.repeat(np.arange(len(a)), count)
    row = np.arange(len(edge)) - np.repeat(np.cumsum(count) - count, count) + first[edge]
    (ax, ay), (bx, by) = a[edge].T, b[edge].T
    x = ax + (row + 0.5 - ay) * (bx - ax) / (by - ay)
    return row, np.clip(np.ceil(x - 0.5), 0, width).astype(np.int64)
