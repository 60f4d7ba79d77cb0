"""How sure a mask is, before any calibration: one number in (0, 1] from what its box claimed. Numpy only."""

import math

import numpy as np
from numpy.typing import NDArray

from mal_train.core.settings import STABILITY_LOGITS, ScoreType
from mal_train.kernel.labeler.components import remove_small_regions
from mal_train.kernel.labeler.overlaps import MaskClaim


def score_of(kind: ScoreType, claim: MaskClaim, mask: NDArray[np.bool_], min_component_area_px: int = 0) -> float:
    """The score of a mask that is not empty; see `ScoreType`.

    Args:
        kind: what it is made of.
        claim: of the mask's box.
        mask: the claimed pixels (rows, columns) that the box got.
        min_component_area_px: specks below it were taken out of the mask.
    """
    if kind is ScoreType.STABILITY:
        return _stability(claim, mask, min_component_area_px)
    return _mean_probability(claim, mask)


def _stability(claim: MaskClaim, mask: NDArray[np.bool_], min_component_area_px: int) -> float:
    high, low = (_moved(claim.limit, logits) for logits in (STABILITY_LOGITS, -STABILITY_LOGITS))
    kept = int(np.count_nonzero((claim.values > high) & mask))
    # What the mask gave away to others, and specks with what surrounds them, are no doubt of its own.
    wider = mask | (remove_small_regions(claim.values > low, min_component_area_px) & ~claim.mask)
    # One more of each: 0 is the score of the empty mask alone.
    return (kept + 1) / (int(np.count_nonzero(wider)) + 1)


def _mean_probability(claim: MaskClaim, mask: NDArray[np.bool_]) -> float:
    # NumPy, not OpenCV: its sum depends on where the array happens to lie in memory, in the last digit.
    total = float(np.where(mask, claim.values, np.float32(0)).sum(dtype=np.float64))
    return min(max(total / int(np.count_nonzero(mask)), 0.0), 1.0)


def _moved(probability: float, logits: float) -> float:
    """The probability whose logit is larger by that much.

    >>> round(_moved(0.5, 2.0), 4)
    0.8808
    """
    odds = probability / (1.0 - probability) * math.exp(logits)
    return odds / (1.0 + odds)
