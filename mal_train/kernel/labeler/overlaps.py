"""Assigns contested pixels of an image to one of its instances. NumPy only; knows no network and no file.

Masks of one image may claim the same pixels. Two persons side by side exclude each other. A table and the plates on it
need not: instance annotations include the plates in the mask of the table, panoptic annotations do not. So a mask loses
contested pixels only to masks that overlap it in part. Of two such masks, the smaller one is usually in front, and a
higher probability outweighs a lower one. Points of a user outweigh both.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mal_train.core.masks.geometry import Region
from mal_train.core.masks.points import Point
from mal_train.core.score_model import OVERLAP_FEATURES

Pixels = tuple[NDArray[np.intp], NDArray[np.intp]]
"""Rows and columns of some pixels, to index a map."""

SIZE_WEIGHT = 2.0
"""Logits subtracted for each factor of e in mask size."""
NESTED_SHARE = 0.4
"""If another box owns at least this fraction of the smaller of two masks within the other one, one object is on or in
the other, and both masks keep these pixels.

Chosen with `SIZE_WEIGHT` on two sets of photographs, one with panoptic and one with instance annotations: no size class
loses on either (docs/experiments/masks-of-photographs.md)."""
DOMINATED_SHARE = 0.4
"""Claims of which other boxes own at least this share are dominated: the mask probably shows one of their objects.

