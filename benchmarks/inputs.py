"""Generates inputs of benchmarks: images with boxes in two sizes, networks with random weights, probability maps."""

import io
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks.load.images import JPEG_QUALITY, draw_images
from mal_train.core.masks.geometry import Box
from mal_train.core.settings import LabelerConfig
from mal_train.kernel.labeler.labeler import Labeler
from mal_train.kernel.networks.network import MalNetwork, ModelConfig

SIZES = {"640x480": (640, 480), "12 Mpix": (4000, 3000)}
"""Name → (width, height) in px."""


@dataclass(frozen=True)
class BoxedImage:
    """JPEG with its (width, height) and boxes of small to large objects, up to half of the image."""

    content: bytes
    size_wh: tuple[int, int]
    boxes: tuple[Box, ...]


def boxed_images(count: int, boxes: int, size_wh: tuple[int, int], seed: int = 0) -> list[BoxedImage]:
    """Draws the same scenes for every size: at 640 x 480 px, then enlarged together with their boxes."""
    images = []
    for scene in draw_images(count, boxes, seed):
        if size_wh == (scene.width, scene.height):
            images.append(BoxedImage(scene.content, size_wh, scene.boxes))
            continue
        x, y = size_wh[0] / scene.width, size_wh[1] / scene.height
        large = Image.open(io.BytesIO(scene.content)).resize(size_wh, Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        large.save(buffer, "JPEG", quality=JPEG_QUALITY)
        scaled = tuple((x * left, y * top, x * w, y * h) for left, top, w, h in scene.boxes)
        images.append(BoxedImage(buffer.getvalue(), size_wh, scaled))
    return images


def random_labeler(arch: str, crop_size: int, precision: str = "auto") -> Labeler:
    """Returns a labeler with random weights, which do not affect speed; a threshold of 0.5 gives irregular masks."""
    torch.manual_seed(0)
    config = LabelerConfig(crop_size=crop_size, mask_thres=(0.5, 0.5, 0.5))
    return Labeler(MalNetwork(ModelConfig(arch)), config, precision=precision)


def object_map(side: int, seed: int) -> NDArray[np.float32]:
    """Returns a probability map (side, side) of a blob with a soft, uneven edge, like that of a trained network."""
    rng = np.random.default_rng(seed)
    v, u = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    waves = cv2.resize(rng.normal(0, 0.3, (12, 12)), (side, side), interpolation=cv2.INTER_CUBIC)
    prob: NDArray[np.float32] = (1 / (1 + np.exp(12 * (np.hypot(u, v) - 0.7 + waves)))).astype(np.float32)
    return prob
