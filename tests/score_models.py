"""Score models without a fit."""

from typing import Any

from mal_train.core.score_model import MASK_FEATURES, RESOLVED_FEATURES, ScoreModel
from mal_train.core.settings import FittedScore, LabelerConfig, ScoreType


def model(pooled: int = 2, names: tuple[str, ...] = MASK_FEATURES, **changes: Any) -> ScoreModel:
    """Returns a model that predicts one half for all masks."""
    length = len(names) + pooled
    columns = {"mean": (0.0,) * length, "deviation": (1.0,) * length, "weight": (0.0,) * length}
    return ScoreModel(**{"features": names, **columns, "bias": 0.5, **changes})


def with_resolved_score(pooled: int = 2) -> LabelerConfig:
    """Returns settings with a calibrated score by regression, and one for masks with resolved overlaps."""
    knots = ((0.0, 0.0), (1.0, 1.0))
    resolved = FittedScore(model(pooled, RESOLVED_FEATURES), knots)
    return LabelerConfig(
        score=ScoreType.REGRESSION, score_model=model(pooled), calibration=knots, resolved_score=resolved
    )