Chosen on one set of photographs and measured on a second one (docs/experiments/masks-of-photographs.md)."""
OWNER_BYTES_PER_PIXEL = 9
"""Memory of `PixelOwners` for each pixel of the image."""
BLOCK_PIXELS = 2**18
"""Pixels compared at a time; bounds the memory of intermediate values."""
_MIN_PROB = 1e-5
"""Probabilities are clipped to [1e-5, 1 − 1e-5], so that logits are finite."""


@dataclass(frozen=True)
class MaskClaim:
    """The image pixels that one box claims.

    Attributes:
        region: image region that `prob` covers.
        prob: foreground probability in [0, 1], (rows, columns) float32.
        threshold: probability in (0, 1) above which a pixel is claimed.
        points: points in px of the image; their pixels are claimed, or are not, whatever their probability is.
        pooled: see `Prediction.pooled`.
    """

    region: Region
    prob: NDArray[np.float32]
    threshold: float
    points: tuple[Point, ...] = ()
    pooled: NDArray[np.float32] | None = None

    @cached_property
    def mask(self) -> NDArray[np.bool_]:
        """The claimed pixels, (rows, columns) bool; cannot be written to."""
        claimed: NDArray[np.bool_] = self.prob > self.threshold
        claimed[self.inside] = True
        claimed[self._pixels(is_positive=False)] = False
        claimed.setflags(write=False)
        return claimed

    @cached_property
    def inside(self) -> Pixels:
        """Pixels of the region with a positive point."""
        return self._pixels(is_positive=True)

    def _pixels(self, *, is_positive: bool) -> Pixels:
        pixels = [point.pixel for point in self.points if point.is_positive is is_positive]
        inside = [(row, column) for column, row in pixels if self.region.contains(column, row)]
        rows, columns = np.array(inside, dtype=np.intp).reshape(-1, 2).T
        return rows - self.region.row0, columns - self.region.col0


@dataclass(frozen=True)
class Overlap:
    """Shares of one claim that the other boxes of its image have, in [0, 1].

    Attributes:
        lost: other boxes own these pixels. Those that the mask keeps, because their owner lies within it or it lies
            within their owner, count too.
        contested: other boxes claim these pixels.
    """

    lost: float = 0.0
    contested: float = 0.0

    @property
    def is_dominated(self) -> bool:
        """True if other boxes own at least `DOMINATED_SHARE` of the claimed pixels."""
        return self.lost >= DOMINATED_SHARE

    def features(self) -> list[float]:
        """Returns the features of a `ScoreModel` for resolved masks, in the order of `OVERLAP_FEATURES`."""
        return [getattr(self, name) for name in OVERLAP_FEATURES]


@dataclass(frozen=True)
class KeptPixels:
    """The pixels that a box keeps of its claim.

    Attributes:
        mask: (rows, columns) bool; a subset of the claimed pixels.
        overlap: what the other boxes have of the claim.
    """

    mask: NDArray[np.bool_]
    overlap: Overlap


class PixelOwners:
    """The pixels of one image, each of them owned by one of the boxes that claim it.

    Holds 9 bytes for each pixel of the image, and a number for each box: callers paste one claim at a time, `add` it,
    and paste it again for the pixels that it has `kept`.

    The claim with the highest `logit − SIZE_WEIGHT · log(claimed pixels)` owns a pixel, the first one on a tie; a claim
    with a positive point on the pixel is the highest. A mask also keeps its pixels with positive points, and the pixels
    of an owner that has at least `NESTED_SHARE` of the smaller of both claims within this mask.

    >>> left = MaskClaim(Region(0, 0, 4, 1), np.full((1, 4), 0.9, np.float32), 0.5)
    >>> right = MaskClaim(Region(3, 0, 7, 1), np.full((1, 4), 0.8, np.float32), 0.5)
    >>> inner = MaskClaim(Region(5, 0, 6, 1), np.full((1, 1), 0.8, np.float32), 0.5)
    >>> owners = PixelOwners((1, 7))
    >>> for index, claim in enumerate([left, right, inner]):
    ...     owners.add(index, claim)
    >>> kept = [owners.kept(index, claim) for index, claim in enumerate([left, right, inner])]
    >>> [one.mask.astype(int).tolist() for one in kept]
    [[[1, 1, 1, 1]], [[0, 1, 1, 1]], [[1]]]
    >>> [(one.overlap.lost, one.overlap.contested) for one in kept]
    [(0.0, 0.25), (0.5, 0.5), (0.0, 1.0)]

    Args:
        image_hw: height and width of the image in px; every region lies inside.
    """

    def __init__(self, image_hw: tuple[int, int]) -> None:
        self._best_HW = np.full(image_hw, -np.inf, dtype=np.float32)
        self._owner_HW = np.full(image_hw, -1, dtype=np.int32)
        self._claims_HW = np.zeros(image_hw, dtype=np.uint8)
        """Number of claims on each pixel; 2 stands for all numbers above 1."""
        self._areas = np.zeros(1, dtype=np.int64)
        """Claimed pixels by index."""

    def add(self, index: int, claim: MaskClaim) -> None:
        """Gives the box with this index, at least 0, the pixels for which its claim is the strongest so far.

        Each box is added once.
        """
        if claim.region.is_empty:
            return
        mask = claim.mask
        count = int(np.count_nonzero(mask))
        if not count:
            return
        if index >= len(self._areas):
            self._areas = np.pad(self._areas, (0, max(index + 1 - len(self._areas), len(self._areas))))
        self._areas[index] = count
        size = np.float32(SIZE_WEIGHT * np.log(count))
        best, owner, claims = (
            _view(array_HW, claim.region) for array_HW in (self._best_HW, self._owner_HW, self._claims_HW)
        )
        for block in _blocks(mask):
            claims[block] = np.minimum(claims[block] + mask[block], 2)
            strength = logits(claim.prob[block]) - size
            wins = mask[block] & (strength > best[block])
            best[block][wins] = strength[wins]
            owner[block][wins] = index
        best[claim.inside] = np.inf
        owner[claim.inside] = index

    def kept(self, index: int, claim: MaskClaim) -> KeptPixels:
        """Returns what a box keeps of its claim, once all are added."""
        mask = claim.mask.copy()
        owner, claims = (_view(array_HW, claim.region) for array_HW in (self._owner_HW, self._claims_HW))
        counts, contested = np.zeros_like(self._areas), 0
        for block in _blocks(mask):
            counts += np.bincount(owner[block][mask[block]], minlength=len(counts))
            contested += int(np.count_nonzero((claims[block] > 1) & mask[block]))
        claimed, own = int(counts.sum()), int(counts[index : index + 1].sum())
        keeps = counts >= NESTED_SHARE * np.minimum(self._areas, claimed)
        keeps[index : index + 1] = True
        for block in _blocks(mask):
            mask[block] &= keeps[owner[block]]
        mask[claim.inside] = True
        return KeptPixels(mask, Overlap((claimed - own) / claimed, contested / claimed) if claimed else Overlap())


def _blocks(mask: NDArray[np.bool_]) -> Iterator[slice]:
    """Splits the rows of a mask into blocks of some `BLOCK_PIXELS`."""
    rows = max(BLOCK_PIXELS // max(mask.shape[1], 1), 1)
    return (slice(start, start + rows) for start in range(0, len(mask), rows))


def logits(prob: NDArray[np.float32]) -> NDArray[np.float32]:
    """Returns the logits of probabilities of any shape; finite also for 0 and 1.

    >>> logits(np.float32([0, 0.5, 1])).round(1).tolist()
    [-11.5, 0.0, 11.5]
    """
    clipped = np.clip(prob, _MIN_PROB, 1.0 - _MIN_PROB)
    result: NDArray[np.float32] = np.log(clipped / (1.0 - clipped)).astype(np.float32, copy=False)
    return result


def _view(array_HW: NDArray[Any], region: Region) -> NDArray[Any]:
    """Returns a view of the region's pixels, empty if the region is."""
    return array_HW[region.row0 : max(region.row1, region.row0), region.col0 : max(region.col1, region.col0)]
