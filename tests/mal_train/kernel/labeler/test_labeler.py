"""The labeler: published pasting, one result for every box, and masks that do not depend on the batch."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mal_train.core.errors import BadBox, ConfigError, DeviceError, DeviceLost, OutOfDeviceMemory
from mal_train.core.masks import geometry, rle
from mal_train.core.masks.rle import Rle
from mal_train.core.settings import Branch, Compat, LabelerConfig, ScoreBasis, ScoreType
from mal_train.kernel.checkpoint.checkpoint import Checkpoint, save_checkpoint
from mal_train.kernel.labeler.labeler import Labeler
from mal_train.kernel.labeler.load import load_labeler
from mal_train.kernel.labeler.pass_threads import pass_sizes
from mal_train.kernel.labeler.types import Crop, Label, Prediction, PredictOptions
from mal_train.kernel.networks.network import MalNetwork, ModelConfig, probabilities
from tests.networks import spread_network
from tests.reference import fixture
from tests.score_models import with_resolved_score

IMAGE = np.random.default_rng(5).integers(0, 256, (90, 140, 3), dtype=np.uint8)
BOXES = [(5, 5, 30, 30), (60, 10, 70, 75), (100.25, 60.5, 50, 40), (0, 0, 140, 90), (20, 40, 3, 45)]


def make_labeler(config: LabelerConfig | None = None, *, precision: str = "float32") -> Labeler:
    network = spread_network()
    default = LabelerConfig(crop_size=64, mask_thres=(0.25, 0.25, 0.25))
    return Labeler(network, config or default, precision=precision)


def labels_of(results: list[Label | BadBox]) -> list[Label]:
    assert all(isinstance(result, Label) for result in results)
    return [result for result in results if isinstance(result, Label)]


def random_prediction(crop: Crop, seed: int = 0) -> Prediction:
    size = crop.pixels.shape[0]
    return Prediction(np.random.default_rng(seed).random((size, size), dtype=np.float32))


@pytest.mark.parametrize("name", ["f_paste_crop64_s22", "f_paste_crop128_s21"])
def test_masks_equal_the_published_ones_for_the_same_logits(name: str) -> None:
    data = np.load(fixture(f"{name}.npz"))
    expected = json.loads(fixture(f"{name}.json").read_text())
    expected = expected["annotations"] if isinstance(expected, dict) else expected
    small, medium, large = (float(t) for t in data["mask_thres"])
    size = data["boxmask_crop"].shape[-1]
    labeler = make_labeler(LabelerConfig(crop_size=size, mask_thres=(small, medium, large), compat=Compat.TAO))
    maps = probabilities(torch.from_numpy(data["seg_logits"]), size).numpy()
    for index, (prob, (x0, y0, x1, y1), (height, width)) in enumerate(
        zip(maps, data["bbox_xyxy"].tolist(), data["hw"].tolist(), strict=True)
    ):
        image = np.zeros((height, width, 3), np.uint8)
        (crop,) = labeler.prepare(image, [(x0, y0, x1 - x0, y1 - y0)])
        assert isinstance(crop, Crop)
        assert list(crop.window) == data["ext"][index].tolist()
        published = rle.decode_mask(Rle.from_coco(expected[index]["segmentation"]))
        mask = rle.decode_mask(labeler.finish(crop, Prediction(prob)).rle)
        assert np.count_nonzero(mask != published) <= 4, index


def test_every_box_has_a_label_or_an_error_in_order() -> None:
    boxes = [(5, 5, 30, 30), (0, 0, -1, 5), (130, 80, 40, 40), (500, 0, 5, 5), (float("nan"), 0, 1, 1)]
    results = make_labeler().label(IMAGE, boxes)
    assert [type(result) for result in results] == [Label, BadBox, Label, BadBox, BadBox]
    assert "box 1" in str(results[1])
    clipped = results[2]
    assert isinstance(clipped, Label)
    assert "BOX_CLIPPED" in clipped.flags


def test_the_mask_stays_inside_the_box() -> None:
    labeler = make_labeler()
    for box in BOXES:
        (crop,) = labeler.prepare(IMAGE, [box])
        assert isinstance(crop, Crop)
        size = crop.pixels.shape[0]
        full = labeler.finish(crop, Prediction(np.ones((size, size), np.float32)))
        region = geometry.box_pixels(crop.box_inside, (90, 140))
        frame = np.zeros((90, 140), bool)
        frame[region.row0 : region.row1, region.col0 : region.col1] = True
        np.testing.assert_array_equal(rle.decode_mask(full.rle), frame)
        assert "FULL_BOX" in full.flags
        assert full.score == pytest.approx(1.0)


def test_score_area_and_box_describe_the_mask() -> None:
    labeler = make_labeler()
    (crop,) = labeler.prepare(IMAGE, [(40, 20, 64, 48)])
    assert isinstance(crop, Crop)
    prob = np.zeros((64, 64), np.float32)
    prob[20:44, 16:48] = 0.8
    label = labeler.finish(crop, Prediction(prob))
    mask = rle.decode_mask(label.rle)
    assert label.area == np.count_nonzero(mask) > 0
    assert 0.5 < label.score < 1.0
    rows, columns = np.nonzero(mask)
    assert label.mask_box is not None
    assert label.mask_box == (
        columns.min(), rows.min(), columns.max() - columns.min() + 1, rows.max() - rows.min() + 1
    )  # fmt: skip
    assert label.flags == ()


def score_of_squares(inner: float, outer: float, **config: Any) -> float:
    """Returns the score of a square of probability `inner` within one of `outer`, at a threshold of one half."""
    labeler = Labeler(make_labeler().network, LabelerConfig(64, 0.6, (0.5, 0.5, 0.5), **config), precision="float32")
    (crop,) = labeler.prepare(IMAGE, [(40, 20, 64, 48)])
    assert isinstance(crop, Crop)
    prob = np.zeros((64, 64), np.float32)
    prob[16:48, 16:48] = outer
    prob[24:40, 24:40] = inner
    return labeler.finish(crop, Prediction(prob)).score


def test_stability_is_the_iou_of_masks_at_thresholds_two_logits_apart() -> None:
    certain, uncertain_inside, uncertain_outside = (
        score_of_squares(0.99, 0.99),
        score_of_squares(0.99, 0.6),
        score_of_squares(0.99, 0.4),
    )
    assert certain > 0.85
    # A quarter of the pixels is certain in both. The threshold includes the others in one case and not in the other.
    assert uncertain_inside == pytest.approx(0.25, abs=0.05)
    assert uncertain_outside == pytest.approx(uncertain_inside, abs=0.03)
    assert 0.0 < score_of_squares(0.6, 0.0) < 0.01


def test_a_small_component_that_is_all_of_a_mask_scores_at_most_one() -> None:
    labeler = make_labeler(LabelerConfig(64, 0.6, (0.5, 0.5, 0.5)))
    (crop,) = labeler.prepare(IMAGE, [(40, 20, 64, 48)])
    assert isinstance(crop, Crop)
    claim = labeler.claim(crop, Prediction(np.zeros((64, 64), np.float32)))
    values = np.zeros_like(claim.prob)
    values[10:30, 10:30] = values[40:43, 40:43] = 0.95
    kept = np.zeros_like(claim.mask)
    kept[40:43, 40:43] = True  # the square is assigned to another box
    label = labeler.label_from_mask(crop, dataclasses.replace(claim, prob=values), kept, min_component_area_px=50)
    assert (label.area, label.score) == (9, 1.0)


def test_score_meaning_names_the_score() -> None:
    assert "stability" in LabelerConfig().score_meaning()
    for config in (LabelerConfig(score=ScoreType.PROBABILITY), LabelerConfig(compat=Compat.TAO)):
        assert config.score_meaning() == "mean foreground probability, not calibrated"
    assert FITTED.score_meaning() == "expected IoU, calibrated"


FITTED = LabelerConfig(margin_rate=0.4, calibration=((0.0, 0.0), (1.0, 1.0)))


@pytest.mark.parametrize(
    ("basis", "difference"),
    [
        (ScoreBasis(margins=(0.4,)), None),
        (ScoreBasis(margins=(0.2, 0.4)), "margins 0.2, 0.4"),
        (ScoreBasis(branch=Branch.MIXED), "branch mixed"),
        (ScoreBasis(flip=True), "a mirrored pass"),
        (ScoreBasis(overlaps_resolved=True), "overlaps resolved"),
        (ScoreBasis(threshold=0.3), "threshold 0.3"),
        (ScoreBasis(min_component_area_px=9), "components under 9 px removed"),
        (ScoreBasis(refined_edges=True), "edges refined"),
    ],
)
def test_a_calibration_is_not_claimed_for_labels_with_other_options(basis: ScoreBasis, difference: str | None) -> None:
    meaning = FITTED.score_meaning(basis)
    assert meaning == FITTED.score_meaning() if difference is None else difference in meaning
    assert LabelerConfig().score_meaning(basis) == LabelerConfig().score_meaning()


def test_a_calibration_with_mirrored_passes_is_not_claimed_without() -> None:
    mirrored = dataclasses.replace(FITTED, calibrated_with_flip=True)
    assert LabelerConfig.from_dict(mirrored.to_dict()) == mirrored
    assert mirrored.score_meaning(ScoreBasis(flip=True)) == "expected IoU, calibrated"
    assert "not for: no mirrored pass" in mirrored.score_meaning()


def test_a_calibration_for_resolved_overlaps_is_claimed_for_these_only() -> None:
    fitted = with_resolved_score()
    assert fitted.score_meaning(ScoreBasis(overlaps_resolved=True)) == "expected IoU, calibrated"
    both = fitted.score_meaning(ScoreBasis(overlaps_resolved=True, flip=True))
    assert both.endswith("not for: a mirrored pass")
    tao = dataclasses.replace(fitted, compat=Compat.TAO)
    assert "overlaps resolved" in tao.score_meaning(ScoreBasis(overlaps_resolved=True))


def test_under_tao_and_in_old_checkpoints_the_score_is_the_mean_probability() -> None:
    for config in ({"score": ScoreType.PROBABILITY}, {"compat": Compat.TAO}):
        assert score_of_squares(0.8, 0.8, **config) == pytest.approx(0.79, abs=0.02)
    written = LabelerConfig(crop_size=64).to_dict()
    assert LabelerConfig.from_dict(written).score is ScoreType.STABILITY
    del written["score"]
    assert LabelerConfig.from_dict(written).score is ScoreType.PROBABILITY


def test_an_empty_mask_is_flagged_and_scores_zero() -> None:
    labeler = make_labeler()
    (crop,) = labeler.prepare(IMAGE, [(40, 20, 64, 48)])
    assert isinstance(crop, Crop)
    label = labeler.finish(crop, Prediction(np.zeros((64, 64), np.float32)))
    assert (label.area, label.score, label.mask_box, label.flags) == (0, 0.0, None, ("EMPTY_MASK",))


def test_two_separate_components_are_flagged() -> None:
    labeler = make_labeler()
    (crop,) = labeler.prepare(IMAGE, [(40, 20, 64, 48)])
    assert isinstance(crop, Crop)
    prob = np.zeros((64, 64), np.float32)
    prob[15:30, 15:30] = prob[40:50, 40:50] = 0.9
    assert "MULTI_PART" in labeler.finish(crop, Prediction(prob)).flags


def test_small_components_are_removed_before_score_area_box_flags_and_agreement() -> None:
    labeler = make_labeler()
    (crop,) = labeler.prepare(IMAGE, [(40, 20, 64, 48)])
    assert isinstance(crop, Crop)
    clean = np.zeros((64, 64), np.float32)
    clean[15:30, 15:30] = 0.9
    noisy = clean.copy()
    noisy[44:49, 44:49] = 0.5
    unfiltered = labeler.finish(crop, Prediction(noisy, noisy, clean))
    filtered = labeler.finish(crop, Prediction(noisy, noisy, clean), min_component_area_px=100)
    alone = labeler.finish(crop, Prediction(clean, clean, clean))
    assert "MULTI_PART" in unfiltered.flags
    assert unfiltered.area > filtered.area
    assert filtered == alone
    assert filtered.agreement == 1.0


def test_a_tiny_box_is_flagged() -> None:
    (label,) = labels_of(make_labeler().label(IMAGE, [(10, 10, 2, 30)]))
    assert "TOO_SMALL" in label.flags


def test_the_threshold_depends_on_the_size_class_unless_given() -> None:
    labeler = make_labeler(LabelerConfig(crop_size=64, mask_thres=(0.2, 0.5, 0.8)))
    crops = labeler.prepare(IMAGE, [(0, 0, 32, 32), (0, 0, 32.1, 32), (0, 0, 140, 90)])
    half = Prediction(np.full((64, 64), 0.6, np.float32))
    areas = [labeler.finish(crop, half).area > 0 for crop in crops if isinstance(crop, Crop)]
    assert areas == [True, True, False]
    assert isinstance(crops[2], Crop)
    assert labeler.finish(crops[2], half, threshold=0.5).area == 140 * 90


def test_masks_do_not_depend_on_the_batch_in_float32() -> None:
    labeler = make_labeler()
    crops = [crop for crop in labeler.prepare(IMAGE, BOXES) if isinstance(crop, Crop)]
    other = [crop for crop in labeler.prepare(IMAGE[::-1, ::-1].copy(), BOXES) if isinstance(crop, Crop)]
    mixed = [crop for pair in zip(crops, other, strict=True) for crop in pair]
    alone = [labeler.predict([crop])[0].prob for crop in crops]
    together = [prediction.prob for prediction in labeler.predict(mixed)][0::2]
    for a, b in zip(alone, together, strict=True):
        np.testing.assert_array_equal(a, b)


def test_agreement_is_the_iou_of_student_and_teacher() -> None:
    labeler = make_labeler()
    crops = [crop for crop in labeler.prepare(IMAGE, BOXES) if isinstance(crop, Crop)]
    students = labeler.predict(crops, PredictOptions(Branch.STUDENT))
    teachers = labeler.predict(crops, PredictOptions(Branch.TEACHER))
    with_agreement = labeler.predict(crops, PredictOptions(Branch.STUDENT, agreement=True))
    for crop, student, teacher, both in zip(crops, students, teachers, with_agreement, strict=True):
        label = labeler.finish(crop, both)
        a, b = labeler.finish(crop, student), labeler.finish(crop, teacher)
        expected = rle.iou(a.rle, b.rle) if a.area or b.area else 1.0
        assert label.agreement == pytest.approx(expected)
        assert label.rle == a.rle
        assert ("LOW_AGREEMENT" in label.flags) == (expected < 0.8)


def test_mixed_is_the_mean_of_logits_and_flip_is_symmetric() -> None:
    labeler = make_labeler()
    crops = [crop for crop in labeler.prepare(IMAGE, BOXES) if isinstance(crop, Crop)]
    symmetric = [
        Crop(np.concatenate([c.pixels[:, :32], c.pixels[:, 31::-1]], axis=1), *list(vars(c).values())[1:])
        for c in crops
    ]
    for prediction in labeler.predict(symmetric, PredictOptions(flip=True)):
        np.testing.assert_allclose(prediction.prob, prediction.prob[:, ::-1], atol=1e-5)
    for prediction in labeler.predict(crops, PredictOptions(Branch.MIXED, agreement=True)):
        assert prediction.student is not None
        assert prediction.teacher is not None
        low = np.minimum(prediction.student, prediction.teacher)
        high = np.maximum(prediction.student, prediction.teacher)
        # Upsampling is linear in the logits and the sigmoid is monotone, so mixed lies between the two.
        assert (prediction.prob >= low - 1e-6).all()
        assert (prediction.prob <= high + 1e-6).all()


def test_a_loaded_labeler_gives_the_labels_of_the_saved_one(tmp_path: Path) -> None:
    labeler = make_labeler()
    path = tmp_path / "model.malckpt"
    save_checkpoint(
        path,
        Checkpoint(
            model=labeler.network.config,
            labeler=labeler.config,
            weights=labeler.network.state_dict(),
            categories=[{"id": 1, "name": "thing"}],
            provenance={},
            kind="weights",
            training=None,
        ),
        None,
    )
    loaded, checkpoint = load_labeler(path, precision="float32")
    assert checkpoint.categories == [{"id": 1, "name": "thing"}]
    assert labels_of(loaded.label(IMAGE, BOXES)) == labels_of(labeler.label(IMAGE, BOXES))


def test_bfloat16_masks_are_close_to_float32() -> None:
    exact, approximate = make_labeler(), make_labeler(precision="bfloat16")
    pairs = list(zip(labels_of(exact.label(IMAGE, BOXES)), labels_of(approximate.label(IMAGE, BOXES)), strict=True))
    large = [(a, b) for a, b in pairs if a.area > 300]
    assert len(large) >= 2
    for a, b in large:
        assert rle.iou(a.rle, b.rle) > 0.9


def test_float16_on_a_cpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="float16"):
        make_labeler(precision="float16")


def test_device_failures_raise_distinct_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    labeler = make_labeler()
    crops = [crop for crop in labeler.prepare(IMAGE, BOXES) if isinstance(crop, Crop)]

    def fail(error: Exception) -> None:
        def run(*_: object) -> None:
            raise error

        monkeypatch.setattr(labeler.engine, "run", run)

    fail(torch.OutOfMemoryError("no memory"))
    with pytest.raises(OutOfDeviceMemory):
        labeler.predict(crops)
    fail(RuntimeError("shapes differ"))
    with pytest.raises(DeviceError, match="cpu") as raised:
        labeler.predict(crops)
    assert not isinstance(raised.value, DeviceLost)
    fail(RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be …"))
    with pytest.raises(DeviceLost):
        labeler.predict(crops)
    fail(RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be …"))
    with pytest.raises(OutOfDeviceMemory):
        labeler.predict(crops)


def test_no_boxes_give_no_labels() -> None:
    assert make_labeler().label(IMAGE, []) == []


def test_auto_precision_keeps_the_published_digits_under_compat_tao() -> None:
    assert make_labeler(LabelerConfig(crop_size=64, compat=Compat.TAO), precision="auto").dtype is torch.float32


@pytest.mark.parametrize(
    ("precision", "side", "count"),
    [("bfloat16", 512, 2), ("bfloat16", 224, 10), ("bfloat16", 2048, 1), ("float32", 224, 1)],
)
def test_the_number_of_crops_in_a_pass_depends_on_precision_and_size(precision: str, side: int, count: int) -> None:
    labeler = Labeler(MalNetwork(ModelConfig("vit-micro/16")), LabelerConfig(crop_size=64), precision=precision)
    assert labeler._predictor.max_crops_per_pass(side) == count


def test_predictions_of_several_passes_keep_the_order_of_crops(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    labeler = Labeler(MalNetwork(ModelConfig("vit-micro/16")), LabelerConfig(crop_size=64), precision="bfloat16")
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    boxes = [(float(2 * i), float(i), 30.0, 30.0) for i in range(7)]
    crops = [crop for crop in labeler.prepare(pixels, boxes) if isinstance(crop, Crop)]
    passes, inner = list[int](), labeler._predictor._predict_batch

    def counting(crops: Any, options: PredictOptions) -> Any:
        passes.append(len(crops))
        return inner(crops, options)

    monkeypatch.setattr(labeler._predictor, "_predict_batch", counting)
    monkeypatch.setattr(labeler._predictor, "max_crops_per_pass", lambda crop_size: 3)
    predictions = labeler.predict(crops)
    assert sorted(passes, reverse=True) == pass_sizes(7, 3, torch.get_num_threads())
    for crop, prediction in zip(crops, predictions, strict=True):
        (alone,) = labeler.predict([crop])
        assert float(np.abs(prediction.prob - alone.prob).max()) < 0.02


def random_boxes(rng: np.random.Generator, count: int) -> list[tuple[float, float, float, float]]:
    """Returns boxes of all sizes; some extend beyond `IMAGE`, and some have sides of less than two pixels."""
    sides = np.exp(rng.uniform(np.log(1.1), np.log(120.0), (count, 2)))
    corners = rng.uniform(-20.0, 1.0, (count, 2)) + rng.random((count, 2)) * (120.0, 70.0)
    return [(float(x), float(y), float(w), float(h)) for (x, y), (w, h) in zip(corners, sides, strict=True)]


@pytest.mark.parametrize("compat", list(Compat))
@pytest.mark.parametrize("crop_size", [32, 64, 160])
def test_labels_do_not_depend_on_what_is_predicted_outside_the_box(compat: Compat, crop_size: int) -> None:
    labeler = make_labeler(LabelerConfig(crop_size=crop_size, mask_thres=(0.25, 0.25, 0.25), compat=compat))
    rng = np.random.default_rng(crop_size)
    crops = [crop for crop in labeler.prepare(IMAGE, random_boxes(rng, 60)) if isinstance(crop, Crop)]
    assert len(crops) > 20
    for crop in crops:
        prob = rng.random((crop_size, crop_size), dtype=np.float32)
        region = geometry.pixels_of_mask(crop.box_inside, crop.window, crop.image_hw, crop_size, compat)
        rows, columns = slice(region.row0, region.row1), slice(region.col0, region.col1)
        cut = np.zeros_like(prob)
        cut[rows, columns] = prob[rows, columns]
        box_mask = geometry.box_mask_in_window(crop.box_inside, crop.window, crop.image_hw, crop_size, compat)
        assert np.count_nonzero(box_mask[rows, columns]) == np.count_nonzero(box_mask)
        whole, part = labeler.claim(crop, Prediction(prob)), labeler.claim(crop, Prediction(cut))
        assert np.array_equal(whole.prob, part.prob)


@pytest.mark.parametrize("compat", list(Compat))
def test_labels_are_those_of_the_whole_map(compat: Compat) -> None:
    labeler = make_labeler(LabelerConfig(crop_size=64, mask_thres=(0.25, 0.25, 0.25), compat=compat))
    boxes = random_boxes(np.random.default_rng(8), 40)
    for options in (PredictOptions(), PredictOptions(Branch.MIXED, agreement=True, flip=True)):
        part = labeler.label(IMAGE, boxes, options)
        whole = labeler.label(IMAGE, boxes, dataclasses.replace(options, whole_map=True))
        assert labels_of([label for label in part if isinstance(label, Label)]) == [
            label for label in whole if isinstance(label, Label)
        ]


def test_the_margin_of_a_crop_is_predicted_only_on_request() -> None:
    labeler = make_labeler(LabelerConfig(crop_size=224, margin_rate=2.0))
    (crop,) = labeler.prepare(IMAGE, [(40, 20, 50, 50)])
    assert isinstance(crop, Crop)
    (part,), (whole,) = labeler.predict([crop]), labeler.predict([crop], PredictOptions(whole_map=True))
    assert part.prob[0, 0] == 0.0 < whole.prob[0, 0]
    assert np.array_equal(part.prob[80:144, 80:144], whole.prob[80:144, 80:144])
