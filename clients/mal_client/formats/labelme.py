"""Writes masks as labelme JSON files, one per image and named like it, as labelme expects."""

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
from mal_train.core.coco.output import mask_score_of
from mal_train.core.errors import BadImage
from mal_train.core.masks.encodings import to_png
from mal_train.core.masks.polygons import merge_holes
from mal_train.core.storage.addresses import Location, redact

VERSION = "5.5.0"
"""Version of labelme that defines this format; it reads shapes of type mask since 5.2."""


class Shape(StrEnum):
    """Representation of an object."""

    POLYGON = "polygon"
    """Editable outlines; holes are joined to their outline by bridges of zero width, components share a group."""
    MASK = "mask"
    """The pixels as a PNG."""


def write_labelme(
    masks: MaskFile,
    image_files: ImageFiles,
    folder: Path,
    shape: Shape = Shape.POLYGON,
    *,
    relative_to_folder: bool = True,
) -> None:
    """Writes `folder/NAME.json` for each image `NAME.jpg`, including images without objects.

    The flags of an annotation become flags of the shape; its score becomes the description. The path of a local image
    is relative to its label file, or absolute if `relative_to_folder` is False, for a folder that is uploaded.

    Raises:
        OutputError: a file cannot be written.
    """
    label_files = LabelFiles(folder, ".json", masks)
    for image, rows in masks.images():
        path = label_files.path(image, rows)
        if path is None:
            continue
        try:
            location = image_files.locate(image.file_name)
        except BadImage as error:
            label_files.omit(image, rows, error.reason, str(error))
            continue
        content: dict[str, Any] = {
            "version": VERSION,
            "flags": {},
            "shapes": [entry for group, row in enumerate(rows, start=1) for entry in _shapes(row, group, shape)],
            "imagePath": _image_path(location, path.parent if relative_to_folder else None),
            "imageData": None,
            "imageHeight": image.height,
            "imageWidth": image.width,
        }
        write_bytes(path, json.dumps(content, indent=2).encode())


def _image_path(location: Location, folder: Path | None) -> str:
    if not isinstance(location, Path):
        return redact(location)
    return os.path.abspath(location) if folder is None else os.path.relpath(location, folder)


def _shapes(row: MaskRow, group: int, shape: Shape) -> Iterator[dict[str, Any]]:
    score, flags = mask_score_of(row.row), row.row.get("flags")
    common = {
        "label": row.category,
        "group_id": None,
        "description": f"score {score:.3f}" if isinstance(score, float) else "",
        "shape_type": str(shape),
        "flags": {str(flag): True for flag in flags} if isinstance(flags, list) else {},
    }
    if shape is Shape.MASK:
        crop = to_png(row.rle)
        # Both corners are inclusive.
        corners = [[crop.x, crop.y], [crop.x + crop.crop_width - 1, crop.y + crop.crop_height - 1]]
        yield {**common, "points": corners, "mask": base64.b64encode(crop.content).decode()}
        return
    outlines = merge_holes(row.rings)
    for outline in outlines:
        yield {**common, "points": outline.tolist(), "group_id": group if len(outlines) > 1 else None, "mask": None}
