"""Points correct masks: every mask obeys them, whatever happens to it after the forward pass."""

import tracemalloc
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from mal_train.core.errors import BadBox, BadPoint
from mal_train.core.masks import rle
from mal_train.core.masks.geometry import Region
from mal_train.core.masks.points import MAX_POINTS, Point
from mal_train.core.settings import Branch, Compat, LabelerConfig
from mal_train.kernel.labeler.clicks import corrected, correcting_bytes
from mal_train.kernel.labeler.labeler import Labeler
from mal_train.kernel.labeler.overlaps import PixelOwners
from mal_train.kernel.labeler.types import Crop, Label, Prediction, PredictOptions
from mal_train.kernel.networks.network import NetworkOutput
from tests.networks import spread_network

IMAGE = np.random.default_rng(5).integers(0, 256, (90, 140, 3), dtype=np.uint8)
BOX = (20.0, 15.0, 70.0, 60.0)
NEIGHBOR = (60.0, 30.0, 60.0, 50.0)


def make_labeler(compat: Compat = Compat.NONE) -> Labeler:
    return Labeler(spread_network(), LabelerConfig(64, 0.6, (0.25, 0.25, 0.25), compat=compat), precision="float32")


LABELERS = {compat: make_labeler(compat) for compat in Compat}


def crops_of(labeler: Labeler, boxes: Sequence[Sequence[float]], points: Sequence[Sequence[Point]]) -> list[Crop]:
    crops = labeler.prepare(IMAGE, boxes, points=points)
    return [crop for crop in crops if isinstance(crop, Crop)]


def obeys(label: Label, points: Sequence[Point]) -> bool:
    mask = rle.decode_mask(label.rle)
    return all(mask[row, column] == point.is_positive for point in points for column, row in [point.pixel])


@st.composite
def some_points(draw: st.DrawFn) -> tuple[Point, ...]:
    """Draws points in the middle of both boxes and negative ones anywhere, one on a pixel."""
    inside = st.tuples(st.integers(60, 88), st.integers(30, 73))
    anywhere = st.tuples(st.integers(0, 139), st.integers(0, 89))
    positive = draw(st.sets(inside, max_size=4))
    negative = draw(st.sets(anywhere, max_size=4)) - positive
    offset = draw(st.floats(0, 0.99))
    return tuple(Point(x + offset, y + offset, is_positive=(x, y) in positive) for x, y in positive | negative)


@settings(max_examples=25, deadline=None)
@given(
    points=some_points(),
    compat=st.sampled_from(Compat),
    options=st.builds(PredictOptions, st.sampled_from(Branch), st.booleans(), st.booleans(), st.booleans()),
    threshold=st.sampled_from([1e-6, 0.25, 1 - 1e-6]),
    min_area=st.sampled_from([0, 50]),
)
def test_every_mask_obeys_its_points(
    points: tuple[Point, ...], compat: Compat, options: PredictOptions, threshold: float, min_area: int
) -> None:
    labeler = LABELERS[compat]
    crops = crops_of(labeler, [BOX, NEIGHBOR], [points, points])
    predictions = labeler.predict(crops, options)
    owners = PixelOwners(crops[0].image_hw)
    for index, (crop, prediction) in enumerate(zip(crops, predictions, strict=True)):
        owners.add(index, labeler.claim(crop, prediction, threshold=threshold))
    for index, (crop, prediction) in enumerate(zip(crops, predictions, strict=True)):
        for shared in (None, owners):
            label = labeler.finish(
                crop,
                prediction,
                threshold=threshold,
                min_component_area_px=min_area,
                owners=shared,
                index=index,
            )
            assert obeys(label, points)


def test_a_pixel_with_a_positive_point_belongs_to_the_box_of_the_point() -> None:
    labeler = LABELERS[Compat.NONE]
    point = Point(70, 40, is_positive=True)
    for first in (True, False):
        points = [(point,), ()] if first else [(), (point,)]
        crops = crops_of(labeler, [BOX, NEIGHBOR], points)
        predictions = labeler.predict(crops)
        owners = PixelOwners(crops[0].image_hw)
        claims = [labeler.claim(crop, p, threshold=1e-6) for crop, p in zip(crops, predictions, strict=True)]
        for index, claim in enumerate(claims):
            owners.add(index, claim)
        masks = [owners.kept(index, claim).mask for index, claim in enumerate(claims)]
        owner, other = (0, 1) if first else (1, 0)
        column, row = point.pixel
        held = [
            mask[row - claim.region.row0, column - claim.region.col0] for mask, claim in zip(masks, claims, strict=True)
        ]
        assert held[owner]
        assert not held[other] or masks[other].all()


