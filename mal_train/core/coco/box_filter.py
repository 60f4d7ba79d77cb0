"""Which boxes are trained on: the published rule, and ours."""

import math

from mal_train.core.coco.annotations import Annotation, Reason
from mal_train.core.masks.geometry import Box
from mal_train.core.settings import Compat


def tao_keeps(box_xywh: Box, image_wh: tuple[int, int], min_area: float, max_area: float) -> bool:
    """Whether the published data set keeps a box: inside its image, both sides over 2 px, area strictly between.

    Areas in px². Training uses (min_obj_size, max_obj_size), all else (0, 1e9); what it drops vanishes (§2.1).

    >>> tao_keeps((10, 10, 2.01, 30), (100, 80), 0, 1e9), tao_keeps((90, 70, 10.5, 5), (100, 80), 0, 1e9)
    (True, False)
    """
    return tao_refusal(box_xywh, image_wh, min_area, max_area) is None


def tao_refusal(box_xywh: Box, image_wh: tuple[int, int], min_area: float, max_area: float) -> Reason | None:
    """Why `tao_keeps` says no; None when it says yes."""
    x, y, w, h = box_xywh
    width, height = image_wh
    if not all(map(math.isfinite, box_xywh)):
        return Reason.BAD_BOX
    if x < 0 or y < 0 or x + w > width or y + h > height:
        return Reason.BOX_OUT_OF_BOUNDS
    if w <= 2 or h <= 2 or w * h <= min_area:
        return Reason.BOX_TOO_SMALL
    return Reason.BOX_TOO_LARGE if w * h >= max_area else None


def training_refusal(
    annotation: Annotation,
    clipped_box_xywh: Box | None,
    image_wh: tuple[int, int],
    *,
    min_area: float,
    max_area: float,
    compat: Compat,
) -> Reason | None:
    """Why a box is not trained on; None when it is. Crowd and rows with a problem never are.

    Under `tao` the published filter decides on the user's box. Else boxes are clipped instead of dropped: only the
    area of what lies inside the image counts, strictly between min_area and max_area, px².

    Args:
        annotation: the row.
        clipped_box_xywh: its box cut to the image (`geometry.check_box`); None where that refused it.
        image_wh: width and height of the image.
        min_area: exclusive lower bound, px².
        max_area: exclusive upper bound, px².
        compat: whose rule.
    """
    if annotation.reason is not None:
        return annotation.reason
    if annotation.iscrowd:
        return Reason.CROWD
    if compat is Compat.TAO:
        return tao_refusal(annotation.box_xywh, image_wh, min_area, max_area)
    if clipped_box_xywh is None:
        return Reason.BAD_BOX
    area = clipped_box_xywh[2] * clipped_box_xywh[3]
    if area <= min_area:
        return Reason.BOX_TOO_SMALL
    return Reason.BOX_TOO_LARGE if area >= max_area else None
