"""Runs `mal-train inference` with a labeler that returns one small mask at once, to measure memory at many boxes.

Usage: python -m tests.chaos.stand_in_labels SPEC; prints the peak memory of the process in MiB. Reading, decoding,
batching, the journal and the output are those of the command.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from mal_train.cli import main
from mal_train.core.masks.geometry import Box, Window
from mal_train.core.masks.points import Point
from mal_train.core.masks.rle import encode_mask
from mal_train.kernel.labeler.labeler import Labeler
from mal_train.kernel.labeler.types import Crop, Label, Prediction

BOXES_PER_IMAGE = 8
N_FILES = 16
WIDTH, HEIGHT = 32, 24
PIXELS = np.zeros((1, 1, 3), dtype=np.uint8)
PREDICTION = Prediction(np.zeros((1, 1), dtype=np.float32))
MASK = encode_mask(np.arange(HEIGHT)[:, None] + np.arange(WIDTH)[None, :] < 20)
LABEL = Label(MASK, 0.5, 210, (0.0, 0.0, 20.0, 20.0), None, ())


def prepare(
    _: Labeler, image: np.ndarray[Any, Any], boxes: Sequence[Sequence[float]], *, points: Sequence[Sequence[Point]]
) -> list[Crop]:
    """Returns crops of one pixel."""
    (box,) = boxes
    x, y, w, h = box
    inside: Box = (x, y, w, h)
    return [Crop(PIXELS, inside, inside, Window(0, 0, 1, 1), image.shape[:2], w * h, tuple(points[0]))]


def write_boxes(folder: Path, count: int) -> tuple[Path, Path]:
    """Writes a COCO file of `count` boxes row by row, and its images; returns (annotation file, image folder)."""
    images = folder / "images"
    images.mkdir(parents=True)
    for number in range(N_FILES):
        Image.new("RGB", (WIDTH, HEIGHT), (number, 0, 0)).save(images / f"{number}.png")
    path = folder / "boxes.json"
    with path.open("w") as file:
        file.write('{"categories": [{"id": 1, "name": "cup"}], "images": [')
        for image in range(-(-count // BOXES_PER_IMAGE)):
            row = {"id": image, "file_name": f"{image % N_FILES}.png", "width": WIDTH, "height": HEIGHT}
            file.write((", " if image else "") + json.dumps(row))
        file.write('], "annotations": [')
        for number in range(count):
            box = [number % 7, number % 5, 12.5, 9.0]
            row = {"id": number, "image_id": number // BOXES_PER_IMAGE, "category_id": 1, "bbox": box, "iscrowd": 0}
            file.write((", " if number else "") + json.dumps(row))
        file.write("]}")
    return path, images


def run(spec: str) -> int:
    """Runs the command with the stand-in."""
    patched: dict[str, Any] = {
        "prepare": prepare,
        "predict": lambda _labeler, crops, _options: [PREDICTION] * len(crops),
        "claim": lambda _labeler, _crop, _prediction: SimpleNamespace(mask=None),
        "label_from_mask": lambda _labeler, _crop, _claim, _mask: LABEL,
    }
    for name, method in patched.items():
        setattr(Labeler, name, method)
    return main(["inference", "-e", spec])


if __name__ == "__main__":
    code = run(sys.argv[1])
    # Not of getrusage, whose value includes the process that started this one.
    print(int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024)
    sys.exit(code)
