"""Masks as a COCO file that FiftyOne's importer reads exactly: each row's box is the tight box of its mask.

FiftyOne keeps of a mask what lies in the row's box, with the box rounded to pixels; a box as a user drew it would cut
or shift the mask by up to a pixel.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from mal_client.formats.masks import MaskFile, MaskRow, write_bytes
from mal_train.core.masks.rle import area, to_box

NAME: Final = "labels.json"

KEPT: Final = ("score", "agreement", "flags")
"""Fields that become attributes of FiftyOne's detections; `score` is its confidence."""


def write_fiftyone(masks: MaskFile, folder: Path) -> None:
    """Writes `folder/labels.json`; category ids count from 1, in the order of the file's list.

    The box as it was drawn is kept in `prompt_box`, the id of the row in `annotation_id`.

    Raises:
        OutputError: the disk.
    """
    images: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for at, (image, found) in enumerate(masks.images(), start=1):
        images.append({"id": at, "file_name": image.file_name, "width": image.width, "height": image.height})
        rows += [_row(row, len(rows) + more, at) for more, row in enumerate(found, start=1)]
    categories = [{"id": at, "name": name} for at, name in enumerate(masks.names, start=1)]
    content = {"images": images, "annotations": rows, "categories": categories}
    write_bytes(folder / NAME, json.dumps(content).encode())


def _row(row: MaskRow, row_id: int, image_id: int) -> dict[str, Any]:
    return {
        "id": row_id,
        "image_id": image_id,
        "category_id": row.category_at + 1,
        "bbox": to_box(row.rle),
        "area": area(row.rle),
        "iscrowd": 0,
        "segmentation": row.rle.to_coco(),
        "annotation_id": row.row.get("id"),
        "prompt_box": row.row.get("bbox"),
        **{key: row.row[key] for key in KEPT if row.row.get(key) is not None},
    }
