"""Draws the charts of a page as plain SVG: curves over a common axis, a calibration plot, parallel coordinates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate

from mal_train.core.report.page import Html, legend

Point = tuple[float, float]

MAX_POINTS = 2000
"""Dots in a scatter plot; browsers cannot show a page with a million dots."""

BINS = 10
MIN_IN_BIN = 3

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 460, 300, 66, 44, 14, 14

_COLORS = ("var(--a)", "var(--b)", "var(--c)", "var(--d)", "var(--e)")


def calibration_plot(pairs: Sequence[Point]) -> Html:
    """Draws score against IoU: a dot for each mask, the mean IoU of each tenth of the score, and the ideal diagonal.

    Args:
        pairs: (score, IoU), each in [0, 1].
    """
    chart = _Chart((0.0, 1.0), (0.0, 1.0), "score", "IoU with the true mask")
    step = max(1, math.ceil(len(pairs) / MAX_POINTS))
    dots = "".join(f'<circle cx="{chart.x(score):.1f}" cy="{chart.y(iou):.1f}" r="2"/>' for score, iou in pairs[::step])
    diagonal = chart.line([(0.0, 0.0), (1.0, 1.0)], "var(--soft)", dashed=True)
    means = _bin_means(pairs)
    marks = "".join(f'<circle cx="{chart.x(x):.1f}" cy="{chart.y(y):.1f}" r="4"/>' for x, y in means)
    body = (
        f'<g fill="var(--a)" fill-opacity="0.3">{dots}</g>{diagonal}'
        f'{chart.line(means, "var(--b)")}<g fill="var(--b)">{marks}</g>'
    )
    keys = [("one mask", "var(--a)"), ("mean of each tenth", "var(--b)"), ("perfect score", "var(--soft)")]
    return chart.svg(body, f"score against IoU of {len(pairs)} masks") + legend(keys)


def line_chart(series: Mapping[str, Sequence[Point]], x_name: str, y_name: str) -> Html:
    """Draws curves over a common axis, for example loss and mIoU by step; omits points with NaN or infinity."""
    clean = {
        name: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)] for name, points in series.items()
    }
    clean = {name: points for name, points in clean.items() if points}
    all_points = [point for points in clean.values() for point in points] or [(0.0, 0.0), (1.0, 1.0)]
    chart = _Chart(_span([x for x, _ in all_points]), _span([0.0, *(y for _, y in all_points)]), x_name, y_name)
    colors = [_COLORS[index % len(_COLORS)] for index in range(len(clean))]
    body = "".join(chart.line(points, color) for points, color in zip(clean.values(), colors, strict=True))
    return chart.svg(body, f"{y_name} over {x_name}") + legend(list(zip(clean, colors, strict=True)))


def history_chart(points: Sequence[Point], x_name: str, y_name: str) -> Html:
    """Draws a dot for each value, and the best value so far as a curve; the largest is the best.

    >>> "<polyline" in history_chart([(0, 0.4), (1, 0.6), (2, 0.5)], "trial", "mIoU")
    True
    """
    clean = sorted((x, y) for x, y in points if math.isfinite(x) and math.isfinite(y))
    best = list(zip((x for x, _ in clean), accumulate((y for _, y in clean), max), strict=True))
    shown = clean or [(0.0, 0.0), (1.0, 1.0)]
    chart = _Chart(_span([x for x, _ in shown]), _span([y for _, y in shown]), x_name, y_name)
    dots = "".join(f'<circle cx="{chart.x(x):.1f}" cy="{chart.y(y):.1f}" r="3"/>' for x, y in clean)
    body = f'<g fill="var(--a)" fill-opacity="0.6">{dots}</g>{chart.line(best, "var(--b)") if best else ""}'
    return chart.svg(body, f"{y_name} by {x_name}") + legend([("one value", "var(--a)"), ("best so far", "var(--b)")])


@dataclass(frozen=True)
class ParallelAxis:
    """One axis of parallel coordinates: its name, and its ticks as (position in [0, 1] from the bottom, text)."""

    name: str
    ticks: Sequence[tuple[float, str]]


AXIS_PX = 150
"""Distance of two parallel axes in px."""


def parallel_coordinates(axes: Sequence[ParallelAxis], lines: Sequence[tuple[Sequence[float], float]]) -> Html:
    """Draws each line through its positions on parallel axes; the stronger it is, the more it stands out.

    Args:
        axes: from left to right.
        lines: positions in [0, 1] on all axes, and strength in [0, 1]; lines of strength 1 have a color of their own.
    """
    width, top, bottom = LEFT + AXIS_PX * max(0, len(axes) - 1) + LEFT, 42, HEIGHT - 14
    columns = [LEFT + AXIS_PX * number for number in range(len(axes))]

    def y(position: float) -> float:
        return bottom - position * (bottom - top)

    body = ""
    for positions, strength in sorted(lines, key=lambda line: line[1]):
        path = " ".join(f"{x},{y(position):.1f}" for x, position in zip(columns, positions, strict=True))
        color = "var(--b)" if strength >= 1.0 else "var(--a)"
        body += (
            f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{1 + strength:.1f}" '
            f'stroke-opacity="{0.15 + 0.85 * strength**2:.2f}"/>'
        )
    for number, (x, axis) in enumerate(zip(columns, axes, strict=True)):
        body += f'<line x1="{x}" y1="{top}" x2="{x}" y2="{bottom}" stroke="var(--soft)"/>'
        # Names extend to the inside, in two rows, so that long ones are neither cut nor on top of each other.
        anchor = "end" if number and number == len(axes) - 1 else "start"
        body += f'<text x="{x}" y="{12 + 13 * (number % 2)}" text-anchor="{anchor}">{escape(axis.name)}</text>'
        body += "".join(
            f'<text x="{x + 4}" y="{y(position) - 4:.1f}">{escape(text)}</text>' for position, text in axis.ticks
        )
    return (
        f'<div class="scroll"><svg role="img" aria-label="parallel coordinates of {len(lines)} lines" '
        f'viewBox="0 0 {width} {HEIGHT}" width="{width}" height="{HEIGHT}" style="max-width: none">{body}</svg></div>'
    )


def downsample(points: Sequence[Point], max_points: int = 400) -> list[Point]:
    """Reduces a curve to at most `max_points` means of consecutive points, which keeps the trend and reduces noise.

    >>> downsample([(0, 1.0), (1, 3.0), (2, 5.0), (3, 7.0)], max_points=2)
    [(0.5, 2.0), (2.5, 6.0)]
    """
    clean = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    run = max(1, math.ceil(len(clean) / max_points))
    groups = [clean[start : start + run] for start in range(0, len(clean), run)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


class _Chart:
    """The axes of a plot: scale from data to px, ticks, names."""

    def __init__(self, x_range: Point, y_range: Point, x_name: str, y_name: str) -> None:
        self._x_range, self._y_range = x_range, y_range
        self._x_name, self._y_name = x_name, y_name

    def x(self, value: float) -> float:
        """Returns the distance from the left edge in px."""
        low, high = self._x_range
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Returns the distance from the top edge in px."""
        low, high = self._y_range
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - BOTTOM - TOP)

    def line(self, points: Sequence[Point], color: str, *, dashed: bool = False) -> Html:
        """Returns a polyline; for a single point a dot, since a polyline of one point is invisible."""
        if len(points) == 1:
            ((x, y),) = points
            return f'<circle cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="4" fill="{color}"/>'
        path = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)
        dash = ' stroke-dasharray="4 4"' if dashed else ""
        return f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"{dash}/>'

    def svg(self, body: Html, label: str) -> Html:
        """Returns the plot with its axes."""
        ticks = "".join(self._x_tick(value) for value in _ticks(*self._x_range))
        ticks += "".join(self._y_tick(value) for value in _ticks(*self._y_range))
        middle = (HEIGHT - BOTTOM + TOP) / 2
        names = (
            f'<text x="{(WIDTH + LEFT - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">'
            f"{escape(self._x_name)}</text>"
            f'<text transform="rotate(-90 14 {middle})" x="14" y="{middle}" text-anchor="middle">'
            f"{escape(self._y_name)}</text>"
        )
        return (
            f'<svg role="img" aria-label="{escape(label)}" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
            f'height="{HEIGHT}">{ticks}{names}{body}</svg>'
        )

    def _x_tick(self, value: float) -> Html:
        x = self.x(value)
        return (
            f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{HEIGHT - BOTTOM}" stroke="var(--line)"/>'
            f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{value:g}</text>'
        )

    def _y_tick(self, value: float) -> Html:
        y = self.y(value)
        return (
            f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}" stroke="var(--line)"/>'
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>'
        )


def _bin_means(pairs: Sequence[Point]) -> list[Point]:
    """Returns the mean (score, IoU) of each equal-width score bin with at least MIN_IN_BIN masks."""
    bins: list[list[Point]] = [[] for _ in range(BINS)]
    for score, iou in pairs:
        bins[min(BINS - 1, max(0, int(score * BINS)))].append((score, iou))
    return [
        (sum(score for score, _ in group) / len(group), sum(iou for _, iou in group) / len(group))
        for group in bins
        if len(group) >= MIN_IN_BIN
    ]


def _span(values: Sequence[float]) -> Point:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _ticks(low: float, high: float) -> list[float]:
    """Returns four to eight round numbers inside the range."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]
