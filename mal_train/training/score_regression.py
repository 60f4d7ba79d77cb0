"""Fits a `ScoreModel`, which predicts the IoU of a mask from its features, by ridge regression on true masks.

Method: Hoerl and Kennard, "Ridge regression", Technometrics 1970. The model predicts IoU ** TARGET_POWER; the
calibration, which follows, maps its score to the IoU.
"""

from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

from mal_train.core.metrics.score_quality import spearman
from mal_train.core.score_model import MASK_FEATURES, MAX_DEVIATIONS, ScoreModel
from mal_train.training.calibration import FOLDS, fold_of_images

MIN_MASKS = 200
"""Number of masks below which no model is fitted."""
TARGET_POWER = 1.5
"""Above 1, differences between good masks count more: Spearman rises by .006 on both sets of the built-in model."""
OWN_PENALTY = 0.2
"""Penalty of the weights of the mask's own features, relative to the number of masks."""
POOLED_PENALTY = 0.8
"""The same for pooled features, of which there are many."""

Features = NDArray[np.float64]
"""Features of masks (N, F), each row from `score_features`."""


def fit_score_model(
    features: Features, ious: NDArray[np.float64], names: tuple[str, ...] = MASK_FEATURES
) -> ScoreModel | None:
    """Fits a model to masks; None for fewer than `MIN_MASKS`.

    Args:
        features: (N, F) features of masks that are not empty.
        ious: (N,) IoU of the masks with their ground truth, in [0, 1].
        names: names of the masks' own features; those after them are pooled.
    """
    if len(features) < MIN_MASKS:
        return None
    target = ious**TARGET_POWER
    mean, deviation = features.mean(0), features.std(0)
    # A constant feature has the weight 0, whatever it is divided by.
    deviation[deviation < _LEAST_DEVIATION] = 1.0
    standard = np.clip((features - mean) / deviation, -MAX_DEVIATIONS, MAX_DEVIATIONS)
    bias = float(target.mean())
    own = len(names)
    penalty = len(features) * np.where(np.arange(features.shape[1]) < own, OWN_PENALTY, POOLED_PENALTY)
    weight = np.linalg.solve(standard.T @ standard + np.diag(penalty), standard.T @ (target - bias))
    return ScoreModel(names, _rounded(mean), _rounded(deviation), _rounded(weight), float(f"{bias:.6g}"))


def held_out_predictions(
    features: Features,
    ious: NDArray[np.float64],
    images: Sequence[Hashable],
    names: tuple[str, ...] = MASK_FEATURES,
) -> NDArray[np.float64] | None:
    """Returns cross-validated scores (N,): each from a model that was fitted without the image of its mask.

    Returns None if too few masks remain for a fit. The folds are those of `held_out_scores`.

    Args:
        features: see `fit_score_model`.
        ious: see `fit_score_model`.
        images: image id of each mask.
        names: see `fit_score_model`.
    """
    fold = fold_of_images(images)
    result = np.zeros(len(features))
    for k in range(FOLDS):
        held_out = fold == k
        model = fit_score_model(features[~held_out], ious[~held_out], names)
        if model is None:
            return None
        result[held_out] = [model.score(row) for row in features[held_out]]
    return result


def ranks_better(predictions: NDArray[np.float64], scores: NDArray[np.float64], ious: NDArray[np.float64]) -> bool:
    """Returns True if held-out predictions (N,) have a higher rank correlation with the IoU (N,) than scores (N,)."""
    predicted, scored = spearman(predictions, ious), spearman(scores, ious)
    return predicted is not None and (scored is None or predicted > scored)


_LEAST_DEVIATION = 1e-9


def _rounded(values: NDArray[np.float64]) -> tuple[float, ...]:
    """Returns numbers of six digits, for a small file."""
    return tuple(float(f"{value:.6g}") for value in values)