def test_a_point_that_cannot_be_obeyed_comes_back_in_place_of_the_crop() -> None:
    labeler = LABELERS[Compat.NONE]
    outside = Point(5, 5, is_positive=True)
    results = labeler.label(IMAGE, [BOX, BOX, (0, 0, -1, 2)], points=[[outside], [], []])
    assert [type(result) for result in results] == [BadPoint, Label, BadBox]
    bad = results[0]
    assert isinstance(bad, BadPoint)
    assert bad.reason == "POINT_OUTSIDE_BOX"


def test_points_need_one_sequence_for_each_box() -> None:
    with pytest.raises(ValueError, match="zip"):
        LABELERS[Compat.NONE].prepare(IMAGE, [BOX, BOX], points=[[]])


class ConstantEngine:
    """An engine whose logits are a disc, whatever the crop shows."""

    dtype = torch.float32

    def run(
        self, x_NCHW: Tensor, size_class_N: Tensor, branch: Branch, needed: Sequence[Region] | None = None
    ) -> NetworkOutput:
        position = torch.linspace(-1, 1, 16)
        disc = 3.0 - 8.0 * (position[:, None].square() + position.square())
        return NetworkOutput(disc.expand(len(x_NCHW), 1, 16, 16).clone(), torch.ones(len(x_NCHW), 3, 4, 4))


def scene(*points: Point) -> Crop:
    """Returns the crop of a box of 64 px: dark, with a bright square on the right."""
    image = np.full((96, 96, 3), 40, np.uint8)
    image[40:56, 52:68] = 220
    (crop,) = Labeler(spread_network(), LabelerConfig(64, 0.0, (0.5, 0.5, 0.5))).prepare(
        image, [(16, 16, 64, 64)], points=[points]
    )
    assert isinstance(crop, Crop)
    return crop


def map_of(inside: float, outside: float, columns: slice = slice(16, 48)) -> NDArray[np.float32]:
    prob = np.full((64, 64), outside, np.float32)
    prob[12:52, columns] = inside
    return prob


def test_a_positive_click_adds_its_surroundings_of_the_same_color_and_nothing_else() -> None:
    crop = scene(Point(60.5, 48.5, is_positive=True))
    prob = map_of(0.9, 0.2, slice(8, 24))
    mask = corrected(prob, crop, 0.5, Compat.NONE) > 0.5
    square = np.zeros((64, 64), bool)
    square[23:39, 35:51] = True  # the window begins at column and row 16 and has 65 px
    assert mask[square].mean() > 0.9
    assert (mask & ~square)[:, 26:].sum() < 100
    np.testing.assert_array_equal(mask[:, :24], prob[:, :24] > 0.5)


def test_a_negative_click_in_a_strip_along_the_edge_leaves_the_object_behind_it() -> None:
    crop = scene(Point(16 + 18.5, 16 + 32.5, is_positive=False))
    mask = corrected(map_of(0.9, 0.1), crop, 0.5, Compat.NONE) > 0.5
    assert not mask[28:36, :19].any()
    assert mask[28:36, 26:48].all()


def test_clicks_that_are_obeyed_already_keep_the_mask() -> None:
    prob = map_of(0.995, 0.005)
    points = (Point(40.5, 48.5, is_positive=True), Point(20.5, 20.5, is_positive=False))
    np.testing.assert_allclose(corrected(prob, scene(*points), 0.5, Compat.NONE), prob, atol=1e-4)


def test_points_outside_the_box_change_nothing() -> None:
    prob = map_of(0.9, 0.1)
    np.testing.assert_array_equal(corrected(prob, scene(Point(2, 2, is_positive=False)), 0.5, Compat.NONE), prob)


def test_opposite_points_side_by_side_give_finite_probabilities() -> None:
    points = [Point(40 + x, 48, is_positive=x % 2 == 0) for x in range(8)]
    prob = corrected(map_of(0.9, 0.1), scene(*points), 0.5, Compat.NONE)
    assert np.isfinite(prob).all()
    assert prob.min() >= 0
    assert prob.max() <= 1


def constant_labeler() -> Labeler:
    return Labeler(spread_network(), LabelerConfig(64, 0.0, (0.5, 0.5, 0.5)), engine=ConstantEngine())


