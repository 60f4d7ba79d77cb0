"""Measures how time and memory grow with boxes, clients, image size and models, and draws them on one page.

Every measurement runs in a process of its own. A straight line `a + b·x` is fitted to the seconds of each series; the
table prints the largest distance of a point from its line, relative to the point. Series:

    boxes     boxes of a file, labeled by `mal-client label` with a server that responds immediately
    call      boxes of one image, labeled by one call of a fake network
    clients   closed-loop clients of eight boxes; seconds for 1000 of their calls together
    pixels    Mpix of one JPEG: decode, crop and finish ten boxes
    models    copies of the built-in model in one server; seconds until it is ready

    python -m benchmarks.growth [--page FILE] [--json FILE]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from mal_client.blocking_client import Client

from benchmarks.inputs import BoxedImage, boxed_images, object_map
from benchmarks.load.client import Plan
from benchmarks.load.run import (
    Server,
    all_samples,
    environment,
    fake_server,
    fake_server_images,
    run_clients,
    split_plan,
    wait_for_address,
)
from benchmarks.load.summary import summarize
from benchmarks.timing import Table, peak_mib
from mal_train.core.images.decoder import decode_image
from mal_train.core.report.charts import Point, line_chart
from mal_train.core.report.page import build_report, section, side_by_side, table

DEFAULT_PAGE = Path("results/growth.html")
BOXES = (4_000, 8_000, 16_000, 32_000, 64_000)
CALL_BOXES = (1, 100, 250, 500, 1000)
CLIENTS = (1, 2, 4, 8, 16, 32, 64, 128)
CLIENT_SECONDS = 4.0
"""Duration of the load of up to 16 clients. A call waits for those of all others, so more clients need longer loads."""
WIDTHS = (640, 1600, 2560, 4000, 5600)
"""Widths in px of images of the ratio 4:3."""
MODELS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Measurement:
    """One point of a series: seconds, and memory in MiB."""

    x: float
    seconds: float
    mib: float


def boxes_of_a_file() -> Iterator[Measurement]:
    """Labels files of more and more boxes with the client; memory is the client's peak."""
    for count in BOXES:
        command = [sys.executable, "-m", "benchmarks.bulk_client", "--boxes", str(count), "--json"]
        run = subprocess.run(command, env=environment(), stdout=subprocess.PIPE, check=True, text=True)
        results = json.loads(run.stdout)
        yield Measurement(count, results["seconds"], results["peak_mib"])


def boxes_of_a_call() -> Iterator[Measurement]:
    """Sends one image with more and more boxes; memory is the server's after the calls."""
    (image,) = boxed_images(1, CALL_BOXES[1], (640, 480))
    with (
        tempfile.TemporaryDirectory() as name,
        fake_server(Path(name), "--batch-ms", "0") as server,
        Client(server.address) as client,
    ):
        for count in CALL_BOXES:
            boxes = [image.boxes[n % len(image.boxes)] for n in range(count)]
            seconds = [_seconds(partial(client.label_image, image.content, boxes)) for _ in range(5)]
            yield Measurement(count, statistics.median(seconds), server.rss_mib())


