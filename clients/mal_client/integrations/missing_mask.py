"""Explains why a label has no mask to show; for annotation tools that have no empty masks."""

from mal_client.types import BoxLabel


def missing_mask_reason(label: BoxLabel) -> str | None:
    """Returns the error of a label, or that its mask is empty; None if the mask has pixels."""
    if label.error is not None:
        return str(label.error)
    return None if label.area and label.rle is not None else "mask is empty: no pixel of the box reached the threshold"
