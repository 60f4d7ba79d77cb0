"""CPU time around the network for each box, on one thread: its share of decoding, the crop, the mask and its code.

Ten boxes a picture, crop 512: `decode_image` once, `Labeler.prepare` and `Labeler.finish` for each box; probability
maps of blobs stand in for the network's. The scenes at 12 Mpix are those at 640 x 480 px, enlarged.
"""

from collections.abc import Callable

import cv2
import torch

from benchmarks.subjects import SIZES, Subject, object_map, random_labeler, subjects
from benchmarks.timing import Table, in_turn
from mal_train.core.masks import geometry
from mal_train.core.masks.images import decode_image
from mal_train.kernel.labeler.labeler import Crop, Labeler, Prediction

BOXES, SIDE = 10, 512
MOST_MS = {"640x480": 8.0, "12 Mpix": 25.0}


def crops(labeler: Labeler, one: Subject) -> list[Crop]:
    """Every box of these subjects is good."""
    prepared = labeler.prepare(decode_image(one.content), one.boxes)
    found = [crop for crop in prepared if isinstance(crop, Crop)]
    if len(found) != BOXES:
        raise RuntimeError(f"{BOXES - len(found)} of {BOXES} boxes were refused")
    return found


def stages(labeler: Labeler, pictures: list[Subject], rounds: int) -> dict[str, float]:
    """Milliseconds a box of each stage."""
    images = [decode_image(one.content) for one in pictures]
    cut = [crops(labeler, one) for one in pictures]
    windows = [geometry.cut(image, crop.window) for image, found in zip(images, cut, strict=True) for crop in found]
    maps = [Prediction(object_map(SIDE, seed)) for seed in range(BOXES)]

    def prepare() -> None:
        for image, one in zip(images, pictures, strict=True):
            labeler.prepare(image, one.boxes)

    def finish() -> None:
        for found in cut:
            for crop, probability in zip(found, maps, strict=True):
                labeler.finish(crop, probability)

    forms: dict[str, Callable[[], object]] = {
        "decode": lambda: [decode_image(one.content) for one in pictures],
        "crop": prepare,
        "  of it Pillow's resize": lambda: [geometry.resize_crop(window, SIDE) for window in windows],
        "finish": finish,
    }
    seconds = in_turn(forms, rounds)
    return {name: 1000 * value / (BOXES * len(pictures)) for name, value in seconds.items()}


def main() -> int:
    """Prints the table."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    table = Table("host_work", f"Host work of one box of {BOXES} a picture, crop {SIDE}, CPU time of one thread")
    labeler = random_labeler("vit-micro/16", SIDE)
    for name, size_wh in SIZES.items():
        small = size_wh == (640, 480)
        pictures = subjects(4 if small else 2, BOXES, size_wh)
        found = stages(labeler, pictures, rounds=9 if small else 3)
        area = sum(w * h for one in pictures for _, _, w, h in one.boxes) / (BOXES * len(pictures))
        table.add(f"{name}: mean box", area / 1e6, "Mpix")
        for stage, value in found.items():
            table.add(f"{name}: {stage}", value, "ms")
        table.add(f"{name}: together", found["decode"] + found["crop"] + found["finish"], "ms", most=MOST_MS[name])
    return table.finish()


if __name__ == "__main__":
    raise SystemExit(main())
