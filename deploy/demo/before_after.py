"""Draws the image at the top of the README: photographs with their boxes, and the same with the built-in model's masks.

Usage: python -m deploy.demo.before_after docs/images/before-after.jpg
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from deploy.demo.photographs import write_photographs
from mal_train.core.coco.annotations import by_image, read_coco
from mal_train.core.images.decoder import RgbImage
from mal_train.core.images.files import read_image
from mal_train.core.report.overlays import Drawn, draw_labels
from mal_train.kernel.checkpoint.builtin import BUILTIN, resolve
from mal_train.kernel.labeler.labeler import Labeler
from mal_train.kernel.labeler.load import load_labeler
from mal_train.kernel.labeler.types import Label

NAMES = ("coffee.png", "coins.png", "astronaut.png")
HEIGHT_PX = 280
GAP_PX = 6


def main(output: Path) -> None:
    """Writes the image as JPEG."""
    labeler, _ = load_labeler(resolve(BUILTIN))
    with tempfile.TemporaryDirectory() as folder:
        split = write_photographs(Path(folder))
        pairs = {
            info.file_name: _pair(labeler, read_image(split.images / info.file_name), [row.box_xywh for row in rows])
            for info, rows in by_image(read_coco(split.annotations))
        }
    rows = [np.concatenate([_scaled(pairs[name][row]) for name in NAMES], axis=1) for row in (0, 1)]
    Image.fromarray(np.concatenate(rows)[:, :-GAP_PX]).save(output, quality=88)


def _pair(labeler: Labeler, image: RgbImage, boxes: list[tuple[float, float, float, float]]) -> list[RgbImage]:
    """The image with its boxes, and with boxes and masks."""
    labels = labeler.label(image, boxes)
    rles = [label.rle if isinstance(label, Label) else None for label in labels]
    masks = [Drawn(rle, box) for rle, box in zip(rles, boxes, strict=True)]
    return [draw_labels(image, [Drawn(None, box) for box in boxes]), draw_labels(image, masks)]


def _scaled(image: RgbImage) -> RgbImage:
    """The image at HEIGHT_PX, with a white margin at the right and at the bottom."""
    width = round(image.shape[1] * HEIGHT_PX / image.shape[0])
    pixels = np.asarray(Image.fromarray(image).resize((width, HEIGHT_PX), Image.Resampling.LANCZOS))
    return np.pad(pixels, ((0, GAP_PX), (0, GAP_PX), (0, 0)), constant_values=255)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
