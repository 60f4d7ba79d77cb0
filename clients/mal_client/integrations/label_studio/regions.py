"""Converts Label Studio's regions: rectangles and key points in percent to pixels, masks to brush or polygon regions.

Label Studio measures in percent of the displayed image. If that differs from the stored image (EXIF orientation, a
rotated view, a rotated rectangle), the box would be misplaced, so such a rectangle is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from mal_client.integrations.label_studio.brush import encode_brush
from mal_client.integrations.label_studio.label_config import BOXES, NEGATIVE, POSITIVE, Control
from mal_client.types import BoxLabel, BoxXywh, Point
from mal_train.core.coco.fields import UPRIGHT_PX, corner_shift
from mal_train.core.errors import BadBox, BadImage
from mal_train.core.images.container import ImageHeader
from mal_train.core.masks.polygons import merge_holes

if TYPE_CHECKING:
    from numpy.typing import NDArray

DIGITS: Final = 6
"""Decimals that pixel coordinates are rounded to, so that the conversion from percent keeps integers and halves."""

MAX_NAME_CHARS: Final = 200

MAX_NUMBER: Final = 1e9
"""Limit of positions and angles, far beyond every image."""

MAX_SIDE_PX: Final = 1_000_000

LOCAL_FILES: Final = "/data/local-files/"
"""Path in the URLs of Label Studio's local files, whose query names the file."""

MIN_POINTS: Final = 3
"""Points of a polygon with an area."""

_BOX_END: Final = "-box"

Json = dict[str, Any]


@dataclass(frozen=True)
class Rectangle:
    """A rectangle that a user drew.

    Attributes:
        id: ID of its region.
        from_name: name of the control that drew it.
        to_name: name of its image.
        labels: its classes.
        box: x, y, width, height in px of the stored image.
        size_wh: size of the image in px, according to Label Studio.
    """

    id: str
    from_name: str
    to_name: str
    labels: tuple[str, ...]
    box: BoxXywh
    size_wh: tuple[int, int]


def name_of(value: Any) -> str:
    """Returns the text of an ID or a name of a request, for messages and results: a text or a number of some length."""
    is_named = isinstance(value, str | int) and not isinstance(value, bool)
    return str(value)[:MAX_NAME_CHARS] if is_named else "?"


def is_rectangle(region: Mapping[str, Any]) -> bool:
    """Returns True for a rectangle of any control."""
    return region.get("type") in BOXES.values()


@dataclass(frozen=True)
class Frame:
    """The part of a region that does not depend on its type.

    Attributes:
        name: the region, for messages.
        value: its value.
        size_wh: size of the image in px, according to Label Studio.
    """

    name: str
    value: Mapping[str, Any]
    size_wh: tuple[int, int]


def read_frame(region: Mapping[str, Any]) -> Frame:
    """Reads what all regions on an image have.

    Raises:
        BadBox: the view of the image is rotated, or a value is missing.
    """
    name = f"region {name_of(region.get('id'))!r}"
    value = region.get("value")
    if not isinstance(value, Mapping):
        raise BadBox(f"{name}: value is missing")
    width, height = (_side(region.get(key), f"{name}: {key}") for key in ("original_width", "original_height"))
    view_rotation = _number(region.get("image_rotation") or 0, f"{name}: image_rotation")
    if view_rotation % 360:
        raise BadBox(f"{name}: image_rotation is {view_rotation:g} degrees; reset the view and draw it again")
    return Frame(name, value, (width, height))


def read_rectangle(region: Mapping[str, Any]) -> Rectangle:
    """Reads the rectangle of a region.

    Raises:
        BadBox: the rectangle or the view of the image is rotated, or a value is missing.
    """
    frame = read_frame(region)
    name, value = frame.name, frame.value
    x, y, w, h = (_number(value.get(key), f"{name}: {key}") for key in ("x", "y", "width", "height"))
    rotation = _number(value.get("rotation") or 0, f"{name}: rotation")
    box = percent_to_box((x, y, w, h), frame.size_wh)
    # Label Studio turns a rectangle about its first corner.
    if corner_shift(math.hypot(*box[2:]), math.remainder(rotation, 360)) > UPRIGHT_PX:
        raise BadBox(f"{name}: rotation is {rotation:g} degrees; draw the rectangle without rotation")
    return Rectangle(
        id=name_of(region.get("id")),
        from_name=name_of(region.get("from_name")),
        to_name=name_of(region.get("to_name")),
        labels=read_labels(region, frame),
        box=box,
        size_wh=frame.size_wh,
    )


