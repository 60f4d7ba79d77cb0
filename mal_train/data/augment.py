"""One box of a picture → what the student and the teacher see of it. Pillow and numpy; every draw comes from `rng`.

Both views share the crop and the flip; only the student's colors are disturbed (§2.4 of the method).
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter

from mal_train.core.masks import geometry
from mal_train.core.masks.geometry import Box
from mal_train.core.masks.images import RgbImage
from mal_train.core.settings import Compat

FLIP_SHARE = 0.5
JITTER_SHARE = 0.5
GRAY_SHARE = 0.2
BLUR_SHARE = 0.5
BRIGHTNESS, CONTRAST, SATURATION, HUE = 0.4, 0.4, 0.2, 0.1
HALF = 127
BLUR_RADIUS = (0.1, 2.0)


class Views(NamedTuple):
    """A training sample before it becomes a tensor; S is the crop size.

    `student` and `teacher` are (S, S, 3) uint8 RGB, `box_mask` is (S, S) uint8 with values 0 and 1, and so
    is `mask`, the object's own where it is known.
    """

    student: NDArray[np.uint8]
    teacher: NDArray[np.uint8]
    box_mask: NDArray[np.uint8]
    mask: NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class Cropping:
    """How a training crop is taken.

    Attributes:
        size: side of the crop in px.
        margin_rate: range of the random growth of the box.
        compat: clip rule of the box mask; under `tao` it also wraps with the picture.
        colors: whether the student's colors are disturbed.
    """

    size: int
    margin_rate: tuple[float, float]
    compat: Compat
    colors: bool = True


def make_views(
    image: RgbImage,
    box_inside: Box,
    cropping: Cropping,
    rng: np.random.Generator,
    mask: NDArray[np.bool_] | None = None,
) -> Views:
    """Both views and the box mask of a box that lies inside its picture (H, W, 3), and its mask (H, W) where given."""
    image_hw = (image.shape[0], image.shape[1])
    window = geometry.train_window(box_inside, geometry.random_margins(rng, cropping.margin_rate))
    clean = geometry.resize_crop(geometry.cut(image, window), cropping.size)
    box_mask = geometry.box_mask_in_window(
        box_inside, window, image_hw, cropping.size, cropping.compat, wrap=cropping.compat is Compat.TAO
    )
    own = None
    if mask is not None:
        # Where the picture repeats in the margin so does the object; only the one in the box is meant.
        pixels = geometry.resize_crop(geometry.cut(mask.astype(np.uint8) * 255, window), cropping.size)
        own = (pixels > HALF).astype(np.uint8) * box_mask
    if rng.random() < FLIP_SHARE:
        clean, box_mask = clean[:, ::-1], box_mask[:, ::-1]
        own = None if own is None else np.ascontiguousarray(own[:, ::-1])
    clean = np.ascontiguousarray(clean)
    student = color_jitter(clean, rng) if cropping.colors else clean
    return Views(student, clean, np.ascontiguousarray(box_mask), own)


def color_jitter(pixels: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Color jitter, grayscale and blur, each with its own probability; (H, W, 3) uint8 in and out."""
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    if rng.random() < JITTER_SHARE:
        picture = _jitter(picture, rng)
    if rng.random() < GRAY_SHARE:
        picture = picture.convert("L").convert("RGB")
    if rng.random() < BLUR_SHARE:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(*BLUR_RADIUS)))
    return np.asarray(picture)


def _jitter(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Brightness, contrast, saturation and hue in random order, with torchvision's meaning of each factor."""
    brightness, contrast, saturation = (
        1.0 + rng.uniform(-spread, spread) for spread in (BRIGHTNESS, CONTRAST, SATURATION)
    )
    hue = rng.uniform(-HUE, HUE)
    for step in rng.permutation(4):
        if step == 0:
            picture = ImageEnhance.Brightness(picture).enhance(brightness)
        elif step == 1:
            picture = ImageEnhance.Contrast(picture).enhance(contrast)
        elif step == 2:
            picture = ImageEnhance.Color(picture).enhance(saturation)
        else:
            picture = shift_hue(picture, hue)
    return picture


def shift_hue(picture: Image.Image, turn: float) -> Image.Image:
    """The RGB picture with its hues turned by `turn` of the color circle, −0.5 … 0.5."""
    hue, saturation, value = picture.convert("HSV").split()
    # A byte overflows where the color circle closes; the shift is cut to whole steps as torchvision does.
    turned = np.asarray(hue) + np.uint8(int(turn * 255) % 256)
    return Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert("RGB")
