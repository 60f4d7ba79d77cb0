"""bfloat16 against float32 on this machine: the time of a batch, and how far the masks differ.

The model of the package on scikit-image's photographs with their boxes (a trained network: random weights would answer
with noise, of which rounding makes other noise). Times are those of ViT-tiny and ViT-small with random weights.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.subjects import SIZES, random_labeler, subjects
from benchmarks.timing import Table, in_turn
from deploy.demo.photographs import write_photographs
from mal_train.core.coco.annotations import by_image, read_coco
from mal_train.core.masks import rle
from mal_train.core.masks.images import decode_image, read_image
from mal_train.kernel.checkpoint.builtin import BUILTIN, resolve
from mal_train.kernel.labeler.labeler import Crop, Label, Labeler, load_labeler
from mal_train.kernel.networks.precision import Precision
from mal_train.kernel.networks.precision import resolve as resolve_precision

TIMED = (("vit-deit-tiny/16", 224, 8, 3), ("vit-deit-tiny/16", 512, 2, 2), ("vit-deit-small/16", 512, 2, 1))
"""Network, crop side, crops in a batch, rounds."""


def masks_iou() -> list[float]:
    """IoU of the two masks of each box."""
    labelers = [load_labeler(resolve(BUILTIN), precision=name)[0] for name in ("float32", "bfloat16")]
    found = []
    with tempfile.TemporaryDirectory() as name:
        split = write_photographs(Path(name))
        for image, annotations in by_image(read_coco(split.annotations)):
            pixels = read_image(split.images / image.file_name)
            boxes = [annotation.box_xywh for annotation in annotations]
            answers = [labeler.label(pixels, boxes) for labeler in labelers]
            for a, b in zip(*answers, strict=True):
                if not isinstance(a, Label) or not isinstance(b, Label):
                    raise RuntimeError(f"{image.file_name}: a box was refused")
                found.append(rle.iou(a.rle, b.rle))
    return found


def crops_of(labeler: Labeler, count: int) -> list[Crop]:
    (one,) = subjects(1, count, SIZES["640x480"])
    return [crop for crop in labeler.prepare(decode_image(one.content), one.boxes) if isinstance(crop, Crop)]


def main() -> int:
    """Prints the table. The ratio is a promise only where the processor has bfloat16."""
    torch.set_num_threads(1)
    table = Table("bfloat16", "bfloat16 against float32, CPU time of one thread")
    has_it = resolve_precision(Precision.AUTO, torch.device("cpu")) is torch.bfloat16
    for arch, side, count, rounds in TIMED:
        exact, fast = random_labeler(arch, side, "float32"), random_labeler(arch, side, "bfloat16")
        crops = crops_of(exact, count)
        forms: dict[str, Callable[[], object]] = {
            "float32": lambda exact=exact, crops=crops: exact.predict(crops),  # type: ignore[misc]
            "bfloat16": lambda fast=fast, crops=crops: fast.predict(crops),  # type: ignore[misc]
        }
        seconds = in_turn(forms, rounds)
        ratio = seconds["float32"] / seconds["bfloat16"]
        table.add(f"{arch}, crop {side}, batch {count}: times faster", ratio, "x", least=1.5 if has_it else None)
    ious = masks_iou()
    table.add(f"mean IoU of {len(ious)} masks on photographs", float(np.mean(ious)), "", least=0.995)
    table.add("least IoU", min(ious), "")
    return table.finish()


if __name__ == "__main__":
    raise SystemExit(main())
