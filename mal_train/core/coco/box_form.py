"""Recognizes boxes that are not x, y, width, height in px: corners, or shares of the image.

Only what all boxes of a file have in common shows it, so no single box is refused for it.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mal_train.core.coco.annotations import Annotation, ImageInfo, JsonId, Reason, is_id, row_name
from mal_train.core.coco.fields import box_of, has_segmentation
from mal_train.core.coco.json_values import as_json, json_type
from mal_train.core.numbers import counted
from mal_train.core.settings import BoxForm

SUSPICIOUS: Final = 0.2
"""Share of the boxes that must extend beyond their images before corners are suggested."""
COMMON: Final = 0.95
"""Share of the boxes that must be possible in the other form."""
ROUNDING_PX: Final = 1.0
"""Distance by which a corner may lie beyond its image."""

SHARE_ROUNDING: Final = 0.01
"""Amount by which a box in shares may extend beyond its image."""

_RULES: Final = {
    BoxForm.XYWH: "four finite numbers x, y, width, height in px",
    BoxForm.CORNERS: "numbers x_min, y_min, x_max, y_max in px, each maximum above its minimum",
    BoxForm.SHARES: "numbers that are shares of the image: x, y >= 0, width, height > 0, sums up to 1",
}
"""The rule that the numbers of each form obey, for messages."""


def likely_form(boxes: NDArray[np.float64], sizes_wh: NDArray[np.float64]) -> tuple[BoxForm, str]:
    """Returns the form that the boxes of a file have, as far as they show it, and a sentence for another form.

    Args:
        boxes: (N, 4), four numbers of each `bbox`; finite.
        sizes_wh: (N, 2), width and height of their images in px; NaN where unknown.
    """
    if not len(boxes):
        return BoxForm.XYWH, ""
    remedy = "convert them with mal-client convert --from coco --box-form"
    is_share = np.all((boxes >= -SHARE_ROUNDING) & (boxes <= 1 + SHARE_ROUNDING), axis=1)
    # A box of whole numbers such as 0, 0, 1, 1 may be a pixel; beside fractions, it is the complete image.
    if is_share.mean() >= COMMON and np.any(boxes[is_share] % 1):
        count = f"{is_share.sum()} of {counted(len(boxes), 'box')}"
        text = f"{count} with numbers from 0 to 1 only: shares of the image, not pixels"
        return BoxForm.SHARES, f"{text}; {remedy} {BoxForm.SHARES}"
    known = ~np.isnan(sizes_wh).any(axis=1)
    first, second, limit = boxes[known, :2], boxes[known, 2:], sizes_wh[known] + ROUNDING_PX
    if not len(limit):
        return BoxForm.XYWH, ""
    is_beyond = np.any(first + second > limit, axis=1)
    fits = np.all((second > first) & (second <= limit), axis=1)
    if is_beyond.mean() >= SUSPICIOUS and fits.mean() >= COMMON and fits[is_beyond].all():
        text = (
            f"{is_beyond.sum()} of {counted(len(limit), 'box')} would extend beyond the image, and {fits.sum()} would "
            "fit as corners x_min, y_min, x_max, y_max"
        )
        return BoxForm.CORNERS, f"{text}; if they are, {remedy} {BoxForm.CORNERS}"
    return BoxForm.XYWH, ""


@dataclass(frozen=True)
class Misfit:
    """A row whose box does not have the stated form.

    Attributes:
        name: the row.
        reason: machine-readable reason.
        problem: the value, the rule and the remedy.
    """

    name: str
    reason: Reason
    problem: str


def to_xywh(row: Any, index: int, form: BoxForm, images: Mapping[JsonId, ImageInfo]) -> dict[str, Any] | Misfit:
    """Returns a row with its box as x, y, width, height in px, or what keeps its box from having the form.

    The `area` of a row without a mask is that of its box, and becomes that of the converted one.

    >>> to_xywh({"bbox": [10, 20, 30, 60], "area": 1800}, 0, BoxForm.CORNERS, {})
    {'bbox': [10.0, 20.0, 20.0, 40.0], 'area': 800.0}
    >>> to_xywh({"id": 7, "bbox": [30, 20, 10, 60]}, 0, BoxForm.CORNERS, {}).problem
    'bbox [30, 20, 10, 60]; expected numbers x_min, y_min, x_max, y_max in px, each maximum above its minimum'

    Args:
        row: JSON value of the row.
        index: its index in `annotations`.
        form: the form of its box.
        images: images by id; their sizes are needed for shares.
    """
    row_id = row.get("id") if isinstance(row, dict) else None
    misfit = partial(Misfit, row_name(row_id) if is_id(row_id) else f"annotations[{index}]")
    if not isinstance(row, dict):
        return misfit(Reason.NOT_AN_OBJECT, f"{json_type(row)}; it must be an object")
    box, error = box_of(row)
    if error is not None or not has_form(box, form):
        return misfit(Reason.BAD_BOX, f"bbox {as_json(row.get('bbox'))}; expected {_RULES[form]}")
    x, y, w, h = box
    if form is BoxForm.CORNERS:
        box = (x, y, w - x, h - y)
    elif form is BoxForm.SHARES:
        image_id = row.get("image_id")
        image = images.get(image_id) if is_id(image_id) else None
        if image is None:
            return misfit(
                Reason.IMAGE_UNKNOWN, f"image_id {as_json(image_id)}; expected the id of an image of the file"
            )
        if image.size_wh is None:
            rule = "shares need the width and height of their image; add them to its row"
            return misfit(Reason.IMAGE_UNUSABLE, f"image {as_json(image_id)} states no size; {rule}")
        width, height = image.size_wh
        box = (x * width, y * height, w * width, h * height)
    area = box[2] * box[3]
    if not math.isfinite(area):
        return misfit(Reason.BAD_BOX, f"bbox {as_json(row['bbox'])}; its numbers are too large for an area")
    return {**row, "bbox": list(box), **({"area": area} if "area" in row and not has_segmentation(row) else {})}


def has_form(box: tuple[float, float, float, float], form: BoxForm) -> bool:
    """Returns True if four numbers can be a box of a form; those of COCO's form depend on the image."""
    if form is BoxForm.CORNERS:
        return box[2] > box[0] and box[3] > box[1]
    return form is BoxForm.XYWH or _are_shares(*box)


def _are_shares(x: float, y: float, w: float, h: float) -> bool:
    return min(x, y) >= -SHARE_ROUNDING and min(w, h) > 0 and max(x + w, y + h) <= 1 + SHARE_ROUNDING


def form_note(rows: Iterable[Annotation], images: Mapping[JsonId, ImageInfo]) -> str | None:
    """Returns a sentence if the boxes of rows have another form than COCO's; None otherwise."""
    boxes, sizes = [], []
    for row in rows:
        if row.problem is None and row.image_id is not None and not row.iscrowd:
            boxes.append(row.box_xywh)
            sizes.append(images[row.image_id].size_wh or (np.nan, np.nan))
    return likely_form(np.array(boxes, dtype=np.float64), np.array(sizes, dtype=np.float64))[1] or None
