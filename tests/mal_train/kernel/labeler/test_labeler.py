"""Boxes to masks: the published pasting, the answer for every box, and masks that do not depend on the company."""

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
from mal_train.kernel.labeler.labeler import Crop, Label, Labeler, Prediction, PredictOptions, load_labeler
from mal_train.kernel.networks.network import MalNetwork, ModelConfig, probabilities
from tests.networks import spread_network
from tests.reference import fixture

IMAGE = np.random.default_rng(5).integers(0, 256, (90, 140, 3), dtype=np.uint8)
BOXES = [(5, 5, 30, 30), (60, 10, 70, 75), (100.25, 60.5, 50, 40), (0, 0, 140, 90), (20, 40, 3, 45)]


def labeler(config: LabelerConfig | None = None, **options: str) -> Labeler:
    network = spread_network()
    default = LabelerConfig(crop_size=64, mask_thres=(0.25, 0.25, 0.25))
    return Labeler(network, config or default, **({"precision": "float32"} | options))


def labels_of(answers: list[Label | BadBox]) -> list[Label]:
    assert all(isinstance(answer, Label) for answer in answers)
    return [answer for answer in answers if isinstance(answer, Label)]


def random_probability(crop: Crop, seed: int = 0) -> Prediction:
    size = crop.pixels.shape[0]
    return Prediction(np.random.default_rng(seed).random((size, size), dtype=np.float32))


@pytest.mark.parametrize("name", ["f_paste_crop64_s22", "f_paste_crop128_s21"])
def test_masks_equal_the_published_ones_for_given_logits(name: str) -> None:
    data = np.load(fixture(f"{name}.npz"))
    expected = json.loads(fixture(f"{name}.json").read_text())
    expected = expected["annotations"] if isinstance(expected, dict) else expected
    small, medium, large = (float(t) for t in data["mask_thres"])
    size = data["boxmask_crop"].shape[-1]
    ours = labeler(LabelerConfig(crop_size=size, mask_thres=(small, medium, large), compat=Compat.TAO))
    maps = probabilities(torch.from_numpy(data["seg_logits"]), size).numpy()
    for index, (prob, (x0, y0, x1, y1), (height, width)) in enumerate(
        zip(maps, data["bbox_xyxy"].tolist(), data["hw"].tolist(), strict=True)
    ):
        image = np.zeros((height, width, 3), np.uint8)
        (crop,) = ours.prepare(image, [(x0, y0, x1 - x0, y1 - y0)])
        assert isinstance(crop, Crop)
        assert list(crop.window) == data["ext"][index].tolist()
        theirs = rle.decode_mask(Rle.from_coco(expected[index]["segmentation"]))
        mine = rle.decode_mask(ours.finish(crop, Prediction(prob)).rle)
        assert np.count_nonzero(mine != theirs) <= 4, index


def test_every_box_is_answered_in_order_and_the_unusable_say_why() -> None:
    boxes = [(5, 5, 30, 30), (0, 0, -1, 5), (130, 80, 40, 40), (500, 0, 5, 5), (float("nan"), 0, 1, 1)]
    answers = labeler().label(IMAGE, boxes)
    assert [type(answer) for answer in answers] == [Label, BadBox, Label, BadBox, BadBox]
    assert "box 1" in str(answers[1])
    clipped = answers[2]
    assert isinstance(clipped, Label)
    assert "BOX_CLIPPED" in clipped.flags


def test_the_mask_stays_inside_the_box() -> None:
    ours = labeler()
    for box in BOXES:
        (crop,) = ours.prepare(IMAGE, [box])
        assert isinstance(crop, Crop)
        size = crop.pixels.shape[0]
        full = ours.finish(crop, Prediction(np.ones((size, size), np.float32)))
        region = geometry.box_pixels(crop.box_inside, (90, 140))
        frame = np.zeros((90, 140), bool)
        frame[region.row0 : region.row1, region.col0 : region.col1] = True
        np.testing.assert_array_equal(rle.decode_mask(full.rle), frame)
        assert "FULL_BOX" in full.flags
        assert full.score == pytest.approx(1.0)


def test_score_area_and_box_describe_the_mask() -> None:
    ours = labeler()
    (crop,) = ours.prepare(IMAGE, [(40, 20, 64, 48)])
    assert isinstance(crop, Crop)
    prob = np.zeros((64, 64), np.float32)
    prob[20:44, 16:48] = 0.8
    label = ours.finish(crop, Prediction(prob))
    mask = rle.decode_mask(label.rle)
    assert label.area == np.count_nonzero(mask) > 0
    assert 0.5 < label.score < 1.0
    rows, columns = np.nonzero(mask)
    assert label.mask_box is not None
    assert label.mask_box == (
        columns.min(), rows.min(), columns.max() - columns.min() + 1, rows.max() - rows.min() + 1
    )  # fmt: skip
    assert label.flags == ()


