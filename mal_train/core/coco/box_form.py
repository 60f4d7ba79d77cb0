"""Recognizes boxes that are not x, y, width, height in px: corners, or shares of the image.

Only what all boxes of a file have in common shows it, so no single box is refused for it.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from mal_train.core.coco.annotations import Annotation, ImageInfo, JsonId, is_id, row_name
from mal_train.core.coco.fields import box_of
from mal_train.core.coco.json_values import as_json
from mal_train.core.errors import BadDataset
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


def likely_form(boxes: NDArray[np.float64], sizes_wh: NDArray[np.float64]) -> tuple[BoxForm, str]:
    """Returns the form that the boxes of a file have, as far as they show it, and a sentence for another form.

    Args:
        boxes: (N, 4), four numbers of each `bbox`; finite.
        sizes_wh: (N, 2), width and height of their images in px; NaN where unknown.
    """
    if not len(boxes):
        return BoxForm.XYWH, ""
    remedy = "convert them with mal-client convert --from coco --box-form"
    is_share = np.all((boxes >= 0) & (boxes <= 1), axis=1) & np.any(boxes != np.rint(boxes), axis=1)
    if is_share.mean() >= COMMON:
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


def to_xywh(row: Any, form: BoxForm, images: Mapping[JsonId, ImageInfo]) -> Any:
    """Returns a row with its box as x, y, width, height in px; unchanged if it has no box of four numbers.

    >>> to_xywh({"bbox": [10, 20, 30, 60]}, BoxForm.CORNERS, {})
    {'bbox': [10.0, 20.0, 20.0, 40.0]}

    Raises:
        BadDataset: a share of an image whose row does not state its size.
    """
    if not isinstance(row, dict) or form is BoxForm.XYWH:
        return row
    (x, y, w, h), error = box_of(row)
    if error is not None:
        return row
    if form is BoxForm.CORNERS:
        return {**row, "bbox": [x, y, w - x, h - y]}
    image_id = row.get("image_id")
    size_wh = images[image_id].size_wh if is_id(image_id) and image_id in images else None
    if size_wh is None:
        name = row_name(row.get("id"))
        raise BadDataset(f"{name}: shares need the width and height of image {as_json(image_id)}; add them to its row")
    width, height = size_wh
    return {**row, "bbox": [x * width, y * height, w * width, h * height]}


def misfit(row: Any, form: BoxForm) -> str | None:
    """Returns what is wrong with the numbers of a row's box if they have this form; None if nothing is.

    A row without a box of four numbers is not judged.

    >>> misfit({"id": 7, "bbox": [30, 20, 10, 60]}, BoxForm.CORNERS)
    'annotation 7: bbox [30, 20, 10, 60]; expected x_min, y_min, x_max, y_max, each maximum above its minimum'
    >>> misfit({"id": 7, "bbox": [30, 20, 10, 60]}, BoxForm.SHARES)
    'annotation 7: bbox [30, 20, 10, 60]; expected shares of the image: x, y >= 0, width, height > 0, sums up to 1'
    """
    if not isinstance(row, dict):
        return None
    box, error = box_of(row)
    if error is not None or has_form(box, form):
        return None
    name = f"{row_name(row.get('id'))}: bbox {as_json(row['bbox'])}"
    if form is BoxForm.CORNERS:
        return f"{name}; expected x_min, y_min, x_max, y_max, each maximum above its minimum"
    return f"{name}; expected shares of the image: x, y >= 0, width, height > 0, sums up to 1"


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
