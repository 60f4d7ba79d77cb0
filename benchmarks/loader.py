"""Measures training samples per CPU second of one loader process: decode, crop, augment, collate.

Synthetic scenes of 640 x 480 px as JPEGs, eight boxes each, in the order of an epoch. All boxes of an image are cut
while it is in the cache, so fewer boxes per image give a lower rate.
"""

import itertools
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.inputs import SIZES, boxed_images
from benchmarks.timing import Table
from mal_train.core.coco.left_out import LeftOut
from mal_train.core.settings import Compat
from mal_train.data.annotations import TrainingBoxes
from mal_train.data.augment import Cropping
from mal_train.data.datamodule import BoxDataModule, LoaderSettings

IMAGES, BOXES, BATCH = 64, 8, 8


def training_boxes(folder: Path) -> TrainingBoxes:
    """Writes images to disk and returns their boxes."""
    images = boxed_images(IMAGES, BOXES, SIZES["640x480"])
    paths = tuple(folder / f"{n}.jpg" for n in range(IMAGES))
    for path, image in zip(paths, images, strict=True):
        path.write_bytes(image.content)
    return TrainingBoxes(
        paths=paths,
        size_wh=np.array([image.size_wh for image in images], np.int64),
        image_of_box=np.repeat(np.arange(IMAGES), BOXES),
        boxes_xywh=np.array([box for image in images for box in image.boxes], np.float64),
        total=IMAGES * BOXES,
        left_out=LeftOut(),
    )


def samples_per_second(boxes: TrainingBoxes, side: int, batches: int) -> float:
    """Measures the first batches of an epoch in this process, which does the work of one loader process."""
    cropping = Cropping(side, (0.0, 1.2), Compat.NONE)
    loader = BoxDataModule(boxes, cropping, LoaderSettings(BATCH, num_workers=0, seed=0)).train_dataloader()
    began = time.process_time()
    n_samples = sum(len(batch.size_class_N) for batch in itertools.islice(loader, batches))
    return n_samples / (time.process_time() - began)


def main() -> int:
    """Prints the table."""
    torch.set_num_threads(1)
    table = Table("loader", f"Training samples of one loader process, {BOXES} boxes per image of 640 x 480 px")
    with tempfile.TemporaryDirectory() as name:
        boxes = training_boxes(Path(name))
        for side in (224, 512):
            table.add(f"crop {side}", samples_per_second(boxes, side, IMAGES * BOXES // BATCH), "samples/s")
    return table.finish()


if __name__ == "__main__":
    raise SystemExit(main())
