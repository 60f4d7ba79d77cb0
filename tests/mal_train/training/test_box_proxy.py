"""Tightness, stability and their product, on masks that are constructed."""

import numpy as np
import pytest

from mal_train.core.masks import rle
from mal_train.core.masks.geometry import Box
from mal_train.kernel.labeler.types import Label
from mal_train.training.box_proxy import BoxProxy, BoxProxyMeter

SIZE = (40, 60)


def label(rows: slice, columns: slice, score: float, *, corner: bool = True) -> Label:
    """Returns the label of a rectangle; without its upper left corner, it fills its box as much as objects do."""
    mask = np.zeros(SIZE, np.bool_)
    mask[rows, columns] = True
    if corner and mask.any():
        mask[rows.start : rows.start + 6, columns.start : columns.start + 8] = False
    code = rle.encode_mask(mask)
    return Label(code, score, int(mask.sum()), rle.to_box(code), None, ())


def proxy(*labels: tuple[Box, Label]) -> BoxProxy:
    meter = BoxProxyMeter()
    for box, one in labels:
        meter.add(box, one)
    return meter.result()


def test_a_mask_that_touches_all_sides_of_its_box_is_tight() -> None:
    found = proxy(((10, 5, 20, 10), label(slice(5, 15), slice(10, 30), 0.8)))
    assert (found.count, found.tightness, found.stability) == (1, 1.0, 0.8)
    assert found.value == pytest.approx(0.8)


def test_tightness_is_the_iou_of_the_two_boxes() -> None:
    found = proxy(((10, 5, 20, 10), label(slice(5, 15), slice(10, 20), 0.5)))
    assert found.tightness == pytest.approx(0.5)
    assert found.value == pytest.approx(0.25)


def test_fractions_of_pixels_do_not_cost_tightness() -> None:
    box = (10.4, 4.6, 19.8, 10.3)
    assert proxy((box, label(slice(5, 15), slice(10, 30), 1.0))).tightness == 1.0


def test_an_empty_mask_counts_zero_and_is_counted() -> None:
    empty = Label(rle.encode_mask(np.zeros(SIZE, np.bool_)), 0.0, 0, None, None, ())
    full = ((10.0, 5.0, 20.0, 10.0), label(slice(5, 15), slice(10, 30), 0.8))
    found = proxy(full, ((0, 0, 10, 10), empty))
    assert (found.count, found.tightness) == (2, 0.5)
    assert found.value == pytest.approx(0.4)


@pytest.mark.parametrize(("fill", "weight"), [(0.5, 1.0), (0.8, 1.0), (0.9, 0.5), (0.95, 0.25), (1.0, 0.0)])
def test_the_more_a_mask_fills_its_box_the_less_it_counts(fill: float, weight: float) -> None:
    mask = np.zeros(SIZE, np.bool_)
    mask[:20, :40] = True
    inner = mask[1:19, 1:39]
    inner.flat[: round(800 * (1 - fill))] = False
    code = rle.encode_mask(mask)
    found = proxy(((0, 0, 40, 20), Label(code, 0.9, round(800 * fill), rle.to_box(code), None, ())))
    assert (found.tightness, found.stability) == (1.0, 0.9)
    assert found.value == pytest.approx(0.9 * weight)


def test_a_box_beyond_the_image_is_compared_with_its_visible_part() -> None:
    found = proxy(((40, -10, 30, 20), label(slice(0, 10), slice(40, 60), 0.9)))
    assert found.tightness == 1.0


def test_without_a_usable_box_there_is_no_value() -> None:
    outside = ((100.0, 100.0, 5.0, 5.0), label(slice(0, 5), slice(0, 5), 1.0))
    assert proxy() == proxy(outside) == BoxProxy(0, None, None, None)
    assert set(proxy().metrics()) == {"tightness", "stability", "box_proxy"}
