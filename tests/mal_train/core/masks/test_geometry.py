"""Crop arithmetic: the published geometry, its inverse, and boxes at image edges."""

import json
import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mal_train.core.errors import BadBox
from mal_train.core.masks import geometry
from mal_train.core.masks.geometry import Region, Window
from mal_train.core.settings import Compat
from tests.reference import fixture

BOXES = st.tuples(
    st.floats(-50, 150), st.floats(-50, 150), st.floats(0.3, 200), st.floats(0.3, 200)
)  # against an image of 100 x 120 px


def test_inference_windows_equal_the_published_ones() -> None:
    rows = json.loads(fixture("d_ext_boxes.json").read_text())
    for row in rows:
        window = geometry.inference_window(tuple(row["bbox_xywh"]), row["margin_rate"])
        assert list(window) == row["ext"], row
        assert (window.height, window.width) == (row["ext_h"], row["ext_w"])


def test_random_margins_and_windows_equal_the_published_ones() -> None:
    rows = json.loads(fixture("d_ext_boxes_random.json").read_text())
    for row in rows:
        low, high = row["margin_rate"]
        margins = geometry.margins_from(np.array(row["u"]), np.array(row["g"]), (low, high))
        assert margins == pytest.approx(row["margins"], abs=1e-12)
        x0, y0, x1, y1 = row["bbox_xyxy_f32"]
        assert list(geometry.train_window((x0, y0, x1 - x0, y1 - y0), margins)) == row["ext"], row


@pytest.mark.parametrize("image", ["33x47", "60x80", "97x131"])
@pytest.mark.parametrize("margin", ["0.0", "0.6"])
def test_crops_and_box_masks_equal_the_published_ones(image: str, margin: str) -> None:
    data = np.load(fixture(f"d_crop_{image}_m{margin}.npz"))
    pixels = data["image"]
    for box, ext, crop, box_mask in zip(data["bbox_xywh"], data["ext"], data["crop"], data["boxmask"], strict=True):
        x, y, w, h = (float(v) for v in box)
        box_xywh = (x, y, w, h)
        window = geometry.inference_window(box_xywh, float(margin))
        assert list(window) == ext.tolist()
        np.testing.assert_array_equal(geometry.resize_crop(geometry.cut(pixels, window), crop.shape[0]), crop)
        ours = geometry.box_mask_in_window(box_xywh, window, pixels.shape[:2], crop.shape[0], Compat.TAO)
        np.testing.assert_array_equal(ours, box_mask)


def test_wrapped_windows_equal_the_published_ones() -> None:
    data = np.load(fixture("d_wrapcrop.npz"))
    for index, box in enumerate(data["boxes"]):
        np.testing.assert_array_equal(geometry.cut(data["img"], Window(*box.tolist())), data[f"out{index}"])


def test_a_window_wider_than_twice_the_image_repeats_it() -> None:
    image = np.arange(6, dtype=np.uint8).reshape(2, 3)
    assert geometry.cut(image, Window(-4, 0, 5, 1)).tolist() == [[2, 0, 1, 2, 0, 1, 2, 0, 1]]


WINDOWS = st.builds(
    lambda x, y, w, h: Window(x, y, x + w, y + h),
    *[st.integers(-30, 30)] * 2,
    *[st.integers(1, 60)] * 2,
)


@given(WINDOWS, st.tuples(st.integers(1, 12), st.integers(1, 12)), st.booleans())
@settings(max_examples=300, deadline=None)
def test_a_cut_equals_indexing_modulo_the_image_size(window: Window, image_hw: tuple[int, int], is_rgb: bool) -> None:
    height, width = image_hw
    shape = (height, width, 3) if is_rgb else (height, width)
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    rows, columns = np.arange(window.y0, window.y1) % height, np.arange(window.x0, window.x1) % width
    expected = image[rows[:, None], columns[None, :]]
    pixels = geometry.cut(image, window)
    np.testing.assert_array_equal(pixels, expected)
    assert pixels.dtype == np.uint8


@pytest.mark.parametrize(("x0", "y0"), [(2, 3), (-4, 3), (-4, -4), (35, 0)])
def test_a_cut_reads_each_pixel_once(x0: int, y0: int) -> None:
    window = Window(x0, y0, x0 + 10, y0 + 9)
    image, read = np.zeros((40, 40, 3), np.uint8), list[int]()

    class Counting:
        shape, dtype = image.shape, image.dtype

        def __getitem__(self, region: tuple[slice, slice]) -> geometry.Pixels:
            read.append(image[region].shape[0] * image[region].shape[1])
            return image[region]

    assert geometry.cut(Counting(), window).shape == (window.height, window.width, 3)
    assert sum(read) == window.height * window.width


