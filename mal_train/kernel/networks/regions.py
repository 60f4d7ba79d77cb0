"""Tells which entries of a layer's input given entries of its output depend on, for square maps of equal scale.

Lets the mask head compute only what the mask of a box depends on: a convolution reads its neighbors, and bilinear
resampling reads the two nearest entries in each direction.
"""

import math
from collections.abc import Iterable

from torch import Tensor

from mal_train.core.masks.geometry import Region

_ROUNDING = 1e-3
"""Slack of a sampling position, in entries, for rounding in float32."""


def whole(side: int) -> Region:
    """Returns the region of a whole map."""
    return Region(0, 0, side, side)


def union(regions: Iterable[Region]) -> Region:
    """Returns the smallest region that contains all of at least one region.

    >>> union([Region(1, 2, 5, 6), Region(0, 3, 4, 9)])
    Region(col0=0, row0=2, col1=5, row1=9)
    """
    col0, row0, col1, row1 = zip(*regions, strict=True)
    return Region(min(col0), min(row0), max(col1), max(row1))


def grown(region: Region, by: int, side: int) -> Region:
    """Returns the region with `by` more entries on each side, within a map of side `side`."""
    return Region(
        max(region.col0 - by, 0), max(region.row0 - by, 0), min(region.col1 + by, side), min(region.row1 + by, side)
    )


def snapped(region: Region, step: int, side: int) -> Region:
    """Returns the smallest region around it whose bounds are multiples of `step`, or the end of the map.

    >>> snapped(Region(3, 8, 17, 19), 8, 20)
    Region(col0=0, row0=8, col1=20, row1=20)
    """
    col0, row0 = (bound // step * step for bound in (region.col0, region.row0))
    col1, row1 = (min(-(-bound // step) * step, side) for bound in (region.col1, region.row1))
    return Region(col0, row0, col1, row1)


def mirrored(region: Region, side: int) -> Region:
    """Returns the region in the map flipped left to right."""
    return Region(side - region.col1, region.row0, side - region.col0, region.row1)


def bilinear_sources(region: Region, target_side: int, source_side: int) -> Region:
    """Returns the entries that bilinear resampling to `target_side`, without aligned corners, reads for a region.

    >>> bilinear_sources(Region(2, 0, 4, 8), 8, 4)
    Region(col0=0, row0=0, col1=3, row1=4)
    """
    if target_side == source_side:
        return region
    scale = source_side / target_side

    def first(start: int) -> int:
        return min(max(math.floor((start + 0.5) * scale - 0.5 - _ROUNDING), 0), source_side - 1)

    def end(stop: int) -> int:
        return min(math.floor((stop - 0.5) * scale - 0.5 + _ROUNDING) + 2, source_side)

    return Region(first(region.col0), first(region.row0), end(region.col1), end(region.row1))


def scaled(region: Region, factor: int) -> Region:
    """Returns the region in a map of `factor` times the side."""
    return Region(*(factor * bound for bound in region))


def cut(map_NCHW: Tensor, held: Region, region: Region) -> Tensor:
    """Returns the part `region` of a map of which `map_NCHW` is the part `held`; a view."""
    return map_NCHW[
        :, :, region.row0 - held.row0 : region.row1 - held.row0, region.col0 - held.col0 : region.col1 - held.col0
    ]
