"""Compares bfloat16 with float32 on this machine: time of a batch, and difference of the masks.

Masks come from the built-in model on photographs of scikit-image with boxes; random weights would give noise, which
rounding changes to other noise. Times are those of ViT-tiny and ViT-small with random weights.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.inputs import SIZES, boxed_images, random_labeler
from benchmarks.timing import Table, interleaved
from deploy.demo.photographs import write_photographs
from mal_train.core.coco.annotations import by_image, read_coco
from mal_train.core.images.decoder import decode_image
from mal_train.core.images.files import read_image
from mal_train.core.masks import rle
from mal_train.core.settings import Precision
from mal_train.kernel.checkpoint.builtin import BUILTIN, resolve
from mal_train.kernel.labeler.labeler import Labeler
from mal_train.kernel.labeler.load import load_labeler
from mal_train.kernel.labeler.types import Crop, Label
from mal_train.kernel.networks.precision import resolve as resolve_precision

TIMED = (("vit-deit-tiny/16", 224, 8, 3), ("vit-deit-tiny/16", 512, 2, 2), ("vit-deit-small/16", 512, 2, 1))
"""Network, crop size, batch size, rounds."""


def masks_iou() -> list[float]:
    """Returns the IoU of both masks of each box."""
    labelers = [load_labeler(resolve(BUILTIN), precision=name)[0] for name in ("float32", "bfloat16")]
    ious = []
    with tempfile.TemporaryDirectory() as name:
        split = write_photographs(Path(name))
        for image, annotations in by_image(read_coco(split.annotations)):
            pixels = read_image(split.images / image.file_name)
            boxes = [annotation.box_xywh for annotation in annotations]
            labels = [labeler.label(pixels, boxes) for labeler in labelers]
            for a, b in zip(*labels, strict=True):
                if not isinstance(a, Label) or not isinstance(b, Label):
                    raise RuntimeError(f"{image.file_name}: a box was rejected")
                ious.append(rle.iou(a.rle, b.rle))
    return ious


def crops_of(labeler: Labeler, count: int) -> list[Crop]:
    (image,) = boxed_images(1, count, SIZES["640x480"])
    return [crop for crop in labeler.prepare(decode_image(image.content), image.boxes) if isinstance(crop, Crop)]


def main() -> int:
    """Prints the table. The ratio has a bound only if the processor supports bfloat16."""
    torch.set_num_threads(1)
    table = Table("bfloat16", "bfloat16 against float32, CPU time of one thread")
    is_supported = resolve_precision(Precision.AUTO, torch.device("cpu")) is torch.bfloat16
    for arch, side, count, rounds in TIMED:
        float32, bfloat16 = random_labeler(arch, side, "float32"), random_labeler(arch, side, "bfloat16")
        crops = crops_of(float32, count)
        variants: dict[str, Callable[[], object]] = {
            "float32": lambda labeler=float32, crops=crops: labeler.predict(crops),  # type: ignore[misc]
            "bfloat16": lambda labeler=bfloat16, crops=crops: labeler.predict(crops),  # type: ignore[misc]
        }
        seconds = interleaved(variants, rounds)
        ratio = seconds["float32"] / seconds["bfloat16"]
        table.add(f"{arch}, crop {side}, batch {count}: times faster", ratio, "x", least=1.5 if is_supported else None)
    ious = masks_iou()
    table.add(f"mean IoU of {len(ious)} masks on photographs", float(np.mean(ious)), "", least=0.995)
    table.add("least IoU", min(ious), "")
    return table.finish()


if __name__ == "__main__":
    raise SystemExit(main())
