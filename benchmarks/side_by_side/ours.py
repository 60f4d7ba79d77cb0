"""Labels a folder as `mal-train inference` does, once for each request; see `published.answer_requests`."""

import argparse
import json
from pathlib import Path

from mal_train.core.threads import wait_passively

wait_passively()  # as the commands do, before torch is imported

import torch  # noqa: E402

from benchmarks.side_by_side.published import answer_requests  # noqa: E402
from mal_train.core.coco.annotations import Annotation, ImageInfo  # noqa: E402
from mal_train.core.settings import LabelerConfig  # noqa: E402
from mal_train.kernel.convert.tao_import import read_tao_checkpoint  # noqa: E402
from mal_train.kernel.labeler.labeler import Labeler  # noqa: E402
from mal_train.kernel.labeler.types import Label  # noqa: E402
from mal_train.kernel.networks.network import MalNetwork  # noqa: E402
from mal_train.offline.dataset_labeler import Row  # noqa: E402
from mal_train.offline.multi_device import label_on_devices  # noqa: E402


def rows_of(data: Path) -> list[Row]:
    """Returns the images of a folder with their boxes."""
    document = json.loads((data / "annotations.json").read_text(encoding="utf-8"))
    rows: list[Row] = []
    for image in document["images"]:
        boxes = [
            Annotation(row["id"], image["id"], 1, tuple(row["bbox"]), iscrowd=False, raw={})
            for row in document["annotations"]
            if row["image_id"] == image["id"]
        ]
        rows.append((ImageInfo(image["id"], image["file_name"], image["width"], image["height"]), boxes))
    return rows


def labeler_of(weights: Path, crop_size: int, precision: str) -> Labeler:
    """Returns a labeler with the weights of the published network."""
    imported = read_tao_checkpoint(weights)
    network = MalNetwork(imported.model)
    network.load_state_dict(imported.weights)
    return Labeler(network, LabelerConfig(crop_size=crop_size), precision=precision)


def main() -> None:
    """Answers requests until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--crop", type=int, required=True)
    parser.add_argument("--precision", required=True)
    arguments = parser.parse_args()
    rows = rows_of(arguments.data)
    labeler = labeler_of(arguments.data / "published.pth", arguments.crop, arguments.precision)

    def run() -> None:
        results = label_on_devices(
            [torch.device("cpu")], labeler, rows, arguments.data / "images", precision=arguments.precision
        )
        failed = [result for _, result in results if not isinstance(result, Label)]
        if failed:
            raise RuntimeError(f"{len(failed)} boxes have no mask, the first because of {failed[0]}")

    answer_requests(run)


if __name__ == "__main__":
    main()
