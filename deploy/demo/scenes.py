"""Data of the demo: synthetic scenes, and baselines that need no training."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from deploy.demo import baselines
from deploy.demo.commands import say
from deploy.demo.synthetic import CocoSplit, write_split
from mal_train.core.coco.annotations import by_image, read_coco
from mal_train.core.coco.output import write_json_atomic
from mal_train.core.images.decoder import RgbImage
from mal_train.core.images.files import read_image
from mal_train.core.masks.geometry import Box
from mal_train.core.masks.rle import Rle, from_segmentation, iou

SEED = 7


@dataclasses.dataclass(frozen=True)
class Size:
    """Number of images in each part; `overrides` are fields of the training spec that a shorter demo replaces."""

    train: int
    watch: int
    heldout: int
    overrides: tuple[str, ...] = ()


FULL = Size(train=100, watch=16, heldout=48)
QUICK = Size(train=8, watch=2, heldout=4, overrides=("train.num_epochs=1", "train.checkpoint_interval=1"))


@dataclasses.dataclass(frozen=True)
class Scenes:
    """Parts of the dataset: boxes of `train` to learn from, `watch` for the curve, `heldout` for the metrics."""

    train: CocoSplit
    watch: CocoSplit
    heldout: CocoSplit
    heldout_boxes: Path
    """The held-out annotations without masks: the input of a labeling job."""


def write_scenes(folder: Path, size: Size) -> Scenes:
    """Writes the COCO dataset; the files to train on and to label hold no segmentation."""
    train_split = write_split(folder, "train", size.train, SEED, masks=False)
    say(f"      {size.train} training scenes")
    watch = write_split(folder, "watch", size.watch, SEED, masks=True)
    heldout = write_split(folder, "heldout", size.heldout, SEED, masks=True)
    say(f"      {size.watch} validation scenes, {size.heldout} held-out scenes")
    boxes = json.loads(heldout.annotations.read_text(encoding="utf-8"))
    for row in boxes["annotations"]:
        del row["segmentation"], row["area"]
    heldout_boxes = folder / "heldout_boxes.json"
    write_json_atomic(heldout_boxes, boxes)
    return Scenes(train_split, watch, heldout, heldout_boxes)


def measure_baselines(split: CocoSplit) -> dict[str, float]:
    """Returns the mean IoU of each baseline: box filled, ellipse in the box, colors that are absent around the box."""
    coco = read_coco(split.annotations)
    methods: dict[str, Callable[[RgbImage, Box], Rle]] = {
        "box filled": lambda image, box: baselines.box_filled(box, (image.shape[0], image.shape[1])),
        "ellipse in the box": lambda image, box: baselines.ellipse(box, (image.shape[0], image.shape[1])),
        "color clustering in the box": baselines.color_clustering,
    }
    ious: dict[str, list[float]] = {name: [] for name in methods}
    for info, rows in by_image(coco):
        image = read_image(split.images / info.file_name)
        for row in rows:
            truth = from_segmentation(row.raw["segmentation"], image.shape[0], image.shape[1])
            for name, method in methods.items():
                ious[name].append(iou(method(image, row.box_xywh), truth))
    return {name: float(np.mean(values)) for name, values in ious.items()}
