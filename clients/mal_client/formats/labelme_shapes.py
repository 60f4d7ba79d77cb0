"""Reads shapes from labelme's JSON files, one per image: polygons, rectangles, circles and masks."""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from mal_client.formats.boxes import BAD_FILE, BAD_ROW, EmptyImage, Row, RowError
from mal_client.formats.label_files import (
    ImageNames,
    ImageRows,
    annotation_files,
    broken_file,
    file_rows,
    match_stated,
    read_label_file,
    unreadable,
    without_rivals,
)
from mal_client.formats.rotated import extent
from mal_client.formats.shapes import Shape, to_records
from mal_train.core.coco.json_values import as_json, is_too_deep, json_problem, json_type
from mal_train.core.errors import BadBox, BadDataset, BadImage
from mal_train.core.images.decoder import decode_image
from mal_train.core.input_files import decode_text
from mal_train.core.masks.rle import MAX_PIXELS, Rle, encode_region
from mal_train.core.numbers import finite_number

ARC_ERROR_PX: Final = 0.05
"""Largest distance between a circle and its outline."""
MAX_ARC_POINTS: Final = 4096


def read_labelme(labels_dir: Path, images: ImageNames, encoding: str | None = None) -> Iterator[Row]:
    """Yields the image of each JSON file below a folder, followed by its objects.

    Polygons become outlines, circles outlines, rectangles boxes, and masks run-length codes. Shapes of one label with
    the same `group_id` are one object, as in labelme's own conversion, unless several of them are rectangles. A
    rectangle and an outline or mask of one label whose boxes have an IoU of 0.5 or more are one object, too. Other
    shapes are errors.

    Args:
        labels_dir: folder of the JSON files.
        images: the images. A file belongs to the image at its own path or of its own name, or that its `imagePath`
            names; if these are two images, the file is an error.
        encoding: of text without a byte order mark; None is UTF-8.
    """
    yield from without_rivals(_read_files(labels_dir, images, encoding))


def _read_files(labels_dir: Path, images: ImageNames, encoding: str | None) -> Iterator[ImageRows | RowError]:
    for path, name in annotation_files(labels_dir, ".json"):
        try:
            content = _parse(path, encoding)
            stated, size_wh, shapes = _head(content)
        except (OSError, UnicodeError) as error:
            yield broken_file(RowError(name, BAD_FILE, f"{name}: {unreadable(error, encoding)}"), images)
            continue
        except (ValueError, RecursionError) as error:
            detail = json_problem(error) if isinstance(error, ValueError) else str(error)
            yield broken_file(RowError(name, BAD_FILE, f"{name}: not a file of labelme ({detail})"), images)
            continue
        image = match_stated(stated, name, images)
        if isinstance(image, RowError):
            yield image
            continue
        read = (_shape(shape, f"{name}:shape {number}", size_wh) for number, shape in enumerate(shapes, start=1))
        yield file_rows(name, image, [EmptyImage(name, image), *to_records(read, image, size_wh)])


