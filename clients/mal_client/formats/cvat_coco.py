"""Reads masks and boxes from CVAT's export "COCO 1.0", JSON, which marks every mask as a crowd region."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from mal_client.formats.boxes import BAD_ROW, EmptyImage, Row, RowError
from mal_client.formats.label_files import ImageNames, ImageRows, only_image, stated_rows
from mal_client.formats.rotated import corners_of
from mal_client.formats.shapes import Shape, tight_box, to_records
from mal_client.types import BoxXywh
from mal_train.core.coco.annotations import Annotation, ImageInfo, JsonId, Reason, by_image, read_coco
from mal_train.core.coco.fields import box_of, has_segmentation, rotation_of
from mal_train.core.coco.json_values import as_json
from mal_train.core.errors import BadDataset
from mal_train.core.masks.rle import from_segmentation
from mal_train.core.settings import RotatedBoxes, RowRules

MIN_NUMBERS: Final = 6
"""Numbers of a polygon of three points; shorter ones, which exporters leave behind, are ignored."""

EXPORTS: Final = "the export CVAT for images 1.1 or COCO 1.0"

TIGHT_PX: Final = 1.0
"""Distance between the sides of a mask and of the box that CVAT computes of it; exporters count pixels from 0 or 1."""


def read_cvat_coco(
    path: Path, images: ImageNames, rotated_boxes: RotatedBoxes, name: str
) -> Iterator[ImageRows | RowError]:
    """Yields the images with their objects, and the errors of rows without an image; see `cvat.read_cvat`."""
    coco = read_coco(path, RowRules(rotated_boxes=rotated_boxes), f"give {EXPORTS}")
    for note in coco.notes:
        if note.startswith("images["):
            where = f"{name}:{note.partition(':')[0]}"
            yield RowError(where, str(Reason.IMAGE_UNUSABLE), f"{name}:{note}")
    for row in coco.annotations:
        if row.image_id is None or row.image_id not in coco.images:
            yield _row_error(row, name, "its image is not in the file")
    for image, rows in by_image(coco):
        yield _read_image(image, rows, coco.category_names, images, name)


def find_frame(images: ImageNames, name: str) -> list[str]:
    """Returns the images that CVAT's name of a frame refers to."""
    folder, _, base = name.strip("/").rpartition("/")
    return images.find(base, folder)


def rotated_corners(box_xywh: BoxXywh, degrees: float) -> tuple[float, ...]:
    """Returns the corners x0, y0, … x3, y3 of a box that is rotated about its center."""
    x, y, w, h = box_xywh
    return corners_of(x + w / 2, y + h / 2, w, h, math.radians(degrees))


def _read_image(
    image: ImageInfo, annotations: list[Annotation], categories: Mapping[JsonId, str], images: ImageNames, name: str
) -> ImageRows | RowError:
    where = f"{name}:image {image.file_name or as_json(image.id)}"
    if image.problem is not None or image.size_wh is None:
        text = (image.problem or "width and height are missing").removeprefix(f"image {as_json(image.id)}: ")
        return RowError(where, "IMAGE_UNUSABLE", f"{where}: {text}")
    file_name = only_image(where, image.file_name, find_frame(images, image.file_name))
    if isinstance(file_name, RowError):
        return file_name
    shapes = (shape for row in annotations for shape in _shapes(row, categories, image.size_wh or (0, 0), name))
    rows: list[Row] = [EmptyImage(where, file_name), *to_records(shapes, file_name, image.size_wh)]
    return stated_rows(where, image.file_name, file_name, rows)


def _shapes(
    row: Annotation, categories: Mapping[JsonId, str], size_wh: tuple[int, int], name: str
) -> list[Shape] | list[RowError]:
    """Returns the shapes of a row, with a common key; or its error."""
    if row.problem is not None or row.category_id is None:
        return [_row_error(row, name, "no category")]
    category = categories.get(row.category_id)
    if category is None:
        return [_row_error(row, name, f"category {row.category_id!r} is not in the file")]
    if row.raw.get("keypoints"):
        return [_row_error(row, name, "key points would be lost; label the file as it is, without conversion")]
    where = f"{name}:annotation {row.id}"
    key = ("annotation", row.id)
    drawn = box_of(row.raw)[0]
    degrees, _ = rotation_of(row.raw, drawn)
    corners = rotated_corners(drawn, degrees) if degrees else ()
    box = Shape(where, category, key, box=row.box_xywh, corners=corners)
    if not has_segmentation(row.raw):
        return [box]
    segmentation: Any = row.raw["segmentation"]
    width, height = size_wh
    try:
        rle = from_segmentation(segmentation, height, width, "segmentation")
    except BadDataset as error:
        return [_row_error(row, name, str(error))]
    if isinstance(segmentation, dict):
        masks = [Shape(where, category, key, rle=rle)]
    else:
        polygons = [polygon for polygon in segmentation if len(polygon) >= MIN_NUMBERS]
        masks = [Shape(where, category, key, polygon=tuple(map(float, polygon))) for polygon in polygons]
    tight = tight_box(masks)
    # As a box of its own, it would keep the mask from the rectangle that it was made of.
    is_tight = not corners and tight is not None and _is_close(row.box_xywh, tight)
    return masks if is_tight else [box, *masks]


def _is_close(a_xywh: BoxXywh, b_xywh: BoxXywh) -> bool:
    """Returns True if no side of a box is more than TIGHT_PX from that of another."""
    (ax, ay, aw, ah), (bx, by, bw, bh) = a_xywh, b_xywh
    sides = ((ax, bx), (ay, by), (ax + aw, bx + bw), (ay + ah, by + bh))
    return all(abs(a - b) <= TIGHT_PX for a, b in sides)


def _row_error(row: Annotation, name: str, text: str) -> RowError:
    """Returns the error of a row: the one found when it was parsed, else `text`."""
    if row.problem is None:
        where = f"{name}:annotation {row.id}"
        return RowError(where, BAD_ROW, f"{where}: {text}")
    # Without an id, the problem names the place in the list.
    where = f"{name}:annotation {row.id}" if row.id is not None else f"{name}:{row.problem.partition(':')[0]}"
    return RowError(where, str(row.reason or BAD_ROW), f"{name}:{row.problem}")
