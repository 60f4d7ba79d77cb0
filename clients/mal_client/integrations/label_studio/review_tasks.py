"""The worst masks of a labeled file as tasks for Label Studio: a picture each, boxes and masks as its prediction."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final
from xml.sax.saxutils import quoteattr

from mal_client.images.image_files import ImageFiles
from mal_client.integrations.label_studio.brush import encode_brush
from mal_client.integrations.label_studio.regions import Json, percent_of_box
from mal_client.review.queue import QueueItem, by_image, frame_size
from mal_train.core.atomic_io import write_text

BOX_TOOL: Final = "box"
MASK_TOOL: Final = "mask"
PICTURE: Final = "image"


def review_config(names: Sequence[str]) -> str:
    """A labeling configuration that takes the tasks: boxes, and brushes that edit the masks.

    >>> "<Label value='cup'/>" in review_config(["cup"]).replace('"', "'")
    True
    """
    labels = "".join(f"<Label value={quoteattr(name)}/>" for name in names)
    return (
        f'<View>\n  <Header value="$reasons"/>\n  <Image name="{PICTURE}" value="${PICTURE}"/>\n'
        f'  <RectangleLabels name="{BOX_TOOL}" toName="{PICTURE}" smart="true">{labels}</RectangleLabels>\n'
        f'  <BrushLabels name="{MASK_TOOL}" toName="{PICTURE}" smart="false">{labels}</BrushLabels>\n</View>\n'
    )


def review_tasks(
    items: Sequence[QueueItem], names: Mapping[object, str], files: ImageFiles, picture_prefix: str
) -> list[Json]:
    """A task for each picture, that with the worst mask first.

    Args:
        items: the queue.
        names: of the categories, by id.
        files: where sizes are looked up that the file does not state.
        picture_prefix: stands before the file name in a task's address of its picture.

    Raises:
        BadImage: a picture whose size neither the file nor the folder tells.
    """
    return [_task(rows, names, files, f"{picture_prefix}{name}") for name, rows in by_image(items).items()]


def write_review_tasks(
    items: Sequence[QueueItem], names: Mapping[object, str], files: ImageFiles, picture_prefix: str, output: Path
) -> Path:
    """Writes the tasks, and beside them the configuration that takes them; the latter's path."""
    write_text(output, json.dumps(review_tasks(items, names, files, picture_prefix)))
    config = output.with_suffix(".config.xml")
    write_text(config, review_config(sorted(set(names.values()))))
    return config


def _task(rows: Sequence[QueueItem], names: Mapping[object, str], files: ImageFiles, address: str) -> Json:
    size_wh = frame_size(rows[0], files)
    regions = [region for item in rows for region in _regions(item, names, size_wh)]
    scores = [item.row["score"] for item in rows if isinstance(item.row.get("score"), int | float)]
    reasons = "; ".join(f"{item.rank}: {', '.join(item.reasons) or 'low score'}" for item in rows)
    data = {PICTURE: address, "review_rank": rows[0].rank, "reasons": reasons}
    prediction = {"model_version": "mask-auto-labeler", "score": min(scores, default=0.0), "result": regions}
    return {"data": data, "predictions": [prediction]}


def _regions(item: QueueItem, names: Mapping[object, str], size_wh: tuple[int, int]) -> list[Json]:
    label = names.get(item.row.get("category_id"), "")
    width, height = size_wh
    x, y, w, h = percent_of_box(item.box, size_wh)
    common = {
        "to_name": PICTURE,
        "original_width": width,
        "original_height": height,
        "image_rotation": 0,
        "meta": {"text": [f"annotation {item.row.get('id')}", *item.reasons]},
    }
    box = {"x": x, "y": y, "width": w, "height": h, "rotation": 0, "rectanglelabels": [label]}
    made = [{**common, "id": f"{item.rank}-box", "from_name": BOX_TOOL, "type": "rectanglelabels", "value": box}]
    if item.rle is not None and (item.rle.width, item.rle.height) == size_wh:
        brush = {"format": "rle", "rle": encode_brush(item.rle), "brushlabels": [label]}
        mask = {"id": f"{item.rank}-mask", "from_name": MASK_TOOL, "type": "brushlabels", "value": brush}
        made.append({**common, **mask, "score": float(item.row.get("score") or 0.0)})
    return made
