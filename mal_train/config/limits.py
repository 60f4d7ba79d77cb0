"""Section `limits` of the spec: the largest images. The server has the same section, with limits of requests."""

from typing import Any

from pydantic import Field

from mal_train.core.images.header import DEFAULT_LIMITS, MAX_PIXELS, ImageLimits
from mal_train.core.yaml_config import Strict


class LimitsConfig(Strict):
    """Bounds of one image; larger ones fail with IMAGE_TOO_LARGE, except TIFFs that are read by windows."""

    max_pixels: int = Field(
        default=DEFAULT_LIMITS.max_pixels, ge=1, le=MAX_PIXELS, description="Width times height of one image."
    )
    max_side: int = Field(
        default=DEFAULT_LIMITS.max_side, ge=1, le=100_000, description="Width and height of one image, in px."
    )
    max_image_bytes: int = Field(
        default=DEFAULT_LIMITS.max_bytes, ge=1, le=1 << 40, description="Largest image file, in bytes."
    )

    def manifest(self) -> dict[str, Any]:
        """Returns limits that are not the default as JSON data, for the manifest of a job."""
        return {} if self.images() == DEFAULT_LIMITS else {"limits": self.model_dump()}

    def images(self) -> ImageLimits:
        """Returns the limits of the image decoder."""
        return ImageLimits(self.max_image_bytes, self.max_pixels, self.max_side)
