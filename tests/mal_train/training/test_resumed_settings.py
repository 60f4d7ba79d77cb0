"""Labeler settings that a resumed run takes from its checkpoint."""

from dataclasses import replace

from mal_train.commands.resume import resumed_config
from mal_train.config.spec import Spec
from mal_train.core.score_model import MASK_FEATURES, ScoreModel
from mal_train.core.settings import LabelerConfig, ScoreType

CURRENT = LabelerConfig(crop_size=64)
FITTED = LabelerConfig(32, 0.2, (0.2, 0.3, 0.4), calibration=((0.0, 0.1), (1.0, 0.9)))


def test_a_resumed_run_keeps_fitted_thresholds_and_calibration_only() -> None:
    settings = resumed_config(Spec(), CURRENT, FITTED)
    assert (settings.mask_thres, settings.calibration) == (FITTED.mask_thres, FITTED.calibration)
    assert (settings.crop_size, settings.margin_rate) == (CURRENT.crop_size, CURRENT.margin_rate)


def test_a_calibration_of_a_different_kind_of_score_is_dropped() -> None:
    older = LabelerConfig(calibration=FITTED.calibration, score=ScoreType.PROBABILITY)
    assert resumed_config(Spec(), CURRENT, older).calibration is None


def test_a_resumed_run_keeps_a_fitted_model_of_the_score() -> None:
    ones = (1.0,) * len(MASK_FEATURES)
    model = ScoreModel(MASK_FEATURES, ones, ones, ones, 0.5)
    stored = replace(FITTED, score=ScoreType.REGRESSION, score_model=model)
    settings = resumed_config(Spec(), CURRENT, stored)
    assert (settings.score, settings.score_model, settings.calibration) == (stored.score, model, FITTED.calibration)


def test_settings_that_the_spec_does_not_fit_come_from_the_spec() -> None:
    spec = Spec.model_validate({"train": {"fit_thresholds": False, "fit_calibration": False}})
    assert resumed_config(spec, CURRENT, FITTED) == CURRENT
