"""Reads single fields of the rows of COCO files, in the forms that exporters write; `docs/inputs.md` lists them."""

import math
import os
from array import array
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from mal_train.core.coco.json_values import as_json
from mal_train.core.masks.geometry import Box
from mal_train.core.masks.points import MAX_POINTS, Point
from mal_train.core.masks.rle import MAX_PIXELS
from mal_train.core.numbers import finite_number, number_of

NO_BOX: Final[Box] = (math.nan, math.nan, math.nan, math.nan)
"""Placeholder for a row without a readable box."""

UPRIGHT_PX: Final = 0.1
"""Corners that lie so close to those of an upright box are its own; other tools round."""

URL_FIELD: Final = "coco_url"
"""Field of an image row with the URL of the image."""

_URL_PARTS: Final = 2
"""Parts of the path of a URL that make up the file name: the folder of the split and the name, as LVIS defines it."""


def file_name_of(row: Mapping[str, Any]) -> str:
    """Returns the file name of an image row; "" if it has none.

    Without `file_name`, it is the last two parts of the path of `coco_url`, as in LVIS.

    >>> file_name_of({"coco_url": "http://images.cocodataset.org/val2017/000000000632.jpg"})
    'val2017/000000000632.jpg'
    """
    name = row.get("file_name")
    if name is None:
        name = _name_in_url(row.get(URL_FIELD))
    return name if isinstance(name, str) and _can_be_path(name) else ""


def side_of(value: object) -> tuple[int | None, str | None]:
    """Returns the width or height of an image in px, None if it is unknown, and a rule that the value breaks.

    Numbers up to 0 mean unknown; digits in a string are a number.

    >>> side_of(640.0), side_of("640"), side_of(0), side_of(-1), side_of(None)
    ((640, None), (640, None), (None, None), (None, None), (None, None))
    """
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) <= len(str(MAX_PIXELS)):
        value = int(value)
    number = finite_number(value)
    if value is None or (number is not None and number <= 0):
        return None, None
    if number is not None and number <= MAX_PIXELS and number.is_integer():
        return int(number), None
    return None, "it must be a whole number of pixels, or absent"


def box_of(row: Mapping[str, Any]) -> tuple[Box, str | None]:
    """Returns the box of a row and a description of what is wrong with it; None for a finite box."""
    value = row.get("bbox")
    rule = "it must be four finite numbers x, y, width, height"
    if value is None:
        return NO_BOX, f"bbox is missing; {rule}"
    if isinstance(value, list) and len(value) == 4:
        x, y, w, h = map(finite_number, value)
        if x is not None and y is not None and w is not None and h is not None:
            return (x, y, w, h), None
    return NO_BOX, f"bbox {as_json(value)}; {rule}"


def rotation_of(row: Mapping[str, Any], box_xywh: Box) -> tuple[float, str | None]:
    """Returns the angle in degrees by which the box of a row is rotated about its center, and a rule that it breaks.

    It is in `attributes.rotation`, as CVAT exports it, also as text; see `turn_of`.

    >>> rotation_of({"attributes": {"rotation": "30.0"}}, (0, 0, 9, 9))
    (30.0, None)
    """
    attributes = row.get("attributes")
    value = attributes.get("rotation") if isinstance(attributes, dict) else None
    if value is None or value == "":
        return 0.0, None
    angle = number_of(value) if isinstance(value, str) else finite_number(value)
    if angle is None:
        return 0.0, f"attributes.rotation {as_json(value)}; it must be an angle in degrees, or absent"
    return turn_of(box_xywh, angle), None


def turn_of(box_xywh: Box, degrees: float) -> float:
    """Returns the angle in [0, 360) by which a box is rotated about its center; 0 if that leaves its corners in place.

    Up to UPRIGHT_PX, they are in place: annotation tools leave angles such as 1e-7. Half a turn exchanges them.

    >>> turn_of((0, 0, 40, 30), 390), turn_of((0, 0, 40, 30), 1e-7), turn_of((0, 0, 40, 30), -180)
    (30, 0.0, 0.0)
    """
    _, _, w, h = box_xywh
    shift = corner_shift(math.hypot(w, h) / 2, math.remainder(degrees, 180.0))
    return 0.0 if shift <= UPRIGHT_PX else degrees % 360


def corner_shift(radius: float, degrees: float) -> float:
    """Returns the distance by which a rotation moves a point at a radius from its center."""
    return 2 * radius * abs(math.sin(math.radians(degrees) / 2))


def enclosing_box(box_xywh: Box, degrees: float) -> Box:
    """Returns the smallest upright box around a box that is rotated about its center.

    >>> [round(value, 6) for value in enclosing_box((10, 20, 40, 20), 90)]
    [20.0, 10.0, 20.0, 40.0]
    """
    x, y, w, h = box_xywh
    cos, sin = abs(math.cos(math.radians(degrees))), abs(math.sin(math.radians(degrees)))
    width, height = w * cos + h * sin, w * sin + h * cos
    return x + (w - width) / 2, y + (h - height) / 2, width, height


def points_of(row: Mapping[str, Any]) -> tuple[tuple[Point, ...], str | None]:
    """Returns the points of a row and a description of what is wrong with them; None if they can be read.

    Of more than MAX_POINTS it returns one too many, for `check_points` to refuse.

    >>> points_of({"points": [[3, 4.5, 1]]})
    ((Point(x=3.0, y=4.5, is_positive=True),), None)
    """
    value = row.get("points")
    if value is None:
        return (), None
    points = [_point_of(point) for point in value[: MAX_POINTS + 1]] if isinstance(value, list) else [None]
    read = tuple(point for point in points if point is not None)
    if len(read) == len(points):
        return read, None
    rule = "it must be a list of [x, y, 1] or [x, y, 0], in px, or absent"
    return (), f"points {as_json(value)}; {rule}; give a field of another meaning another name"


def _point_of(value: object) -> Point | None:
    if not isinstance(value, list) or len(value) != 3:
        return None
    x, y, label = map(finite_number, value)
    return None if x is None or y is None or label not in (0.0, 1.0) else Point(x, y, label == 1.0)


def integers_of(values: object) -> "array[int] | None":
    """Returns the integers of 64 bits in a list, in no more memory than its text; None for another value."""
    if not isinstance(values, list):
        return None
    return array("q", (value for value in values if type(value) is int and -(2**63) <= value < 2**63))


def has_segmentation(row: Mapping[str, Any]) -> bool:
    """Returns True if a row states a mask; null, [], {} and "" state none."""
    return bool(row.get("segmentation"))


def _name_in_url(url: object) -> str:
    if not isinstance(url, str):
        return ""
    try:
        path = unquote(urlsplit(url).path)
    except ValueError:
        return ""
    return "/".join(part for part in path.split("/")[-_URL_PARTS:] if part not in ("", ".", ".."))


def _can_be_path(text: str) -> bool:
    """Returns False for text that names no file: with a NUL, or half of a surrogate pair, which JSON can hold."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False