def scored(middle: float, rim: float, **config: Any) -> float:
    """Score of a square of `middle` within a square of `rim`, at a threshold of one half."""
    ours = Labeler(labeler().network, LabelerConfig(64, 0.6, (0.5, 0.5, 0.5), **config), precision="float32")
    (crop,) = ours.prepare(IMAGE, [(40, 20, 64, 48)])
    assert isinstance(crop, Crop)
    prob = np.zeros((64, 64), np.float32)
    prob[16:48, 16:48] = rim
    prob[24:40, 24:40] = middle
    return ours.finish(crop, Prediction(prob)).score


def test_a_score_is_the_share_that_stays_when_the_threshold_moves_by_two_logits() -> None:
    sure, unsure_inside, unsure_outside = scored(0.99, 0.99), scored(0.99, 0.6), scored(0.99, 0.4)
    assert sure > 0.85
    # A quarter of the pixels is sure in both, whether the threshold leaves the rest in or out.
    assert unsure_inside == pytest.approx(0.25, abs=0.05)
    assert unsure_outside == pytest.approx(unsure_inside, abs=0.03)
    assert 0.0 < scored(0.6, 0.0) < 0.01


def test_a_speck_that_is_all_a_box_is_left_with_scores_at_most_one() -> None:
    ours = labeler(LabelerConfig(64, 0.6, (0.5, 0.5, 0.5)))
    (crop,) = ours.prepare(IMAGE, [(40, 20, 64, 48)])
    assert isinstance(crop, Crop)
    claim = ours.claim(crop, Prediction(np.zeros((64, 64), np.float32)))
    values = np.zeros_like(claim.values)
    values[10:30, 10:30] = values[40:43, 40:43] = 0.95
    kept = np.zeros_like(claim.mask)
    kept[40:43, 40:43] = True  # another box was given the square
    label = ours.answer(crop, dataclasses.replace(claim, values=values), kept, min_component_area_px=50)
    assert (label.area, label.score) == (9, 1.0)


def test_files_say_which_score_they_carry() -> None:
    assert "stability" in LabelerConfig().score_meaning()
    for config in (LabelerConfig(score=ScoreType.PROBABILITY), LabelerConfig(compat=Compat.TAO)):
        assert config.score_meaning() == "mean foreground probability, not calibrated"
    assert FITTED.score_meaning() == "expected IoU, calibrated"


FITTED = LabelerConfig(margin_rate=0.4, calibration=((0.0, 0.0), (1.0, 1.0)))


