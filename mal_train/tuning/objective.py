"""Defines the metric that a study maximizes, and compares the proxy without masks with mIoU."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from mal_train.core.errors import ConfigError
from mal_train.core.metrics.score_quality import spearman

Metrics = Mapping[str, float | None]
"""Metrics of a validation by their names in status.json."""

TRUE, PROXY = "mIoU", "box_proxy"
METRICS = {"miou": TRUE, "ap": "AP@score", "proxy": PROXY}
"""Metric in status.json by the name of the objective."""


@dataclass(frozen=True)
class Objective:
    """The metric to maximize.

    Attributes:
        name: miou, ap or proxy.
        chosen: True if `auto` chose it.
    """

    name: str
    chosen: bool = False

    @property
    def metric(self) -> str:
        """Name of the metric in status.json."""
        return METRICS[self.name]

    def value(self, metrics: Metrics) -> float | None:
        """Returns the value of the objective; None if the validation gave none."""
        return metrics.get(self.metric)


def choose_objective(setting: Literal["auto", "miou", "ap", "proxy"], *, has_masks: bool) -> Objective:
    """Returns the objective for a validation set with or without masks.

    Raises:
        ConfigError: the objective needs masks, and there are none.
    """
    if setting == "auto":
        return Objective("miou" if has_masks else "proxy", chosen=True)
    if not has_masks and setting != "proxy":
        raise ConfigError(
            f"tune.objective: {setting}; no annotation of dataset.val_ann_path has a mask; give proxy or auto"
        )
    return Objective(setting)


@dataclass(frozen=True)
class RankAgreement:
    """Agreement of the proxy with mIoU on the order of trainings.

    Attributes:
        count: trainings with both metrics.
        spearman: rank correlation in [-1, 1]; None for fewer than two, or where one of the metrics is constant.
    """

    count: int
    spearman: float | None


def rank_agreement(trainings: Iterable[Metrics]) -> RankAgreement:
    """Compares the proxy with mIoU over trainings; those without one of the two are left out.

    >>> rank_agreement([{"mIoU": 0.5, "box_proxy": 0.2}, {"mIoU": 0.7, "box_proxy": 0.3}, {"mIoU": None}])
    RankAgreement(count=2, spearman=1.0)
    """
    pairs = [(metrics.get(TRUE), metrics.get(PROXY)) for metrics in trainings]
    both = [(true, proxy) for true, proxy in pairs if true is not None and proxy is not None]
    return RankAgreement(len(both), spearman([true for true, _ in both], [proxy for _, proxy in both]))