def test_points_correct_the_masks_of_any_engine() -> None:
    labeler = constant_labeler()
    plain, clicked = (
        labeler.claim(scene(*points), labeler.predict([scene(*points)])[0]).prob
        for points in ((), (Point(48.5, 48.5, is_positive=False),))
    )
    assert plain[28:36, 28:36].min() > 0.5
    assert clicked[28:36, 28:36].max() < 0.5


def test_points_leave_predictions_as_they_are() -> None:
    labeler = constant_labeler()
    plain, clicked = labeler.predict([scene(), scene(Point(48.5, 48.5, is_positive=False))])
    np.testing.assert_array_equal(plain.prob, clicked.prob)


def strip(threshold: float) -> Prediction:
    """Returns a strip on the left, 1 above the logit of a threshold, and 1.5 below it elsewhere."""
    odds = np.exp(np.where(map_of(1, 0, slice(8, 24)) > 0, 1.0, -1.5)) * threshold / (1 - threshold)
    return Prediction((odds / (1 + odds)).astype(np.float32))


@pytest.mark.parametrize("threshold", [0.01, 0.99])
def test_surroundings_follow_a_click_at_the_threshold_of_the_request(threshold: float) -> None:
    labeler = constant_labeler()
    plain, clicked = scene(), scene(Point(60.5, 48.5, is_positive=True))
    mask = labeler.claim(clicked, strip(threshold), threshold=threshold).mask
    assert (mask & ~labeler.claim(plain, strip(threshold), threshold=threshold).mask).sum() > 200
    at_half = labeler.claim(clicked, strip(0.5), threshold=0.5).mask
    assert np.count_nonzero(mask ^ at_half) < 0.1 * np.count_nonzero(at_half)


def test_agreement_compares_corrected_masks() -> None:
    labeler = constant_labeler()
    crop = scene(Point(60.5, 48.5, is_positive=True))
    student, teacher = map_of(0.9, 0.2, slice(8, 24)), map_of(0.9, 0.2, slice(8, 16))
    masks = [labeler.claim(crop, Prediction(prob)).mask for prob in (student, teacher)]
    label = labeler.finish(crop, Prediction(student, student, teacher))
    assert label.agreement == np.count_nonzero(masks[0] & masks[1]) / np.count_nonzero(masks[0] | masks[1])


def test_the_last_step_corrects_crops_that_keep_what_it_needs() -> None:
    labeler = constant_labeler()
    for crop in (scene(), scene(Point(48.5, 48.5, is_positive=False))):
        (prediction,) = labeler.predict([crop])
        assert labeler.finish(crop.for_finish(), prediction) == labeler.finish(crop, prediction)
    assert scene().for_finish().pixels.size == 0


@pytest.mark.parametrize("count", [1, MAX_POINTS])
def test_a_correction_takes_no_more_memory_than_is_counted(count: int) -> None:
    points = [Point(20.5 + index % 8, 20.5 + index // 8, is_positive=index % 2 == 0) for index in range(count)]
    side = 512
    crop = replace(scene(*points), pixels=np.zeros((side, side, 3), np.uint8))
    prob = np.full((side, side), 0.4, np.float32)
    tracemalloc.start()
    try:
        corrected(prob, crop, 0.5, Compat.NONE)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    counted = correcting_bytes(count, side**2)
    assert counted / 2 < peak <= counted


@pytest.mark.parametrize("flip", [False, True])
def test_crops_depend_on_no_other_crop_of_their_batch(flip: bool) -> None:
    labeler = LABELERS[Compat.NONE]
    options = PredictOptions(Branch.MIXED, flip=flip, agreement=True)
    points = (Point(70, 40, is_positive=True), Point(30, 30, is_positive=False))
    plain = crops_of(labeler, [BOX, NEIGHBOR, BOX], [(), (), ()])
    mixed = crops_of(labeler, [BOX, NEIGHBOR, BOX], [(), (), points])
    alone = [labeler.predict([crop], options)[0] for crop in plain]
    for expected, prediction in zip(alone, labeler.predict(mixed, options), strict=True):
        np.testing.assert_array_equal(prediction.prob, expected.prob)
        np.testing.assert_array_equal(np.asarray(prediction.student), np.asarray(expected.student))
        np.testing.assert_array_equal(np.asarray(prediction.teacher), np.asarray(expected.teacher))