def clients_of_a_server() -> Iterator[Measurement]:
    """Loads one server with more and more clients; memory is the server's."""
    with tempfile.TemporaryDirectory() as name, fake_server(Path(name), "--batch-ms", "0") as server:
        folder = Path(name, "images")
        folder.mkdir()
        fake_server_images(folder)
        for count in CLIENTS:
            duration_s = CLIENT_SECONDS * max(1, count // 16)
            plan = Plan(server.address, clients=count, seconds=duration_s, boxes=8)
            with run_clients(split_plan(plan, min(count, 2)), folder) as load:
                begin = load.start_at + duration_s / 4
                reports = load.wait(120)
            summary = summarize(all_samples(reports), begin, load.start_at + duration_s)
            if not summary.is_sound:
                raise RuntimeError(f"{count} clients: wrong or missing results: {summary}")
            yield Measurement(count, 1000 / summary.calls_per_s, server.rss_mib())


def pixels_of_an_image() -> Iterator[Measurement]:
    """Labels ten boxes of larger and larger images without a network, each in a process of its own."""
    for width in WIDTHS:
        command = [sys.executable, "-m", "benchmarks.growth", "--point", str(width)]
        run = subprocess.run(command, env=environment(), stdout=subprocess.PIPE, check=True, text=True)
        yield Measurement(*json.loads(run.stdout))


def one_image(width: int) -> Measurement:
    """Decodes, crops and finishes one image; memory is the peak beyond what the process had before."""
    from benchmarks.inputs import random_labeler  # noqa: PLC0415  builds a network, which other series do not need
    from mal_train.kernel.labeler.types import Crop, Prediction  # noqa: PLC0415

    labeler = random_labeler("vit-micro/16", 224)
    (image,) = boxed_images(1, 10, (width, width * 3 // 4))
    prediction = Prediction(object_map(224, seed=0))

    def label(image: BoxedImage = image) -> None:
        crops = labeler.prepare(decode_image(image.content), image.boxes)
        for crop in crops:
            if not isinstance(crop, Crop):
                raise crop
            labeler.finish(crop, prediction)

    label()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is now the current size
    before = peak_mib()
    seconds = statistics.median(_seconds(label) for _ in range(5))
    return Measurement(width * (width * 3 // 4) / 1e6, seconds, peak_mib() - before)


def models_of_a_server() -> Iterator[Measurement]:
    """Starts servers with more and more models; memory is the server's when it is ready."""
    for count in MODELS:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            models = "".join(f"  - {{name: m{n}, checkpoint: builtin}}\n" for n in range(count))
            config = folder / "server.yaml"
            config.write_text(f"models:\n{models}gpu_ids: []\nlisten: {{port: 0}}\n", encoding="utf-8")
            line = "from mal_server.cli import run; run()"
            command = [sys.executable, "-c", line, "serve", "-c", str(config), "--port-file", str(folder / "port")]
            began = time.perf_counter()
            with subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL) as process:
                try:
                    address = wait_for_address(process, folder / "port")
                    seconds = time.perf_counter() - began
                    yield Measurement(count, seconds, Server(process, address, folder / "none").rss_mib())
                finally:
                    process.kill()


def _seconds(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


SERIES: dict[str, tuple[str, Callable[[], Iterator[Measurement]]]] = {
    "boxes": ("boxes of a file", boxes_of_a_file),
    "call": ("boxes of one call", boxes_of_a_call),
    "clients": ("clients (seconds for 1000 calls)", clients_of_a_server),
    "pixels": ("Mpix of an image", pixels_of_an_image),
    "models": ("models of a server", models_of_a_server),
}


def distance_from_line(points: list[Point]) -> tuple[float, float, float]:
    """Fits y = a + b·x with equal relative weights; returns a, b and the largest |y - a - b·x| / y.

    >>> a, b, distance = distance_from_line([(1, 3), (2, 5), (4, 9)])
    >>> round(a, 6), round(b, 6), round(distance, 6)
    (1.0, 2.0, 0.0)
    """
    x, y = np.array(points, dtype=np.float64).T
    rows = np.stack([1 / y, x / y], axis=1)
    (a, b), *_ = np.linalg.lstsq(rows, np.ones(len(y)), rcond=None)
    return float(a), float(b), float(np.max(np.abs(rows @ (a, b) - 1)))


def main() -> int:
    """Prints the table and writes the page."""
    parser = argparse.ArgumentParser(description="Measure how time and memory grow.")
    parser.add_argument("--series", action="append", choices=list(SERIES), help="only this one; may be repeated")
    parser.add_argument("--page", type=Path, default=DEFAULT_PAGE, help="HTML page to write (default: %(default)s)")
    parser.add_argument("--point", type=int, help=argparse.SUPPRESS)
    result = Table("growth", "Growth of time and memory", parser)
    arguments = result.arguments
    if arguments.point is not None:
        point = one_image(arguments.point)
        print(json.dumps([point.x, point.seconds, point.mib]))
        return 0
    sections = []
    for name in arguments.series or SERIES:
        x_name, measure = SERIES[name]
        points: list[Measurement] = []
        for measured in measure():
            points.append(measured)
            result.add(f"{x_name} = {measured.x:g}", measured.seconds, "s")
            result.add(f"{x_name} = {measured.x:g}, memory", measured.mib, "MiB")
        a, b, distance = distance_from_line([(point.x, point.seconds) for point in points])
        result.add(f"{name}: largest distance from {a:.3g} s + {b:.3g} s · x", 100 * distance, "%")
        seconds = line_chart(
            {"measured": [(p.x, p.seconds) for p in points], "line": [(p.x, a + b * p.x) for p in points]},
            x_name,
            "seconds",
        )
        memory = line_chart({"memory": [(p.x, p.mib) for p in points]}, x_name, "MiB")
        rows = table(("x", "seconds", "MiB"), [(p.x, p.seconds, p.mib) for p in points])
        note = f"seconds ≈ {a:.3g} + {b:.3g} · x; no point is further than {100 * distance:.0f} % from this line"
        sections.append(section(x_name, side_by_side(seconds, memory) + rows, note))
    arguments.page.parent.mkdir(parents=True, exist_ok=True)
    arguments.page.write_text(build_report("Growth of time and memory", sections), encoding="utf-8")
    print(f"page: {arguments.page}")
    return result.finish()


if __name__ == "__main__":
    raise SystemExit(main())
