"""Labeling throughput against the bare forward passes of the same batches, in the default number format.

Pictures of 640 x 480 px on disk, eight boxes each, batches of eight, ViT-small, crop 512: `label_boxes` as validation
and inference run it. CPU time of all threads on one core's worth of torch: what labeling costs beside the network.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import torch

from benchmarks.subjects import SIZES, Subject, random_labeler, subjects
from benchmarks.timing import Table, in_turn
from mal_train.core.coco.annotations import Annotation, ImageInfo
from mal_train.core.masks.images import decode_image
from mal_train.core.settings import Branch, network_size_class
from mal_train.kernel.labeler.labeler import Crop, Label, Labeler
from mal_train.kernel.networks.network import normalize
from mal_train.offline.dataset_labeler import Row, label_boxes

ARCH, SIDE, BOXES, PICTURES, ROUNDS = "vit-deit-small/16", 512, 8, 2, 1


def rows_of(pictures: list[Subject], folder: Path) -> list[Row]:
    """The pictures on disk, and the rows of a COCO file that would name them."""
    rows: list[Row] = []
    for at, one in enumerate(pictures):
        (folder / f"{at}.jpg").write_bytes(one.content)
        boxes = [Annotation(BOXES * at + n, at, 1, box, iscrowd=False, raw={}) for n, box in enumerate(one.boxes)]
        rows.append((ImageInfo(at, f"{at}.jpg", *one.size_wh), boxes))
    return rows


def bare_batches(labeler: Labeler, pictures: list[Subject]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(normalized crops, size branches) of each batch."""
    found = []
    for one in pictures:
        crops = [crop for crop in labeler.prepare(decode_image(one.content), one.boxes) if isinstance(crop, Crop)]
        pixels = torch.from_numpy(np.stack([crop.pixels for crop in crops]))
        branch = network_size_class([crop.area for crop in crops], labeler.config.compat)
        found.append((normalize(pixels), torch.from_numpy(branch)))
    return found


def main() -> int:
    """Prints the table."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    labeler = random_labeler(ARCH, SIDE)
    dtype = str(labeler.dtype).removeprefix("torch.")
    table = Table("labeling", f"Labeling with {ARCH}, crop {SIDE}, {dtype}, against its forward passes, CPU time")
    pictures = subjects(PICTURES, BOXES, SIZES["640x480"])
    batches = bare_batches(labeler, pictures)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = rows_of(pictures, folder)

        def label() -> None:
            found = list(label_boxes(labeler, rows, folder, lambda _, *answer: labeler.finish(*answer)))
            if len(found) != PICTURES * BOXES or not all(isinstance(label, Label) for _, label in found):
                raise RuntimeError("a box was not labeled")

        def forward() -> None:
            with torch.inference_mode(), torch.autocast("cpu", labeler.dtype, enabled=dtype != "float32"):
                for crops, branch in batches:
                    labeler.network.logits(crops, branch, Branch.STUDENT)

        forms: dict[str, Callable[[], object]] = {"label": label, "forward": forward}
        seconds = in_turn(forms, ROUNDS)
    table.add("bare forward, a crop", 1000 * seconds["forward"] / (PICTURES * BOXES), "ms")
    table.add("labeling, a box", 1000 * seconds["label"] / (PICTURES * BOXES), "ms")
    table.add("labeling throughput by bare forward", seconds["forward"] / seconds["label"], "", least=0.90)
    return table.finish()


if __name__ == "__main__":
    raise SystemExit(main())
