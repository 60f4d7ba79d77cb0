"""Points correct masks: every mask obeys them, whatever happens to it after the forward pass."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mal_train.core.errors import BadBox, BadPoint
from mal_train.core.masks import rle
from mal_train.core.masks.points import Point
from mal_train.core.settings import Branch, Compat, LabelerConfig
from mal_train.kernel.labeler.labeler import Labeler
from mal_train.kernel.labeler.overlaps import PixelOwners
from mal_train.kernel.labeler.types import Crop, Label, PredictOptions
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
        masks = [owners.mask(index, claim) for index, claim in enumerate(claims)]
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
