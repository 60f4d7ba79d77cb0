"""Builds a self-contained HTML page of metrics and images: no scripts, no fonts, no other files.

Each function takes data and returns a piece of HTML; `build_report` joins pieces into a page. All text is escaped here;
callers pass it unescaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mal_train.core.metrics.report import CategoryRow

Html = str

BAR_PX = 240
"""Width of the longest bar of a histogram."""

_STYLE = """
:root { --bg: #fff; --fg: #1c2024; --soft: #60646c; --line: #d9dce1; --panel: #f6f7f9;
  --a: #0b68cb; --b: #c2410c; --c: #15803d; --d: #7e22ce; --e: #a16207; }
@media (prefers-color-scheme: dark) { :root { --bg: #16181c; --fg: #e8eaed; --soft: #9aa0a8; --line: #33373d;
  --panel: #1e2126; --a: #6cb2ff; --b: #ff9a62; --c: #5fd38a; --d: #c79bff; --e: #fde047; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 24px; max-width: 1200px; background: var(--bg); color: var(--fg);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 18px; margin: 36px 0 8px; }
p { margin: 0 0 10px; } .soft { color: var(--soft); }
.row { display: flex; flex-wrap: wrap; gap: 28px; align-items: flex-start; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; margin-bottom: 20px; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 16px 4px 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { color: var(--soft); font-weight: 500; } td.n, th.n { text-align: right; }
svg { max-width: 100%; height: auto; } svg text { fill: var(--soft); font: 11px system-ui, sans-serif;
  paint-order: stroke; stroke: var(--bg); stroke-width: 3px; stroke-linejoin: round; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)); gap: 14px; }
.sheet > * { margin: 0; padding: 8px; background: var(--panel); border: 1px solid var(--line); border-radius: 6px; }
.sheet img { display: block; width: 100%; height: 200px; object-fit: contain; }
figcaption { padding-top: 6px; overflow-wrap: anywhere; } figcaption span { display: block; font-size: 13px; }
pre { overflow-x: auto; padding: 12px; background: var(--panel); border: 1px solid var(--line); font-size: 13px; }
summary { cursor: pointer; }
.key { display: inline-block; width: 12px; height: 12px; border-radius: 2px; margin: 0 5px 0 14px; }
"""


@dataclass(frozen=True)
class Card:
    """One image of a contact sheet; `image_uri` is a data URI (`overlays.png_data_uri`)."""

    image_uri: str
    title: str
    detail: str = ""


def build_report(title: str, sections: Sequence[Html], subtitle: str = "") -> Html:
    """Returns the page with the given sections; `subtitle` is shown below the title."""
    head = f"<h1>{escape(title)}</h1>" + (f'<p class="soft">{escape(subtitle)}</p>' if subtitle else "")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>{head}\n"
        + "\n".join(sections)
        + "\n</body></html>\n"
    )


def section(heading: str, body: Html, note: str = "") -> Html:
    """Returns a section: a heading, a note below it, and the body."""
    under = f'<p class="soft">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(heading)}</h2>{under}{body}</section>"


def side_by_side(*pieces: Html) -> Html:
    """Returns pieces in a row, which wraps on narrow screens."""
    return '<div class="row">' + "".join(f"<div>{piece}</div>" for piece in pieces) + "</div>"


def table(header: Sequence[str], rows: Iterable[Sequence[str | float | int | None]]) -> Html:
    """Returns a table: numbers are right-aligned, floats have three decimals, None is a dash.

    >>> "0.500" in table(["name", "IoU"], [["cup", 0.5]])
    True
    """
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def category_table(categories: Sequence[CategoryRow], count: int = 20) -> Html:
    """Returns a table of the `count` categories with the lowest mean IoU."""
    lowest = sorted(categories, key=lambda row: row.miou)[:count]
    return table(
        ["categories, lowest mIoU first", "masks", "mIoU", "IoU > 0.75", "mean score"],
        [[row.name or str(row.category_id), row.count, row.miou, row.share_good, row.mean_score] for row in lowest],
    )


def bars(counts: Mapping[str, int]) -> Html:
    """Returns a histogram: one row for each bin, in the given order, with its count and a bar."""
    scale = BAR_PX / max(1, max(counts.values(), default=1))
    rows = "".join(
        f'<tr><td>{escape(name)}</td><td class="n">{count}</td><td><svg width="{BAR_PX}" height="12" role="img" '
        f'aria-label="{count}"><rect width="{scale * count:.1f}" height="12" fill="var(--a)"/></svg></td></tr>'
        for name, count in counts.items()
    )
    return f'<div class="scroll"><table><tbody>{rows}</tbody></table></div>'


def fraction_bars(values: Mapping[str, float]) -> Html:
    """Returns one row for each value in [0, 1], in the given order, with a bar."""
    rows = [
        f'<tr><td>{escape(name)}</td><td class="n">{format_metric(value)}</td><td><svg width="{BAR_PX}" height="12" '
        f'role="img" aria-label="{format_metric(value)}"><rect width="{BAR_PX * min(1.0, max(0.0, value)):.1f}" '
        'height="12" fill="var(--a)"/></svg></td></tr>'
        for name, value in values.items()
    ]
    return f'<div class="scroll"><table><tbody>{"".join(rows)}</tbody></table></div>'


def preformatted(text: str) -> Html:
    """Returns plain text to copy, with its line breaks."""
    return f"<pre>{escape(text)}</pre>"


def folded(summary: str, text: str) -> Html:
    """Returns plain text that is collapsed until the user clicks on the summary."""
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"


def contact_sheet(cards: Sequence[Card]) -> Html:
    """Returns images in a grid, in the given order."""
    items = "".join(
        f'<figure><img src="{escape(card.image_uri)}" alt="{escape(card.title)}" loading="lazy">'
        f'<figcaption>{escape(card.title)}<span class="soft">{escape(card.detail)}</span></figcaption></figure>'
        for card in cards
    )
    return f'<div class="sheet">{items}</div>'


def legend(keys: Sequence[tuple[str, str]]) -> Html:
    """Returns a legend of (name, CSS color) in one line."""
    items = "".join(f'<span class="key" style="background:{color}"></span>{escape(name)}' for name, color in keys)
    return f'<div class="soft">{items}</div>'


def overlay_legend(*, has_truth: bool = True) -> Html:
    """Returns the legend of the colors of `overlays.draw_close_up`; without true masks if none are drawn."""
    truth = [("true mask", "rgb(64, 224, 255)")] if has_truth else []
    return f"<p>{legend([('mask', 'rgb(255, 64, 129)'), *truth, ('box', 'rgb(255, 214, 0)')])}</p>"


def format_metric(value: float | None) -> str:
    """Formats a metric with three decimals; None is a dash."""
    return "-" if value is None else f"{value:.3f}"


def _cell(value: str | float | int | None) -> Html:
    if isinstance(value, str):
        return f"<td>{escape(value)}</td>"
    text = str(value) if isinstance(value, int) else format_metric(value)
    return f'<td class="n">{text}</td>'