@pytest.mark.parametrize(
    ("manner", "words"),
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
def test_a_calibration_is_not_claimed_for_labels_made_in_another_way(manner: ScoreBasis, words: str | None) -> None:
    told = FITTED.score_meaning(manner)
    exact = "expected IoU, calibrated"
    assert told == (exact if words is None else f"{exact} for one pass of the student, not for: {words}")
    assert LabelerConfig().score_meaning(manner) == LabelerConfig().score_meaning()


def test_a_calibration_of_mirrored_answers_is_for_these_alone() -> None:
    mirrored = dataclasses.replace(FITTED, calibrated_with_flip=True)
    assert LabelerConfig.from_dict(mirrored.to_dict()) == mirrored
    assert mirrored.score_meaning(ScoreBasis(flip=True)) == "expected IoU, calibrated"
    assert "not for: no mirrored pass" in mirrored.score_meaning()


def test_under_tao_and_in_old_checkpoints_a_score_is_the_mean_probability() -> None:
    for config in ({"score": ScoreType.PROBABILITY}, {"compat": Compat.TAO}):
        assert scored(0.8, 0.8, **config) == pytest.approx(0.79, abs=0.02)
    written = LabelerConfig(crop_size=64).to_dict()
    assert LabelerConfig.from_dict(written).score is ScoreType.STABILITY
    del written["score"]
    assert LabelerConfig.from_dict(written).score is ScoreType.PROBABILITY


def test_an_empty_mask_is_flagged_and_scores_zero() -> None:
    ours = labeler()
    (crop,) = ours.prepare(IMAGE, [(40, 20, 64, 48)])
    assert isinstance(crop, Crop)
    label = ours.finish(crop, Prediction(np.zeros((64, 64), np.float32)))
    assert (label.area, label.score, label.mask_box, label.flags) == (0, 0.0, None, ("EMPTY_MASK",))


def test_two_separate_parts_are_flagged() -> None:
    ours = labeler()
    (crop,) = ours.prepare(IMAGE, [(40, 20, 64, 48)])
    assert isinstance(crop, Crop)
    prob = np.zeros((64, 64), np.float32)
    prob[15:30, 15:30] = prob[40:50, 40:50] = 0.9
    assert "MULTI_PART" in ours.finish(crop, Prediction(prob)).flags


def test_specks_are_gone_before_score_area_box_flags_and_agreement() -> None:
    ours = labeler()
    (crop,) = ours.prepare(IMAGE, [(40, 20, 64, 48)])
    assert isinstance(crop, Crop)
    clean = np.zeros((64, 64), np.float32)
    clean[15:30, 15:30] = 0.9
    specked = clean.copy()
    specked[44:49, 44:49] = 0.5
    with_speck = ours.finish(crop, Prediction(specked, specked, clean))
    without = ours.finish(crop, Prediction(specked, specked, clean), min_component_area_px=100)
    alone = ours.finish(crop, Prediction(clean, clean, clean))
    assert "MULTI_PART" in with_speck.flags
    assert with_speck.area > without.area
    assert without == alone
    assert without.agreement == 1.0


def test_a_tiny_box_is_flagged() -> None:
    (label,) = labels_of(labeler().label(IMAGE, [(10, 10, 2, 30)]))
    assert "TOO_SMALL" in label.flags


def test_the_threshold_follows_the_size_class_unless_given() -> None:
    ours = labeler(LabelerConfig(crop_size=64, mask_thres=(0.2, 0.5, 0.8)))
    crops = ours.prepare(IMAGE, [(0, 0, 32, 32), (0, 0, 32.1, 32), (0, 0, 140, 90)])
    half = Prediction(np.full((64, 64), 0.6, np.float32))
    areas = [ours.finish(crop, half).area > 0 for crop in crops if isinstance(crop, Crop)]
    assert areas == [True, True, False]
    assert isinstance(crops[2], Crop)
    assert ours.finish(crops[2], half, threshold=0.5).area == 140 * 90


def test_masks_do_not_depend_on_the_batch_in_float32() -> None:
    ours = labeler()
    crops = [crop for crop in ours.prepare(IMAGE, BOXES) if isinstance(crop, Crop)]
    other = [crop for crop in ours.prepare(IMAGE[::-1, ::-1].copy(), BOXES) if isinstance(crop, Crop)]
    mixed = [crop for pair in zip(crops, other, strict=True) for crop in pair]
    alone = [ours.predict([crop])[0].prob for crop in crops]
    together = [found.prob for found in ours.predict(mixed)][0::2]
    for a, b in zip(alone, together, strict=True):
        np.testing.assert_array_equal(a, b)


def test_agreement_is_the_iou_of_student_and_teacher() -> None:
    ours = labeler()
    crops = [crop for crop in ours.prepare(IMAGE, BOXES) if isinstance(crop, Crop)]
    students = ours.predict(crops, PredictOptions(Branch.STUDENT))
    teachers = ours.predict(crops, PredictOptions(Branch.TEACHER))
    asked = ours.predict(crops, PredictOptions(Branch.STUDENT, agreement=True))
    for crop, student, teacher, both in zip(crops, students, teachers, asked, strict=True):
        label = ours.finish(crop, both)
        a, b = ours.finish(crop, student), ours.finish(crop, teacher)
        expected = rle.iou(a.rle, b.rle) if a.area or b.area else 1.0
        assert label.agreement == pytest.approx(expected)
        assert label.rle == a.rle
        assert ("LOW_AGREEMENT" in label.flags) == (expected < 0.8)


def test_mixed_is_the_mean_of_logits_and_flip_is_symmetric() -> None:
    ours = labeler()
    crops = [crop for crop in ours.prepare(IMAGE, BOXES) if isinstance(crop, Crop)]
    symmetric = [
        Crop(np.concatenate([c.pixels[:, :32], c.pixels[:, 31::-1]], axis=1), *list(vars(c).values())[1:])
        for c in crops
    ]
    for found in ours.predict(symmetric, PredictOptions(flip=True)):
        np.testing.assert_allclose(found.prob, found.prob[:, ::-1], atol=1e-5)
    asked = ours.predict(crops, PredictOptions(Branch.MIXED, agreement=True))
    for found in asked:
        assert found.student is not None
        assert found.teacher is not None
        low, high = np.minimum(found.student, found.teacher), np.maximum(found.student, found.teacher)
        # Upsampling is linear in the logits and the sigmoid is monotone, so mixed lies between the two.
        assert (found.prob >= low - 1e-6).all()
        assert (found.prob <= high + 1e-6).all()


def test_a_checkpoint_labels_as_the_network_it_was_made_from(tmp_path: Path) -> None:
    ours = labeler()
    path = tmp_path / "model.malckpt"
    save_checkpoint(
        path,
        Checkpoint(
            model=ours.network.config,
            labeler=ours.config,
            weights=ours.network.state_dict(),
            categories=[{"id": 1, "name": "thing"}],
            provenance={},
            kind="weights",
            training=None,
        ),
        None,
    )
    again, checkpoint = load_labeler(path, precision="float32")
    assert checkpoint.categories == [{"id": 1, "name": "thing"}]
    assert labels_of(again.label(IMAGE, BOXES)) == labels_of(ours.label(IMAGE, BOXES))


def test_bfloat16_masks_are_close_to_float32() -> None:
    exact, quick = labeler(), labeler(precision="bfloat16")
    pairs = list(zip(labels_of(exact.label(IMAGE, BOXES)), labels_of(quick.label(IMAGE, BOXES)), strict=True))
    large = [(a, b) for a, b in pairs if a.area > 300]
    assert len(large) >= 2
    for a, b in large:
        assert rle.iou(a.rle, b.rle) > 0.9


def test_float16_on_a_cpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="float16"):
        labeler(precision="float16")


