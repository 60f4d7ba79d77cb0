"""Writes masks as a COCO file that FiftyOne imports exactly: the box of each row is the tight box of its mask.

FiftyOne rounds the box to pixels and keeps the part of the mask inside it. The box of the user would crop or shift the
mask by up to a pixel.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from mal_client.formats.masks import MaskFile, MaskRow, write_bytes
from mal_train.core.coco.output import MASK_SCORE
from mal_train.core.masks.rle import area, to_box
from mal_train.core.storage.writing import refuse_same_location

NAME: Final = "labels.json"

KEPT: Final = ("score", MASK_SCORE, "agreement", "flags")
"""Fields that FiftyOne imports as attributes of a detection; `score` becomes its confidence."""


def write_fiftyone(masks: MaskFile, folder: Path) -> None:
    """Writes `folder/labels.json`; category IDs start at 1, in the order of the input file.

    Stores the original box in `prompt_box` and the original ID in `annotation_id`.

    Raises:
        OutputError: the file cannot be written.
        ConfigError: it is the input file.
    """
    refuse_same_location(masks.path, folder / NAME)
    images: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for image_id, (image, mask_rows) in enumerate(masks.images(), start=1):
        images.append({"id": image_id, "file_name": image.file_name, "width": image.width, "height": image.height})
        rows += [_row(row, row_id, image_id) for row_id, row in enumerate(mask_rows, start=len(rows) + 1)]
    categories = [{"id": category_id, "name": name} for category_id, name in enumerate(masks.names, start=1)]
    content = {"images": images, "annotations": rows, "categories": categories}
    write_bytes(folder / NAME, json.dumps(content).encode())


def _row(row: MaskRow, row_id: int, image_id: int) -> dict[str, Any]:
    return {
        "id": row_id,
        "image_id": image_id,
        "category_id": row.category_index + 1,
        "bbox": to_box(row.rle),
        "area": area(row.rle),
        "iscrowd": 0,
        "segmentation": row.rle.to_coco(),
        "annotation_id": row.row.get("id"),
        "prompt_box": row.row.get("bbox"),
        **{key: row.row[key] for key in KEPT if row.row.get(key) is not None},
    }
