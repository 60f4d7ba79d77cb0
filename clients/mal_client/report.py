"""One self-contained HTML page from figures and pictures: no script, no font, no file beside it.

Every function takes data and gives a piece of HTML; `build_report` puts pieces into a page. All text from outside is
escaped here, so callers pass it as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from mal_client.types import shown

if TYPE_CHECKING:
    from mal_client.types import Evaluation
    from mal_train.labeling.evaluation_report import CategoryRow

Html = str
Point = tuple[float, float]

MAX_POINTS = 2000
"""Dots in a scatter plot; a page of a million dots opens nowhere."""

BINS = 10
MIN_IN_BIN = 3

BAR = 240
"""Px of the longest bar of a histogram."""

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 460, 300, 52, 44, 14, 14

_COLOURS = ("var(--a)", "var(--b)", "var(--c)", "var(--d)")

_STYLE = """
:root { --bg: #fff; --fg: #1c2024; --soft: #60646c; --line: #d9dce1; --panel: #f6f7f9;
  --a: #0b68cb; --b: #c2410c; --c: #15803d; --d: #7e22ce; }
@media (prefers-color-scheme: dark) { :root { --bg: #16181c; --fg: #e8eaed; --soft: #9aa0a8; --line: #33373d;
  --panel: #1e2126; --a: #6cb2ff; --b: #ff9a62; --c: #5fd38a; --d: #c79bff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 24px; max-width: 1200px; background: var(--bg); color: var(--fg);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 18px; margin: 36px 0 8px; }
p { margin: 0 0 10px; } .soft { color: var(--soft); }
.row { display: flex; flex-wrap: wrap; gap: 28px; align-items: flex-start; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; margin-bottom: 20px; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 16px 4px 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { color: var(--soft); font-weight: 500; } td.n, th.n { text-align: right; }
svg { max-width: 100%; height: auto; } svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)); gap: 14px; }
figure { margin: 0; padding: 8px; background: var(--panel); border: 1px solid var(--line); border-radius: 6px; }
figure img { display: block; width: 100%; height: 200px; object-fit: contain; }
figcaption { padding-top: 6px; overflow-wrap: anywhere; } figcaption span { display: block; font-size: 13px; }
.key { display: inline-block; width: 12px; height: 12px; border-radius: 2px; margin: 0 5px 0 14px; }
"""


@dataclass(frozen=True)
class Card:
    """One picture of a contact sheet. `picture` is a data URI (`overlays.png_data_uri`)."""

    picture: str
    title: str
    detail: str = ""


def build_report(title: str, sections: Sequence[Html], subtitle: str = "") -> Html:
    """The page. `sections` come from the functions below."""
    head = f"<h1>{escape(title)}</h1>" + (f'<p class="soft">{escape(subtitle)}</p>' if subtitle else "")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>{head}\n"
        + "\n".join(sections)
        + "\n</body></html>\n"
    )


def section(heading: str, body: Html, note: str = "") -> Html:
    """A heading, a sentence under it, and what belongs to it."""
    under = f'<p class="soft">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(heading)}</h2>{under}{body}</section>"


def side_by_side(*pieces: Html) -> Html:
    """Pieces in a row that wraps on narrow screens."""
    return '<div class="row">' + "".join(f"<div>{piece}</div>" for piece in pieces) + "</div>"


def table(header: Sequence[str], rows: Iterable[Sequence[str | float | int | None]]) -> Html:
    """A table; numbers stand right, floats with three decimals, None is a dash.

    >>> "0.500" in table(["name", "IoU"], [["cup", 0.5]])
    True
    """
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def figures_table(evaluation: Evaluation) -> Html:
    """The main figures with a word on each."""
    return table(["figure", "value", "of"], evaluation.figures())


def size_table(evaluation: Evaluation) -> Html:
    """Mean IoU and AP by size of the true mask."""
    short = {"small": "APs", "medium": "APm", "large": "APl"}
    return table(
        ["size of the true mask", "masks", "mIoU", "AP@1", "AP@score"],
        [
            [
                name,
                group.count,
                group.miou,
                evaluation.ap_at_1.get(short[name]),
                evaluation.ap_at_score.get(short[name]),
            ]
            for name, group in evaluation.by_size.items()
        ],
    )


def category_table(categories: Sequence[CategoryRow], count: int = 20) -> Html:
    """The classes with the lowest mean IoU."""
    lowest = sorted(categories, key=lambda row: row.miou)[:count]
    return table(
        ["classes, lowest mIoU first", "masks", "mIoU", "IoU > 0.75", "mean score"],
        [[row.name or str(row.category_id), row.count, row.miou, row.share_good, row.mean_score] for row in lowest],
    )


def calibration_plot(pairs: Sequence[Point]) -> Html:
    """Score against IoU: a dot a mask, the mean IoU of each tenth of the score, and the diagonal of a perfect score.

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
    keys = [("a mask", "var(--a)"), ("mean of each tenth", "var(--b)"), ("perfect score", "var(--soft)")]
    return chart.svg(body, f"score against IoU of {len(pairs)} masks") + _legend(keys)


def line_chart(series: Mapping[str, Sequence[Point]], x_name: str, y_name: str) -> Html:
    """Curves over a common axis, for example a training's loss and mIoU by step; points with NaN are left out."""
    clean = {
        name: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)] for name, points in series.items()
    }
    everything = [point for points in clean.values() for point in points] or [(0.0, 0.0), (1.0, 1.0)]
    chart = _Chart(_span([x for x, _ in everything]), _span([0.0, *(y for _, y in everything)]), x_name, y_name)
    colours = [_COLOURS[at % len(_COLOURS)] for at in range(len(clean))]
    body = "".join(chart.line(points, colour) for points, colour in zip(clean.values(), colours, strict=True))
    return chart.svg(body, f"{y_name} over {x_name}") + _legend(list(zip(clean, colours, strict=True)))