@dataclass(frozen=True)
class KeyPoint:
    """A key point that corrects the mask of a rectangle.

    Attributes:
        name: its region, for messages.
        to_name: name of its image.
        point: in px of the stored image.
    """

    name: str
    to_name: str
    point: Point


def read_key_point(region: Mapping[str, Any]) -> KeyPoint:
    """Reads the key point of a region of a control in `LabelConfig.points`.

    Raises:
        BadBox: the view of the image is rotated, or a value is missing or none of the two labels.
    """
    frame = read_frame(region)
    x, y = (_number(frame.value.get(key), f"{frame.name}: {key}") for key in ("x", "y"))
    labels = [label.casefold() for label in read_labels(region, frame)]
    if labels not in ([POSITIVE], [NEGATIVE]):
        raise BadBox(f"{frame.name}: labels are {', '.join(labels) or 'missing'}; expected {POSITIVE} or {NEGATIVE}")
    x, y, _, _ = percent_to_box((x, y, 0.0, 0.0), frame.size_wh)
    return KeyPoint(frame.name, name_of(region.get("to_name")), Point(x, y, is_positive=labels == [POSITIVE]))


def smallest_around(point: Point, boxes: NDArray[np.float64]) -> int | None:
    """Returns the index of the smallest box that contains a point; None if there is none.

    >>> smallest_around(Point(3, 3, is_positive=True), np.float64([(0, 0, 9, 9), (2, 2, 4, 4), (5, 5, 1, 1)]))
    1

    Args:
        point: in px of the image.
        boxes: (N, 4) x, y, width, height in px.
    """
    x, y, w, h = boxes.T
    contains = (x <= point.x) & (point.x < x + w) & (y <= point.y) & (point.y < y + h)
    return int(np.argmin(np.where(contains, w * h, np.inf))) if contains.any() else None


def read_labels(region: Mapping[str, Any], frame: Frame) -> tuple[str, ...]:
    """Returns the classes of a region. Raises BadBox if they are not texts."""
    labels = frame.value.get(str(region.get("type"))) or frame.value.get("labels") or []
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise BadBox(f"{frame.name}: labels are not a list of texts")
    return tuple(labels)


def read_polygon(frame: Frame) -> tuple[float, ...]:
    """Returns the outline of a polygon region: x0, y0, x1, y1, … in px.

    Raises:
        BadBox: it has fewer than three points, or one that is not a pair of finite numbers.
    """
    points = frame.value.get("points")
    if not isinstance(points, list) or len(points) < MIN_POINTS:
        raise BadBox(f"{frame.name}: points of a polygon are missing; expected {MIN_POINTS} or more")
    width, height = frame.size_wh
    outline: list[float] = []
    for point in points:
        if not isinstance(point, list) or len(point) != 2:
            raise BadBox(f"{frame.name}: a point is {_shown(point)}; expected x and y")
        x, y = (_number(value, f"{frame.name}: a point") for value in point)
        outline += (round(x * width / 100.0, DIGITS), round(y * height / 100.0, DIGITS))
    return tuple(outline)


def check_image(rectangle: Rectangle, header: ImageHeader) -> None:
    """Raises BadImage if the browser displayed the image with another size or orientation than the stored one."""
    if header.orientation != 1:
        raise BadImage(
            f"EXIF orientation {header.orientation}: browsers rotate the image, but masks refer to the stored pixels; "
            "store it upright without the tag",
            "IMAGE_SIZE_MISMATCH",
        )
    if rectangle.size_wh != header.size_wh:
        (displayed_w, displayed_h), (width, height) = rectangle.size_wh, header.size_wh
        raise BadImage(
            f"Label Studio displayed {displayed_w}x{displayed_h} px, but the stored image has {width}x{height} px; "
            "reload the task",
            "IMAGE_SIZE_MISMATCH",
        )


