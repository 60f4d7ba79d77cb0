"""Compares labeling and training with the published implementation, side by side in one run.

    git clone https://github.com/NVIDIA/tao_pytorch_backend
    python -m benchmarks.side_by_side --published tao_pytorch_backend [--arch ARCH …] [--train] [--json FILE]

Every side is a process of its own with the same weights, images and boxes (ten an image). The sides take turns, so that
all run under the same load of the machine; each number is the median of the rounds, in ms a box, from JPEG to RLE. The
published code runs on the CPU in float32, and under autocast to bfloat16, the nearest that a CPU has to its default
(float16). The served side is `mal-server serve` with one client that sends image after image.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from mal_client.blocking_client import Client
from mal_client.results.labels import BoxLabel

from benchmarks.inputs import SIZES, boxed_images
from benchmarks.load.run import ROOT, environment
from benchmarks.serving import ModelServer
from benchmarks.side_by_side.ours import labeler_of, rows_of
from benchmarks.timing import Table
from benchmarks.training_step import ARCH
from mal_train.core.coco.output import write_json_atomic
from mal_train.kernel.checkpoint.checkpoint import Checkpoint, save_checkpoint

ARCHS = {"vit-deit-tiny/16": 2, "vit-deit-base/16": 1}
"""Backbone → images of a pass."""
BOXES, CROP, TIMEOUT_S = 10, 512, 600
LEAST = {"640x480": 2.5, "12 Mpix": 4.0}
"""Published time in float32 over ours in the default precision."""
TRAINING_CROPS = (224, 512)


@contextlib.contextmanager
def side(module: str, *options: str) -> Iterator[Callable[[], float]]:
    """Starts a side in a process of its own; yields a function that runs one pass and returns its seconds."""
    env = environment()
    del env["OMP_NUM_THREADS"]  # as in production
    command = [sys.executable, "-m", f"benchmarks.side_by_side.{module}", *options]
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8"
    )
    assert process.stdin is not None
    assert process.stdout is not None
    requests, answers = process.stdin, process.stdout

    def answer() -> str | float:
        line = answers.readline()
        if not line:
            raise RuntimeError(f"{module} ended with code {process.wait()}")
        value: str | float = json.loads(line)
        return value

    def run() -> float:
        print("run", file=requests, flush=True)
        return float(answer())

    try:
        answer()
        yield run
    finally:
        requests.close()
        process.wait(TIMEOUT_S)
        answers.close()


@contextlib.contextmanager
def served(data: Path, crop_size: int) -> Iterator[Callable[[], float]]:
    """Starts a server with the same weights; yields a function that labels all images by calls one after another."""
    labeler = labeler_of(data / "published.pth", crop_size, "auto")
    weights = {name: tensor.detach() for name, tensor in labeler.network.state_dict().items()}
    save_checkpoint(data / "model.malckpt", Checkpoint(labeler.network.config, labeler.config, weights, []), None)
    server = ModelServer(data, data / "model.malckpt", [])
    rows = [(data / "images" / image.file_name, [row.box_xywh for row in boxes]) for image, boxes in rows_of(data)]
    try:
        with Client(server.address) as client:

            def run() -> float:
                began = time.perf_counter()
                for path, boxes in rows:
                    labels = client.label_image(path, boxes)
                    if not all(isinstance(label, BoxLabel) for label in labels):
                        raise RuntimeError("the server did not label a box")
                return time.perf_counter() - began

            run()
            yield run
    finally:
        server.process.kill()
        server.process.wait()


def write_data(folder: Path, images: int, size_wh: tuple[int, int]) -> None:
    """Writes images and a COCO file with ten boxes for each."""
    (folder / "images").mkdir()
    images_json, rows = list[object](), list[object]()
    for index, image in enumerate(boxed_images(images, BOXES, size_wh), start=1):
        (folder / "images" / f"{index}.jpg").write_bytes(image.content)
        width, height = image.size_wh
        images_json.append({"id": index, "file_name": f"{index}.jpg", "width": width, "height": height})
        for number, box in enumerate(image.boxes):
            row = {"id": BOXES * index + number, "image_id": index, "category_id": 1, "bbox": list(box), "iscrowd": 0}
            rows.append({**row, "area": box[2] * box[3]})
    categories = [{"id": 1, "name": "object"}]
    document = {"images": images_json, "annotations": rows, "categories": categories}
    write_json_atomic(folder / "annotations.json", document)


def compare_labeling(table: Table, published: Path, arch: str, images: int, rounds: int) -> None:
    """Adds the rows of one backbone."""
    for size, size_wh in SIZES.items():
        with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
            data = Path(name)
            write_data(data, images, size_wh)
            theirs = ["--published", str(published), "--data", name, "--arch", arch, "--crop", str(CROP)]
            mine = ["--data", name, "--crop", str(CROP)]
            sides = {
                "published, float32": stack.enter_context(side("published", *theirs, "--precision", "float32")),
                "published, bfloat16": stack.enter_context(side("published", *theirs, "--precision", "bfloat16")),
                "ours, float32": stack.enter_context(side("ours", *mine, "--precision", "float32")),
                "ours, default": stack.enter_context(side("ours", *mine, "--precision", "auto")),
                "ours, served": stack.enter_context(served(data, CROP)),
            }
            seconds = medians(sides, rounds)
        for name, value in seconds.items():
            table.add(f"{arch} {CROP}, {size}: {name}", 1000 * value / (images * BOXES), "ms a box")
        for base in ("published, float32", "published, bfloat16"):
            for name in ("ours, float32", "ours, default", "ours, served"):
                is_goal = base == "published, float32" and name == "ours, default"
                ratio = seconds[base] / seconds[name]
                table.add(f"{arch}, {size}: {base} / {name}", ratio, "x", least=LEAST[size] if is_goal else None)


def compare_training(table: Table, published: Path, rounds: int) -> None:
    """Adds the rows of the training step of ViT-tiny, batches of 4, for each crop size."""
    for crop_size in TRAINING_CROPS:
        with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
            write_data(Path(name), 1, SIZES["640x480"])
            options = [
                "--data",
                name,
                "--arch",
                ARCH,
                "--crop",
                str(crop_size),
                "--published",
                str(published),
                "--train",
            ]
            sides = {
                "published, float32": stack.enter_context(side("published", *options, "--precision", "float32")),
                "published, bfloat16": stack.enter_context(side("published", *options, "--precision", "bfloat16")),
                "ours, default": stack.enter_context(side("our_training", "--crop", str(crop_size))),
            }
            seconds = medians(sides, rounds)
        for name, value in seconds.items():
            table.add(f"training step, {ARCH} {crop_size}: {name}", value, "s")
        for base in ("published, float32", "published, bfloat16"):
            table.add(
                f"training step, {ARCH} {crop_size}: {base} / ours", seconds[base] / seconds["ours, default"], "x"
            )


def medians(sides: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Runs the sides in turn; returns the median seconds of each."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            seconds[name].append(run())
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description="Compare with the published implementation.")
    parser.add_argument("--published", type=Path, required=True, metavar="DIR", help="checkout of its repository")
    parser.add_argument("--arch", action="append", choices=list(ARCHS), help="only this backbone; may be repeated")
    parser.add_argument("--rounds", type=int, default=3, help="rounds (default: %(default)d)")
    parser.add_argument("--train", action="store_true", help="compare training steps instead of labeling")
    table = Table("side_by_side", f"Beside the published implementation, {BOXES} boxes an image", parser)
    arguments = table.arguments
    published = arguments.published.resolve()
    if arguments.train:
        compare_training(table, published, arguments.rounds)
        return table.finish()
    for arch in arguments.arch or ARCHS:
        compare_labeling(table, published, arch, ARCHS[arch], arguments.rounds)
    return table.finish()


if __name__ == "__main__":
    raise SystemExit(main())
