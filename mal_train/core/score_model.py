"""Defines the model that predicts the IoU of a mask from features of it, as checkpoints store it.

Imports neither torch nor NumPy, so that the client can import it in little time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mal_train.core.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

MASK_FEATURES = (
    "inside_1",
    "inside_2",
    "inside_4",
    "around_1",
    "around_2",
    "around_4",
    "fill",
    "mean_inside",
    "mean_outside",
    "decisiveness",
    "soft_iou",
    "tightness",
    "longest_border",
    "mean_border",
    "corners",
    "log_area",
    "aspect",
    "image_borders",
    "largest_part",
    "contour",
    "contrast",
    "center",
    "lower_quartile",
    "upper_quartile",
)
"""Names of the features of a probability map and its mask, in order; `mask_features` defines each."""
OVERLAP_FEATURES = ("lost", "contested")
"""Names of the features of a claim among the others of its image, in order; `overlaps.Overlap` defines each."""
RESOLVED_FEATURES = (*MASK_FEATURES, *OVERLAP_FEATURES)
"""Names of the features of a mask whose overlaps are resolved."""
MAX_DEVIATIONS = 3.0
"""Standardized features are clipped to ± this, so that an unusual mask is scored like an extreme one of the fit."""
MIN_SCORE = 1e-3
"""Lowest score of a mask that is not empty."""
MAX_POOLED = 4096
"""Upper bound of the number of pooled features; the widest backbone has 1024."""


@dataclass(frozen=True)
class ScoreModel:
    """Linear model of the IoU of a mask: bias + Σ weight · clip((feature − mean) / deviation).

    The features are those of the mask, followed by the pooled features of the backbone.

    Attributes:
        features: names of the features of the mask: `MASK_FEATURES`, or `RESOLVED_FEATURES` of a model for masks whose
            overlaps are resolved.
        mean: mean of each feature over the masks of the fit.
        deviation: standard deviation of each, > 0.
        weight: weight of each.
        bias: mean of the target over the masks of the fit.
    """

    features: tuple[str, ...]
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    weight: tuple[float, ...]
    bias: float

    def __post_init__(self) -> None:
        if self.features not in (MASK_FEATURES, RESOLVED_FEATURES):
            unknown = sorted(set(self.features) - set(RESOLVED_FEATURES))[:5]
            problem = f"this version does not compute {unknown}" if unknown else "some are missing or in another order"
            raise ConfigError(f"score_model.features: {problem}; use a newer version, or fit the score again")
        counts = {len(self.mean), len(self.deviation), len(self.weight)}
        if len(counts) != 1 or not 0 <= self.pooled <= MAX_POOLED:
            raise ConfigError(
                f"score_model: {len(self.mean)} means, {len(self.deviation)} deviations, {len(self.weight)} weights; "
                f"it must be as many of each, at least {len(self.features)}"
            )
        if not all(map(math.isfinite, (*self.mean, *self.deviation, *self.weight, self.bias))):
            raise ConfigError("score_model: a number is not finite; fit it again")
        if not all(value > 0.0 for value in self.deviation):
            raise ConfigError("score_model.deviation: each must be above 0; fit it again")

    @property
    def pooled(self) -> int:
        """Number of pooled features of the backbone that the model needs."""
        return len(self.mean) - len(self.features)

    @cached_property
    def _columns(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        import numpy as np  # noqa: PLC0415

        mean, deviation, weight = (np.asarray(v, dtype=np.float64) for v in (self.mean, self.deviation, self.weight))
        return mean, deviation, weight

    def score(self, features: NDArray[np.float64]) -> float:
        """Returns the score in [`MIN_SCORE`, 1] of a mask with these features (F,): those of the mask, then pooled."""
        mean, deviation, weight = self._columns
        standard = ((features - mean) / deviation).clip(-MAX_DEVIATIONS, MAX_DEVIATIONS)
        # Not a dot product: the order of its sums depends on the library of linear algebra.
        return min(max(self.bias + float((standard * weight).sum()), MIN_SCORE), 1.0)

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON object that checkpoints store."""
        return {
            "features": list(self.features),
            "mean": list(self.mean),
            "deviation": list(self.deviation),
            "weight": list(self.weight),
            "bias": self.bias,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ScoreModel:
        """Inverse of `to_dict`; raises ConfigError for a model that this version cannot evaluate."""
        columns = [data[name] for name in ("mean", "deviation", "weight")]
        most = max(len(column) for column in columns)
        if most > len(RESOLVED_FEATURES) + MAX_POOLED:
            raise ConfigError(f"score_model: {most} features; the limit is {len(RESOLVED_FEATURES) + MAX_POOLED}")
        mean, deviation, weight = (tuple(float(value) for value in column) for column in columns)
        return cls(tuple(str(name) for name in data["features"]), mean, deviation, weight, float(data["bias"]))
