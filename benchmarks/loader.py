"""Training samples that one loader process makes in a second of CPU time: decode, crop, augment, collate.

Synthetic scenes of 640 x 480 px as JPEGs, eight boxes each, in the order of an epoch. Every box of a picture is cut
while the picture is still decoded, so the rate falls with fewer boxes a picture.
"""

import itertools
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from benchmarks.subjects import SIZES, subjects
from benchmarks.timing import Table
from mal_train.core.settings import Compat
from mal_train.data.annotations import TrainingBoxes
from mal_train.data.augment import Cropping
from mal_train.data.datamodule import BoxDataModule, LoaderSettings

PICTURES, BOXES, BATCH = 64, 8, 8


def training_boxes(folder: Path) -> TrainingBoxes:
    """Pictures on disk, and their boxes."""
    pictures = subjects(PICTURES, BOXES, SIZES["640x480"])
    paths = tuple(folder / f"{at}.jpg" for at in range(PICTURES))
    for path, one in zip(paths, pictures, strict=True):
        path.write_bytes(one.content)
    return TrainingBoxes(
        paths=paths,
        size_wh=np.array([one.size_wh for one in pictures], np.int64),
        image_of_box=np.repeat(np.arange(PICTURES), BOXES),
        boxes_xywh=np.array([box for one in pictures for box in one.boxes], np.float64),
        total=PICTURES * BOXES,
        excluded=Counter(),
    )


def samples_per_second(boxes: TrainingBoxes, side: int, batches: int) -> float:
    """Over the first batches of an epoch, made in this process: what each of several loader processes does."""
    cropping = Cropping(side, (0.0, 1.2), Compat.NONE)
    loader = BoxDataModule(boxes, cropping, LoaderSettings(BATCH, num_workers=0, seed=0)).train_dataloader()
    began = time.process_time()
    made = sum(len(batch.size_class_N) for batch in itertools.islice(loader, batches))
    return made / (time.process_time() - began)


def main() -> int:
    """Prints the table."""
    torch.set_num_threads(1)
    table = Table("loader", f"Training samples of one loader process, {BOXES} boxes a picture of 640 x 480 px")
    with tempfile.TemporaryDirectory() as name:
        boxes = training_boxes(Path(name))
        for side in (224, 512):
            table.add(f"crop {side}", samples_per_second(boxes, side, PICTURES * BOXES // BATCH), "samples/s")
    return table.finish()


if __name__ == "__main__":
    raise SystemExit(main())
