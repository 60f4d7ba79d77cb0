"""Writes the worst masks of a labeled file as Label Studio tasks: one per image, its boxes and masks as prediction."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final
from xml.sax.saxutils import quoteattr

from mal_client.images.image_files import ImageFiles
from mal_client.integrations.label_studio.brush import encode_brush
from mal_client.integrations.label_studio.regions import Json, box_to_percent
from mal_client.review.queue import QueueItem, by_image, frame_size, xml_text
from mal_train.core.atomic_io import write_text
from mal_train.core.coco.output import mask_score_of
from mal_train.core.numbers import finite_number
from mal_train.core.storage.addresses import quote_name

BOX_CONTROL: Final = "box"
MASK_CONTROL: Final = "mask"
IMAGE: Final = "image"


def review_config(names: Sequence[str]) -> str:
    """Returns a labeling configuration for the tasks, with controls for boxes and for brush masks.

    >>> "<Label value='cup'/>" in review_config(["cup"]).replace('"', "'")
    True
    """
    labels = "".join(f"<Label value={quoteattr(name)}/>" for name in names)
    return (
        f'<View>\n  <Header value="$reasons"/>\n  <Image name="{IMAGE}" value="${IMAGE}"/>\n'
        f'  <RectangleLabels name="{BOX_CONTROL}" toName="{IMAGE}" smart="true">{labels}</RectangleLabels>\n'
        f'  <BrushLabels name="{MASK_CONTROL}" toName="{IMAGE}" smart="false">{labels}</BrushLabels>\n</View>\n'
    )


def review_tasks(
    items: Sequence[QueueItem], names: Mapping[object, str], files: ImageFiles, image_prefix: str
) -> list[Json]:
    """Builds a task for each image, the image with the worst mask first.

    Args:
        items: the review queue.
        names: category names by ID.
        files: image files, for sizes that the labeled file does not state.
        image_prefix: prefix of the file name in the URL of an image. The name is percent-encoded, except behind
            `s3://` and the like: Label Studio takes what follows for the key of an object.

    Raises:
        BadImage: the size of an image is not stated and its file cannot be read.
    """
    is_object = "://" in image_prefix and not image_prefix.lower().startswith(("http://", "https://"))
    return [
        _task(rows, names, files, image_prefix + (name if is_object else quote_name(name)))
        for name, rows in by_image(items).items()
    ]


def config_path(output: Path) -> Path:
    """Returns the labeling configuration beside the tasks: `tasks.config.xml` beside `tasks.json`."""
    return output.with_suffix(".config.xml")


def write_review_tasks(
    items: Sequence[QueueItem], names: Mapping[object, str], files: ImageFiles, image_prefix: str, output: Path
) -> Path:
    """Writes the tasks and, beside them, the labeling configuration; returns the path of the latter.

    A category name is written with escapes for characters that XML cannot hold.

    Raises:
        BadImage: see `review_tasks`.
    """
    names = {category_id: xml_text(name) for category_id, name in names.items()}
    write_text(output, json.dumps(review_tasks(items, names, files, image_prefix)))
    config = config_path(output)
    write_text(config, review_config(sorted(set(names.values()))))
    return config


def _task(rows: Sequence[QueueItem], names: Mapping[object, str], files: ImageFiles, url: str) -> Json:
    size_wh = frame_size(rows[0], files)
    regions = [region for item in rows for region in _regions(item, names, size_wh)]
    scores = [score for item in rows if (score := finite_number(mask_score_of(item.row))) is not None]
    reasons = "; ".join(f"{item.rank}: {', '.join(item.reasons) or 'low score'}" for item in rows)
    data = {IMAGE: url, "review_rank": rows[0].rank, "reasons": reasons}
    prediction = {"model_version": "mask-auto-labeler", "score": min(scores, default=0.0), "result": regions}
    return {"data": data, "predictions": [prediction]}


def _regions(item: QueueItem, names: Mapping[object, str], size_wh: tuple[int, int]) -> list[Json]:
    label = names.get(item.row.get("category_id"), "")
    width, height = size_wh
    x, y, w, h = box_to_percent(item.box, size_wh)
    common = {
        "to_name": IMAGE,
        "original_width": width,
        "original_height": height,
        "image_rotation": 0,
        "meta": {"text": [f"annotation {item.row.get('id')}", *item.reasons]},
    }
    box = {"x": x, "y": y, "width": w, "height": h, "rotation": 0, "rectanglelabels": [label]}
    regions = [{**common, "id": f"{item.rank}-box", "from_name": BOX_CONTROL, "type": "rectanglelabels", "value": box}]
    if item.rle is not None and (item.rle.width, item.rle.height) == size_wh:
        brush = {"format": "rle", "rle": encode_brush(item.rle), "brushlabels": [label]}
        mask = {"id": f"{item.rank}-mask", "from_name": MASK_CONTROL, "type": "brushlabels", "value": brush}
        regions.append({**common, **mask, "score": finite_number(mask_score_of(item.row)) or 0.0})
    return regions
