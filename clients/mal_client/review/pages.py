"""Close-ups of the worst masks: those of an evaluation, asked for again, and those of a review queue."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mal_client.errors import InvalidRequest
from mal_client.images.image_files import ImageFiles
from mal_client.review.queue import FLAG_MEANINGS, QueueItem, ReviewQueue
from mal_client.types import BoxLabel, Evaluation, LabelOptions, MeasuredInstance
from mal_train.core.coco.annotations import CocoFile
from mal_train.core.errors import BadDataset, BadImage
from mal_train.core.masks.images import RgbImage, read_image
from mal_train.core.masks.rle import Rle, from_segmentation
from mal_train.core.report.overlays import draw_close_up, png_data_uri
from mal_train.core.report.page import Card, Html, contact_sheet, overlay_legend, section, table

if TYPE_CHECKING:
    from mal_client.client import Client


def worst_cards(
    client: Client,
    evaluation: Evaluation,
    coco: CocoFile,
    images_dir: Path | str,
    options: LabelOptions,
    *,
    count: int = 24,
) -> list[Card]:
    """Cards of the `count` masks with the lowest IoU, lowest first.

    Each image is sent once more with its boxes, since an evaluation gives figures and no masks. An image that has
    become unreadable since loses its cards.
    """
    worst = evaluation.worst[:count]
    segmentations = {row.id: row.raw.get("segmentation") for row in coco.annotations if row.id is not None}
    files = ImageFiles(images_dir)
    cards: dict[int, Card] = {}
    for file_name in dict.fromkeys(row.file_name for row in worst):
        wanted = [(place, row) for place, row in enumerate(worst) if row.file_name == file_name]
        try:
            path = files.path(file_name)
            image = read_image(path)
            labels = client.label_image(path, [row.box for _, row in wanted], options)
        except (BadImage, InvalidRequest):
            continue
        for (place, row), label in zip(wanted, labels, strict=True):
            cards[place] = _card(image, row, label, segmentations.get(row.annotation_id))
    return [cards[place] for place in sorted(cards)]


def queue_cards(items: Sequence[QueueItem], images_dir: Path | str) -> list[Card]:
    """Cards in the order given; each image is read once. One that cannot be read loses its cards."""
    files = ImageFiles(images_dir)
    cards: dict[int, Card] = {}
    for file_name in dict.fromkeys(item.image.file_name for item in items):
        wanted = [item for item in items if item.image.file_name == file_name]
        try:
            image = read_image(files.path(file_name), expected_wh=wanted[0].image.size_wh)
        except BadImage:
            continue
        for item in wanted:
            cards[item.rank] = _queue_card(image, item)
    return [cards[rank] for rank in sorted(cards)]


def queue_sections(queue: ReviewQueue, cards: Sequence[Card]) -> list[Html]:
    """The page of a review queue."""
    lost = len(queue.worst) - len(cards)
    unseen = f" {lost} of them are not shown: their pictures cannot be read." if lost else ""
    counts = f"{queue.masks} masks, {queue.failed} without a mask, {queue.left_out} left out."
    sections = [
        section(
            "Worst first",
            overlay_legend() + contact_sheet(cards),
            f"{counts} The first {len(queue.worst)}, by {queue.by}; annotations without a mask come first.{unseen}",
        ),
        section(
            "Flags",
            table(
                ["flag", "annotations", "meaning"],
                [[flag, count, FLAG_MEANINGS.get(flag, "")] for flag, count in queue.flags.most_common()],
            ),
        ),
    ]
    if queue.qualities:
        rows = [
            [str(q.by), q.count, q.bad_count, q.spearman, q.bad_in_worst_tenth, q.bad_in_worst_fifth]
            for q in queue.qualities
        ]
        header = ["order", "masks", "IoU < 0.5", "Spearman with IoU", "bad in worst 10 %", "bad in worst 20 %"]
        note = "Measured against the ground truth. A random order finds 0.1 and 0.2 of the bad masks there."
        sections.append(section("What the order is worth", table(header, rows), note))
    return sections


def _queue_card(image: RgbImage, item: QueueItem) -> Card:
    facts = [f"{name} {item.row[name]:.2f}" for name in ("score", "agreement") if _is_number(item.row.get(name))]
    facts += [] if item.iou is None else [f"IoU {item.iou:.2f}"]
    height, width = image.shape[:2]
    # A mask of another frame cannot be drawn on this picture.
    rle = item.rle if item.rle is not None and (item.rle.height, item.rle.width) == (height, width) else None
    return Card(
        png_data_uri(draw_close_up(image, item.box, rle, item.truth if rle is not None else None)),
        f"{item.rank}. {' · '.join(facts)}",
        " · ".join([f"annotation {item.row.get('id')}", item.image.file_name, *item.reasons]),
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _card(image: RgbImage, row: MeasuredInstance, label: BoxLabel, segmentation: object) -> Card:
    height, width = image.shape[:2]
    truth: Rle | None
    try:
        truth = from_segmentation(segmentation, height, width)
    except BadDataset:
        truth = None
    flags = ", ".join(label.flags).lower().replace("_", " ")
    return Card(
        png_data_uri(draw_close_up(image, row.box, label.rle, truth)),
        f"IoU {row.iou:.2f} · score {row.score:.2f}",
        " · ".join(filter(None, (f"annotation {row.annotation_id}", row.file_name, flags))),
    )
