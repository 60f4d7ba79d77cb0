"""What of a checkpoint's settings a run that goes on keeps."""

from mal_train.commands.resume import taken_up
from mal_train.config.spec import Spec
from mal_train.core.settings import LabelerConfig, ScoreType

ASKED = LabelerConfig(crop_size=64)
FITTED = LabelerConfig(32, 0.2, (0.2, 0.3, 0.4), calibration=((0.0, 0.1), (1.0, 0.9)))


def test_a_run_that_goes_on_keeps_what_was_fitted_and_nothing_else() -> None:
    settings = taken_up(Spec(), ASKED, FITTED)
    assert (settings.mask_thres, settings.calibration) == (FITTED.mask_thres, FITTED.calibration)
    assert (settings.crop_size, settings.margin_rate) == (ASKED.crop_size, ASKED.margin_rate)


def test_a_map_of_another_kind_of_score_is_not_kept() -> None:
    older = LabelerConfig(calibration=FITTED.calibration, score=ScoreType.PROBABILITY)
    assert taken_up(Spec(), ASKED, older).calibration is None


def test_what_the_spec_does_not_fit_is_its_own() -> None:
    spec = Spec.model_validate({"train": {"fit_thresholds": False, "fit_calibration": False}})
    assert taken_up(spec, ASKED, FITTED) == ASKED
