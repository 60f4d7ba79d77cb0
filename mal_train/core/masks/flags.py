"""Flags of a mask: properties that a reviewer should check. On the wire: `MaskFlag`, with the prefix MASK_FLAG_."""

from enum import StrEnum


class Flag(StrEnum):
    """Property of a mask that a reviewer should check; the value is written to labeled files."""

    BOX_CLIPPED = "BOX_CLIPPED"
    EMPTY_MASK = "EMPTY_MASK"
    FULL_BOX = "FULL_BOX"
    TOO_SMALL = "TOO_SMALL"
    LOW_AGREEMENT = "LOW_AGREEMENT"
    MULTI_PART = "MULTI_PART"
    DOMINATED = "DOMINATED"


FLAG_DESCRIPTIONS: dict[Flag, str] = {
    Flag.BOX_CLIPPED: "the box was clipped to the image",
    Flag.EMPTY_MASK: "no pixel reached the threshold",
    Flag.FULL_BOX: "the mask fills its box: the object was hardly separated from its surroundings",
    Flag.TOO_SMALL: "a side of the box is at most 2 px; the mask is little more than a guess",
    Flag.LOW_AGREEMENT: "the masks of student and teacher differ",
    Flag.MULTI_PART: "the mask has several parts",
    Flag.DOMINATED: "other boxes have the stronger claim to much of the mask: it may show one of their objects",
}
"""Meaning of each flag, as text for users."""
