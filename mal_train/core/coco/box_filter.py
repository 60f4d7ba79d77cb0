"""Selects the boxes to train on, by the published rule or by the rule of this project."""

import math

from mal_train.core.coco.annotations import Annotation, Reason
from mal_train.core.masks.geometry import Box
from mal_train.core.settings import Compat


def tao_keeps(box_xywh: Box, image_wh: tuple[int, int], min_area: float, max_area: float) -> bool:
    """Returns True if the published data set keeps a box: inside its image, sides above 2 px, area within the bounds.

    Bounds are exclusive, in px². Training uses (min_obj_size, max_obj_size), everything else (0, 1e9); the published
    data set discards other boxes silently (§2.1).

    >>> tao_keeps((10, 10, 2.01, 30), (100, 80), 0, 1e9), tao_keeps((90, 70, 10.5, 5), (100, 80), 0, 1e9)
    (True, False)
    """
    return tao_exclusion(box_xywh, image_wh, min_area, max_area) is None


def tao_exclusion(box_xywh: Box, image_wh: tuple[int, int], min_area: float, max_area: float) -> Reason | None:
    """Returns the reason for which the published data set discards a box; None if it keeps the box."""
    x, y, w, h = box_xywh
    width, height = image_wh
    if not all(map(math.isfinite, box_xywh)):
        return Reason.BAD_BOX
    if x < 0 or y < 0 or x + w > width or y + h > height:
        return Reason.BOX_OUT_OF_BOUNDS
    if w <= 2 or h <= 2 or w * h <= min_area:
        return Reason.BOX_TOO_SMALL
    return Reason.BOX_TOO_LARGE if w * h >= max_area else None


def training_exclusion(
    annotation: Annotation,
    clipped_box_xywh: Box | None,
    image_wh: tuple[int, int],
    *,
    min_area: float,
    max_area: float,
    compat: Compat,
) -> Reason | None:
    """Returns the reason for which a box is not trained on; None if it is. Always excludes crowd and invalid rows.

    Under `tao` the published filter is applied to the user's box. Otherwise boxes are clipped instead of discarded, and
    the area inside the image must lie within the bounds.

    Args:
        annotation: the row.
        clipped_box_xywh: its box clipped to the image by `geometry.check_box`; None if that raised BadBox.
        image_wh: width and height of the image.
        min_area: exclusive lower bound in px².
        max_area: exclusive upper bound in px².
        compat: rule to apply.
    """
    if annotation.reason is not None:
        return annotation.reason
    if annotation.iscrowd:
        return Reason.CROWD
    if compat is Compat.TAO:
        return tao_exclusion(annotation.box_xywh, image_wh, min_area, max_area)
    if clipped_box_xywh is None:
        return Reason.BAD_BOX
    area = clipped_box_xywh[2] * clipped_box_xywh[3]
    if area <= min_area:
        return Reason.BOX_TOO_SMALL
    return Reason.BOX_TOO_LARGE if area >= max_area else None
