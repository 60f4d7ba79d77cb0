"""Labelers without learning: where their masks lie."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from deploy.demo.baselines import box_filled, color_clustering, ellipse
from mal_train.core.masks import geometry, rle

FRAME = (40, 60)

BOXES = st.tuples(st.floats(-20, 55), st.floats(-20, 35), st.floats(0.5, 80), st.floats(0.5, 80))


def noise(seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (*FRAME, 3), dtype=np.uint8)


def disc_on_grass() -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    rows, columns = np.mgrid[: FRAME[0], : FRAME[1]]
    disc = (rows - 20) ** 2 + (columns - 30) ** 2 <= 100
    image = np.where(disc[..., None], (200, 30, 30), (30, 160, 40)) + np.random.default_rng(1).integers(
        -20, 20, (*FRAME, 1)
    )
    return image.astype(np.uint8), disc


@settings(max_examples=60, deadline=None, derandomize=True)
@given(BOXES)
def test_masks_lie_in_the_box_by_the_clip_rule(box: Any) -> None:
    region = geometry.box_pixels(box, FRAME)
    allowed = np.zeros(FRAME, dtype=np.bool_)
    if not region.is_empty:
        allowed[region.row0 : region.row1, region.col0 : region.col1] = True
    assert (rle.decode_mask(box_filled(box, FRAME)) == allowed).all()
    for mask in (ellipse(box, FRAME), color_clustering(noise(), box)):
        assert not (rle.decode_mask(mask) & ~allowed).any()


def test_ellipse_fills_its_share_of_the_box() -> None:
    assert rle.area(ellipse((2, 3, 50, 30), FRAME)) == pytest.approx(np.pi / 4 * 50 * 30, rel=0.01)


def test_ellipse_of_a_clipped_box_keeps_the_shape_of_the_whole() -> None:
    whole = rle.decode_mask(ellipse((10, 5, 30, 30), (60, 60)))
    cut = rle.decode_mask(ellipse((-5, -10, 30, 30), (60, 60)))
    assert (cut[:20, :25] == whole[15:35, 15:40]).all()


def test_color_clustering_finds_an_object_that_differs_in_color() -> None:
    image, disc = disc_on_grass()
    found = color_clustering(image, (20, 10, 21, 21))
    assert rle.iou(found, rle.encode_mask(disc)) > 0.95


def test_color_clustering_is_repeatable() -> None:
    assert color_clustering(noise(3), (10, 10, 30, 20)) == color_clustering(noise(3), (10, 10, 30, 20))


@pytest.mark.parametrize("box", [(0, 0, 60, 40), (5, 5, 2, 2), (-100, -100, 400, 400)])
def test_color_clustering_without_margin_or_pixels_is_the_box(box: Any) -> None:
    assert color_clustering(noise(), box) == box_filled(box, FRAME)


def test_color_clustering_of_one_color_is_the_box() -> None:
    box = (10.0, 10.0, 20.0, 20.0)
    assert color_clustering(np.full((*FRAME, 3), 90, dtype=np.uint8), box) == box_filled(box, FRAME)
