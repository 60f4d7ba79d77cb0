"""Measures the CPU time of polygons and of their response for the worst masks, per pixel.

Usage: python -m benchmarks.polygons [--json FILE]. A checkerboard has the most rings for its pixels, a mask with a hole
for every other pixel the most holes, and noise of 512 px that is enlarged to 4000 px the longest outlines.
"""

from collections.abc import Callable, Mapping

import cv2
import numpy as np
from mal.v1 import types_pb2
from numpy.typing import NDArray

from benchmarks.timing import Table, interleaved
from mal_server.api.serialization.labeling_messages import write_response
from mal_server.inference.requests import InstanceResult, PartialResult, Timing
from mal_train.core.masks.encodings import encode
from mal_train.core.masks.polygons import merge_holes, to_rings
from mal_train.core.masks.rle import area, decode_patch, encode_mask
from mal_train.core.settings import MaskFormat
from mal_train.kernel.labeler.types import Label

MOST_US = 2.0
"""Microseconds for each pixel of the mask. With OpenCV's RETR_CCOMP, holes in a square of 1023 px take 3.3."""


def worst_masks() -> Mapping[str, NDArray[np.bool_]]:
    """Returns the masks by name."""
    holes = np.ones((1023, 1023), np.bool_)
    holes[1::2, 1::2] = False
    noise = np.random.default_rng(0).random((512, 512)).astype(np.float32)
    return {
        "checkerboard, 512 px": np.add.outer(np.arange(512), np.arange(512)) % 2 == 0,
        "holes, 1023 px": holes,
        "noise, 512 px": noise < 0.5,
        "noise, enlarged to 4000 px": cv2.resize(noise, (4000, 4000)) < 0.5,
    }


def steps_of(mask: NDArray[np.bool_]) -> dict[str, Callable[[], object]]:
    """Returns the measured steps."""
    code = encode_mask(mask)
    patch = decode_patch(code)
    rings = to_rings(patch)
    label = Label(code, 0.5, area(code), None, None, ())
    result = PartialResult((InstanceResult(0, label, encode(code, [MaskFormat.POLYGONS])),), Timing())
    return {
        "traced": lambda: to_rings(patch),
        "with a tolerance of 1 px": lambda: to_rings(patch, 1.0),
        "holes merged": lambda: merge_holes(rings),
        "response": lambda: write_response(result, types_pb2.ModelRef()),
    }


def main() -> int:
    """Prints the table."""
    cv2.setNumThreads(1)
    table = Table("polygons", "Polygons of the worst masks, CPU time of one thread for each pixel")
    for name, mask in worst_masks().items():
        for step, seconds in interleaved(steps_of(mask), rounds=3).items():
            most = MOST_US if step == "traced" else None
            table.add(f"{name}: {step}", 1e6 * seconds / mask.size, "µs/px", most=most)
    return table.finish()


if __name__ == "__main__":
    raise SystemExit(main())
