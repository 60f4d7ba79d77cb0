from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mal_train.core.coco.annotations import CocoFile, by_image, read_coco
from mal_train.core.errors import ConfigError
from mal_train.core.images.files import read_image
from mal_train.core.metrics.evaluator import Evaluator
from mal_train.core.metrics.miou import InstanceIoU
from mal_train.core.score_model import RESOLVED_FEATURES
from mal_train.core.settings import Compat, LabelerConfig, ScoreType, calibrated
from mal_train.kernel.labeler.labeler import Labeler
from mal_train.kernel.labeler.overlaps import PixelOwners
from mal_train.kernel.labeler.scoring import score_features
from mal_train.kernel.labeler.types import Crop, Label
from mal_train.training.calibration import MIN_INSTANCES, fit_calibration, held_out_scores
from mal_train.training.score_fit import FeaturesOfMasks, fit_resolved_score
from mal_train.training.validation import Validator
from tests.networks import spread_network
from tests.scenes import write_scenes


def overconfident(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    iou = rng.uniform(0.1, 0.95, count)
    return np.clip(0.6 + 0.4 * iou + rng.normal(0, 0.05, count), 0.01, 1.0), iou


def test_calibration_removes_the_bias_and_keeps_the_order() -> None:
    scores, ious = overconfident(2000, 0)
    fresh, truth = overconfident(2000, 1)
    knots = fit_calibration(scores, ious)
    assert knots is not None
    mapped = np.array([calibrated(float(s), knots) for s in fresh])
    assert abs(fresh.mean() - truth.mean()) > 0.2
    assert abs(mapped.mean() - truth.mean()) < 0.02
    order = np.argsort(fresh)
    assert (np.diff(mapped[order]) >= 0).all()
    below_one = fresh[order] < 0.999
    assert (np.diff(mapped[order][below_one]) > 0).mean() > 0.9


def test_the_map_is_that_of_numpy_to_the_bit() -> None:
    rng = np.random.default_rng(0)
    knots = tuple(zip(np.sort(rng.random(20)).tolist(), np.sort(rng.random(20)).tolist(), strict=True))
    x, y = zip(*knots, strict=True)
    for score in [0.0, 1.0, *x, *rng.random(1000).tolist()]:
        assert calibrated(score, knots) == np.interp(score, x, y)


def test_scores_in_reverse_order_give_a_single_pool() -> None:
    scores = np.linspace(0.5, 0.9, 200)
    knots = fit_calibration(scores, 1.0 - scores)
    assert knots is not None
    assert len(knots) == 3
    assert knots[1] == pytest.approx((0.7, 0.3), abs=1e-6)


@pytest.mark.parametrize("score", [0.5, 1.0])
def test_equal_scores_give_a_map(score: float) -> None:
    knots = fit_calibration([score] * 100, [0.4] * 100)
    assert knots is not None
    assert calibrated(score, knots) == pytest.approx(0.4)
    LabelerConfig(calibration=knots)


@pytest.mark.parametrize("seed", range(20))
def test_every_fitted_map_is_a_valid_setting(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(MIN_INSTANCES, 400))
    knots = fit_calibration(rng.choice([rng.random(count), np.round(rng.random(count), 1)]), rng.random(count))
    if knots is not None:
        config = LabelerConfig(calibration=knots)
        assert LabelerConfig.from_dict(config.to_dict()) == config


def test_too_few_instances_are_not_fitted_and_empty_masks_do_not_count() -> None:
    scores, ious = overconfident(MIN_INSTANCES - 1, 0)
    assert fit_calibration(scores, ious) is None
    assert fit_calibration(np.append(scores, [0.0] * 50), np.append(ious, [0.0] * 50)) is None
    assert held_out_scores(*overconfident(MIN_INSTANCES + 5, 0), list(range(MIN_INSTANCES + 5))) is None


def test_the_held_out_score_of_an_instance_does_not_depend_on_its_image() -> None:
    scores, ious = overconfident(300, 0)
    images = [n // 3 for n in range(300)]
    before = held_out_scores(scores, ious, images)
    changed = ious.copy()
    changed[:3] = 1.0 - changed[:3]
    after = held_out_scores(scores, changed, images)
    assert before is not None
    assert after is not None
    assert np.array_equal(before[:3], after[:3])
    assert not np.array_equal(before[3:6], after[3:6])


@pytest.mark.parametrize(
    "knots",
    [
        ((0.0, 0.0),),
        ((0.1, 0.0), (1.0, 1.0)),
        ((0.0, 0.0), (0.9, 1.0)),
        ((0.0, 0.0), (0.5, 0.6), (1.0, 0.5)),
        ((0.0, 0.0), (1.0, 1.2)),
        ((0.0, 0.0), (float("nan"), 0.5), (1.0, 1.0)),
    ],
)
def test_knots_that_are_not_a_non_decreasing_map_are_refused(knots: tuple[tuple[float, float], ...]) -> None:
    with pytest.raises(ConfigError, match="calibration"):
        LabelerConfig(calibration=knots)


def test_settings_without_a_calibration_are_accepted() -> None:
    data = LabelerConfig(crop_size=64).to_dict()
    del data["calibration"]
    assert LabelerConfig.from_dict(data) == LabelerConfig(crop_size=64)


def validator_of(coco: CocoFile, images: Path) -> Validator:
    return Validator(coco, images, 8, fit_thresholds=False, precision="float32", device="cpu")


@pytest.fixture
def model_of_few_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model is fitted to 50 masks, and is used however it ranks."""
    monkeypatch.setattr("mal_train.training.score_fit.ranks_better", lambda *_: True)
    monkeypatch.setattr("mal_train.training.score_regression.MIN_MASKS", 50)


def test_validation_fits_a_calibration_and_reports_held_out_scores(tmp_path: Path) -> None:
    annotations, images = write_scenes(tmp_path, images=80)
    coco = read_coco(annotations)
    network = spread_network()
    raw = LabelerConfig(crop_size=32, mask_thres=(0.5, 0.5, 0.5))
    validator = validator_of(coco, images)
    plain = validator.run(network, raw)
    fitted = replace(validator, fit_calibration=True).run(network, raw)
    assert plain.config == raw
    assert fitted.config.calibration is not None
    again = replace(validator, fit_calibration=True).run(network, fitted.config)
    assert again.config == fitted.config
    assert plain.report.score.bias is not None
    assert fitted.report.score.bias is not None
    assert abs(fitted.report.score.bias) < min(0.03, abs(plain.report.score.bias))
    assert (fitted.report.overall, fitted.report.by_size) == (plain.report.overall, plain.report.by_size)
    row, boxes = next(iter(by_image(coco)))
    image = read_image(images / row.file_name)
    before = Labeler(network, raw, precision="float32").label(image, [boxes[0].box_xywh])[0]
    after = Labeler(network, fitted.config, precision="float32").label(image, [boxes[0].box_xywh])[0]
    assert isinstance(before, Label)
    assert isinstance(after, Label)
    assert replace(after, score=before.score) == before
    if fitted.config.score_model is None:
        assert after.score == calibrated(before.score, fitted.config.calibration)


def test_validation_fits_a_model_that_ranks_better_and_reports_held_out_scores(tmp_path: Path) -> None:
    annotations, images = write_scenes(tmp_path, images=150)
    coco = read_coco(annotations)
    network = spread_network()
    raw = LabelerConfig(crop_size=32, mask_thres=(0.2, 0.2, 0.2))
    validator = validator_of(coco, images)
    plain = validator.run(network, raw)
    fitted = replace(validator, fit_calibration=True).run(network, raw)
    assert fitted.config.score is ScoreType.REGRESSION
    assert fitted.config.score_model is not None
    assert (fitted.report.score.spearman or 0.0) > (plain.report.score.spearman or 0.0)
    assert (fitted.report.overall, fitted.proxy) == (plain.report.overall, plain.proxy)
    assert replace(validator, fit_calibration=True).run(network, fitted.config).config == fitted.config
    tao = replace(validator, fit_calibration=True).run(network, replace(raw, compat=Compat.TAO))
    assert (tao.config.score_model, tao.config.calibration is None) == (None, False)
    row, boxes = next(iter(by_image(coco)))
    labeler = Labeler(network, fitted.config, precision="float32")
    (crop,) = labeler.prepare(read_image(images / row.file_name), [boxes[0].box_xywh])
    assert isinstance(crop, Crop)
    (prediction,) = labeler.predict([crop])
    claim = labeler.claim(crop, prediction)
    predicted = fitted.config.score_model.score(score_features(crop, claim, claim.mask))
    assert fitted.config.calibration is not None
    assert labeler.finish(crop, prediction).score == calibrated(predicted, fitted.config.calibration)
    with pytest.raises(ValueError, match="pooled"):
        labeler.finish(crop, replace(prediction, pooled=None))


def test_masks_with_resolved_overlaps_get_a_score_of_their_own(tmp_path: Path, model_of_few_masks: None) -> None:
    annotations, images = write_scenes(tmp_path, images=150)
    coco = read_coco(annotations)
    # On every third image the boxes reach into each other.
    wider = [
        replace(row, box_xywh=(10.0, 10.0, 76.0, 60.0)) if int(str(row.image_id)) % 3 == 0 else row
        for row in coco.annotations
    ]
    network = spread_network()
    validator = replace(validator_of(replace(coco, annotations=wider), images), fit_calibration=True)
    single = validator.run(network, LabelerConfig(crop_size=32, mask_thres=(0.2, 0.2, 0.2)))
    resolved = validator.fit_resolved(network, single.config)
    assert resolved is not None
    fitted, report = resolved
    config = replace(single.config, resolved_score=fitted)
    assert fitted.model.features == RESOLVED_FEATURES
    assert (report.score.spearman or 0.0) > 0.0
    assert abs(report.score.bias or 1.0) < 0.03
    row, boxes = next(iter(by_image(coco)))
    labeler = Labeler(network, config, precision="float32")
    whole, inner = boxes[0].box_xywh, (boxes[0].box_xywh[0], boxes[0].box_xywh[1], 8.0, 8.0)
    crops = [
        one for one in labeler.prepare(read_image(images / row.file_name), [whole, inner]) if isinstance(one, Crop)
    ]
    predictions = labeler.predict(crops)
    claims = [labeler.claim(*pair) for pair in zip(crops, predictions, strict=True)]
    owners = PixelOwners(crops[0].image_hw)
    for index, claim in enumerate(claims):
        owners.add(index, claim)
    kept = owners.kept(0, claims[0])
    assert kept.overlap.contested > 0.0
    predicted = fitted.model.score(score_features(crops[0], claims[0], kept.mask, kept.overlap))
    assert labeler.finish(crops[0], predictions[0], owners=owners).score == calibrated(predicted, fitted.calibration)
    assert config.score_model is not None
    assert config.calibration is not None
    alone = config.score_model.score(score_features(crops[0], claims[0], claims[0].mask))
    assert alone != predicted
    assert labeler.finish(crops[0], predictions[0]).score == calibrated(alone, config.calibration)


@pytest.mark.parametrize("images", [3, 80], ids=["too few masks", "none of them contested"])
def test_without_contested_masks_there_is_no_score_for_resolved_overlaps(
    tmp_path: Path, model_of_few_masks: None, images: int
) -> None:
    annotations, folder = write_scenes(tmp_path, images=images)
    validator = replace(validator_of(read_coco(annotations), folder), fit_calibration=True)
    assert validator.fit_resolved(spread_network(), LabelerConfig(crop_size=32)) is None


class _Compared(Evaluator):
    """Masks with these IoUs, each of an image of its own."""

    def __init__(self, ious: np.ndarray) -> None:
        super().__init__({})
        self.ious = ious
        self.scores: list[float] | None = None

    @property
    def rows(self) -> list[InstanceIoU]:
        return [InstanceIoU(index, index, 1, float(iou), 0.5, 100, 100.0) for index, iou in enumerate(self.ious)]

    def rescore(self, scores: Iterable[float]) -> None:
        self.scores = list(scores)


@pytest.mark.parametrize("is_better", [True, False])
def test_the_score_for_resolved_overlaps_must_rank_better_than_one_that_knows_no_overlaps(is_better: bool) -> None:
    rng = np.random.default_rng(0)
    count, own = 400, len(RESOLVED_FEATURES)
    features = rng.normal(size=(count, own + 2))
    contested = RESOLVED_FEATURES.index("contested")
    features[:, contested] = rng.random(count)
    # IoUs follow the contested share, or only a feature of the mask itself.
    ious = 1.0 - features[:, contested] if is_better else rng.random(count) + (features[:, 0] > 0)
    ious = ious / ious.max()
    found: FeaturesOfMasks = {(index, index): row.astype(np.float32) for index, row in enumerate(features)}
    compared = _Compared(ious)
    assert (fit_resolved_score(compared, found) is not None) == is_better
    assert (compared.scores is not None) == is_better


def test_of_rows_with_one_id_the_features_are_those_of_the_compared_mask(
    tmp_path: Path, model_of_few_masks: None
) -> None:
    annotations, images = write_scenes(tmp_path, images=160)
    network = spread_network()
    raw = LabelerConfig(crop_size=32, mask_thres=(0.5, 0.5, 0.5))
    coco = read_coco(annotations)
    # The same ids with other boxes; none of them is compared.
    others = [replace(row, box_xywh=(0.0, 0.0, 30.0, 20.0)) for row in coco.annotations]

    def fit(file: CocoFile) -> LabelerConfig:
        return replace(validator_of(file, images), fit_calibration=True).run(network, raw).config

    once = fit(coco)
    assert once.score is ScoreType.REGRESSION
    assert fit(replace(coco, annotations=[*coco.annotations, *others])) == once


def test_a_score_is_fitted_only_to_as_many_masks_as_fit_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_of_few_masks: None
) -> None:
    annotations, images = write_scenes(tmp_path, images=160)
    coco = read_coco(annotations)
    validator = replace(validator_of(coco, images), fit_calibration=True)
    raw = LabelerConfig(crop_size=32, mask_thres=(0.5, 0.5, 0.5))
    assert validator.run(spread_network(), raw).config.score is ScoreType.REGRESSION
    monkeypatch.setattr("mal_train.training.validation.SCORE_FIT_BYTES", 4 * len(coco.annotations))
    fitted = validator.run(spread_network(), raw).config
    assert fitted.score is ScoreType.STABILITY
    assert fitted.calibration is not None