def test_device_failures_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = labeler()
    crops = [crop for crop in ours.prepare(IMAGE, BOXES) if isinstance(crop, Crop)]

    def fail(error: Exception) -> None:
        def logits(*_: object) -> None:
            raise error

        monkeypatch.setattr(ours.network, "logits", logits)

    fail(torch.OutOfMemoryError("no memory"))
    with pytest.raises(OutOfDeviceMemory):
        ours.predict(crops)
    fail(RuntimeError("shapes differ"))
    with pytest.raises(DeviceError, match="shapes differ") as raised:
        ours.predict(crops)
    assert not isinstance(raised.value, DeviceLost)
    fail(RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be …"))
    with pytest.raises(DeviceLost, match="illegal memory access"):
        ours.predict(crops)
    fail(RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be …"))
    with pytest.raises(OutOfDeviceMemory):
        ours.predict(crops)


def test_no_boxes_give_no_labels() -> None:
    assert labeler().label(IMAGE, []) == []


def test_auto_precision_keeps_the_published_digits_under_compat_tao() -> None:
    assert labeler(LabelerConfig(crop_size=64, compat=Compat.TAO), precision="auto").dtype is torch.float32


@pytest.mark.parametrize(
    ("precision", "threads", "side", "count"),
    [
        ("bfloat16", 1, 512, 4),
        ("bfloat16", 2, 512, 4),
        ("bfloat16", 8, 512, 16),
        ("bfloat16", 2, 224, 20),
        ("bfloat16", 2, 2048, 1),
        ("float32", 8, 224, 1),
    ],
)
def test_on_a_cpu_so_many_crops_share_a_pass(
    precision: str, threads: int, side: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    labeler = Labeler(MalNetwork(ModelConfig("vit-micro/16")), LabelerConfig(crop_size=64), precision=precision)
    assert labeler.crops_a_pass(side) == count


def test_passes_give_every_crop_its_own_map_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    labeler = Labeler(MalNetwork(ModelConfig("vit-micro/16")), LabelerConfig(crop_size=64), precision="bfloat16")
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    boxes = [(float(2 * i), float(i), 30.0, 30.0) for i in range(7)]
    crops = [crop for crop in labeler.prepare(pixels, boxes) if isinstance(crop, Crop)]
    passes, inner = list[int](), labeler._predict_batch

    def counted(crops: Any, options: PredictOptions) -> Any:
        passes.append(len(crops))
        return inner(crops, options)

    monkeypatch.setattr(labeler, "_predict_batch", counted)
    monkeypatch.setattr(labeler, "crops_a_pass", lambda side: 3)
    found = labeler.predict(crops)
    assert passes == [3, 3, 1]
    for crop, one in zip(crops, found, strict=True):
        (alone,) = labeler.predict([crop])
        assert float(np.abs(one.prob - alone.prob).max()) < 0.02
