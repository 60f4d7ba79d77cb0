"""Measures speed and memory of `mal-client label` on a large file, with a fake server that responds immediately.

The file repeats a few small images with eight boxes each, and the server returns each box as its mask, so that only the
client is measured. A second run is killed halfway and resumed, to measure the time until its first new result. Fails if
peak memory exceeds 1.5 GB or resuming takes more than 30 s.
Usage: python -m benchmarks.bulk_client [--boxes N] [--json]; docs/results.md has the run with --boxes 1000000.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from mal.v1 import labeling_pb2, labeling_pb2_grpc, model_pb2, model_pb2_grpc, types_pb2
from PIL import Image

from deploy.demo.baselines import box_filled
from mal_train.core.coco.journal import journal_path

BOXES_PER_IMAGE = 8
N_IMAGES = 16
WIDTH, HEIGHT = 160, 120
MAX_PEAK_MIB = 1430
MAX_RESUME_S = 30.0


class FakeServicer(labeling_pb2_grpc.LabelingServiceServicer, model_pb2_grpc.ModelServiceServicer):
    """Servicer that returns precomputed masks; all images have the same boxes."""

    def __init__(self) -> None:
        self._model = types_pb2.ModelRef(name="stand-in", checkpoint_sha256="0" * 64, branch=types_pb2.BRANCH_STUDENT)
        self._masks = [box_filled(box, (HEIGHT, WIDTH)) for box in boxes()]

    def GetServerInfo(self, request: model_pb2.GetServerInfoRequest, context: Any) -> model_pb2.GetServerInfoResponse:
        """Returns the limits of a typical server."""
        limits = model_pb2.ServerLimits(
            max_request_bytes=1 << 26,
            max_response_bytes=1 << 26,
            max_boxes=1000,
            max_pixels=1 << 26,
            max_side=1 << 14,
            max_image_bytes=1 << 25,
            max_items_in_flight=64,
        )
        return model_pb2.GetServerInfoResponse(version="0", model=model_pb2.ModelInfo(ref=self._model), limits=limits)

    def LabelImage(
        self, request: labeling_pb2.LabelImageRequest, context: Any
    ) -> Iterator[labeling_pb2.LabelImageResponse]:
        """Labels a single image."""
        results = [self._result(instance, n) for n, instance in enumerate(request.instances)]
        yield labeling_pb2.LabelImageResponse(results=results, model=self._model)

    def LabelImages(
        self, request_iterator: Iterator[labeling_pb2.LabelImagesRequest], context: Any
    ) -> Iterator[labeling_pb2.LabelImagesResponse]:
        """Yields one response per item, in order."""
        for item in request_iterator:
            yield labeling_pb2.LabelImagesResponse(
                item_id=item.item_id,
                response=next(self.LabelImage(item.request, context)),
            )

    def _result(self, instance: types_pb2.Instance, index: int) -> types_pb2.InstanceResult:
        mask = self._masks[index % BOXES_PER_IMAGE]
        rle = types_pb2.CocoRle(height=mask.height, width=mask.width, counts=mask.counts)
        return types_pb2.InstanceResult(
            instance_id=instance.instance_id, masks=[types_pb2.Mask(coco_rle=rle)], score=0.75, area_px=900
        )


def boxes() -> list[tuple[float, float, float, float]]:
    """Returns the boxes of every image."""
    return [(4.0 + 19 * n, 3.0 + 7 * n, 16.5, 30.0 + n) for n in range(BOXES_PER_IMAGE)]


def serve(port_file: Path) -> None:
    """Runs the fake server until it is killed."""
    server = grpc.server(futures.ThreadPoolExecutor(4), options=[("grpc.max_receive_message_length", -1)])
    servicer = FakeServicer()  # type: ignore[abstract]  # the calls that manage models are not used
    labeling_pb2_grpc.add_LabelingServiceServicer_to_server(servicer, server)
    model_pb2_grpc.add_ModelServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    port_file.with_suffix(".part").write_text(str(port))
    port_file.with_suffix(".part").replace(port_file)
    server.wait_for_termination()


def write_file(folder: Path, count: int) -> None:
    """Writes a COCO file of `count` boxes, row by row, and its images."""
    (folder / "images").mkdir()
    rng = np.random.default_rng(1)
    for n in range(N_IMAGES):
        pixels = np.repeat(np.repeat(rng.integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8), 8, 0), 8, 1)
        Image.fromarray(pixels).save(folder / "images" / f"{n}.png")
    with (folder / "in.json").open("w") as file:
        file.write('{"categories": [{"id": 1, "name": "cup"}], "images": [')
        for image in range(-(-count // BOXES_PER_IMAGE)):
            row = {"id": image, "file_name": f"{image % N_IMAGES}.png", "width": WIDTH, "height": HEIGHT}
            file.write((", " if image else "") + json.dumps(row))
        file.write('], "annotations": [')
        shapes = boxes()
        for n in range(count):
            x, y, w, h = shapes[n % BOXES_PER_IMAGE]
            row = {
                "id": n,
                "image_id": n // BOXES_PER_IMAGE,
                "category_id": 1,
                "bbox": [x, y, w, h],
                "area": w * h,
                "iscrowd": 0,
            }
            file.write((", " if n else "") + json.dumps(row))
        file.write("]}")


def label(folder: Path, port: str, output: str) -> subprocess.Popen[str]:
    """Starts the client; it writes its progress to stderr as JSON lines."""
    command = [sys.executable, "-m", "mal_client.cli.main", "label", "--server", f"127.0.0.1:{port}", "--log", "json"]
    command += ["--annotations", f"{folder}/in.json", "--images", f"{folder}/images", "--output", f"{folder}/{output}"]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def wait(process: subprocess.Popen[str]) -> tuple[float, float]:
    """Waits for a run that must succeed; returns its peak memory in MiB and its CPU seconds."""
    drain = threading.Thread(target=process.stderr.read if process.stderr else str)
    drain.start()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    drain.join()
    if process.returncode:
        raise SystemExit(f"the client exited with code {process.returncode}")
    return usage.ru_maxrss / 1024, usage.ru_utime + usage.ru_stime


def seconds_to_first_result(process: subprocess.Popen[str]) -> float:
    """Returns the seconds until the first line of progress."""
    start = time.perf_counter()
    for line in process.stderr or ():
        if json.loads(line)["event"] == "progress":
            return time.perf_counter() - start
    raise SystemExit("the client exited before its first result")


def measure(folder: Path, port: str, count: int) -> dict[str, float]:
    """Measures a complete run, and a run that is killed halfway and resumed; their outputs must be equal."""
    start = time.perf_counter()
    peak_mib, cpu_s = wait(label(folder, port, "complete.json"))
    complete_s = time.perf_counter() - start

    killed = label(folder, port, "killed.json")
    journal = journal_path(folder / "killed.json")
    half = 110 * count
    while not journal.exists() or journal.stat().st_size < half:
        time.sleep(0.02)
        if killed.poll() is not None:
            break
    killed.kill()
    killed.communicate()
    resumed = label(folder, port, "killed.json")
    resume_s = seconds_to_first_result(resumed)
    resumed_peak_mib, _ = wait(resumed)
    if (folder / "complete.json").read_bytes() != (folder / "killed.json").read_bytes():
        raise SystemExit("the resumed run wrote a different file")
    return {
        "boxes": count,
        "seconds": complete_s,
        "boxes_per_second": count / complete_s,
        "boxes_per_cpu_second": count / cpu_s,
        "peak_mib": peak_mib,
        "resume_seconds": resume_s,
        "resumed_peak_mib": resumed_peak_mib,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure speed and memory of bulk labeling.")
    parser.add_argument("--boxes", type=int, default=40_000, help="annotations in the file (default %(default)d)")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve is not None:
        serve(arguments.serve)
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_file(folder, arguments.boxes)
        port_file = folder / "port"
        server = subprocess.Popen([sys.executable, "-m", "benchmarks.bulk_client", "--serve", str(port_file)])
        try:
            while not port_file.exists() and server.poll() is None:
                time.sleep(0.05)
            if server.returncode is not None:
                raise SystemExit(f"the fake server exited with code {server.returncode}")
            results = measure(folder, port_file.read_text(), arguments.boxes)
        finally:
            server.kill()
            server.wait()
    if arguments.json:
        print(json.dumps(results))
    else:
        for key, value in results.items():
            print(f"{key:22}{value:12.1f}")
    peak_mib = max(results["peak_mib"], results["resumed_peak_mib"])
    if peak_mib > MAX_PEAK_MIB or results["resume_seconds"] > MAX_RESUME_S:
        print(f"the limits are {MAX_PEAK_MIB} MiB and {MAX_RESUME_S:g} s", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
