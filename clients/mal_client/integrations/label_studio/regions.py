"""Label Studio's regions: rectangles in percent become boxes in pixels, masks become brush or polygon regions.

Label Studio measures in percent of what the browser shows. Where that is not what is stored (EXIF orientation, the
view turned by its own tool, a turned rectangle), a box would land somewhere else: such a rectangle is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from mal_client.integrations.label_studio.brush import encode_brush
from mal_client.integrations.label_studio.label_config import BOXES, Control
from mal_client.types import BoxLabel, BoxXywh
from mal_train.core.errors import BadBox, BadImage
from mal_train.core.masks.images import ImageHeader
from mal_train.core.masks.polygons import merge_holes

DIGITS: Final = 6
"""Decimals of a pixel that are kept: binary fractions of percents would miss whole and half pixels otherwise."""

Json = dict[str, Any]


@dataclass(frozen=True)
class Rectangle:
    """A rectangle that somebody drew.

    Attributes:
        id: of its region.
        from_name: the tool that drew it.
        to_name: the picture that it lies on.
        labels: its classes.
        box: x, y, width, height in px of the stored picture.
        size_wh: size in px that Label Studio took the picture to have.
    """

    id: str
    from_name: str
    to_name: str
    labels: tuple[str, ...]
    box: BoxXywh
    size_wh: tuple[int, int]


def is_rectangle(region: Mapping[str, Any]) -> bool:
    """Whether a region is a rectangle, of whatever tool."""
    return region.get("type") in BOXES.values()


def read_rectangle(region: Mapping[str, Any]) -> Rectangle:
    """The rectangle of a region.

    Raises:
        BadBox: turned, incomplete, or on a picture whose view is turned.
    """
    name = f"region {region.get('id')!r}"
    value = region.get("value")
    if not isinstance(value, Mapping):
        raise BadBox(f"{name}: holds no value")
    width, height = (_side(region.get(key), f"{name}: {key}") for key in ("original_width", "original_height"))
    x, y, w, h = (_number(value.get(key), f"{name}: {key}") for key in ("x", "y", "width", "height"))
    turned = _number(value.get("rotation") or 0, f"{name}: rotation")
    if turned % 360:
        raise BadBox(f"{name}: the rectangle is turned by {turned:g} degrees; draw it upright round the object")
    view = _number(region.get("image_rotation") or 0, f"{name}: image_rotation")
    if view % 360:
        raise BadBox(f"{name}: the picture is shown turned by {view:g} degrees; turn the view back and draw again")
    labels = value.get(str(region.get("type"))) or value.get("labels") or ()
    return Rectangle(
        id=str(region.get("id")),
        from_name=str(region.get("from_name")),
        to_name=str(region.get("to_name")),
        labels=tuple(str(label) for label in labels),
        box=box_of_percent((x, y, w, h), (width, height)),
        size_wh=(width, height),
    )


def check_picture(rectangle: Rectangle, header: ImageHeader) -> None:
    """Raises BadImage where the browser showed another frame than the one that is stored."""
    if header.orientation != 1:
        raise BadImage(
            f"the picture carries EXIF orientation {header.orientation}: browsers turn it, masks refer to stored "
            "pixels; store it upright without the tag",
            "IMAGE_SIZE_MISMATCH",
        )
    if rectangle.size_wh != header.size_wh:
        (shown_w, shown_h), (width, height) = rectangle.size_wh, header.size_wh
        raise BadImage(
            f"Label Studio took the picture for {shown_w}x{shown_h} px but it is stored as {width}x{height}; load the "
            "task again",
            "IMAGE_SIZE_MISMATCH",
        )


def box_of_percent(percent: BoxXywh, size_wh: tuple[int, int]) -> BoxXywh:
    """x, y, width, height in px of a rectangle in percent of its picture.

    >>> box_of_percent((25.0, 50.0, 12.5, 10.0), (640, 480))
    (160.0, 240.0, 80.0, 48.0)
    """
    x, y, w, h = (round(v * side / 100.0, DIGITS) for v, side in zip(percent, 2 * size_wh, strict=True))
    return x, y, w, h


def percent_of_box(box: BoxXywh, size_wh: tuple[int, int]) -> BoxXywh:
    """The inverse of `box_of_percent`."""
    x, y, w, h = (v * 100.0 / side for v, side in zip(box, 2 * size_wh, strict=True))
    return x, y, w, h


def mask_regions(
    label: BoxLabel, tool: Control, labels: tuple[str, ...], region_id: str, tolerance_px: float
) -> list[Json]:
    """A mask as regions of the tool that takes it: one brush region, or a polygon for each of its parts.

    Args:
        label: it must hold a mask.
        tool: of kind brushlabels or polygonlabels.
        labels: classes of the regions.
        region_id: of the region; further parts get a number behind it.
        tolerance_px: how far a polygon may run beside the mask's edge, to have fewer points. Holes are joined to their
            outline by a bridge, since Label Studio's polygons know none.
    """
    assert label.rle is not None
    if tool.kind == "brushlabels":
        values: list[Json] = [{"format": "rle", "rle": encode_brush(label.rle)}]
    else:
        size = np.array([label.rle.width, label.rle.height])
        lines = merge_holes(label.to_polygons(tolerance_px))
        values = [{"points": (line * 100.0 / size).tolist(), "closed": True} for line in lines]
    return [
        _region(label, tool, f"{region_id}-{part}" if part else region_id, value | {tool.kind: list(labels)})
        for part, value in enumerate(values)
    ]


def _region(label: BoxLabel, tool: Control, region_id: str, value: Json) -> Json:
    assert label.rle is not None
    return {
        "id": region_id,
        "from_name": tool.name,
        "to_name": tool.to_name,
        "type": tool.kind,
        "origin": "prediction",
        "original_width": label.rle.width,
        "original_height": label.rle.height,
        "image_rotation": 0,
        "score": label.score,
        "value": value,
        **({"meta": {"text": [", ".join(label.flags)]}} if label.flags else {}),
    }


def _side(value: object, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise BadBox(f"{name} is {value!r}; the size of the picture in px is needed, as Label Studio states it")
    return value


def _number(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadBox(f"{name} is {value!r}; a number is needed")
    return float(value)
