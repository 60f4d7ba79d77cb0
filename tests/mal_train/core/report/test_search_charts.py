"""Charts of a search: history, parallel coordinates, bars of fractions."""

import math
import re

import pytest

from mal_train.core.report.charts import ParallelAxis, history_chart, parallel_coordinates
from mal_train.core.report.page import fraction_bars, preformatted


def heights(chart: str) -> list[float]:
    """Returns the heights of the best values so far, in px from the top."""
    (path,) = re.findall(r'<polyline points="([^"]+)"', chart)
    return [float(point.split(",")[1]) for point in path.split()]


def test_the_history_shows_every_value_and_the_best_so_far() -> None:
    chart = history_chart([(2, 0.5), (0, 0.4), (1, 0.6), (3, math.nan)], "trial", "mIoU")
    assert chart.count('r="3"') == 3
    first, second, third = heights(chart)
    assert first > second == third
    assert "mIoU by trial" in chart


@pytest.mark.parametrize("points", [[], [(0.0, 0.5)], [(0.0, 0.5), (1.0, 0.5)]])
def test_a_history_of_few_or_equal_values_is_drawn(points: list[tuple[float, float]]) -> None:
    assert "</svg>" in history_chart(points, "trial", "mIoU")


def test_parallel_coordinates_have_an_axis_for_each_field_and_the_best_line_on_top() -> None:
    axes = [ParallelAxis("train.lr", [(0.0, "1e-5"), (1.0, "1e-3")]), ParallelAxis("<b>", [(0.5, "a & b")])]
    chart = parallel_coordinates(axes, [([0.0, 1.0], 1.0), ([0.5, 0.5], 0.2)])
    assert chart.count("<line ") == 2
    weak, best = re.findall(r'stroke="([^"]+)" stroke-width', chart)
    assert (weak, best) == ("var(--a)", "var(--b)")
    for text in (">train.lr<", ">1e-3<", ">&lt;b&gt;<", ">a &amp; b<"):
        assert text in chart


def test_names_of_the_outer_axes_extend_to_the_inside() -> None:
    chart = parallel_coordinates([ParallelAxis(name, []) for name in ("model.teacher_momentum", "b", "box_proxy")], [])
    assert re.findall(r'text-anchor="(\w+)">', chart) == ["start", "start", "end"]


def test_parallel_coordinates_without_lines_or_axes_are_drawn() -> None:
    assert "</svg>" in parallel_coordinates([], [])
    assert "0 lines" in parallel_coordinates([ParallelAxis("a", [])], [])


def test_bars_are_as_long_as_their_fractions() -> None:
    assert re.findall(r'rect width="([\d.]+)"', fraction_bars({"a": 0.5, "b": 2.0, "c": -1.0})) == [
        "120.0",
        "240.0",
        "0.0",
    ]


def test_text_to_copy_is_escaped() -> None:
    assert preformatted("a: <b>\n") == "<pre>a: &lt;b&gt;\n</pre>"
