"""Fits the score of labeled masks to their IoU: a model that predicts it, and a calibration."""

import dataclasses
import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mal_train.core.coco.annotations import JsonId
from mal_train.core.metrics.evaluator import Evaluator
from mal_train.core.score_model import MASK_FEATURES, RESOLVED_FEATURES, ScoreModel
from mal_train.core.settings import FittedScore, LabelerConfig, ScoreType
from mal_train.training.calibration import MIN_INSTANCES, fit_calibration, held_out_scores
from mal_train.training.score_regression import fit_score_model, held_out_predictions, ranks_better

FeaturesOfMasks = dict[tuple[JsonId | None, JsonId | None], NDArray[np.float32] | None]
"""Features of masks (`score_features`), (F,), by image id and annotation id; None for an empty mask."""


def fit_score(
    evaluator: Evaluator, features: FeaturesOfMasks, config: LabelerConfig, *, with_flip: bool
) -> LabelerConfig:
    """Returns `config` with a score fitted to the results, and replaces their scores with cross-validated ones.

    A model that predicts the IoU is fitted where it ranks held-out masks better than the score of `config`, and a
    calibration in both cases. With too few instances to fit, returns `config` and keeps the scores.

    Args:
        evaluator: has compared the masks.
        features: of the same masks.
        config: settings without a fitted score.
        with_flip: the masks are averaged with the mirrored crop.
    """
    masks = _Masks.of(evaluator, features)
    scores = masks.scores.copy()
    predictions = masks.held_out_predictions(MASK_FEATURES)
    if predictions is not None and ranks_better(predictions, scores[masks.known], masks.ious[masks.known]):
        # Empty masks keep the score 0.
        scores[masks.known] = predictions
        config = dataclasses.replace(config, score=ScoreType.REGRESSION, score_model=masks.model(MASK_FEATURES))
    knots, held_out = fit_calibration(scores, masks.ious), held_out_scores(scores, masks.ious, masks.images)
    if knots is None or held_out is None:
        return config.without_fitted_score()
    evaluator.rescore(held_out.tolist())
    return dataclasses.replace(config, calibration=knots, calibrated_with_flip=with_flip)


def fit_resolved_score(evaluator: Evaluator, features: FeaturesOfMasks) -> FittedScore | None:
    """Fits the score of masks whose overlaps are resolved, and replaces their scores with cross-validated ones.

    Args:
        evaluator: has compared the masks.
        features: of the same masks, with those of their overlaps.

    Returns:
        The score; None, with the scores kept, if there are too few masks, if other boxes claim pixels of fewer than
        `MIN_INSTANCES`, or if a model without the features of overlaps ranks held-out masks as well.
    """
    masks = _Masks.of(evaluator, features)
    if masks.contested < MIN_INSTANCES:
        return None
    model, predictions = masks.model(RESOLVED_FEATURES), masks.held_out_predictions(RESOLVED_FEATURES)
    without = masks.without_overlaps().held_out_predictions(MASK_FEATURES)
    if model is None or predictions is None or without is None:
        return None
    if not ranks_better(predictions, without, masks.ious[masks.known]):
        return None
    scores = np.zeros(len(masks.ious))
    scores[masks.known] = predictions
    knots, held_out = fit_calibration(scores, masks.ious), held_out_scores(scores, masks.ious, masks.images)
    if knots is None or held_out is None:
        return None
    evaluator.rescore(held_out.tolist())
    return FittedScore(model, knots)


@dataclass(frozen=True)
class _Masks:
    """The compared masks (N) and the features of those that are not empty.

    Attributes:
        scores: (N,) score of each; of an empty mask 0.
        ious: (N,) IoU of each with its ground truth.
        images: image id of each.
        known: (N,) bool, whether its features are known.
        features: (M, F) features of the known ones.
    """

    scores: NDArray[np.float64]
    ious: NDArray[np.float64]
    images: list[JsonId]
    known: NDArray[np.bool_]
    features: NDArray[np.float64]

    @classmethod
    def of(cls, evaluator: Evaluator, features: FeaturesOfMasks) -> "_Masks":
        rows = evaluator.rows
        found = [features.get((row.image_id, row.annotation_id)) for row in rows]
        return cls(
            np.array([row.score for row in rows]),
            np.array([row.iou for row in rows]),
            [row.image_id for row in rows],
            np.array([one is not None for one in found], dtype=np.bool_),
            np.array([one for one in found if one is not None]),
        )

    @property
    def contested(self) -> int:
        """Number of masks of which other boxes claim pixels."""
        if not len(self.features):
            return 0
        return int(np.count_nonzero(self.features[:, RESOLVED_FEATURES.index("contested")]))

    def without_overlaps(self) -> "_Masks":
        """Returns these masks without the features of their overlaps."""
        columns = slice(len(MASK_FEATURES), len(RESOLVED_FEATURES))
        return dataclasses.replace(self, features=np.delete(self.features, columns, axis=1))

    def model(self, names: tuple[str, ...]) -> ScoreModel | None:
        return fit_score_model(self.features, self.ious[self.known], names)

    def held_out_predictions(self, names: tuple[str, ...]) -> NDArray[np.float64] | None:
        images = list(itertools.compress(self.images, self.known))
        return held_out_predictions(self.features, self.ious[self.known], images, names)
