"""Compares labeling with the published implementation, side by side in one run.

    git clone https://github.com/NVIDIA/tao_pytorch_backend
    python -m benchmarks.side_by_side --published tao_pytorch_backend [--arch ARCH …] [--json FILE]

Every side is a process of its own with the same weights, images and boxes (ten an image). The sides take turns, so that
all run under the same load of the machine; each number is the median of the rounds, in ms a box, from JPEG to RLE. The
published code runs on the CPU in float32, and under autocast to bfloat16, the nearest that a CPU has to its default
(float16). The served side is `mal-server serve` with one client that sends image after image.
`benchmarks.training_step --published` compares training steps.
"""

import argparse
import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from mal_client.blocking_client import Client
from mal_client.results.labels import BoxLabel

from benchmarks.inputs import SIZES
from benchmarks.serving import ModelServer
from benchmarks.side_by_side.ours import labeler_of, rows_of
from benchmarks.side_by_side.sides import BOXES, medians, side, write_data
from benchmarks.timing import Table
from mal_train.kernel.checkpoint.checkpoint import Checkpoint, save_checkpoint

ARCHS = {"vit-deit-tiny/16": 2, "vit-deit-base/16": 1}
"""Backbone → images of a pass."""
CROP = 512
LEAST = {"640x480": 2.5, "12 Mpix": 4.0}
"""Published time in float32 over ours in the default precision."""


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


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description="Compare with the published implementation.")
    parser.add_argument("--published", type=Path, required=True, metavar="DIR", help="checkout of its repository")
    parser.add_argument("--arch", action="append", choices=list(ARCHS), help="only this backbone; may be repeated")
    parser.add_argument("--rounds", type=int, default=3, help="rounds (default: %(default)d)")
    table = Table("side_by_side", f"Beside the published implementation, {BOXES} boxes an image", parser)
    arguments = table.arguments
    published = arguments.published.resolve()
    for arch in arguments.arch or ARCHS:
        compare_labeling(table, published, arch, ARCHS[arch], arguments.rounds)
    return table.finish()


if __name__ == "__main__":
    raise SystemExit(main())
