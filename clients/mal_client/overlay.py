"""Draws labels over an image, for notebooks: tinted and outlined masks, boxes, scores. Sends nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mal_client.images.image_input import encode
from mal_train.core.atomic_io import atomic_write
from mal_train.core.images.decoder import RgbImage, decode_image, encode_png
from mal_train.core.report.overlays import Drawn, draw_labels

if TYPE_CHECKING:
    from mal_client.types import BoxLabel, ImageInput


@dataclass(frozen=True, eq=False)
class Overlay:
    """Image that a notebook shows when it is the last expression of a cell.

    Attributes:
        pixels: (H, W, 3) uint8 RGB.
    """

    pixels: RgbImage

    def _repr_png_(self) -> bytes:
        """Returns the image as PNG, for IPython's display protocol."""
        return encode_png(self.pixels)

    def save(self, path: Path | str) -> None:
        """Writes the image as a PNG file. Raises OutputError."""
        with atomic_write(Path(path)) as file:
            file.write(self._repr_png_())


def overlay(image: ImageInput, labels: Sequence[BoxLabel], max_side: int = 1280) -> Overlay:
    """Returns the image with its labels drawn over it.

    >>> overlay("street.jpg", client.label_image("street.jpg", boxes))  # doctest: +SKIP

    Args:
        image: as in `Client.label_image`.
        labels: of this image.
        max_side: larger images are shrunk to this number of px on their longer side.

    Raises:
        BadImage: the image cannot be read.
    """
    pixels = decode_image(encode(image).content)
    objects = [Drawn(label.rle, label.box, f"{label.score:.2f}" if label.ok else "no mask") for label in labels]
    return Overlay(draw_labels(pixels, objects, max_side))
