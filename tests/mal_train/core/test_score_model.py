import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from mal_train.core.errors import ConfigError
from mal_train.core.score_model import MASK_FEATURES, MAX_POOLED, MIN_SCORE, RESOLVED_FEATURES, ScoreModel
from mal_train.core.settings import Compat, FittedScore, LabelerConfig, ScoreType
from tests.score_models import model, with_resolved_score

COUNT = len(MASK_FEATURES)


REGRESSION = LabelerConfig(score=ScoreType.REGRESSION, score_model=model())


def test_a_score_is_the_weighted_sum_of_standardized_features() -> None:
    weights = (0.1, *(0.0,) * (COUNT - 1), 0.0, -0.05)
    features = np.zeros(COUNT + 2)
    features[0], features[-1] = 5.0, 1.0
    scored = model(weight=weights, deviation=(2.0,) * (COUNT + 2), mean=(1.0,) * (COUNT + 2))
    assert scored.score(features) == pytest.approx(0.5 + 0.1 * 2.0)
    features[0], features[-1] = 1e9, 3.0
    assert scored.score(features) == pytest.approx(0.5 + 0.1 * 3.0 - 0.05)


def test_scores_of_masks_that_are_not_empty_lie_above_zero_and_up_to_one() -> None:
    features = np.full(COUNT + 2, 9.0)
    assert model(weight=(1.0,) * (COUNT + 2)).score(features) == 1.0
    assert model(weight=(-1.0,) * (COUNT + 2)).score(features) == MIN_SCORE


def test_settings_with_a_model_are_read_as_written() -> None:
    written = json.loads(json.dumps(REGRESSION.to_dict()))
    assert LabelerConfig.from_dict(written) == REGRESSION
    assert "score_model" not in LabelerConfig().to_dict()
    assert REGRESSION.without_fitted_score() == LabelerConfig()


def test_a_summary_counts_the_features_of_the_model() -> None:
    assert REGRESSION.summary()["score_features"] == COUNT + 2
    assert "score_model" not in REGRESSION.summary()
    assert LabelerConfig().summary() == LabelerConfig().to_dict()


def test_a_score_for_resolved_overlaps_is_read_as_written() -> None:
    config = with_resolved_score()
    assert LabelerConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.summary()["resolved_score_features"] == len(RESOLVED_FEATURES) + 2
    assert "resolved_score" not in config.summary()
    assert config.without_fitted_score() == LabelerConfig()
    assert config.calibrates_resolved
    assert not dataclasses.replace(config, compat=Compat.TAO).calibrates_resolved


@pytest.mark.parametrize(
    "resolved",
    [model(), model(names=RESOLVED_FEATURES, pooled=3)],
    ids=["no features of overlaps", "another backbone"],
)
def test_a_score_for_resolved_overlaps_of_other_features_is_refused(resolved: ScoreModel) -> None:
    score = FittedScore(resolved, ((0.0, 0.0), (1.0, 1.0)))
    with pytest.raises(ConfigError, match="resolved_score"):
        dataclasses.replace(with_resolved_score(), resolved_score=score)


def test_only_regression_has_a_score_for_resolved_overlaps() -> None:
    resolved = with_resolved_score().resolved_score
    with pytest.raises(ConfigError, match="resolved_score"):
        LabelerConfig(resolved_score=resolved)
    with pytest.raises(ConfigError, match="complete ones"):
        LabelerConfig(score=ScoreType.REGRESSION, score_model=model(names=RESOLVED_FEATURES))


@pytest.mark.parametrize(
    ("part", "damage", "words"),
    [
        ("calibration", [[0.0, 0.0], [0.5, 1.0]], "resolved_score: calibration"),
        ("calibration", [[0.0, float("nan")], [1.0, 1.0]], "resolved_score: calibration"),
        ("model", model().to_dict(), "resolved_score: 24 features"),
        ("model", {**model(names=RESOLVED_FEATURES).to_dict(), "bias": float("nan")}, "resolved_score: score_model"),
        ("model", {**model().to_dict(), "features": ["color"]}, "does not compute .'color'"),
        ("model", {**model().to_dict(), "features": list(MASK_FEATURES[1:])}, "missing or in another order"),
    ],
)
def test_a_damaged_score_for_resolved_overlaps_is_refused_by_name(part: str, damage: object, words: str) -> None:
    stored = with_resolved_score().to_dict()
    stored["resolved_score"][part] = damage
    with pytest.raises(ConfigError, match=words):
        LabelerConfig.from_dict(stored)


def test_a_score_for_resolved_overlaps_needs_a_calibration_of_all_masks() -> None:
    with pytest.raises(ConfigError, match="resolved_score: given, but calibration is none"):
        dataclasses.replace(with_resolved_score(), calibration=None)


def test_the_published_score_needs_no_model() -> None:
    assert dataclasses.replace(REGRESSION, compat=Compat.TAO).score_type is ScoreType.PROBABILITY


@pytest.mark.parametrize(
    "changes",
    [
        {"features": MASK_FEATURES[1:]},
        {"features": (*MASK_FEATURES[1:], MASK_FEATURES[0])},
        {"mean": (0.0,) * COUNT},
        {"weight": (float("nan"),) * (COUNT + 2)},
        {"deviation": (0.0,) * (COUNT + 2)},
        {"bias": float("inf")},
        {name: (1.0,) * (COUNT - 1) for name in ("mean", "deviation", "weight")},
        {name: (1.0,) * (COUNT + MAX_POOLED + 1) for name in ("mean", "deviation", "weight")},
    ],
)
def test_a_model_that_cannot_be_evaluated_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="score_model"):
        model(**changes)
    stored = {**model().to_dict(), **changes}
    with pytest.raises(ConfigError, match="score_model"):
        LabelerConfig.from_dict({**REGRESSION.to_dict(), "score_model": stored})


@pytest.mark.parametrize("score", [ScoreType.STABILITY, ScoreType.PROBABILITY])
def test_only_regression_has_a_model(score: ScoreType) -> None:
    with pytest.raises(ConfigError, match="score_model"):
        LabelerConfig(score=score, score_model=model())
    with pytest.raises(ConfigError, match="score_model"):
        LabelerConfig(score=ScoreType.REGRESSION)
