"""One self-contained HTML page from figures and pictures: no script, no font, no file beside it.

Every function takes data and gives a piece of HTML; `build_report` puts pieces into a page. All text from outside is
escaped here, so callers pass it as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mal_train.core.metrics.report import CategoryRow

Html = str

BAR = 240
"""Px of the longest bar of a histogram."""

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
pre { overflow-x: auto; padding: 12px; background: var(--panel); border: 1px solid var(--line); font-size: 13px; }
summary { cursor: pointer; }
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


def category_table(categories: Sequence[CategoryRow], count: int = 20) -> Html:
    """The classes with the lowest mean IoU."""
    lowest = sorted(categories, key=lambda row: row.miou)[:count]
    return table(
        ["classes, lowest mIoU first", "masks", "mIoU", "IoU > 0.75", "mean score"],
        [[row.name or str(row.category_id), row.count, row.miou, row.share_good, row.mean_score] for row in lowest],
    )


def bars(counts: Mapping[str, int]) -> Html:
    """A histogram: a row a bin, in the order given, with its count and a bar."""
    scale = BAR / max(1, max(counts.values(), default=1))
    rows = "".join(
        f'<tr><td>{escape(name)}</td><td class="n">{count}</td><td><svg width="{BAR}" height="12" role="img" '
        f'aria-label="{count}"><rect width="{scale * count:.1f}" height="12" fill="var(--a)"/></svg></td></tr>'
        for name, count in counts.items()
    )
    return f'<div class="scroll"><table><tbody>{rows}</tbody></table></div>'


def folded(summary: str, text: str) -> Html:
    """Plain text that opens on a click."""
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"


def contact_sheet(cards: Sequence[Card]) -> Html:
    """Pictures in a grid, in the order given."""
    figures = "".join(
        f'<figure><img src="{escape(card.picture)}" alt="{escape(card.title)}" loading="lazy"><figcaption>'
        f'{escape(card.title)}<span class="soft">{escape(card.detail)}</span></figcaption></figure>'
        for card in cards
    )
    return f'<div class="sheet">{figures}</div>'


def legend(keys: Sequence[tuple[str, str]]) -> Html:
    """What colors mean: (name, CSS color) in a line."""
    items = "".join(f'<span class="key" style="background:{color}"></span>{escape(name)}' for name, color in keys)
    return f'<div class="soft">{items}</div>'


def overlay_legend() -> Html:
    """What the colors of `overlays.draw_close_up` mean."""
    keys = [("mask", "rgb(255, 64, 129)"), ("true mask", "rgb(64, 224, 255)"), ("box", "rgb(255, 214, 0)")]
    return f"<p>{legend(keys)}</p>"


def shown(value: float | None) -> str:
    """A figure for people; a dash where there is none."""
    return "-" if value is None else f"{value:.3f}"


def _cell(value: str | float | int | None) -> Html:
    if isinstance(value, str):
        return f"<td>{escape(value)}</td>"
    text = str(value) if isinstance(value, int) else shown(value)
    return f'<td class="n">{text}</td>'
