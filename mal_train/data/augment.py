"""Cuts the views of student and teacher around one box, with Pillow and numpy; all random numbers come from `rng`.

Both views share the crop and the flip; only the student's view gets color augmentation (§2.4 of the method).

Letters: H, W image size; S crop size; C = 3 channels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter

from mal_train.core.images.decoder import RgbImage
from mal_train.core.images.header import DEFAULT_LIMITS, ImageLimits
from mal_train.core.images.tiff_reader import TiffReader
from mal_train.core.masks import geometry
from mal_train.core.masks.geometry import Box, Pixels, Window
from mal_train.core.masks.image_patch import MaskPixels, read_window
from mal_train.core.masks.rle import Rle
from mal_train.core.settings import Compat

FLIP_PROB = 0.5
JITTER_PROB = 0.5
GRAY_PROB = 0.2
BLUR_PROB = 0.5
BRIGHTNESS, CONTRAST, SATURATION, HUE = 0.4, 0.4, 0.2, 0.1
MASK_THRESHOLD = 127
BLUR_RADIUS = (0.1, 2.0)


class Views(NamedTuple):
    """Training sample as arrays.

    Attributes:
        student: (S, S, 3) uint8 RGB.
        teacher: (S, S, 3) uint8 RGB.
        box_mask: (S, S) uint8, 0 and 1.
        mask: mask of the object, (S, S) uint8, 0 and 1; None if it is unknown.
    """

    student: NDArray[np.uint8]
    teacher: NDArray[np.uint8]
    box_mask: NDArray[np.uint8]
    mask: NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class Cropping:
    """Settings of training crops.

    Attributes:
        size: side of the crop in px.
        margin_rate: range of the random margin rate of the box.
        compat: clip rule of the box mask; under `tao` the box mask also wraps around with the image.
        colors: apply color augmentation to the student's view.
    """

    size: int
    margin_rate: tuple[float, float]
    compat: Compat
    colors: bool = True


def make_views(
    image_HWC: RgbImage | TiffReader,
    box_inside: Box,
    cropping: Cropping,
    rng: np.random.Generator,
    mask: Rle | None = None,
    *,
    limits: ImageLimits = DEFAULT_LIMITS,
) -> Views:
    """Cuts both views, the box mask and the mask of one object.

    Args:
        image_HWC: uint8 RGB; of an image that is read by windows, only the window of the box is read.
        box_inside: box in px, inside the image.
        cropping: settings of the crop.
        rng: source of the margins, the flip and the color augmentation.
        mask: mask of the object, if it is known.
        limits: of a window that is read.

    Raises:
        BadImage: a window that cannot be read, or exceeds the limits (reason IMAGE_TOO_LARGE).
    """
    image_hw = (image_HWC.shape[0], image_HWC.shape[1])
    window = geometry.train_window(box_inside, geometry.random_margins(rng, cropping.margin_rate))
    crop_SSC = _crop(image_HWC, window, cropping.size, limits)
    box_mask_SS = geometry.box_mask_in_window(
        box_inside, window, image_hw, cropping.size, cropping.compat, wrap=cropping.compat is Compat.TAO
    )
    object_mask_SS = None if mask is None else _object_mask(mask, window, box_mask_SS)
    if rng.random() < FLIP_PROB:
        crop_SSC, box_mask_SS = crop_SSC[:, ::-1], box_mask_SS[:, ::-1]
        object_mask_SS = None if object_mask_SS is None else np.ascontiguousarray(object_mask_SS[:, ::-1])
    teacher_SSC = np.ascontiguousarray(crop_SSC)
    student_SSC = color_jitter(teacher_SSC, rng) if cropping.colors else teacher_SSC
    return Views(student_SSC, teacher_SSC, np.ascontiguousarray(box_mask_SS), object_mask_SS)


def _crop(image_HWC: RgbImage | TiffReader, window: Window, size: int, limits: ImageLimits) -> Pixels:
    if isinstance(image_HWC, TiffReader):
        return geometry.resize_crop(read_window(image_HWC, window, limits), size)
    return geometry.resized_window(image_HWC, window, size)


def _object_mask(mask: Rle, window: Window, box_mask_SS: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Cuts the mask of an object. The box mask removes the copies of the object where the crop wraps around."""
    mask_SS = geometry.resize_crop(geometry.cut(MaskPixels(mask), window) * 255, box_mask_SS.shape[0])
    return (mask_SS > MASK_THRESHOLD).astype(np.uint8) * box_mask_SS


def color_jitter(image_HWC: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Applies color jitter, grayscale and blur to a uint8 RGB image, each with its own probability."""
    image = Image.fromarray(np.ascontiguousarray(image_HWC))
    if rng.random() < JITTER_PROB:
        image = _jitter(image, rng)
    if rng.random() < GRAY_PROB:
        image = image.convert("L").convert("RGB")
    if rng.random() < BLUR_PROB:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(*BLUR_RADIUS)))
    return np.asarray(image)


def _jitter(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Changes brightness, contrast, saturation and hue in random order; factors as in torchvision's ColorJitter."""
    brightness, contrast, saturation = (
        1.0 + rng.uniform(-spread, spread) for spread in (BRIGHTNESS, CONTRAST, SATURATION)
    )
    hue = rng.uniform(-HUE, HUE)
    operations: tuple[Callable[[Image.Image], Image.Image], ...] = (
        lambda image: ImageEnhance.Brightness(image).enhance(brightness),
        lambda image: ImageEnhance.Contrast(image).enhance(contrast),
        lambda image: ImageEnhance.Color(image).enhance(saturation),
        lambda image: shift_hue(image, hue),
    )
    for index in rng.permutation(len(operations)):
        image = operations[index](image)
    return image


def shift_hue(image: Image.Image, shift: float) -> Image.Image:
    """Rotates the hues of an RGB image by `shift` of the color circle, −0.5 … 0.5."""
    hue, saturation, value = image.convert("HSV").split()
    # uint8 overflow closes the color circle; the shift is truncated to whole steps as torchvision does.
    shifted_hue = np.asarray(hue) + np.uint8(int(shift * 255) % 256)
    return Image.merge("HSV", (Image.fromarray(shifted_hue), saturation, value)).convert("RGB")
