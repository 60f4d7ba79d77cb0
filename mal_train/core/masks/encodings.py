"""Converts masks between encodings: compressed and plain run lengths, polygon rings, and a PNG of the tight crop.

Server and client use the same functions, so the result does not depend on which of them encodes.
"""

import io
from array import array
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mal_train.core.images.decoder import decode_image
from mal_train.core.images.header import ImageLimits
from mal_train.core.masks.polygons import Rings, fill, to_rings
from mal_train.core.masks.rle import Rle, decode_patch, encode_mask, encode_region, encode_runs
from mal_train.core.masks.run_lengths import run_lengths
from mal_train.core.settings import MaskFormat


@dataclass(frozen=True)
class Runs:
    """Column-major run lengths in px of a mask of height x width px; the first run is background.

    An array of the standard library: 4 bytes a run, where a tuple of numbers takes 36.
    """

    height: int
    width: int
    counts: "array[int]"


@dataclass(frozen=True)
class Polygons:
    """Closed rings of a mask of height x width px; a hole follows the ring that contains it."""

    height: int
    width: int
    rings: Rings


@dataclass(frozen=True)
class PngCrop:
    """Tight crop of a mask.

    Attributes:
        height: image height in px.
        width: image width in px.
        x: first image column of the crop.
        y: first image row of the crop.
        crop_width: width of the crop in px; 0 for an empty mask.
        crop_height: height of the crop in px; 0 for an empty mask.
        content: 1-bit grayscale PNG, foreground is white; empty for an empty mask.
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
    """Encodes a mask in each of the formats, in that order; `tolerance_px` as in `polygons.to_rings`."""
    return tuple(_encode_one(rle, mask_format, tolerance_px) for mask_format in formats)


def to_runs(rle: Rle) -> Runs:
    """Returns the mask as plain run lengths."""
    return Runs(rle.height, rle.width, array("i", run_lengths(rle.counts).astype(np.intc).tobytes()))


def to_polygons(rle: Rle, tolerance_px: float = 0.0) -> Polygons:
    """Returns the mask as rings; `tolerance_px` as in `polygons.to_rings`."""
    return Polygons(rle.height, rle.width, to_rings(decode_patch(rle), tolerance_px))


def to_png(rle: Rle) -> PngCrop:
    """Returns the tight crop of the mask as a PNG."""
    patch = decode_patch(rle)
    rows, columns = patch.mask.shape
    content = encode_bitmap(patch.mask) if patch.mask.size else b""
    return PngCrop(rle.height, rle.width, patch.col0, patch.row0, columns, rows, content)


def decode(mask: EncodedMask) -> Rle:
    """Returns the RLE of a mask in any encoding; exact except for polygons with a tolerance.

    Raises:
        BadDataset: run lengths do not sum to height·width.
        BadImage: the PNG is damaged or its size differs from the stated size.
    """
    if isinstance(mask, Rle):
        return mask
    if isinstance(mask, Runs):
        return encode_runs(mask.counts, mask.height, mask.width)
    if isinstance(mask, Polygons):
        return encode_mask(fill([ring.points for ring in mask.rings], mask.height, mask.width))
    return encode_region(_crop_pixels(mask), mask.y, mask.x, (mask.height, mask.width))


def encode_bitmap(mask_bool: NDArray[np.bool_]) -> bytes:
    """Returns a mask (h, w) as a 1-bit grayscale PNG; foreground is white."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(mask_bool)).save(buffer, format="PNG")
    return buffer.getvalue()


def _encode_one(rle: Rle, mask_format: MaskFormat, tolerance_px: float) -> EncodedMask:
    if mask_format is MaskFormat.RLE:
        return rle
    if mask_format is MaskFormat.UNCOMPRESSED:
        return to_runs(rle)
    return to_polygons(rle, tolerance_px) if mask_format is MaskFormat.POLYGONS else to_png(rle)


def _crop_pixels(crop: PngCrop) -> NDArray[np.bool_]:
    if not crop.content:
        return np.zeros((0, 0), dtype=np.bool_)
    width, height = crop.crop_width, crop.crop_height
    limits = ImageLimits(max_pixels=width * height, max_side=max(width, height))
    image = decode_image(crop.content, expected_wh=(width, height), limits=limits, name="mask")
    return np.asarray(image[:, :, 0] > 127)
