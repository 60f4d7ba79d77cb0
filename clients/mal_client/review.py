"""Close-ups of the worst masks of an evaluation: asks the server for them again and draws them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mal_client.errors import RequestRefused
from mal_client.overlays import draw_close_up, png_data_uri
from mal_client.report import Card
from mal_client.types import BoxLabel, Evaluation, LabelOptions, MeasuredInstance
from mal_train.errors import BadDataset, BadImage
from mal_train.labeling.coco import CocoFile
from mal_train.labeling.images import RgbImage, read_image
from mal_train.labeling.rle import Rle, from_segmentation

if TYPE_CHECKING:
    from mal_client.client import Client


def worst_cards(
    client: Client,
    evaluation: Evaluation,
    coco: CocoFile,
    images_dir: Path,
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
    cards: dict[int, Card] = {}
    for file_name in dict.fromkeys(row.file_name for row in worst):
        wanted = [(place, row) for place, row in enumerate(worst) if row.file_name == file_name]
        path = images_dir / file_name
        try:
            image = read_image(path)
            labels = client.label_image(path, [row.box for _, row in wanted], options)
        except (BadImage, RequestRefused):
            continue
        for (place, row), label in zip(wanted, labels, strict=True):
            cards[place] = _card(image, row, label, segmentations.get(row.annotation_id))
    return [cards[place] for place in sorted(cards)]


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
