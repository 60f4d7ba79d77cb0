"""Compares labeling throughput with the forward passes of the same batches, in the default precision.

Images of 640 x 480 px on disk, eight boxes each, batches of eight, ViT-small, crop 512: `label_boxes` as in validation
and inference. Measures the CPU time of all threads with one torch thread: the cost of labeling outside the network.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch

from benchmarks.inputs import SIZES, BoxedImage, boxed_images, random_labeler
from benchmarks.timing import Table, interleaved
from mal_train.core.coco.annotations import Annotation, ImageInfo
from mal_train.core.images.decoder import decode_image
from mal_train.core.settings import Branch
from mal_train.core.size_class import network_size_class
from mal_train.kernel.labeler.labeler import Labeler
from mal_train.kernel.labeler.types import Crop, Label
from mal_train.kernel.networks.network import normalize
from mal_train.offline.dataset_labeler import Row, label_boxes

ARCH, SIDE, BOXES, IMAGES, ROUNDS = "vit-deit-small/16", 512, 8, 2, 1


def rows_of(images: list[BoxedImage], folder: Path) -> list[Row]:
    """Writes the images to disk and returns the rows of a COCO file for them."""
    rows: list[Row] = []
    for index, image in enumerate(images):
        (folder / f"{index}.jpg").write_bytes(image.content)
        boxes = [
            Annotation(BOXES * index + n, index, 1, box, iscrowd=False, raw={}) for n, box in enumerate(image.boxes)
        ]
        rows.append((ImageInfo(index, f"{index}.jpg", *image.size_wh), boxes))
    return rows


def network_inputs(labeler: Labeler, images: list[BoxedImage]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Returns (normalized crops, size classes) of each batch."""
    batches = []
    for image in images:
        crops = [crop for crop in labeler.prepare(decode_image(image.content), image.boxes) if isinstance(crop, Crop)]
        pixels = torch.from_numpy(np.stack([crop.pixels for crop in crops]))
        size_class = network_size_class([crop.area for crop in crops], labeler.config.compat)
        batches.append((normalize(pixels), torch.from_numpy(size_class)))
    return batches


def main() -> int:
    """Prints the table."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    labeler = random_labeler(ARCH, SIDE)
    dtype = str(labeler.dtype).removeprefix("torch.")
    table = Table("labeling", f"Labeling with {ARCH}, crop {SIDE}, {dtype}, against its forward passes, CPU time")
    images = boxed_images(IMAGES, BOXES, SIZES["640x480"])
    batches = network_inputs(labeler, images)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = rows_of(images, folder)

        def label() -> None:
            labels = list(label_boxes(labeler, rows, folder, lambda _, *result: labeler.finish(*result)))
            if len(labels) != IMAGES * BOXES or not all(isinstance(label, Label) for _, label in labels):
                raise RuntimeError("a box was not labeled")

        def forward() -> None:
            with torch.inference_mode(), torch.autocast("cpu", labeler.dtype, enabled=dtype != "float32"):
                for crops, size_class in batches:
                    labeler.network.logits(crops, size_class, Branch.STUDENT)

        variants: dict[str, Callable[[], object]] = {"label": label, "forward": forward}
        seconds = interleaved(variants, ROUNDS)
    table.add("forward pass, per crop", 1000 * seconds["forward"] / (IMAGES * BOXES), "ms")
    table.add("labeling, per box", 1000 * seconds["label"] / (IMAGES * BOXES), "ms")
    table.add("labeling throughput / forward pass throughput", seconds["forward"] / seconds["label"], "", least=0.90)
    return table.finish()


if __name__ == "__main__":
    raise SystemExit(main())
