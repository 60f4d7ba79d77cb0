import numpy as np
import pytest

from mal_train.core.metrics.score_quality import spearman
from mal_train.core.score_model import MASK_FEATURES
from mal_train.training.score_regression import MIN_MASKS, fit_score_model, held_out_predictions, ranks_better

POOLED = 5


def masks(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns features and IoUs that depend on one feature of the mask and on a pooled one."""
    rng = np.random.default_rng(seed)
    features = rng.normal(3.0, 2.0, (count, len(MASK_FEATURES) + POOLED))
    standard = (features - 3.0) / 2.0
    return features, np.clip(0.7 + 0.1 * standard[:, 2] - 0.1 * standard[:, -1] + rng.normal(0, 0.02, count), 0, 1)


def test_a_model_predicts_the_iou_of_other_masks() -> None:
    features, ious = masks(600, 0)
    model = fit_score_model(features, ious)
    assert model is not None
    assert model.pooled == POOLED
    others, truth = masks(300, 1)
    predicted = [model.score(row) for row in others]
    assert (spearman(predicted, truth) or 0.0) > 0.9


def test_a_constant_feature_has_no_weight() -> None:
    features, ious = masks(300, 0)
    features[:, 4] = 0.3
    model = fit_score_model(features, ious)
    assert model is not None
    assert model.weight[4] == pytest.approx(0.0, abs=1e-9)


def test_too_few_masks_are_not_fitted() -> None:
    features, ious = masks(MIN_MASKS, 0)
    assert fit_score_model(features, ious) is not None
    assert fit_score_model(features[1:], ious[1:]) is None
    assert held_out_predictions(features, ious, list(range(MIN_MASKS))) is None


def test_the_held_out_prediction_of_a_mask_does_not_depend_on_its_image() -> None:
    features, ious = masks(400, 0)
    images = [n // 2 for n in range(400)]
    before = held_out_predictions(features, ious, images)
    changed = ious.copy()
    changed[:2] = 1.0 - changed[:2]
    after = held_out_predictions(features, changed, images)
    assert before is not None
    assert after is not None
    assert np.array_equal(before[:2], after[:2])
    assert not np.array_equal(before[2:4], after[2:4])


def test_predictions_are_used_only_if_they_rank_better() -> None:
    ious = np.linspace(0.1, 0.9, 50)
    assert ranks_better(ious, 1.0 - ious, ious)
    assert not ranks_better(1.0 - ious, ious, ious)
    assert not ranks_better(ious, ious, ious)
    assert ranks_better(ious, np.full(50, 0.5), ious)
