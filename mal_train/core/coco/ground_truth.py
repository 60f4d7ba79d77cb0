"""Reads the ground-truth masks of COCO rows; the only rule for which of them are compared."""

from collections.abc import Mapping
from typing import Any, Final

from mal_train.core.coco.annotations import Reason
from mal_train.core.coco.fields import has_segmentation
from mal_train.core.errors import BadDataset, BadGroundTruth
from mal_train.core.masks import rle

NO_SEGMENTATION: Final = "has no segmentation; give a file with true masks"
"""Message on a row without a mask to compare with."""


def read_ground_truth(row: Mapping[str, Any], image_hw: tuple[int, int] | None, name: str) -> rle.Rle:
    """Returns the mask of a row of `annotations`, which has at least one pixel.

    Args:
        row: the row; its `segmentation` is read as by `rle.from_segmentation`.
        image_hw: height and width of the image in px; None if unknown: that of the run-length code.
        name: begins the message of an error.

    Raises:
        BadGroundTruth: the row has no mask (reason NO_GROUND_TRUTH), one that cannot be read (BAD_GROUND_TRUTH), or one
            without a pixel of the image (EMPTY_GROUND_TRUTH), with which every mask has an IoU of 0.
    """
    if not has_segmentation(row):
        raise BadGroundTruth(f"{name}: {NO_SEGMENTATION}", Reason.NO_GROUND_TRUTH)
    try:
        mask = _read(row["segmentation"], image_hw, name)
    except BadDataset as error:
        raise BadGroundTruth(str(error), Reason.BAD_GROUND_TRUTH) from None
    if not rle.area(mask):
        raise BadGroundTruth(
            f"{name}: no foreground pixel inside the image of {mask.width}x{mask.height} px; correct the segmentation, "
            "or remove it",
            Reason.EMPTY_GROUND_TRUTH,
        )
    return mask


def _read(segmentation: Any, image_hw: tuple[int, int] | None, name: str) -> rle.Rle:
    if image_hw is not None:
        return rle.from_segmentation(segmentation, *image_hw, name)
    if isinstance(segmentation, dict):
        return rle.Rle.from_coco(segmentation, name)
    raise BadDataset(f"{name}: polygons need the width and height of their image")
