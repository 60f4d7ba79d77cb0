"""Measures what Ray adds to the time of an image, by the number of boxes of a part.

One actor on a cluster of this machine, against a plain loop over the same parts in this process. The network is small,
and images have one box. The time from the first to the last file counts, without the start of the cluster and of the
labeler. Needs two idle cores: one for the actor, one for the command.

    python -m benchmarks.ray_overhead [--images N] [--json FILE]
"""

import argparse
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.timing import Table
from mal_train.commands.ray_inference import task_size
from mal_train.core.coco.parquet_parts import Part, divide, tasks_of
from mal_train.core.coco.parquet_reader import ParquetDataset
from mal_train.core.coco.part_folder import PartFolder
from mal_train.core.coco.stream import write_coco
from mal_train.core.images.files import ImageFolder
from mal_train.core.settings import LabelerConfig
from mal_train.kernel.checkpoint.checkpoint import Checkpoint, save_checkpoint, sha256_of
from mal_train.kernel.networks.network import MalNetwork, ModelConfig
from mal_train.offline.part_labeler import PartJob, PartLabeler, decode_message, encode_task
from mal_train.offline.ray_cluster import ActorPool, RayCluster
from mal_train.offline.tta import TtaOptions

PART_BOXES = (1, 8, 64, 256)
N_FILES = 16
WIDTH, HEIGHT = 320, 240
POOL = ActorPool(count=1, cpus=1, gpus=0)
MAX_MS = 1.0
"""Bound of the overhead per image with parts of 256 boxes."""


def write_inputs(folder: Path, images: int) -> None:
    """Writes images, boxes in parquet and a checkpoint of a small network."""
    rng = np.random.default_rng(1)
    for number in range(N_FILES):
        pixels = rng.integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    rows = [
        {"id": number, "file_name": f"{number % N_FILES}.png", "width": WIDTH, "height": HEIGHT}
        for number in range(images)
    ]
    boxes = [{"id": number, "image_id": number, "category_id": 1, "bbox": [40, 30, 90, 80]} for number in range(images)]
    coco = {"images": rows, "annotations": boxes, "categories": [{"id": 1, "name": "cup"}]}
    write_coco(folder / "boxes.parquet", coco)
    network = MalNetwork(ModelConfig("vit-micro/16"))
    content = Checkpoint(network.config, LabelerConfig(crop_size=32), dict(network.weights()), [])
    save_checkpoint(folder / "model.malckpt", content, None)


def job_of(folder: Path, dataset: ParquetDataset, output: PartFolder) -> PartJob:
    """Returns the job on the inputs of a folder."""
    return PartJob(
        dataset=folder / "boxes.parquet",
        dataset_sha256=dataset.sha256,
        images=ImageFolder(folder),
        output=output.path,
        journal=output.journal,
        manifest=output.manifest_line(),
        provenance={},
        checkpoint=str(folder / "model.malckpt"),
        checkpoint_sha256=sha256_of(folder / "model.malckpt"),
        key=None,
        precision="float32",
        tta=TtaOptions(),
        batch_size=8,
    )


def plain_loop(job: PartJob, tasks: Sequence[Sequence[Part]]) -> Iterable[str]:
    """Yields the messages of the parts, labeled in this process."""
    labeler = PartLabeler(job, POOL.device, POOL.cpus)
    return (row["message"][0] for row in labeler({"task": [encode_task(task) for task in tasks]}))


def ms_per_image(messages: Iterable[str], output: PartFolder) -> float:
    """Labels all parts; returns the time of an image behind the first part, in ms, by the times of the files."""
    for message in messages:
        decode_message(message)
    written = [(output.path / part.name).stat().st_mtime_ns for part in output.parts]
    images = sum(part.stop - part.start for part in output.parts[1:])
    return (max(written) - min(written)) / images / 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--images", type=int, default=2048, metavar="N", help="images of the file (default: 2048); at least 512"
    )
    table = Table("ray_overhead", "ms per image: plain loop, Ray, and their difference", parser)
    if table.arguments.images < 2 * max(PART_BOXES):
        parser.error(f"--images: {table.arguments.images}; at least {2 * max(PART_BOXES)} are needed")
    with tempfile.TemporaryDirectory() as name, RayCluster("") as cluster:
        folder = Path(name)
        write_inputs(folder, table.arguments.images)
        dataset = ParquetDataset(folder / "boxes.parquet")
        for boxes in PART_BOXES:
            parts = divide(dataset.row_groups, boxes)
            tasks = tasks_of(parts, task_size(len(parts), POOL.count))
            with PartFolder(folder / f"{boxes}.parquet", parts, {"part_boxes": boxes}) as output:
                job = job_of(folder, dataset, output)
                plain = ms_per_image(plain_loop(job, tasks), output)
                ray = ms_per_image(cluster.label(job, POOL, tasks), output)
            table.add(f"parts of {boxes} boxes: plain loop", plain, "ms")
            table.add(f"parts of {boxes} boxes: Ray", ray, "ms")
            bound = MAX_MS if boxes == max(PART_BOXES) else None
            table.add(f"parts of {boxes} boxes: overhead", ray - plain, "ms", most=bound)
    return table.finish()


if __name__ == "__main__":
    raise SystemExit(main())
