"""Cards with close-ups of the worst masks, of an evaluation or of a review queue."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mal_client.errors import InvalidRequest
from mal_client.images.image_files import ImageFiles
from mal_client.review.queue import FLAG_MEANINGS, QueueItem, ReviewQueue
from mal_client.types import BoxLabel, Evaluation, LabelOptions, MeasuredInstance
from mal_train.core.coco.annotations import CocoFile
from mal_train.core.coco.output import mask_score_of
from mal_train.core.errors import BadDataset, BadImage
from mal_train.core.images.decoder import RgbImage, decode_image
from mal_train.core.masks.rle import Rle, from_segmentation
from mal_train.core.numbers import finite_number
from mal_train.core.report.evaluation import omission_note
from mal_train.core.report.overlays import draw_close_up, png_data_uri
from mal_train.core.report.page import Card, Html, contact_sheet, overlay_legend, section, table
from mal_train.core.storage.addresses import Location

if TYPE_CHECKING:
    from mal_client.client import Client


def worst_cards(
    client: Client,
    evaluation: Evaluation,
    coco: CocoFile,
    images_dir: ImageFiles | Location,
    options: LabelOptions,
    *,
    count: int = 24,
) -> list[Card]:
    """Builds cards of the `count` masks with the lowest IoU, lowest first.

    Sends each image again with its boxes, because an evaluation returns metrics and no masks. Omits the cards of images
    that can no longer be read.
    """
    worst = evaluation.worst[:count]
    segmentations = {row.id: row.raw.get("segmentation") for row in coco.annotations if row.id is not None}
    files = ImageFiles.of(images_dir)
    cards: dict[int, Card] = {}
    for file_name in dict.fromkeys(row.file_name for row in worst):
        indexed = [(index, row) for index, row in enumerate(worst) if row.file_name == file_name]
        try:
            content = files.read(file_name)
            image = decode_image(content, name=file_name)
            labels = client.label_image(content, [row.box for _, row in indexed], options)
        except (BadImage, InvalidRequest):
            continue
        for (index, row), label in zip(indexed, labels, strict=True):
            cards[index] = _evaluation_card(image, row, label, segmentations.get(row.annotation_id))
    return [cards[index] for index in sorted(cards)]


def queue_cards(items: Sequence[QueueItem], images_dir: ImageFiles | Location) -> list[Card]:
    """Builds the cards of queue items, in the order of the queue; reads each image once and omits unreadable ones."""
    files = ImageFiles.of(images_dir)
    cards: dict[int, Card] = {}
    for file_name in dict.fromkeys(item.image.file_name for item in items):
        on_image = [item for item in items if item.image.file_name == file_name]
        try:
            content = files.read(file_name)
            image = decode_image(content, expected_wh=on_image[0].image.size_wh, name=file_name)
        except BadImage:
            continue
        for item in on_image:
            cards[item.rank] = _queue_card(image, item)
    return [cards[rank] for rank in sorted(cards)]


def queue_sections(queue: ReviewQueue, cards: Sequence[Card]) -> list[Html]:
    """Builds the sections of the HTML page of a review queue."""
    note = omission_note(len(queue.worst) - len(cards))
    counts = f"{queue.masks} masks, {queue.failed} without a mask, {queue.omitted} omitted."
    sections = [
        section(
            "Worst first",
            overlay_legend(has_truth=bool(queue.qualities)) + contact_sheet(cards),
            f"{counts} The first {len(queue.worst)} by {queue.sort_by}; annotations without a mask come first.{note}",
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
            [str(q.sort_by), q.count, q.bad_count, q.spearman, q.bad_in_worst_tenth, q.bad_in_worst_fifth]
            for q in queue.qualities
        ]
        header = ["order", "masks", "IoU < 0.5", "Spearman with IoU", "bad in worst 10 %", "bad in worst 20 %"]
        note = "Measured against the ground truth. A random order has 0.1 and 0.2 of the bad masks there."
        sections.append(section("Quality of the order", table(header, rows), note))
    return sections


def _queue_card(image: RgbImage, item: QueueItem) -> Card:
    numbers = {"score": mask_score_of(item.row), "agreement": item.row.get("agreement")}
    facts = [f"{name} {number:.2f}" for name, value in numbers.items() if (number := finite_number(value)) is not None]
    facts += [] if item.iou is None else [f"IoU {item.iou:.2f}"]
    height, width = image.shape[:2]
    # A mask of another size cannot be drawn on this image.
    rle = item.rle if item.rle is not None and (item.rle.height, item.rle.width) == (height, width) else None
    return Card(
        png_data_uri(draw_close_up(image, item.box, rle, item.truth if rle is not None else None)),
        f"{item.rank}. {' · '.join(facts)}",
        " · ".join([f"annotation {item.row.get('id')}", item.image.file_name, *item.reasons]),
    )


def _evaluation_card(image: RgbImage, row: MeasuredInstance, label: BoxLabel, segmentation: object) -> Card:
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