def _parse(path: Path, encoding: str | None) -> dict[str, Any]:
    """Returns the object of a file. Raises OSError, ValueError, RecursionError."""
    content = json.loads(decode_text(read_label_file(path), encoding or "utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"it holds {json_type(content)}")
    if is_too_deep(content):
        raise RecursionError("nested too deep")
    return content


def _head(content: dict[str, Any]) -> tuple[str, tuple[int, int], list[Any]]:
    """Returns the stated image, its width and height in px, and the shapes. Raises ValueError."""
    shapes = content.get("shapes")
    if not isinstance(shapes, list):
        raise ValueError(f"shapes is {json_type(shapes)}; expected a list")
    width, height = (content.get(key) for key in ("imageWidth", "imageHeight"))
    if not (type(width) is int and type(height) is int and width > 0 and height > 0 and width * height <= MAX_PIXELS):
        raise ValueError(
            f"imageWidth {as_json(width)}, imageHeight {as_json(height)}; expected the size in px; save it with labelme"
        )
    stated = content.get("imagePath")
    return stated if isinstance(stated, str) else "", (width, height), shapes


def _shape(shape: Any, where: str, size_wh: tuple[int, int]) -> Shape | RowError:
    try:
        return _read(shape, where, size_wh)
    except (BadBox, BadDataset, BadImage) as error:
        return RowError(where, BAD_ROW, f"{where}: {str(error).removeprefix(f'{where}: ')}")


def _read(shape: Any, where: str, size_wh: tuple[int, int]) -> Shape:
    if not isinstance(shape, dict):
        raise BadBox(f"{json_type(shape)}; expected an object")
    label, kind = shape.get("label"), shape.get("shape_type", "polygon")
    if not isinstance(label, str) or not label.strip():
        raise BadBox(f"label {as_json(label)}; expected the name of a class")
    group = shape.get("group_id")
    key = None if group is None else (as_json(group), label)
    of_kind = partial(Shape, where, label, key, extra=_extra(shape))
    points = _points(shape.get("points"))
    count = len(points) // 2
    if kind == "polygon" and count >= 3:
        return of_kind(polygon=points)
    if kind == "rectangle" and count == 2:
        x0, y0, x1, y1 = extent(points)
        if not (x1 > x0 and y1 > y0):
            raise BadBox(f"rectangle from {x0:g}, {y0:g} to {x1:g}, {y1:g} px has no area")
        return of_kind(box=(x0, y0, x1 - x0, y1 - y0))
    if kind == "circle" and count == 2:
        return of_kind(polygon=circle(*points))
    if kind == "mask" and count == 2:
        return of_kind(rle=_mask(shape.get("mask"), points, size_wh))
    if isinstance(kind, str) and kind in {"polygon", "rectangle", "circle", "mask"}:
        raise BadBox(f"{kind} of {count} points; expected {'3 or more' if kind == 'polygon' else 2}")
    raise BadBox(f"shape_type {as_json(kind)} is not converted; expected polygon, rectangle, circle or mask")


def _points(value: Any) -> tuple[float, ...]:
    """Returns x0, y0, x1, y1, … in px."""
    if not isinstance(value, list) or any(not isinstance(point, list) or len(point) != 2 for point in value):
        raise BadBox(f"points {as_json(value)}; expected a list of pairs x, y")
    numbers = [finite_number(number) for point in value for number in point]
    if None in numbers:
        raise BadBox(f"points {as_json(value)}; expected finite numbers")
    return tuple(number for number in numbers if number is not None)


def circle(cx: float, cy: float, x: float, y: float) -> tuple[float, ...]:
    """Returns an outline x0, y0, … of the circle about (cx, cy) through (x, y), with its outermost points.

    Raises:
        BadBox: the circle has no area.
    """
    radius = math.hypot(x - cx, y - cy)
    if not 0 < radius < math.inf:
        raise BadBox(f"circle of radius {radius:g} px")
    # A chord of n is radius * (1 - cos(pi / n)) from its arc.
    step = 2 * math.acos(max(0.0, 1 - ARC_ERROR_PX / radius))
    quarter = min(MAX_ARC_POINTS // 4, math.ceil(math.pi / 2 / step)) if step else MAX_ARC_POINTS // 4
    angles = [math.pi / 2 * index / quarter for index in range(4 * quarter)]
    return tuple(value for angle in angles for value in (cx + radius * math.cos(angle), cy + radius * math.sin(angle)))


def _mask(value: Any, corners: Sequence[float], size_wh: tuple[int, int]) -> Rle:
    """Returns the mask of a PNG between two corners, both inclusive, in an image of this width and height."""
    x0, y0, x1, y1 = (int(corner) if corner.is_integer() else -1 for corner in corners)
    width, height = size_wh
    if not (0 <= x0 <= x1 < width and 0 <= y0 <= y1 < height):
        raise BadBox(f"mask from {corners[:2]} to {corners[2:]}; expected pixels of the image of {width}x{height} px")
    if not isinstance(value, str):
        raise BadBox(f"mask is {json_type(value)}; expected a PNG in base64")
    try:
        content = base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadBox(f"mask is not base64 ({error})") from None
    pixels = decode_image(content, expected_wh=(x1 - x0 + 1, y1 - y0 + 1), name="mask")
    return encode_region(np.any(pixels != 0, axis=2), y0, x0, (height, width))


def _extra(shape: dict[str, Any]) -> dict[str, Any]:
    """Returns the description and the flags of a shape, as far as they are set."""
    description, flags = shape.get("description"), shape.get("flags")
    names = [name for name, is_set in flags.items() if is_set is True] if isinstance(flags, dict) else []
    return {
        **({"description": description} if isinstance(description, str) and description else {}),
        **({"flags": names} if names else {}),
    }
