"""The figures of an evaluation for people, wherever it was made: rows of text, and the sections of a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mal_train.core.report.charts import Point, calibration_plot
from mal_train.core.report.page import (
    Card,
    Html,
    category_table,
    contact_sheet,
    overlay_legend,
    section,
    shown,
    side_by_side,
    table,
)

if TYPE_CHECKING:
    from mal_train.core.metrics.miou import Figures
    from mal_train.core.metrics.report import CategoryRow
    from mal_train.core.metrics.score_quality import ScoreQuality

FigureRow = tuple[str, str, str]
"""Name, figure and remark."""

_AP_OF_SIZE = {"small": "APs", "medium": "APm", "large": "APl"}


@dataclass(frozen=True)
class Measured:
    """What an evaluation found, as far as people want to see it.

    Attributes:
        count: masks compared.
        images: pictures they are on; None where nobody counted.
        miou: mean over instances.
        by_size: (masks, mIoU) by size of the true mask.
        class_miou: mean over classes of class means.
        share_good: share of masks with IoU > 0.75.
        ap_at_1: COCO's figures with every score 1; {} when they were not asked for.
        ap_at_score: the same with our scores.
        score: what the score is worth.
        categories: means of each class.
        skipped: rows that were not counted, by reason.
        pairs: (score, IoU) of masks, lowest IoU first; all of them, or as many as are kept.
    """

    count: int
    images: int | None
    miou: float | None
    by_size: Mapping[str, tuple[int, float | None]]
    class_miou: float | None
    share_good: float | None
    ap_at_1: Figures
    ap_at_score: Figures
    score: ScoreQuality
    categories: Sequence[CategoryRow]
    skipped: Mapping[str, int]
    pairs: Sequence[Point]

    def figures(self) -> list[FigureRow]:
        """The main figures, for terminals and pages."""
        score = self.score
        on_images = "" if self.images is None else f" on {self.images} images"
        rows = [("mIoU", shown(self.miou), f"{self.count} masks{on_images}")]
        rows += [(f"mIoU {name}", shown(miou), f"{count} masks") for name, (count, miou) in self.by_size.items()]
        rows += [
            ("mIoU class", shown(self.class_miou), f"{len(self.categories)} classes"),
            ("IoU > 0.75", shown(self.share_good), "of the masks"),
            ("AP@1", shown(self.ap_at_1.get("AP")), "COCO, every score 1"),
            ("AP50@1", shown(self.ap_at_1.get("AP50")), ""),
            ("AP75@1", shown(self.ap_at_1.get("AP75")), ""),
            ("AP@score", shown(self.ap_at_score.get("AP")), "COCO, with our scores"),
            ("score bias", shown(score.bias), "mean score minus mean IoU"),
            ("calibration", shown(score.calibration_error), "mean distance of score and IoU"),
            ("Spearman", shown(score.spearman), "score and IoU, rank correlation"),
            ("bad found", shown(score.bad_in_worst_fifth), f"of {score.bad_count} with IoU < 0.5, in the lowest 20 %"),
        ]
        rows += [("not counted", str(count), reason) for reason, count in self.skipped.items()]
        return rows


def size_table(measured: Measured) -> Html:
    """Mean IoU and AP by size of the true mask."""
    return table(
        ["size of the true mask", "masks", "mIoU", "AP@1", "AP@score"],
        [
            [
                name,
                count,
                miou,
                measured.ap_at_1.get(_AP_OF_SIZE[name]),
                measured.ap_at_score.get(_AP_OF_SIZE[name]),
            ]
            for name, (count, miou) in measured.by_size.items()
        ],
    )


def evaluation_sections(measured: Measured, note: str = "", cards: Sequence[Card] = ()) -> list[Html]:
    """The usual sections of an evaluation.

    Args:
        measured: the figures.
        note: which weights were measured.
        cards: pictures of the worst masks, lowest IoU first.
    """
    shown_pairs = len(measured.pairs)
    listed = "" if shown_pairs == measured.count else f" The {shown_pairs} lowest of {measured.count}."
    sections = [
        section(
            "Figures",
            side_by_side(
                table(["figure", "value", "of"], measured.figures()),
                size_table(measured) + category_table(measured.categories, 10),
            ),
            note,
        ),
        section(
            "Is the score worth something?",
            calibration_plot(measured.pairs),
            "A mask below the diagonal is worse than its score says." + listed,
        ),
    ]
    if cards:
        sheet = overlay_legend() + contact_sheet(cards)
        sections.append(section("Worst masks first", sheet, "Look here before trusting the rest."))
    return sections
