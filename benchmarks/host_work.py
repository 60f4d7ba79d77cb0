"""Measures the CPU time per box outside the network, on one thread: decoding, crop, mask and RLE.

Ten boxes per image, crop 512: `decode_image` once, `Labeler.prepare` and `Labeler.finish` for each box, with synthetic
probability maps. The scenes at 12 Mpix are those at 640 x 480 px, enlarged.
"""

from collections.abc import Callable

import cv2
import torch

from benchmarks.inputs import SIZES, BoxedImage, boxed_images, object_map, random_labeler
from benchmarks.timing import Table, interleaved
from mal_train.core.images.decoder import decode_image
from mal_train.core.masks import geometry
from mal_train.kernel.labeler.labeler import Labeler
from mal_train.kernel.labeler.types import Crop, Prediction

BOXES, SIDE = 10, 512
MOST_MS = {"640x480": 8.0, "12 Mpix": 25.0}


def crops(labeler: Labeler, image: BoxedImage) -> list[Crop]:
    """Returns the crops of an image, all of whose boxes are valid."""
    prepared = labeler.prepare(decode_image(image.content), image.boxes)
    valid = [crop for crop in prepared if isinstance(crop, Crop)]
    if len(valid) != BOXES:
        raise RuntimeError(f"{BOXES - len(valid)} of {BOXES} boxes were rejected")
    return valid


def stages(labeler: Labeler, images: list[BoxedImage], rounds: int) -> dict[str, float]:
    """Returns the milliseconds per box of each stage."""
    decoded = [decode_image(image.content) for image in images]
    crops_of_images = [crops(labeler, image) for image in images]
    windows = [
        geometry.cut(pixels, crop.window)
        for pixels, image_crops in zip(decoded, crops_of_images, strict=True)
        for crop in image_crops
    ]
    maps = [Prediction(object_map(SIDE, seed)) for seed in range(BOXES)]

    def prepare() -> None:
        for pixels, image in zip(decoded, images, strict=True):
            labeler.prepare(pixels, image.boxes)

    def finish() -> None:
        for image_crops in crops_of_images:
            for crop, probability in zip(image_crops, maps, strict=True):
                labeler.finish(crop, probability)

    variants: dict[str, Callable[[], object]] = {
        "decode": lambda: [decode_image(image.content) for image in images],
        "crop": prepare,
        "  of which resizing": lambda: [geometry.resize_crop(window, SIDE) for window in windows],
        "finish": finish,
    }
    seconds = interleaved(variants, rounds)
    return {name: 1000 * value / (BOXES * len(images)) for name, value in seconds.items()}


def main() -> int:
    """Prints the table."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    table = Table("host_work", f"Host work of one box of {BOXES} per image, crop {SIDE}, CPU time of one thread")
    labeler = random_labeler("vit-micro/16", SIDE)
    for name, size_wh in SIZES.items():
        small = size_wh == (640, 480)
        images = boxed_images(4 if small else 2, BOXES, size_wh)
        times_ms = stages(labeler, images, rounds=9 if small else 3)
        area = sum(w * h for image in images for _, _, w, h in image.boxes) / (BOXES * len(images))
        table.add(f"{name}: mean box", area / 1e6, "Mpix")
        for stage, value in times_ms.items():
            table.add(f"{name}: {stage}", value, "ms")
        table.add(
            f"{name}: total", times_ms["decode"] + times_ms["crop"] + times_ms["finish"], "ms", most=MOST_MS[name]
        )
    return table.finish()


if __name__ == "__main__":
    raise SystemExit(main())
