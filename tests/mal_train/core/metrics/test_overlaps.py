"""Overlaps in pieces: pycocotools' numbers, with bounded work in each call."""

from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from mal_train.core.masks import rle
from mal_train.core.masks.rle import Rle
from mal_train.core.metrics import overlaps
from mal_train.core.metrics.overlaps import crowd_overlaps, iou_matrix, iou_of_groups, mask_areas


def masks(seed: int, count: int) -> list[Rle]:
    """Returns masks of one frame: empty ones, full ones, rectangles and noise."""
    rng = np.random.default_rng(seed)
    result = []
    for _ in range(count):
        mask = np.zeros((30, 40), dtype=np.bool_)
        top, left = rng.integers(0, 25), rng.integers(0, 30)
        mask[top : top + rng.integers(0, 30), left : left + rng.integers(0, 30)] = True
        if rng.random() < 0.4:
            mask &= rng.random(mask.shape) < 0.7
        result.append(rle.encode_mask(mask))
    return result


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Returns a list that receives the steps of each call of pycocotools, in bytes of codes; 0 for single pairs."""
    seen: list[int] = []
    inner = coco_mask.iou

    def counted(detections: list[Any], truths: list[Any], is_crowd: list[int]) -> Any:
        sizes = [[len(one["counts"]) if isinstance(one, dict) else 1 for one in side] for side in (detections, truths)]
        steps = sum(d + g for d in sizes[0] for g in sizes[1])
        seen.append(steps if len(detections) * len(truths) > 1 else 0)
        return inner(detections, truths, is_crowd)

    monkeypatch.setattr(coco_mask, "iou", counted)
    return seen


@pytest.mark.parametrize("max_steps", [1, 500, 20_000, 1 << 30])
def test_pieces_give_the_numbers_of_one_call(max_steps: int, monkeypatch: pytest.MonkeyPatch, calls: list[int]) -> None:
    monkeypatch.setattr(overlaps, "MAX_STEPS", max_steps)
    detected, true = masks(1, 23), masks(2, 17)
    found = iou_matrix(detected, true)
    assert max(calls) <= max_steps
    packed = [one.packed() for one in detected], [one.packed() for one in true]
    np.testing.assert_array_equal(found, coco_mask.iou(*packed, [0] * len(true)))


def test_boxes_in_pieces_give_the_numbers_of_one_call(monkeypatch: pytest.MonkeyPatch, calls: list[int]) -> None:
    monkeypatch.setattr(overlaps, "MAX_STEPS", 10)
    rng = np.random.default_rng(0)
    detected, true = ((rng.random((size, 4)) * 50).tolist() for size in (13, 11))
    found = iou_matrix(detected, true)
    assert max(calls) <= 10
    np.testing.assert_array_equal(found, coco_mask.iou(detected, true, [0] * 11))


@pytest.mark.parametrize("crowds_at_once", [1, 7, 1000])
def test_the_best_crowd_region_is_the_last_one_of_largest_overlap(
    crowds_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overlaps, "_CROWDS", crowds_at_once)
    detected, crowds = masks(3, 19), masks(4, 31)
    best, index = crowd_overlaps(detected, crowds)
    packed = [one.packed() for one in detected], [one.packed() for one in crowds]
    every = coco_mask.iou(*packed, [1] * len(crowds))
    np.testing.assert_array_equal(best, every.max(axis=1))
    np.testing.assert_array_equal(index, len(crowds) - 1 - every[:, ::-1].argmax(axis=1))


def test_without_crowd_regions_nothing_lies_in_one() -> None:
    best, index = crowd_overlaps(masks(5, 3), [])
    assert best.tolist() == [0.0] * 3
    assert index.tolist() == [-1] * 3


def test_a_call_of_pycocotools_holds_the_interpreter_for_a_bounded_number_of_steps(calls: list[int]) -> None:
    stripes = np.zeros((200, 200), dtype=np.bool_)
    stripes[::2] = True
    shape = rle.encode_mask(stripes)
    iou_matrix([shape] * 6, [shape] * 5)
    assert len(calls) > 1
    assert max(calls) <= overlaps.MAX_STEPS == 1 << 19


@pytest.mark.parametrize("joined_steps", [1, 2_000, 1 << 30])
def test_groups_that_share_calls_get_their_own_overlaps(
    joined_steps: int, monkeypatch: pytest.MonkeyPatch, calls: list[int]
) -> None:
    monkeypatch.setattr(overlaps, "_JOINED_STEPS", joined_steps)
    sizes = [(1, 1), (0, 2), (3, 2), (2, 0), (1, 4), (0, 0), (9, 8), (1, 1), (1, 1)]
    det_starts, truth_starts = (np.cumsum([0, *side]) for side in zip(*sizes, strict=True))
    detected, true = masks(6, int(det_starts[-1])), masks(7, int(truth_starts[-1]))
    found = iou_of_groups(detected, true, det_starts, truth_starts)
    count = len(calls)
    alone = [
        iou_matrix(detected[det_starts[n] : det_starts[n + 1]], true[truth_starts[n] : truth_starts[n + 1]]).ravel()
        for n in range(len(sizes))
    ]
    np.testing.assert_array_equal(found, np.concatenate(alone))
    with_pairs = sum(bool(d and g) for d, g in sizes)
    assert (count == with_pairs) if joined_steps == 1 else (count < with_pairs)


def test_areas_of_more_masks_than_pycocotools_takes_at_once() -> None:
    codes = masks(8, 300)
    assert mask_areas(codes).tolist() == [rle.area(code) for code in codes]
    assert mask_areas([]).size == 0
