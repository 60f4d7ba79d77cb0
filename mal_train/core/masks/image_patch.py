"""Parts of images and masks that are too large to be held or sent completely."""

from dataclasses import dataclass

import numpy as np

from mal_train.core.errors import BadBox, BadImage
from mal_train.core.images.header import LIMIT_REMEDY, ImageLimits
from mal_train.core.images.tiff_reader import TiffReader
from mal_train.core.masks.geometry import Box, Pixels, Window, check_box, cut, inference_window
from mal_train.core.masks.rle import Rle, decode_patch


@dataclass(frozen=True)
class ImagePatch:
    """Pixels of a part of an image, which labels the boxes whose windows lie inside as the complete image does.

    Attributes:
        pixels: (h, w, 3) uint8 RGB.
        x0: column of the image that the first column shows; the image is repeated left and right of itself.
        y0: row of the image that the first row shows; the image is repeated above and below itself.
        image_hw: height and width of the image in px.
    """

    pixels: Pixels
    x0: int
    y0: int
    image_hw: tuple[int, int]

    def inside(self, window: Window, name: str = "box") -> Window:
        """Returns a window of the image in px of the patch. Raises BadBox for one that is not inside."""
        moved = Window(window.x0 - self.x0, window.y0 - self.y0, window.x1 - self.x0, window.y1 - self.y0)
        height, width = self.pixels.shape[:2]
        if min(moved.x0, moved.y0) < 0 or moved.x1 > width or moved.y1 > height:
            raise BadBox(
                f"its crop shows columns {window.x0} to {window.x1} and rows {window.y0} to {window.y1}; the part of "
                f"the image has columns {self.x0} to {self.x0 + width} and rows {self.y0} to {self.y0 + height}",
                name,
            )
        return moved


def cut_patch(image: TiffReader, box: Box, margin_rate: float, limits: ImageLimits) -> ImagePatch:
    """Reads the part of an image that the crop of a box shows.

    Args:
        image: the image.
        box: x, y, w, h in px of the image.
        margin_rate: that of the labeler.
        limits: of the part.

    Raises:
        BadBox: the box cannot be labeled.
        BadImage: damaged pixels, or the crop shows more than an image may have (reason IMAGE_TOO_LARGE).
    """
    height, width = image.shape[:2]
    inside, _ = check_box(box, (height, width), "")
    window = inference_window(inside, margin_rate)
    return ImagePatch(read_window(image, window, limits), window.x0, window.y0, (height, width))


def read_window(image: TiffReader, window: Window, limits: ImageLimits) -> Pixels:
    """Reads the pixels of a window, as `cut` does.

    Raises:
        BadImage: damaged pixels, or the window exceeds the limits (reason IMAGE_TOO_LARGE).
    """
    if not limits.accepts((window.width, window.height)):
        raise BadImage(
            f"{image.name}: the crop of a box shows {window.width}x{window.height} px; the limit is {limits}; "
            f"{LIMIT_REMEDY}",
            "IMAGE_TOO_LARGE",
        )
    return cut(image, window)


class MaskPixels:
    """The mask of a complete image as uint8, 0 and 1, of which only the object is decoded; `geometry.Sliceable`.

    Raises:
        BadDataset: as `decode_patch`.
    """

    def __init__(self, mask: Rle) -> None:
        self.shape = (mask.height, mask.width)
        self.dtype = np.dtype(np.uint8)
        patch = decode_patch(mask)
        self._object, self._row0, self._col0 = patch.mask.astype(np.uint8), patch.row0, patch.col0

    def __getitem__(self, region: tuple[slice, slice]) -> Pixels:
        (row, last_row), (column, last_column) = (
            part.indices(size)[:2] for part, size in zip(region, self.shape, strict=True)
        )
        pixels = np.zeros((max(last_row - row, 0), max(last_column - column, 0)), np.uint8)
        top, left = max(row, self._row0), max(column, self._col0)
        inside = self._object[
            top - self._row0 : max(last_row - self._row0, 0), left - self._col0 : max(last_column - self._col0, 0)
        ]
        pixels[top - row : top - row + inside.shape[0], left - column : left - column + inside.shape[1]] = inside
        return pixels
