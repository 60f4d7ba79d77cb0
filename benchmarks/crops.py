"""Crops/s of one worker of the server on the CPU, for three backbones, two crop sizes and two number formats.

A worker as the server has it, with one thread of torch, in bfloat16 and in float32, and random weights: speed does not
depend on them. CPU time, so that other work on the machine moves it little; by the clock one quiet core gives this many
crops a second, and more cores at most so many times as much. Decoding, cropping and encoding come on top (host_work).
"""

import asyncio
import itertools

import cv2
import torch

from benchmarks.subjects import SIZES, random_labeler, subjects
from benchmarks.timing import Table, in_turn
from mal_server.inference.worker import Worker
from mal_train.core.masks.images import decode_image
from mal_train.kernel.labeler.labeler import Crop, Labeler, Prediction, PredictOptions

ARCHS = ("vit-deit-tiny/16", "vit-deit-small/16", "vit-deit-base/16")
SIDES = (224, 512)
PRECISIONS = ("bfloat16", "float32")
BATCH, ROUNDS = 4, 2


def crops_for(labeler: Labeler) -> list[Crop]:
    """A batch, of the boxes of one picture."""
    (picture,) = subjects(1, BATCH, SIZES["640x480"])
    return [crop for crop in labeler.prepare(decode_image(picture.content), picture.boxes) if isinstance(crop, Crop)]


def cpu_s_a_crop(labeler: Labeler) -> float:
    """Median over a few batches, after one that warms up."""
    worker, crops = Worker(labeler, "cpu", lambda: torch.set_num_threads(1)), crops_for(labeler)

    def run() -> None:
        found = asyncio.run(worker.run(PredictOptions(), crops))
        if len(found) != BATCH or not all(isinstance(one, Prediction) for one in found):
            raise RuntimeError("a crop was not answered")

    try:
        return in_turn({"batch": run}, ROUNDS)["batch"] / BATCH
    finally:
        worker.close()


def main() -> int:
    """Prints the table."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    table = Table("crops", f"One worker of the server on one core, batches of {BATCH}, CPU time")
    for arch in ARCHS:
        for side, precision in itertools.product(SIDES, PRECISIONS):
            seconds = cpu_s_a_crop(random_labeler(arch, side, precision))
            what = f"{arch}, crop {side}, {precision}"
            table.add(f"{what}: CPU time of a crop", 1000 * seconds, "ms")
            table.add(f"{what}: crops of one core", 1 / seconds, "a second")
    return table.finish()


if __name__ == "__main__":
    raise SystemExit(main())