@pytest.mark.parametrize("window", [Window(-700, -900, 1500, 2300), Window(5, -30, 9, 1700), Window(-90, 7, 2600, 11)])
@pytest.mark.parametrize("is_rgb", [True, False])
def test_a_window_is_resized_to_the_bit_without_a_copy_of_it_in_memory(window: Window, is_rgb: bool) -> None:
    image = np.random.default_rng(0).integers(0, 256, (1000, 1200, 3), dtype=np.uint8)
    image = image if is_rgb else image[:, :, 0]
    expected = geometry.resize_crop(geometry.cut(image, window), 64)
    tracemalloc.start()
    try:
        pixels = geometry.resized_window(image, window, 64)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(pixels, expected)
    # A copy of the largest window would take 7 to 21 MB.
    assert peak < 4 * 2**20


def resized_rows(pixels: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Resizes rows (h, w) to (h, size): antialiased bicubic, a = -1/2, weights of 22 bits, rounded half up."""
    length = pixels.shape[1]
    step = max(length / size, 1.0)
    center = (np.arange(size)[:, None] + 0.5) * (length / size)
    first, end = np.floor(np.maximum(center - 2 * step + 0.5, 0)), np.floor(center + 2 * step + 0.5)
    column = np.arange(length)[None, :]
    t = np.abs((column - center + 0.5) / step)
    near, far = (1.5 * t - 2.5) * t * t + 1, -0.5 * (((t - 5) * t + 8) * t - 4)
    weight = np.where(t < 1, near, np.where(t < 2, far, 0)) * ((column >= first) & (column < end))
    weight /= weight.sum(axis=1, keepdims=True)
    fixed = np.trunc(weight * 2**22 + np.copysign(0.5, weight)).astype(np.int64)
    rounded: NDArray[np.int64] = (pixels.astype(np.int64) @ fixed.T + 2**21) >> 22
    return rounded.clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("hw", "columns_first"),
    [
        *[((90, 70), True), ((600, 40), True), ((65, 1), True), ((67, 65), True), ((500, 280), True)],
        *[((40, 600), False), ((66, 65), False), ((90, 77), False), ((90, 90), False), ((7, 5), False)],
        *[((64, 90), False), ((90, 64), True), ((64, 40), False), ((40, 64), False), ((500, 282), False)],
    ],
)
@pytest.mark.parametrize("is_rgb", [True, False])
def test_a_crop_has_its_own_order_of_passes_with_every_pillow(
    hw: tuple[int, int], columns_first: bool, is_rgb: bool
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*hw, 3), dtype=np.uint8)
    planes = []
    for plane in np.moveaxis(pixels, 2, 0):
        if columns_first:
            planes.append(resized_rows(resized_rows(plane.T, 64).T, 64))
        else:
            planes.append(resized_rows(resized_rows(plane, 64).T, 64).T)
    expected, source = (np.stack(planes, axis=2), pixels) if is_rgb else (planes[0], pixels[:, :, 0])
    np.testing.assert_array_equal(geometry.resize_crop(source, 64), expected)


@given(BOXES)
@settings(max_examples=300, deadline=None)
def test_every_box_is_rejected_or_clipped_to_the_image(box: tuple[float, float, float, float]) -> None:
    try:
        (x, y, w, h), clipped = geometry.check_box(box, (100, 120))
    except BadBox:
        x0, y0 = max(box[0], 0), max(box[1], 0)
        x1, y1 = min(box[0] + box[2], 120), min(box[1] + box[3], 100)
        assert x1 <= x0 or y1 <= y0 or (x1 - x0) * (y1 - y0) < 1.0
        return
    assert x >= 0
    assert y >= 0
    assert x + w <= 120 + 1e-9
    assert y + h <= 100 + 1e-9
    assert clipped == ((x, y, w, h) != box)


@pytest.mark.parametrize(
    "box",
    [
        (math.nan, 0, 5, 5),
        (0, math.inf, 5, 5),
        (0, 0, 0, 5),
        (0, 0, 5, -1),
        (200, 0, 5, 5),
        (-5, -5, 5, 5),
        (1e9, 1e9, 1e9, 1e9),
        (5, 5, 0.5, 0.5),
        (1, 2, 3),
        (10**400, 0, 5, 5),
        (0, 0, 5, -(10**400)),
        (1e308, 1e308, 1e308, 1e308),
    ],
)
def test_boxes_without_a_possible_mask_are_rejected_by_name(box: tuple[float, ...]) -> None:
    with pytest.raises(BadBox, match="box 7"):
        geometry.check_box(box, (100, 120), "box 7")


def test_the_area_of_a_box_far_outside_any_image_is_a_number() -> None:
    for box in ((1e308, 0.0, 1e308, 1.0), (-1e308, -1e308, 1.7e308, 1.7e308), (0.0, 0.0, 1e300, 1e300)):
        assert math.isfinite(geometry.box_area(box))


def test_a_huge_box_is_clipped_to_the_whole_image() -> None:
    assert geometry.check_box((-1e9, -1e9, 2e9, 2e9), (100, 120)) == ((0.0, 0.0, 120.0, 100.0), True)


@pytest.mark.parametrize(
    ("box", "region"),
    [
        ((0.0, 0.0, 4.0, 4.0), Region(0, 0, 4, 4)),
        ((0.5, 0.5, 1.0, 1.0), Region(0, 0, 1, 1)),  # center 0.5 lies on the edge and is included
        ((0.51, 0.0, 1.0, 1.0), Region(1, 0, 2, 1)),
        ((0.4, 0.0, 1.2, 1.0), Region(0, 0, 2, 1)),
        ((96.0, 116.0, 4.0, 4.0), Region(96, 116, 100, 120)),
    ],
)
def test_a_pixel_belongs_to_the_box_when_its_center_does(
    box: tuple[float, float, float, float], region: Region
) -> None:
    assert geometry.box_pixels(box, (120, 100)) == region


@given(st.integers(0, 2**32 - 1), st.sampled_from((8, 16, 64)))
@settings(max_examples=60, deadline=None)
def test_pasting_a_large_window_in_strips_gives_the_same_values_to_the_bit(seed: int, side: int) -> None:
    rng = np.random.default_rng(seed)
    prob = rng.random((side, side), dtype=np.float32)
    window = Window(-3, -5, -3 + side + int(rng.integers(1, 150)), -5 + side + int(rng.integers(1, 150)))
    (col0, col1), (row0, row1) = (
        np.sort(rng.choice(np.arange(low, high + 1), 2, replace=False))
        for low, high in ((window.x0, window.x1), (window.y0, window.y1))
    )
    region = Region(int(col0), int(row0), int(col1), int(row1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(geometry, "STRIP_PIXELS", int(rng.choice([1, 5000])))
        in_strips = geometry.paste(prob, window, region)
    assert np.array_equal(in_strips, geometry.paste(prob, window, region))


def test_paste_is_the_inverse_of_crop_for_boxes_beyond_the_edge() -> None:
    rng = np.random.default_rng(3)
    smooth = np.add.outer(np.linspace(0, 0.5, 90), np.linspace(0, 0.5, 70)).astype(np.float32)
    image = (smooth * 255).astype(np.uint8)
    for _ in range(50):
        x, y = rng.uniform(-10, 50, 2)
        inside, _ = geometry.check_box((x, y, *rng.uniform(15, 60, 2)), (90, 70))
        window = geometry.inference_window(inside, 0.6)
        region = geometry.box_pixels(inside, (90, 70))
        crop = geometry.resize_crop(geometry.cut(image, window), 128).astype(np.float32) / np.float32(255)
        pasted = geometry.paste(crop, window, region)
        expected = smooth[region.row0 : region.row1, region.col0 : region.col1]
        assert pasted.shape == expected.shape
        # Wrapped neighbors bleed over at most one source pixel at the border.
        assert np.abs(pasted - expected)[2:-2, 2:-2].max() < 0.02


def test_only_a_wrapped_box_mask_repeats_the_box() -> None:
    box, window = (0.0, 0.0, 10.0, 10.0), Window(-10, 0, 20, 10)
    plain = geometry.box_mask_in_window(box, window, (10, 20), 30, Compat.NONE)
    wrapped = geometry.box_mask_in_window(box, window, (10, 20), 30, Compat.NONE, wrap=True)
    assert plain[15].tolist() == [0] * 10 + [1] * 10 + [0] * 10
    assert wrapped[15].tolist() == [0] * 10 + [1] * 10 + [0] * 10
    wide = Window(-20, 0, 20, 10)
    assert geometry.box_mask_in_window(box, wide, (10, 20), 40, Compat.NONE, wrap=True)[5, :10].tolist() == [1] * 10
    assert not geometry.box_mask_in_window(box, wide, (10, 20), 40, Compat.NONE)[5, :20].any()
