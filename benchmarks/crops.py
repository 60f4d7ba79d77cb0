"""Measures crops/s of one server worker on the CPU, for three backbones, two crop sizes and two precisions.

Uses the worker of the server with one torch thread, in bfloat16 and float32, with random weights, which do not affect
speed. Measures CPU time, which other processes affect little; n idle cores process at most n times as many crops.
Decoding, cropping and encoding come on top (see host_work).
"""

import asyncio
import itertools

import cv2
import torch

from benchmarks.inputs import SIZES, boxed_images, random_labeler
from benchmarks.timing import Table, interleaved
from mal_server.inference.worker import Worker
from mal_train.core.images.decoder import decode_image
from mal_train.kernel.labeler.labeler import Labeler
from mal_train.kernel.labeler.types import Crop, Prediction, PredictOptions

ARCHS = ("vit-deit-tiny/16", "vit-deit-small/16", "vit-deit-base/16")
SIDES = (224, 512)
PRECISIONS = ("bfloat16", "float32")
BATCH, ROUNDS = 4, 2


def crops_for(labeler: Labeler) -> list[Crop]:
    """Returns a batch: the boxes of one image."""
    (image,) = boxed_images(1, BATCH, SIZES["640x480"])
    return [crop for crop in labeler.prepare(decode_image(image.content), image.boxes) if isinstance(crop, Crop)]


def cpu_s_per_crop(labeler: Labeler) -> float:
    """Returns the median over a few batches, after a warm-up batch."""
    worker, crops = Worker(labeler, "cpu", lambda: torch.set_num_threads(1)), crops_for(labeler)

    def run() -> None:
        predictions = asyncio.run(worker.run(PredictOptions(), crops))
        if len(predictions) != BATCH or not all(isinstance(each, Prediction) for each in predictions):
            raise RuntimeError("a crop has no prediction")

    try:
        return interleaved({"batch": run}, ROUNDS)["batch"] / BATCH
    finally:
        worker.close()


def main() -> int:
    """Prints the table."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    table = Table("crops", f"One worker of the server on one core, batches of {BATCH}, CPU time")
    for arch in ARCHS:
        for side, precision in itertools.product(SIDES, PRECISIONS):
            seconds = cpu_s_per_crop(random_labeler(arch, side, precision))
            variant = f"{arch}, crop {side}, {precision}"
            table.add(f"{variant}: CPU time of a crop", 1000 * seconds, "ms")
            table.add(f"{variant}: crops of one core", 1 / seconds, "a second")
    return table.finish()


if __name__ == "__main__":
    raise SystemExit(main())
