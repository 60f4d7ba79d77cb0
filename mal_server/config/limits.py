"""What a request must keep to: a section of the server's settings, and what of it the decoder of pictures is told."""

from pydantic import Field

from mal_train.core.masks.images import DEFAULT_LIMITS, ImageLimits
from mal_train.core.yaml_config import Strict

MIB = 1024 * 1024
MESSAGE_OVERHEAD = 64 * 1024
"""Bytes of a request that are kept for its boxes and options when the image limit is derived from the message limit."""


class Limits(Strict):
    """What a request must keep to; clients read it from GetServerInfo."""

    max_request_bytes: int = Field(
        default=32 * MIB, ge=MIB, le=1024 * MIB, description="Largest message from a client, in bytes."
    )
    max_response_bytes: int = Field(
        default=64 * MIB, ge=MIB, le=1024 * MIB, description="Largest message to a client, in bytes."
    )
    max_boxes: int = Field(default=1000, ge=1, le=100_000, description="Boxes of one image.")
    max_pixels: int = Field(
        default=DEFAULT_LIMITS.max_pixels, ge=1, le=400_000_000, description="Width times height of one image."
    )
    max_side: int = Field(
        default=DEFAULT_LIMITS.max_side, ge=1, le=100_000, description="Width and height of one image, in px."
    )
    max_items_in_flight: int = Field(
        default=8,
        ge=1,
        le=1024,
        description="Unanswered images of one bulk or evaluation stream; no further one is read until one is answered.",
    )

    def images(self) -> ImageLimits:
        """What the decoder refuses."""
        return ImageLimits(self.max_request_bytes - MESSAGE_OVERHEAD, self.max_pixels, self.max_side)
