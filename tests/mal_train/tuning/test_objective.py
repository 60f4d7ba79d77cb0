"""The choice of the objective, its value, and the rank correlation of the proxy with mIoU on constructed runs."""

import numpy as np
import pytest

from mal_train.core.errors import ConfigError
from mal_train.tuning.objective import Metrics, Objective, RankAgreement, choose_objective, rank_agreement


def test_auto_takes_miou_where_there_are_masks_and_the_proxy_elsewhere() -> None:
    assert choose_objective("auto", has_masks=True) == Objective("miou", chosen=True)
    assert choose_objective("auto", has_masks=False) == Objective("proxy", chosen=True)


@pytest.mark.parametrize("setting", ["miou", "ap"])
def test_an_objective_that_needs_masks_is_refused_without_them(setting: str) -> None:
    with pytest.raises(ConfigError, match=r"tune\.objective"):
        choose_objective(setting, has_masks=False)  # type: ignore[arg-type]
    assert choose_objective(setting, has_masks=True).name == setting  # type: ignore[arg-type]
    assert choose_objective("proxy", has_masks=True) == Objective("proxy")


@pytest.mark.parametrize(("name", "value"), [("miou", 0.7), ("ap", 0.4), ("proxy", 0.3)])
def test_the_value_is_the_metric_of_status_json(name: str, value: float) -> None:
    assert Objective(name).value({"mIoU": 0.7, "AP@score": 0.4, "box_proxy": 0.3, "train_loss": 9.0}) == value


def test_a_validation_without_the_metric_has_no_value() -> None:
    assert Objective("miou").value({"mIoU": None}) is None
    assert Objective("miou").value({}) is None


def test_the_rank_correlation_depends_on_the_order_of_the_runs_alone() -> None:
    true = np.linspace(0.3, 0.8, 20)
    for proxy, expected in ((true**3, 1.0), (-true, -1.0)):
        runs = [{"mIoU": t, "box_proxy": p} for t, p in zip(true, proxy, strict=True)]
        found = rank_agreement(runs)
        assert found.count == 20
        assert found.spearman == pytest.approx(expected)


def test_two_swapped_runs_of_four_give_four_fifths() -> None:
    runs = [{"mIoU": t, "box_proxy": p} for t, p in ((0.1, 0.1), (0.2, 0.2), (0.3, 0.4), (0.4, 0.3))]
    assert rank_agreement(runs).spearman == pytest.approx(0.8)


def test_noise_gives_no_rank_correlation() -> None:
    rng = np.random.default_rng(0)
    found = rank_agreement([{"mIoU": float(t), "box_proxy": float(p)} for t, p in rng.random((2000, 2))])
    assert found.spearman == pytest.approx(0.0, abs=0.05)


def test_runs_without_one_of_the_metrics_are_left_out() -> None:
    runs: list[Metrics] = [
        {"mIoU": 0.1, "box_proxy": 0.1},
        {"mIoU": None, "box_proxy": 0.9},
        {"box_proxy": 0.9},
        {"mIoU": 0.2},
        {},
    ]
    assert rank_agreement(runs) == RankAgreement(1, None)
    assert rank_agreement([]) == RankAgreement(0, None)
