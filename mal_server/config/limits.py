"""Section `limits` of the server's settings: bounds of one request."""

from pydantic import Field

from mal_train.core.images.header import DEFAULT_LIMITS, MAX_PIXELS, ImageLimits
from mal_train.core.yaml_config import Strict

MIB = 1024 * 1024
PIB = 1024**5
"""Upper bound of settings in bytes, beyond the memory of any machine."""
MESSAGE_OVERHEAD = 64 * 1024
"""Bytes of a request reserved for boxes and options; the rest is the limit of its encoded image."""

MAX_CATEGORIES = 10_000
"""Categories of a served model, and of an evaluation, whose report has a row for each."""
MAX_CATEGORY_CHARS = 1000
"""Characters in the name of a category; all of them must fit into a message."""


class Limits(Strict):
    """Bounds of one request; clients read them from GetServerInfo."""

    max_request_bytes: int = Field(
        default=32 * MIB, ge=MIB, le=1024 * MIB, description="Largest message from a client, in bytes."
    )
    max_response_bytes: int = Field(
        default=64 * MIB, ge=MIB, le=1024 * MIB, description="Largest message to a client, in bytes."
    )
    max_boxes: int = Field(default=1000, ge=1, le=100_000, description="Boxes of one image.")
    max_pixels: int = Field(
        default=DEFAULT_LIMITS.max_pixels, ge=1, le=MAX_PIXELS, description="Width times height of one image."
    )
    max_side: int = Field(
        default=DEFAULT_LIMITS.max_side, ge=1, le=100_000, description="Width and height of one image, in px."
    )
    max_items_in_flight: int = Field(
        default=8,
        ge=1,
        le=1024,
        description="Images of one bulk or evaluation stream that are processed at once; the server reads the next one "
        "after\none has finished.",
    )

    def images(self) -> ImageLimits:
        """Returns the limits of the image decoder."""
        return ImageLimits(self.max_request_bytes - MESSAGE_OVERHEAD, self.max_pixels, self.max_side)
