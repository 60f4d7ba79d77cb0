"""Joins the shapes of an annotation tool to objects: a box and the mask that was made of it are one annotation.

Tools store both as shapes of their own. Shapes with a common key are one object. Of the rest, a box and a mask of the
same class are one object if the IoU of the box and the tight box of the mask is PAIR_IOU or more; the pairs with the
highest IoU are joined first.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from pycocotools import mask as coco_mask

from mal_client.formats.boxes import BAD_ROW, BoxRecord, RowError
from mal_client.types import BoxXywh
from mal_train.core.errors import BadDataset
from mal_train.core.masks.rle import Rle, area, from_segmentation, to_box

PAIR_IOU: Final = 0.5


@dataclass(frozen=True)
class Shape:
    """A box, a polygon or a mask on an image; one of the three.

    Attributes:
        where: file and shape, for messages.
        category: name of its class.
        key: equal for shapes of one object; None for a shape of its own.
        box: x, y, width, height in px.
        polygon: x0, y0, x1, y1, … in px.
        rle: mask of the whole image.
        is_made: a tool made the shape, nobody drew it.
        corners: x0, y0, … x3, y3 of a rotated box, of which `box` is the upright box around it; empty otherwise.
        extra: additional fields of the COCO row; an object has those of its first shape that has any.
    """

    where: str
    category: str
    key: Hashable = None
    box: BoxXywh | None = None
    polygon: tuple[float, ...] = ()
    rle: Rle | None = None
    corners: tuple[float, ...] = ()
    is_made: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)


def to_records(
    shapes: Iterable[Shape | RowError], file_name: str, size_wh: tuple[int, int]
) -> Iterator[BoxRecord | RowError]:
    """Yields an object for each group of shapes of one image, in the order of their first shapes.

    Args:
        shapes: of the image, and the errors of their reader.
        file_name: the image.
        size_wh: width and height of the image in px, as the tool states them.
    """
    found: list[Shape] = []
    for shape in shapes:
        if isinstance(shape, RowError):
            yield shape
        else:
            found.append(shape)
    for group in _objects(_without_tight_boxes(found)):
        try:
            yield _record(group, file_name, size_wh)
        except BadDataset as error:
            yield from _errors(group, size_wh, str(error))


def _without_tight_boxes(shapes: Sequence[Shape]) -> list[Shape]:
    """Returns the shapes without the boxes that a tool made of a mask: a mask alone gets its tight box."""
    tight = {to_box(shape.rle) for shape in shapes if shape.rle is not None}
    return [shape for shape in shapes if not (shape.is_made and shape.box in tight)]


def _objects(shapes: Sequence[Shape]) -> list[list[Shape]]:
    """Returns the shapes of each object."""
    by_key: dict[Hashable, list[Shape]] = {}
    for index, shape in enumerate(shapes):
        by_key.setdefault(("shape", index) if shape.key is None else ("key", shape.key), []).append(shape)
    groups: list[list[Shape]] = []
    for group in by_key.values():
        is_object = sum(shape.box is not None for shape in group) <= 1 and len({s.category for s in group}) == 1
        groups += [group] if is_object else [[shape] for shape in group]
    return _with_pairs(groups)


def _with_pairs(groups: list[list[Shape]]) -> list[list[Shape]]:
    """Joins the groups that have only a box with those that have only a mask."""
    boxes = [(index, shape.box) for index, (shape, *more) in enumerate(groups) if shape.box is not None and not more]
    alone = ((index, tight_box(group)) for index, group in enumerate(groups) if not any(s.box for s in group))
    masks = [(index, box) for index, box in alone if box is not None]
    tight = np.array([box for _, box in masks], dtype=np.float64).reshape(-1, 4)
    pairs: list[tuple[float, int, int]] = []
    for first, box in boxes:  # one at a time: all IoUs of an image with thousands of objects take gigabytes
        (ious,) = coco_mask.iou(np.array([box], dtype=np.float64), tight, [0] * len(tight)) if len(tight) else ([],)
        for index in np.flatnonzero(np.asarray(ious) >= PAIR_IOU).tolist():
            second = masks[index][0]
            if groups[first][0].category == groups[second][0].category:
                pairs.append((-float(ious[index]), first, second))
    joined: set[int] = set()
    for _, first, second in sorted(pairs):
        if not {first, second} & joined:
            joined |= {first, second}
            groups[min(first, second)] = [*groups[first], *groups[second]]
            groups[max(first, second)] = []
    return [group for group in groups if group]


def tight_box(group: Sequence[Shape]) -> BoxXywh | None:
    """Returns the tight box of the masks and polygons of a group; None without a pixel."""
    bounds = []
    for shape in group:
        if shape.rle is not None and (tight := to_box(shape.rle)) is not None:
            bounds.append((tight[0], tight[1], tight[0] + tight[2], tight[1] + tight[3]))
        elif shape.polygon:
            xs, ys = shape.polygon[0::2], shape.polygon[1::2]
            bounds.append((min(xs), min(ys), max(xs), max(ys)))
    if not bounds:
        return None
    x0, y0, x1, y1 = zip(*bounds, strict=True)
    return (min(x0), min(y0), max(x1) - min(x0), max(y1) - min(y0))


def _errors(group: Sequence[Shape], size_wh: tuple[int, int], text: str) -> Iterator[RowError]:
    """Yields an error for each shape of an object: its own, or that of the shape which keeps the object out."""
    problems = {shape.where: problem for shape in group if (problem := _problem(shape, size_wh)) is not None}
    problems = problems or {group[0].where: text}
    cause = next(iter(problems))
    for where in dict.fromkeys(shape.where for shape in group):
        problem = problems.get(where, f"is one object with {cause}, which cannot be read")
        yield RowError(where, BAD_ROW, f"{where}: {problem}")


def _problem(shape: Shape, size_wh: tuple[int, int]) -> str | None:
    """Returns what keeps the outline or the mask of a shape from being one; None for a box."""
    if shape.box is not None:
        return None
    kind = "polygon" if shape.polygon else "mask"
    try:
        return None if _pixels(_segmentation([shape], size_wh), size_wh, kind) else f"{kind} has no pixel of the image"
    except BadDataset as error:
        return str(error)


def _pixels(segmentation: Any, size_wh: tuple[int, int], name: str = "mask") -> int:
    return area(from_segmentation(segmentation, size_wh[1], size_wh[0], name))


def _record(group: Sequence[Shape], file_name: str, size_wh: tuple[int, int]) -> BoxRecord:
    """Returns the object of a group of shapes. Raises BadDataset if its mask cannot be read or has no pixel."""
    first = group[0]
    drawn = next((shape for shape in group if shape.box is not None), first)
    box = drawn.box or tight_box(group)
    segmentation = _segmentation(group, size_wh)
    pixels = 0 if segmentation is None else _pixels(segmentation, size_wh)
    if box is None or (segmentation is not None and not pixels):
        raise BadDataset("mask has no pixel of the image")
    x, y, w, h = box
    extra = next((shape.extra for shape in group if shape.extra), {})
    return BoxRecord(
        first.where,
        file_name,
        first.category,
        (x, y, x + w, y + h),
        stated_wh=size_wh,
        is_displayed=True,
        segmentation=segmentation,
        corners=drawn.corners,
        extra={**extra, **({} if segmentation is None else {"area": pixels})},
    )


def _segmentation(group: Sequence[Shape], size_wh: tuple[int, int]) -> Any:
    """Returns the `segmentation` of COCO: polygons if there are no masks, else the run-length code of all."""
    polygons = [list(shape.polygon) for shape in group if shape.polygon]
    masks = [shape.rle for shape in group if shape.rle is not None]
    if not masks:
        return polygons or None
    width, height = size_wh
    if polygons:
        masks.append(from_segmentation(polygons, height, width, "polygon"))
    if len(masks) == 1:
        return masks[0].to_coco()
    merged = coco_mask.merge([rle.packed() for rle in masks], intersect=False)
    return Rle(height, width, merged["counts"]).to_coco()
