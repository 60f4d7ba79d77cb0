"""The page, its charts and its images."""

import math
import re

import numpy as np
import pytest
from numpy.typing import NDArray

from mal_train.core.masks.rle import encode_mask
from mal_train.core.report.charts import calibration_plot, line_chart
from mal_train.core.report.overlays import BOX, CONTEXT, MASK, TRUTH, Drawn, draw_close_up, draw_labels, png_data_uri
from mal_train.core.report.page import Card, build_report, contact_sheet, overlay_legend, section, table

GRAY = np.full((60, 80, 3), 128, dtype=np.uint8)
BOX_XYWH = (20.0, 10.0, 30.0, 20.0)


def disc() -> NDArray[np.bool_]:
    rows, columns = np.mgrid[:60, :80]
    return np.asarray((rows - 20) ** 2 + (columns - 35) ** 2 < 64)


def has(image: NDArray[np.uint8], color: tuple[int, int, int]) -> bool:
    return bool((np.abs(image.astype(int) - color).sum(axis=2) < 30).any())


def test_text_cannot_become_markup() -> None:
    evil = "<script>alert(1)</script>"
    page = build_report(
        evil,
        [
            section(evil, table([evil], [[evil]]), evil),
            contact_sheet([Card(f'x" onerror="{evil}', evil, evil)]),
            line_chart({evil: [(0, 1), (1, 2)]}, evil, evil),
        ],
        evil,
    )
    assert "<script" not in page
    assert ' onerror="' not in page


def test_a_page_without_data_is_complete() -> None:
    page = build_report("Empty", [calibration_plot([]), line_chart({}, "step", "loss"), contact_sheet([])])
    assert page.startswith("<!doctype html>")
    assert page.rstrip().endswith("</html>")
    assert "nan" not in page.lower().replace("nance", "")


def test_points_of_a_curve_stay_inside_the_chart() -> None:
    chart = line_chart({"loss": [(0, 5.0), (10, math.nan), (20, 1e6), (30, -3.0)]}, "step", "loss")
    for x, y in re.findall(r"([\d.]+),([\d.]+)", chart):
        assert 0 <= float(x) <= 460
        assert 0 <= float(y) <= 300


def test_a_constant_curve_is_drawn() -> None:
    assert "<polyline" in line_chart({"mIoU": [(5, 0.0), (9, 0.0)]}, "step", "mIoU")


def test_the_five_curves_of_the_demo_have_five_colors_that_the_page_defines() -> None:
    chart = line_chart({name: [(0, 0.0), (1, 1.0)] for name in "abcde"}, "step", "mIoU")
    colors = set(re.findall(r'<polyline[^>]*stroke="var\((--\w+)\)"', chart))
    assert len(colors) == 5
    page = build_report("Curves", [chart])
    assert all(page.count(f"{color}: #") == 2 for color in colors)  # light and dark


def test_a_curve_of_one_point_is_drawn_as_a_dot() -> None:
    chart = line_chart({"mIoU": [(8, 0.6)], "loss": [(0, 0.5), (8, 0.2)]}, "step", "value")
    (dot,) = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)" r="4" fill="var\(--a\)"/>', chart)
    end = re.findall(r"([\d.]+),([\d.]+)", chart)[-1]
    assert dot[0] == end[0]
    assert float(dot[1]) < float(end[1])


def test_a_scatter_plot_of_many_masks_stays_small() -> None:
    pairs = [(n / 1e5, 0.5) for n in range(100_000)]
    assert len(calibration_plot(pairs)) < 200_000


def test_a_close_up_shows_mask_truth_and_box_at_the_requested_size() -> None:
    mask = encode_mask(disc())
    other = encode_mask(np.roll(disc(), 6, axis=1))
    image = draw_close_up(GRAY, BOX_XYWH, mask, other, side=240)
    assert max(image.shape) == 240
    assert all(has(image, color) for color in (MASK, TRUTH, BOX))


def test_a_close_up_without_a_mask_shows_only_the_box() -> None:
    image = draw_close_up(GRAY, BOX_XYWH, None)
    assert has(image, BOX)
    assert not has(image, MASK)


@pytest.mark.parametrize(
    "box",
    [
        (-20.0, -20.0, 30.0, 30.0),
        (70.0, 50.0, 500.0, 500.0),
        (500.0, 500.0, 5.0, 5.0),
        (math.nan, 0.0, 1.0, 1.0),
        (1e9, 1e9, 1e9, 1e9),
        (3.2, 4.7, 0.4, 0.4),
    ],
)
def test_unusual_boxes_are_drawn_without_an_error(box: tuple[float, float, float, float]) -> None:
    empty = encode_mask(np.zeros((60, 80), dtype=bool))
    assert draw_close_up(GRAY, box, empty).size
    assert draw_labels(GRAY, [Drawn(empty, box, "none")]).shape == GRAY.shape


def test_drawing_does_not_change_the_image() -> None:
    before = GRAY.copy()
    draw_labels(GRAY, [Drawn(encode_mask(disc()), BOX_XYWH, "cup 0.91")])
    draw_close_up(GRAY, BOX_XYWH, encode_mask(disc()))
    np.testing.assert_array_equal(GRAY, before)


def test_a_large_image_is_shrunk() -> None:
    large = np.zeros((300, 3000, 3), dtype=np.uint8)
    mask = encode_mask(np.ones((300, 3000), dtype=bool))
    assert draw_labels(large, [Drawn(mask, (0.0, 0.0, 3000.0, 300.0))], max_side=600).shape == (60, 600, 3)


def test_a_close_up_shows_the_surroundings_of_the_box() -> None:
    image = draw_close_up(GRAY, BOX_XYWH, None, side=int(30 * (1 + 2 * CONTEXT)) + 1)
    assert image.shape[1] >= 50


def test_an_image_becomes_a_data_uri() -> None:
    assert png_data_uri(GRAY).startswith("data:image/png;base64,iVBOR")


def test_the_legend_names_only_what_is_drawn() -> None:
    names = [re.findall(r"</span>([^<]+)", overlay_legend(has_truth=has_truth)) for has_truth in (True, False)]
    assert names == [["mask", "true mask", "box"], ["mask", "box"]]
