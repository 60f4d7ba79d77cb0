import numpy as np

from mal_train.core.masks.geometry import Window
from mal_train.core.masks.rle import encode_mask, encode_region
from mal_train.core.settings import Compat
from mal_train.kernel.labeler.types import Crop
from mal_train.training.thresholds import CANDIDATES, best_thresholds, iou_curve

SIZE = 32


def crop_of(window: Window, image_hw: tuple[int, int], box: tuple[float, float, float, float]) -> Crop:
    pixels = np.zeros((SIZE, SIZE, 3), np.uint8)
    return Crop(pixels, box, box, window, image_hw, box[2] * box[3])


def test_the_curve_is_the_iou_at_each_candidate() -> None:
    rng = np.random.default_rng(0)
    prob = rng.random((SIZE, SIZE)).astype(np.float32)
    truth = rng.random((SIZE, SIZE)) > 0.5
    crop = crop_of(Window(0, 0, SIZE, SIZE), (SIZE, SIZE), (0.0, 0.0, SIZE, SIZE))
    curve = iou_curve(crop, prob, encode_mask(truth), Compat.NONE)
    for threshold, iou in zip(CANDIDATES, curve, strict=True):
        mask = prob > threshold
        assert iou == (mask & truth).sum() / (mask | truth).sum()


def test_foreground_outside_the_box_or_the_image_does_not_count() -> None:
    prob = np.ones((SIZE, SIZE), np.float32)
    truth = np.zeros((16, 16), bool)
    truth[:, :8] = True
    # The window extends one image width to the right, where the image repeats.
    crop = crop_of(Window(0, 0, 32, 16), (16, 16), (0.0, 0.0, 8.0, 16.0))
    assert iou_curve(crop, prob, encode_mask(truth), Compat.NONE).tolist() == [1.0] * len(CANDIDATES)


def test_an_empty_union_has_iou_0() -> None:
    crop = crop_of(Window(0, 0, SIZE, SIZE), (SIZE, SIZE), (0.0, 0.0, SIZE, SIZE))
    truth = encode_mask(np.zeros((SIZE, SIZE), bool))
    curve = iou_curve(crop, np.zeros((SIZE, SIZE), np.float32), truth, Compat.NONE)
    assert not curve.any()


def test_an_image_above_the_limit_of_decoded_masks_has_the_curve_of_a_small_one() -> None:
    rng = np.random.default_rng(1)
    prob, truth = rng.random((SIZE, SIZE)).astype(np.float32), rng.random((SIZE, SIZE)) > 0.5
    small = crop_of(Window(0, 0, SIZE, SIZE), (SIZE, SIZE), (0.0, 0.0, SIZE, SIZE))
    start, side = 20_000, 30_000
    window = Window(start, start, start + SIZE, start + SIZE)
    large = crop_of(window, (side, side), (float(start), float(start), SIZE, SIZE))
    code = encode_region(truth, start, start, (side, side))
    assert np.array_equal(
        iou_curve(large, prob, code, Compat.NONE), iou_curve(small, prob, encode_mask(truth), Compat.NONE)
    )


def test_each_size_class_with_enough_instances_gets_its_own_threshold() -> None:
    low, high = np.zeros(19), np.zeros(19)
    low[1] = high[15] = 1.0
    areas = [100.0] * 25 + [50_000.0] * 40 + [2_000.0] * 3
    thresholds = best_thresholds(areas, [low] * 25 + [high] * 40 + [low] * 3)
    assert thresholds == (0.1, 0.8, 0.8)


def test_without_instances_no_thresholds_are_fitted() -> None:
    assert best_thresholds([], []) is None
