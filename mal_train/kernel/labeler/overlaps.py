"""Gives each contested pixel of a picture to one of its instances. Numpy only; knows no network and no file.

Two masks of one picture may claim the same pixels: a table's takes the plates on it, a rider's the bicycle. In panoptic
ground truth a pixel belongs to one object. Whoever is smaller stands in front far more often than not, and a sure claim
beats a doubtful one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mal_train.core.masks.geometry import Region

SIZE_WEIGHT = 4.0
"""Logits that a mask e times as large gives away. Measured on photographs: 0 loses 5 points of mIoU, 2 wins 1.1, 4 wins
1.4, 6 the same, and size alone 0.6 (docs/quality.md)."""
_EDGE = 1e-5
"""Probabilities this close to 0 and 1 are taken as this far from them: a logit has to be finite."""


@dataclass(frozen=True)
class MaskClaim:
    """What one box claims.

    Attributes:
        region: the pixels in question.
        values: foreground probability of these (rows, columns), float32.
        limit: above it a pixel is claimed, in (0, 1).
    """

    region: Region
    values: NDArray[np.float32]
    limit: float

    @property
    def mask(self) -> NDArray[np.bool_]:
        """The claimed pixels (rows, columns)."""
        claimed: NDArray[np.bool_] = self.values > self.limit
        return claimed


def assign_pixels(claims: Sequence[MaskClaim], image_hw: tuple[int, int]) -> list[NDArray[np.bool_]]:
    """The pixels (rows, columns) of each claim that it keeps; no pixel of the picture is kept twice.

    A pixel goes to the claim with the highest `logit − SIZE_WEIGHT · log(claimed pixels)`; the earlier one of equals.

    Args:
        claims: of the boxes of one picture.
        image_hw: its height and width in px; every region lies inside.
    """
    best = np.full(image_hw, -np.inf, dtype=np.float32)
    owner = np.full(image_hw, -1, dtype=np.int32)
    for number, claim in enumerate(claims):
        mask = claim.mask
        if claim.region.is_empty or not mask.any():
            continue
        size = np.float32(SIZE_WEIGHT * np.log(np.count_nonzero(mask)))
        strength = logits(claim.values) - size
        held, holder = (_part(whole, claim.region) for whole in (best, owner))
        wins = mask & (strength > held)
        held[wins] = strength[wins]
        holder[wins] = number
    return [claim.mask & (_part(owner, claim.region) == number) for number, claim in enumerate(claims)]


def logits(prob: NDArray[np.float32]) -> NDArray[np.float32]:
    """Logits of probabilities, any shape, finite also for 0 and 1.

    >>> logits(np.float32([0, 0.5, 1])).round(1).tolist()
    [-11.5, 0.0, 11.5]
    """
    inside = np.clip(prob, _EDGE, 1.0 - _EDGE)
    found: NDArray[np.float32] = np.log(inside / (1.0 - inside)).astype(np.float32, copy=False)
    return found


def _part(whole: NDArray[Any], region: Region) -> NDArray[Any]:
    """The pixels of a region, as a view; as empty as the region."""
    return whole[region.row0 : max(region.row1, region.row0), region.col0 : max(region.col1, region.col0)]
