"""Parts of TIFFs that exceed the limits of a server: the window of one box, sent with its place in the image.

The mask of such a part is that of the complete image, byte for byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mal_client.errors import ItemError
from mal_client.images.image_input import EncodedImage, check_image_size
from mal_train.core.errors import BadBox, BadImage
from mal_train.core.images.container import ImageHeader, ImageRegion
from mal_train.core.images.decoder import encode_png
from mal_train.core.images.large_tiff import open_large
from mal_train.core.images.tiff_reader import TiffReader
from mal_train.core.masks.image_patch import ImagePatch, cut_patch
from mal_train.core.storage.addresses import Location

if TYPE_CHECKING:
    from mal_client.types import BoxXywh, ServerLimits


@dataclass(frozen=True)
class LargeImage:
    """An image that is read by windows.

    Attributes:
        header: of the file.
        reader: its pixels.
        limits: of the servers.
        name: path of the file, for messages.
    """

    header: ImageHeader
    reader: TiffReader
    limits: ServerLimits
    name: str

    def part(self, box: BoxXywh, margin_rate: float) -> EncodedImage:
        """Returns the window of a box as PNG.

        Raises:
            BadImage: damaged pixels, or the window or its PNG exceeds the limits (reason IMAGE_TOO_LARGE).
        """
        height, width, _ = self.reader.shape
        try:
            patch = cut_patch(self.reader, box, margin_rate, self.limits.images())
        except BadBox:
            # The server states the reason, as for a complete image.
            patch = ImagePatch(np.zeros((1, 1, 3), np.uint8), 0, 0, (height, width))
        rows, columns = patch.pixels.shape[:2]
        part = EncodedImage(encode_png(patch.pixels), columns, rows, ImageRegion(patch.x0, patch.y0, (width, height)))
        check_image_size(part.size_bytes(), self.limits, self.name)
        return part

    def parts(
        self, boxes: Sequence[BoxXywh], margin_rate: float
    ) -> Iterator[tuple[int, BoxXywh, EncodedImage | ItemError]]:
        """Yields index, box, and window of each box, or why it has none."""
        for index, box in enumerate(boxes):
            try:
                yield index, box, self.part(box, margin_rate)
            except BadImage as error:
                yield index, box, ItemError("INVALID_ARGUMENT", error.reason, str(error))

    def refuse_overlaps(self) -> None:
        """Raises BadImage, since overlaps are resolved among all boxes of an image."""
        width, height = self.header.size_wh
        raise BadImage(
            f"{self.name}: {width}x{height} px, read by windows: overlaps can be resolved on complete images only; "
            "label it without --resolve-overlaps (resolve_overlaps=False)",
            "IMAGE_TOO_LARGE",
        )


def open_image(location: Location, limits: ServerLimits) -> LargeImage | None:
    """Opens a local TIFF that exceeds the limits; None for every other file.

    Raises:
        BadImage: a TIFF that exceeds the limits and cannot be read by windows.
    """
    found = open_large(location, limits.images(), str(location))
    return None if found is None else LargeImage(*found, limits, str(location))
