"""Output of the demo: images with their masks, and one page of metrics, curves and images."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from mal_client.evaluation.report_page import evaluation_sections
from mal_client.types import Evaluation
from PIL import Image

from mal_train.core.coco.annotations import by_image, read_coco
from mal_train.core.images.files import read_image
from mal_train.core.masks.rle import from_segmentation
from mal_train.core.report.charts import line_chart
from mal_train.core.report.overlays import Drawn, draw_labels, png_data_uri
from mal_train.core.report.page import Card, build_report, contact_sheet, section, table

OVERLAYS = 8


def write_overlays(folder: Path, labels: Path, images: Path) -> list[Card]:
    """Draws the masks of a labeled file over its images, one PNG each; returns cards of the first few."""
    folder.mkdir(exist_ok=True)
    cards: list[Card] = []
    for info, rows in by_image(read_coco(labels)):
        image = read_image(images / info.file_name)
        height, width = image.shape[:2]
        drawn = draw_labels(
            image,
            [
                Drawn(
                    from_segmentation(row.raw["segmentation"], height, width), row.box_xywh, f"{row.raw['score']:.2f}"
                )
                for row in rows
            ],
        )
        Image.fromarray(drawn).save(folder / Path(info.file_name).with_suffix(".png").name)
        if len(cards) < OVERLAYS:
            masks = "1 mask with its score" if len(rows) == 1 else f"{len(rows)} masks, each with its score"
            cards.append(Card(png_data_uri(drawn), info.file_name, masks))
    return cards


def report_page(
    metrics: Path,
    evaluation: Evaluation,
    references: Mapping[str, float],
    *,
    photographs: Sequence[Card],
    worst: Sequence[Card],
    overlays: Sequence[Card],
    durations: Sequence[tuple[str, float]],
) -> str:
    """Returns the page: metrics beside the references, the training curve, images, durations."""
    rows = [("served model, trained on boxes of scenes", evaluation.overall.miou), *references.items()]
    curve, losses = _curves(metrics)
    last = max((step for step, _ in curve), default=0.0)
    flat = {name: [(0.0, value), (last, value)] for name, value in references.items()}
    sections = [
        section(
            "Photographs",
            contact_sheet(photographs),
            "Masks of the built-in model, which learned from boxes of other photographs. The boxes were drawn by hand.",
        ),
        section(
            "Masks on held-out scenes",
            contact_sheet(overlays),
            "Results of the server; all images: overlays/.",
        ),
        section(
            "Comparison",
            table(["method", f"mIoU of {evaluation.overall.count} held-out masks"], rows),
        ),
        section(
            "Training",
            line_chart({"validation scenes": curve, **flat}, "step", "mIoU")
            + line_chart({"multiple-instance loss": losses[0], "mean-field loss": losses[1]}, "step", "loss, weighted"),
            "The validation scenes are neither trained on nor held out; their masks are used for this curve alone.",
        ),
        *evaluation_sections(evaluation, worst),
        section("Time", table(["stage", "seconds"], [[name, round(seconds, 1)] for name, seconds in durations])),
    ]
    return build_report("Masks from boxes: the demo", sections, "No mask was seen in training.")


def _curves(metrics: Path) -> tuple[list[tuple[float, float]], tuple[list[tuple[float, float]], ...]]:
    """Returns (step, mIoU) of the validations, and (step, loss) of both losses."""
    with metrics.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    miou = [(float(row["step"]), float(row["mIoU"])) for row in rows if row["kind"] == "val" and row["mIoU"]]
    steps = [row for row in rows if row["kind"] == "train"]
    return miou, tuple([(float(row["step"]), float(row[name])) for row in steps] for name in ("loss_mil", "loss_crf"))
