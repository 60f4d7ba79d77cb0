"""Measures how clicks improve the masks of boxes on photographs, and the CPU time of a round of clicks.

    python -m benchmarks.clicks --data $MAL_SHARED/data [--clicks N] [--every N] [--json FILE]

Labels every box of `coco_val_dev` and `coco_val_dev2`, then clicks as `protocol` states, and prints for each set mIoU
after 0, 1, 2, 3, 5, 10 and 20 clicks and the mean number of clicks to an IoU of .80, .85 and .90, which is at most the
number of simulated clicks. A box whose mask reaches no such IoU counts with that number. The network runs once for each
box; the time is that of `finish` with points, less that without. The weights of `kernel.labeler.clicks` were fitted to
every fourth image of `coco_val_dev`; nothing was chosen on `coco_val_dev2`.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import torch

from benchmarks.clicks.protocol import TARGETS, Mask, clicks_to, next_click, simulated
from benchmarks.timing import Table
from mal_train.core.coco.annotations import Annotation, ImageInfo, by_image, read_coco
from mal_train.core.images.decoder import RgbImage, decode_image
from mal_train.core.masks import geometry, rle
from mal_train.core.masks.points import MAX_POINTS, Point
from mal_train.kernel.checkpoint.builtin import BUILTIN, resolve
from mal_train.kernel.labeler.labeler import Labeler
from mal_train.kernel.labeler.load import load_labeler
from mal_train.kernel.labeler.types import Crop

SETS = ("coco_val_dev", "coco_val_dev2")
SHOWN = (0, 1, 2, 3, 5, 10, 20)
"""Numbers of clicks that the table shows."""
LEAST_GAIN = {1: 0.04, 3: 0.08}
"""Bounds of the gain in mIoU by number of clicks."""
MOST_MS = 10.0


class Clicker:
    """Corrects the mask of one box, and measures the time that its points take.

    Args:
        labeler: labels the box.
        crop: crop of the box.
        truth: true mask of the image.

    Attributes:
        seconds: CPU time of each round of clicks beside that of the box alone, and the number of its points.
    """

    def __init__(self, labeler: Labeler, crop: Crop, truth: Mask) -> None:
        self._labeler, self._crop, self._truth = labeler, crop, truth
        self._box = geometry.box_pixels(crop.box_inside, crop.image_hw)
        self.seconds: list[tuple[int, float]] = []
        (self._prediction,) = labeler.predict([crop])
        began = time.process_time()
        labeler.finish(crop, self._prediction)
        self._plain_s = time.process_time() - began

    def correct(self, points: Sequence[Point]) -> tuple[float, Point | None]:
        """Returns the IoU of the mask, and the next click in the box: none can be obeyed outside."""
        crop = replace(self._crop, points=tuple(points))
        began = time.process_time()
        label = self._labeler.finish(crop, self._prediction)
        if points:
            self.seconds.append((len(points), time.process_time() - began - self._plain_s))
        mask = rle.decode_mask(label.rle)
        union = np.count_nonzero(mask | self._truth)
        box = slice(self._box.row0, self._box.row1), slice(self._box.col0, self._box.col1)
        click = next_click(mask[box], self._truth[box], self._box.col0, self._box.row0)
        return (float(np.count_nonzero(mask & self._truth) / union) if union else 1.0), click


def boxes_of(folder: Path, every: int) -> Iterator[tuple[RgbImage, ImageInfo, list[Annotation]]]:
    """Yields every n-th image of a data set with its objects."""
    for index, (image, rows) in enumerate(by_image(read_coco(folder / "annotations.json"))):
        if index % every == 0:
            pixels = decode_image((folder / "images" / image.file_name).read_bytes())
            yield pixels, image, [row for row in rows if not row.iscrowd]


def clickers(labeler: Labeler, folder: Path, every: int) -> Iterator[Clicker]:
    """Yields each box of a data set."""
    for pixels, image, rows in boxes_of(folder, every):
        for row, crop in zip(rows, labeler.prepare(pixels, [row.box_xywh for row in rows]), strict=True):
            if not isinstance(crop, Crop):
                raise RuntimeError(f"annotation {row.id} of image {image.id}: {crop}")
            truth = rle.from_segmentation(row.raw["segmentation"], *crop.image_hw)
            yield Clicker(labeler, crop, rle.decode_mask(truth))


def measure(table: Table, name: str, labeler: Labeler) -> None:
    """Adds the rows of a data set."""
    clicks: int = table.arguments.clicks
    ious: list[list[float]] = []
    seconds: list[tuple[int, float]] = []
    for clicker in clickers(labeler, table.arguments.data / name, table.arguments.every):
        ious.append(simulated(clicker.correct, clicks))
        seconds += clicker.seconds
    means = np.mean(ious, axis=0)
    table.add(f"{name}: boxes", len(ious), "")
    for count in SHOWN:
        if count <= clicks:
            least = means[0] + LEAST_GAIN[count] if count in LEAST_GAIN else means[0]
            table.add(
                f"{name}: mIoU after {count} clicks", float(means[count]), "", least=float(np.floor(least * 1e4) / 1e4)
            )
    for target in TARGETS:
        mean = float(np.mean([clicks_to(each, target) for each in ious]))
        table.add(f"{name}: clicks to an IoU of {target:.2f}, at most {clicks}", mean, "")
    for count in sorted({1, min(clicks, 3), clicks}):
        ms = 1000 * float(np.median([s for points, s in seconds if points == count]))
        most = MOST_MS if count <= 3 else None
        table.add(f"{name}: CPU time of {count} points beside the pass, median", ms, "ms", most=most)


def click_count(text: str) -> int:
    """Reads the option --clicks."""
    if not 1 <= (count := int(text)) <= MAX_POINTS:
        raise argparse.ArgumentTypeError(f"{text}; it must be from 1 to {MAX_POINTS}, the points of a box")
    return count


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help=f"folder of {' and '.join(SETS)}")
    parser.add_argument("--clicks", type=click_count, default=20, metavar="N", help="clicks (default: %(default)s)")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="use every n-th image (default: all)")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS, help="data sets (default: both)")
    table = Table("clicks", "Masks of the built-in model, corrected by clicks, float32", parser)
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    labeler, _ = load_labeler(resolve(BUILTIN), precision="float32")
    for name in table.arguments.sets:
        measure(table, name, labeler)
    return table.finish()


if __name__ == "__main__":
    raise SystemExit(main())
