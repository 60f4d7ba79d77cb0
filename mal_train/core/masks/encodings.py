"""A mask in each form in which it leaves: run lengths, plain or compressed, polygon rings, a PNG of its tight crop.

The server answers in these forms and the client makes them by the same functions from the run-length code, so that it
does not matter who did it.
"""

import io
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from mal_train.core.errors import BadImage
from mal_train.core.masks.polygons import Ring, fill, to_rings
from mal_train.core.masks.rle import Rle, decode_patch, encode_mask, encode_region, encode_runs, run_lengths
from mal_train.core.settings import MaskFormat


@dataclass(frozen=True)
class Runs:
    """A mask of height x width px as column-major run lengths in px, the first run background."""

    height: int
    width: int
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Polygons:
    """A mask of height x width px as closed lines; a hole stands behind the ring that it lies in."""

    height: int
    width: int
    rings: tuple[Ring, ...]


@dataclass(frozen=True)
class PngCrop:
    """The tight crop of a mask of height x width px.

    Attributes:
        height: of the image.
        width: likewise.
        x: column of the image that the crop begins at.
        y: row likewise.
        crop_width: columns of the crop; 0 for an empty mask.
        crop_height: rows likewise.
        content: 1-bit grayscale PNG, white is mask; no bytes for an empty mask.
    """

    height: int
    width: int
    x: int
    y: int
    crop_width: int
    crop_height: int
    content: bytes


EncodedMask = Rle | Runs | Polygons | PngCrop


def encode(rle: Rle, formats: Iterable[MaskFormat], tolerance_px: float = 0.0) -> tuple[EncodedMask, ...]:
    """The mask in each of the formats, in their order; `tolerance_px` is that of `polygons.to_rings`."""
    return tuple(_encode_one(rle, form, tolerance_px) for form in formats)


def to_runs(rle: Rle) -> Runs:
    """Plain run lengths."""
    return Runs(rle.height, rle.width, tuple(run_lengths(rle.counts).tolist()))


def to_polygons(rle: Rle, tolerance_px: float = 0.0) -> Polygons:
    """Rings, as `polygons.to_rings` makes them."""
    return Polygons(rle.height, rle.width, tuple(to_rings(decode_patch(rle), tolerance_px)))


def to_png(rle: Rle) -> PngCrop:
    """The tight crop as a picture."""
    patch = decode_patch(rle)
    rows, columns = patch.mask.shape
    content = encode_bitmap(patch.mask) if patch.mask.size else b""
    return PngCrop(rle.height, rle.width, patch.col0, patch.row0, columns, rows, content)


def decode(mask: EncodedMask) -> Rle:
    """The run-length code of a mask in any form. Exact but for polygons with a tolerance.

    Raises:
        BadDataset: run lengths that do not fill the frame.
        BadImage: a PNG that is damaged or of another size than stated.
    """
    if isinstance(mask, Rle):
        return mask
    if isinstance(mask, Runs):
        return encode_runs(mask.counts, mask.height, mask.width)
    if isinstance(mask, Polygons):
        return encode_mask(fill([ring.points for ring in mask.rings], mask.height, mask.width))
    return encode_region(_crop_pixels(mask), mask.y, mask.x, (mask.height, mask.width))


def encode_bitmap(mask_bool: NDArray[np.bool_]) -> bytes:
    """1-bit grayscale PNG of a mask (h, w), white is mask."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(mask_bool)).save(buffer, format="PNG")
    return buffer.getvalue()


def _encode_one(rle: Rle, form: MaskFormat, tolerance_px: float) -> EncodedMask:
    if form is MaskFormat.RLE:
        return rle
    if form is MaskFormat.UNCOMPRESSED:
        return to_runs(rle)
    return to_polygons(rle, tolerance_px) if form is MaskFormat.POLYGONS else to_png(rle)


def _crop_pixels(crop: PngCrop) -> NDArray[np.bool_]:
    if not crop.content:
        return np.zeros((0, 0), dtype=np.bool_)
    try:
        with Image.open(io.BytesIO(crop.content), formats=["PNG"]) as picture:
            # The header's word is checked before any pixel is read.
            if picture.size != (crop.crop_width, crop.crop_height):
                stated = f"{crop.crop_width}x{crop.crop_height}"
                raise BadImage(f"mask: a PNG of {picture.size[0]}x{picture.size[1]} px, stated as {stated}")
            return np.asarray(picture.convert("1"))
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise BadImage(f"mask: no PNG that can be decoded ({error})") from None
