"""Measures a crop by engine of the network: torch in float32, OpenVINO in float32 and in int8.

Rows are the model in the package, and random weights of each backbone and crop size. A crop is a medium box, as in
`mal-train evaluate`; sides alternate. The int8 of random weights is calibrated on the measured crops.

    python -m benchmarks.network_engines [--only NAME …] [--threads N] [--rounds N] [--json FILE]      some minutes
"""

import argparse
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from benchmarks.inputs import boxed_images
from benchmarks.timing import Table, interleaved
from mal_train.core.images.decoder import decode_image
from mal_train.core.settings import LabelerConfig
from mal_train.kernel.checkpoint import builtin
from mal_train.kernel.checkpoint.checkpoint import load_checkpoint
from mal_train.kernel.labeler.labeler import Labeler
from mal_train.kernel.labeler.load import calibration_of, labeler_of
from mal_train.kernel.labeler.types import Crop
from mal_train.kernel.networks.network import MalNetwork, ModelConfig, normalize
from mal_train.kernel.networks.quantization import Int8Calibration, observed_ranges

ARCHS = {
    "ViT-tiny": "vit-deit-tiny/16",
    "ViT-small": "vit-deit-small/16",
    "ViT-base": "vit-deit-base/16",
    "FAN-tiny hybrid": "fan_tiny_8_p4_hybrid",
}
CROP_SIZES = (224, 512)
BUILTIN = "built-in model, crop 224"
VARIANTS = (("torch", "float32"), ("openvino", "float32"), ("openvino", "int8"))
BOX_SIDE_PX = 64.0
"""Of the size class medium."""


def case_names() -> list[str]:
    """Returns the names of all rows."""
    return [BUILTIN, *(f"{name}, crop {size}" for name in ARCHS for size in CROP_SIZES)]


def labelers_of(case: str) -> dict[str, Labeler]:
    """Returns a labeler for each engine and precision, with the same weights."""
    if case == BUILTIN:
        checkpoint = load_checkpoint(builtin.resolve(builtin.BUILTIN), None)
        network = MalNetwork.from_weights(checkpoint.model, checkpoint.weights).eval()
        config, int8 = checkpoint.labeler, calibration_of(checkpoint.sha256, checkpoint.int8)
    else:
        name, _, size = case.partition(", crop ")
        torch.manual_seed(0)
        network = MalNetwork(ModelConfig(ARCHS[name])).eval()
        config = LabelerConfig(crop_size=int(size))
        int8 = _calibrated(network, config)
    return {
        f"{engine} {precision}": labeler_of(network, config, int8, precision=precision, network_engine=engine)
        for engine, precision in VARIANTS
    }


def _calibrated(network: MalNetwork, config: LabelerConfig) -> Int8Calibration:
    crops = torch.from_numpy(np.stack([crop.pixels for crop in crops_of(Labeler(network, config), 2)]))
    with torch.inference_mode(), observed_ranges(network.student) as ranges:
        network.student(normalize(crops), torch.ones(len(crops), dtype=torch.int64))
    return Int8Calibration({f"student.{name}": bounds for name, bounds in ranges.items()}, len(crops))


def crops_of(labeler: Labeler, count: int) -> Sequence[Crop]:
    """Returns crops of medium boxes in a drawn photograph."""
    (image,) = boxed_images(1, count, (640, 480))
    boxes = [
        (min(x, 640 - BOX_SIDE_PX), min(y, 480 - BOX_SIDE_PX), BOX_SIDE_PX, BOX_SIDE_PX) for x, y, _, _ in image.boxes
    ]
    return [crop for crop in labeler.prepare(decode_image(image.content), boxes) if isinstance(crop, Crop)]


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description="Measure a crop by engine of the network.")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=case_names(), help="rows to measure")
    parser.add_argument("--threads", type=int, default=1, help="cores of a pass (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=11, help="measurements of each side (default: %(default)s)")
    table = Table("network_engines", "A crop by engine of the network, CPU time of one process", parser)
    torch.set_num_threads(table.arguments.threads)
    for case in table.arguments.only or case_names():
        labelers = labelers_of(case)
        crops = {name: crops_of(labeler, 1) for name, labeler in labelers.items()}
        variants = {name: partial(labeler.predict, crops[name]) for name, labeler in labelers.items()}
        taken = interleaved(variants, table.arguments.rounds)
        for name, seconds in taken.items():
            table.add(f"{case}: {name}", 1000 * seconds, "ms")
    return table.finish()


if __name__ == "__main__":
    raise SystemExit(main())