def percent_to_box(percent: BoxXywh, size_wh: tuple[int, int]) -> BoxXywh:
    """Converts a rectangle in percent of its image to x, y, width, height in px.

    >>> percent_to_box((25.0, 50.0, 12.5, 10.0), (640, 480))
    (160.0, 240.0, 80.0, 48.0)
    """
    x, y, w, h = (round(v * side / 100.0, DIGITS) for v, side in zip(percent, 2 * size_wh, strict=True))
    return x, y, w, h


def box_to_percent(box: BoxXywh, size_wh: tuple[int, int]) -> BoxXywh:
    """Inverts `percent_to_box`."""
    x, y, w, h = (v * 100.0 / side for v, side in zip(box, 2 * size_wh, strict=True))
    return x, y, w, h


def mask_id(region_id: str) -> str:
    """Returns the ID of the mask of a rectangle."""
    return f"{region_id}-mask"


def box_id(region_id: str) -> str:
    """Returns the ID of the tight box of the mask of a rectangle."""
    return f"{region_id}{_BOX_END}"


def rectangle_id(region: Mapping[str, Any]) -> str | None:
    """Returns the ID of the rectangle whose mask has this tight box; None for a region of another ID."""
    name = name_of(region.get("id"))
    return name.removesuffix(_BOX_END) if name.endswith(_BOX_END) else None


def newest(annotations: Iterable[Json]) -> Json:
    """Returns the annotation or prediction of a task that was changed last."""
    return max(annotations, key=lambda row: str(row.get("updated_at") or row.get("created_at")))


def mask_regions(
    label: BoxLabel, control: Control, labels: tuple[str, ...], region_id: str, tolerance_px: float
) -> list[Json]:
    """Converts a mask to regions of a control: one brush region, or a polygon for each connected component.

    Args:
        label: a label with a mask.
        control: a control with regions of type brushlabels or polygonlabels.
        labels: classes of the regions.
        region_id: ID of the region; further components append a number to it.
        tolerance_px: largest distance between a polygon and the edge of the mask. Holes are joined to their outline by
            a bridge, because Label Studio's polygons have no holes.
    """
    assert label.rle is not None
    if control.region_type == "brushlabels":
        values: list[Json] = [{"format": "rle", "rle": encode_brush(label.rle)}]
    else:
        size = np.array([label.rle.width, label.rle.height])
        outlines = merge_holes(label.to_polygons(tolerance_px))
        values = [{"points": (outline * 100.0 / size).tolist(), "closed": True} for outline in outlines]
    classes = {control.region_type: list(labels)}
    return [
        _region(label, control, f"{region_id}-{number}" if number else region_id, value | classes)
        for number, value in enumerate(values)
    ]


def tight_box_region(label: BoxLabel, rectangle: Rectangle, control: Control) -> Json:
    """Converts the tight box of a mask, which has pixels, to a region like the rectangle that it was made of."""
    assert label.mask_box is not None
    x, y, w, h = box_to_percent(label.mask_box, rectangle.size_wh)
    value = {"x": x, "y": y, "width": w, "height": h, "rotation": 0}
    classes = {control.region_type: list(rectangle.labels)} if rectangle.labels else {}
    return _region(label, control, box_id(rectangle.id), value | classes)


def _region(label: BoxLabel, control: Control, region_id: str, value: Json) -> Json:
    assert label.rle is not None
    return {
        "id": region_id,
        "from_name": control.name,
        "to_name": control.to_name,
        "type": control.region_type,
        "origin": "prediction",
        "original_width": label.rle.width,
        "original_height": label.rle.height,
        "image_rotation": 0,
        "score": label.score,
        "value": value,
        **({"meta": {"text": [", ".join(label.flags)]}} if label.flags else {}),
    }


def _side(value: object, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_SIDE_PX:
        raise BadBox(f"{name} is {_shown(value)}; expected the size of the image in px, from 1 to {MAX_SIDE_PX}")
    return value


def _number(value: object, name: str) -> float:
    # Compared before it becomes a float: an integer of JSON has any number of digits.
    if isinstance(value, int | float) and not isinstance(value, bool) and -MAX_NUMBER <= value <= MAX_NUMBER:
        return float(value)
    raise BadBox(f"{name} is {_shown(value)}; expected a finite number")


def _shown(value: object) -> str:
    """Returns a value of a request for a message; of a list or an object only its type."""
    is_short = value is None or isinstance(value, str | int | float)
    return repr(value)[:MAX_NAME_CHARS] if is_short else type(value).__name__