def bars(counts: Mapping[str, int]) -> Html:
    """A histogram: a row a bin, in the order given, with its count and a bar."""
    scale = BAR / max(1, max(counts.values(), default=1))
    rows = "".join(
        f'<tr><td>{escape(name)}</td><td class="n">{count}</td><td><svg width="{BAR}" height="12" role="img" '
        f'aria-label="{count}"><rect width="{scale * count:.1f}" height="12" fill="var(--a)"/></svg></td></tr>'
        for name, count in counts.items()
    )
    return f'<div class="scroll"><table><tbody>{rows}</tbody></table></div>'


def contact_sheet(cards: Sequence[Card]) -> Html:
    """Pictures in a grid, in the order given."""
    figures = "".join(
        f'<figure><img src="{escape(card.picture)}" alt="{escape(card.title)}" loading="lazy"><figcaption>'
        f'{escape(card.title)}<span class="soft">{escape(card.detail)}</span></figcaption></figure>'
        for card in cards
    )
    return f'<div class="sheet">{figures}</div>'


def overlay_legend() -> Html:
    """What the colours of `overlays.draw_close_up` mean."""
    keys = [("mask", "rgb(255, 64, 129)"), ("true mask", "rgb(64, 224, 255)"), ("box", "rgb(255, 214, 0)")]
    return f"<p>{_legend(keys)}</p>"


def evaluation_sections(evaluation: Evaluation, cards: Sequence[Card] = ()) -> list[Html]:
    """The usual sections of an evaluation; `cards` show its worst masks, lowest IoU first.

    The plot shows what `evaluation.worst` lists, so ask for as many as there are (10 000 at most).
    """
    model = evaluation.model
    weights = f"Checkpoint {model.checkpoint_sha256[:16]}…, {model.branch} network."
    pairs = [(row.score, row.iou) for row in evaluation.worst]
    listed = (
        "" if len(pairs) == evaluation.overall.count else f" The {len(pairs)} lowest of {evaluation.overall.count}."
    )
    sections = [
        section(
            "Figures",
            side_by_side(figures_table(evaluation), size_table(evaluation) + category_table(evaluation.categories, 10)),
            weights,
        ),
        section(
            "Is the score worth something?",
            calibration_plot(pairs),
            "A mask below the diagonal is worse than its score says." + listed,
        ),
    ]
    if cards:
        sheet = overlay_legend() + contact_sheet(cards)
        sections.append(section("Worst masks first", sheet, "Look here before trusting the rest."))
    return sections


class _Chart:
    """Axes of a plot: from data to px, ticks, names."""

    def __init__(self, x_range: Point, y_range: Point, x_name: str, y_name: str) -> None:
        self._x_range, self._y_range = x_range, y_range
        self._x_name, self._y_name = x_name, y_name

    def x(self, value: float) -> float:
        """Px from the left."""
        low, high = self._x_range
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Px from the top."""
        low, high = self._y_range
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - BOTTOM - TOP)

    def line(self, points: Sequence[Point], colour: str, *, dashed: bool = False) -> Html:
        """A polyline."""
        path = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)
        dash = ' stroke-dasharray="4 4"' if dashed else ""
        return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>'

    def svg(self, body: Html, label: str) -> Html:
        """The plot with its axes."""
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


def _cell(value: str | float | int | None) -> Html:
    if isinstance(value, str):
        return f"<td>{escape(value)}</td>"
    text = str(value) if isinstance(value, int) else shown(value)
    return f'<td class="n">{text}</td>'


def _legend(keys: Sequence[tuple[str, str]]) -> Html:
    items = "".join(f'<span class="key" style="background:{colour}"></span>{escape(name)}' for name, colour in keys)
    return f'<div class="soft">{items}</div>'


def _bin_means(pairs: Sequence[Point]) -> list[Point]:
    """Mean (score, IoU) of each equal-width score bin that holds enough masks to speak of a mean."""
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
    """Four to eight round numbers inside the range."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(at * step, 12) for at in range(first, last + 1)]
