"""The sections of a page about an evaluation, for results of this process and of servers alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mal_train.core.numbers import counted
from mal_train.core.report.charts import calibration_plot
from mal_train.core.report.page import (
    Card,
    Html,
    category_table,
    contact_sheet,
    format_metric,
    overlay_legend,
    section,
    side_by_side,
    table,
)

if TYPE_CHECKING:
    from mal_train.core.metrics.report import EvaluationMetrics

_AP_OF_SIZE = {"small": "APs", "medium": "APm", "large": "APl"}


def evaluation_sections(
    metrics: EvaluationMetrics, note: str = "", cards: Sequence[Card] = (), omitted: int = 0
) -> list[Html]:
    """Returns the sections of an evaluation: metrics, quality of the score, worst masks.

    Args:
        metrics: the result; the plot shows the instances in `metrics.worst`.
        note: names the evaluated weights.
        cards: images of the worst masks, lowest IoU first.
        omitted: number of the worst masks without a card.
    """
    plotted = [(row.score, row.iou) for row in metrics.worst]
    subset = "" if len(plotted) == metrics.overall.count else f" The {len(plotted)} lowest of {metrics.overall.count}."
    sections = [
        section(
            "Metrics",
            side_by_side(
                table(["metric", "value", "of"], metric_rows(metrics)),
                size_table(metrics) + category_table(metrics.categories, 10),
            ),
            note,
        ),
        section(
            "Quality of the score",
            calibration_plot(plotted),
            "The IoU of a mask below the diagonal is lower than its score." + subset,
        ),
    ]
    if cards or omitted:
        sheet = overlay_legend() + contact_sheet(cards)
        text = f"Lowest IoU first. Check these before you trust the rest.{omission_note(omitted)}"
        sections.append(section("Worst masks", sheet, text))
    return sections


def omission_note(omitted: int) -> str:
    """Returns a sentence on masks that have no image, to be appended to others; empty for none."""
    if not omitted:
        return ""
    return f" Not shown: {counted(omitted, 'mask')}, whose images cannot be read, or are read by windows only."


def metric_rows(metrics: EvaluationMetrics) -> list[tuple[str, str, str]]:
    """Returns (name, value, remark) of the main metrics."""
    score = metrics.score
    on_images = "" if metrics.images is None else f" on {counted(metrics.images, 'image')}"
    rows = [("mIoU", format_metric(metrics.overall.miou), f"{counted(metrics.overall.count, 'mask')}{on_images}")]
    rows += [
        (f"mIoU {name}", format_metric(group.miou), counted(group.count, "mask"))
        for name, group in metrics.by_size.items()
    ]
    rows += [
        ("mIoU class", format_metric(metrics.class_miou), counted(len(metrics.categories), "class")),
        ("IoU > 0.75", format_metric(metrics.share_good), "of the masks"),
        ("AP@1", format_metric(metrics.ap_at_1.get("AP")), "COCO, every score 1"),
        ("AP50@1", format_metric(metrics.ap_at_1.get("AP50")), ""),
        ("AP75@1", format_metric(metrics.ap_at_1.get("AP75")), ""),
        ("AP@score", format_metric(metrics.ap_at_score.get("AP")), "COCO, with the scores of the masks"),
        ("score bias", format_metric(score.bias), "mean score minus mean IoU"),
        ("calibration", format_metric(score.calibration_error), "mean distance of score and IoU"),
        ("Spearman", format_metric(score.spearman), "score and IoU, rank correlation"),
        (
            "bad found",
            format_metric(score.bad_in_worst_fifth),
            f"of {score.bad_count} with IoU < 0.5, in the lowest-scored 20 %",
        ),
    ]
    rows += [("not counted", str(count), reason) for reason, count in metrics.skipped.items()]
    return rows


def size_table(metrics: EvaluationMetrics) -> Html:
    """Returns a table of mean IoU and AP by size of the ground-truth mask."""
    return table(
        ["size of the true mask", "masks", "mIoU", "AP@1", "AP@score"],
        [
            [
                name,
                group.count,
                group.miou,
                metrics.ap_at_1.get(_AP_OF_SIZE[name]),
                metrics.ap_at_score.get(_AP_OF_SIZE[name]),
            ]
            for name, group in metrics.by_size.items()
        ],
    )
