"""Scores a mask from its probabilities: one number in (0, 1]. NumPy only."""

import math

import numpy as np
from numpy.typing import NDArray

from mal_train.core.settings import STABILITY_LOGITS, LabelerConfig, ScoreType, calibrated
from mal_train.kernel.labeler.components import remove_small_regions
from mal_train.kernel.labeler.mask_features import mask_features
from mal_train.kernel.labeler.overlaps import MaskClaim, Overlap
from mal_train.kernel.labeler.types import Crop


def mask_score(
    config: LabelerConfig,
    crop: Crop,
    claim: MaskClaim,
    mask: NDArray[np.bool_],
    min_component_area_px: int = 0,
    *,
    overlap: Overlap | None = None,
) -> float:
    """Returns the score of a non-empty mask, calibrated if `config` has a calibration.

    Args:
        config: definition of the score, its fitted models and calibrations.
        crop: crop of the mask's box.
        claim: claim of the box.
        mask: (rows, columns) bool: the pixels of the claim that belong to the mask.
        min_component_area_px: limit below which components were removed from the mask.
        overlap: what other boxes have of the claim; None: overlaps are not resolved.
    """
    resolved = config.resolved_score if config.calibrates_resolved else None
    if overlap is not None and resolved is not None:
        return calibrated(resolved.model.score(score_features(crop, claim, mask, overlap)), resolved.calibration)
    score = _measure(config, crop, claim, mask, min_component_area_px)
    return score if config.calibration is None else calibrated(score, config.calibration)


def _measure(
    config: LabelerConfig, crop: Crop, claim: MaskClaim, mask: NDArray[np.bool_], min_component_area_px: int
) -> float:
    """Returns the score before calibration."""
    if config.score_type is ScoreType.REGRESSION and config.score_model is not None:
        return config.score_model.score(score_features(crop, claim, mask))
    if config.score_type is ScoreType.STABILITY:
        return _stability(claim, mask, min_component_area_px)
    return _mean_probability(claim, mask)


def score_features(
    crop: Crop, claim: MaskClaim, mask: NDArray[np.bool_], overlap: Overlap | None = None
) -> NDArray[np.float64]:
    """Returns the features (F,) of a non-empty mask that a `ScoreModel` needs: its own, then the pooled ones.

    With `overlap` they are those of a model for masks whose overlaps are resolved.

    Raises:
        ValueError: the claim has no pooled features.
    """
    if claim.pooled is None:
        raise ValueError("a score by regression needs the pooled features of the prediction (Prediction.pooled)")
    own = mask_features(claim, mask, crop.box_inside, crop.image_hw)
    return np.concatenate([own, [] if overlap is None else overlap.features(), claim.pooled.astype(np.float64)])


def _stability(claim: MaskClaim, mask: NDArray[np.bool_], min_component_area_px: int) -> float:
    """IoU of the masks at thresholds STABILITY_LOGITS above and below the actual one.

    The stability score of Kirillov et al., "Segment anything", 2023, with a symmetric offset.
    """
    high, low = (_shift_logit(claim.threshold, logits) for logits in (STABILITY_LOGITS, -STABILITY_LOGITS))
    inner = np.count_nonzero((claim.prob > high) & mask)
    # Pixels assigned to other boxes and small components with their surroundings say nothing of this mask's stability.
    around = remove_small_regions(claim.prob > low, min_component_area_px) > claim.mask
    outer = np.count_nonzero(mask) + np.count_nonzero(around)
    # Adding 1 to both reserves the score 0 for empty masks.
    return (inner + 1) / (outer + 1)


def _mean_probability(claim: MaskClaim, mask: NDArray[np.bool_]) -> float:
    # NumPy, not OpenCV: the last digit of OpenCV's sum depends on the memory alignment of the array.
    total = float(np.where(mask, claim.prob, np.float32(0)).sum(dtype=np.float64))
    return min(max(total / int(np.count_nonzero(mask)), 0.0), 1.0)


def _shift_logit(probability: float, logits: float) -> float:
    """Returns the probability whose logit is larger by `logits`.

    >>> round(_shift_logit(0.5, 2.0), 4)
    0.8808
    """
    odds = probability / (1.0 - probability) * math.exp(logits)
    return odds / (1.0 + odds)
