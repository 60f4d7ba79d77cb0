"""Masks as labelme's JSON files, one a picture, which lie where labelme looks: named as the pictures are."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any

from mal_client.formats.masks import LabelFiles, MaskFile, MaskRow, write_bytes
from mal_client.images.image_files import ImageFiles
from mal_train.core.errors import BadImage
from mal_train.core.masks.encodings import to_png
from mal_train.core.masks.polygons import merge_holes

VERSION = "5.5.0"
"""Of labelme, whose form this is; shapes of type mask are read since 5.2."""


class Shape(StrEnum):
    """What an object becomes."""

    POLYGON = "polygon"
    """Lines to be edited; holes are joined to their outline by bridges of no width, parts share a group."""
    MASK = "mask"
    """The pixels themselves."""


def write_labelme(masks: MaskFile, pictures: ImageFiles, folder: Path, shape: Shape = Shape.POLYGON) -> None:
    """Writes `folder/NAME.json` for each picture `NAME.jpg`, those without objects included.

    Our flags become flags of the shape, the score its description.

    Raises:
        OutputError: the disk.
    """
    files = LabelFiles(folder, ".json", masks.export)
    for image, rows in masks.images():
        path = files.path(image, rows)
        if path is None:
            continue
        try:
            picture = pictures.path(image.file_name)
        except BadImage as fault:
            files.leave_out(image, rows, fault.reason, str(fault))
            continue
        content: dict[str, Any] = {
            "version": VERSION,
            "flags": {},
            "shapes": [one for group, row in enumerate(rows, start=1) for one in _shapes(row, group, shape)],
            "imagePath": os.path.relpath(picture, path.parent),
            "imageData": None,
            "imageHeight": image.height,
            "imageWidth": image.width,
        }
        write_bytes(path, json.dumps(content, indent=2).encode())


def _shapes(row: MaskRow, group: int, shape: Shape) -> Iterator[dict[str, Any]]:
    score = row.row.get("score")
    common = {
        "label": row.category,
        "group_id": None,
        "description": f"score {score:.3f}" if isinstance(score, float) else "",
        "shape_type": str(shape),
        "flags": {str(flag): True for flag in row.row.get("flags") or ()},
    }
    if shape is Shape.MASK:
        crop = to_png(row.rle)
        # Both corners are pixels of the crop.
        corners = [[crop.x, crop.y], [crop.x + crop.crop_width - 1, crop.y + crop.crop_height - 1]]
        yield {**common, "points": corners, "mask": base64.b64encode(crop.content).decode()}
        return
    lines = merge_holes(row.rings)
    for line in lines:
        yield {**common, "points": line.tolist(), "group_id": group if len(lines) > 1 else None, "mask": None}
