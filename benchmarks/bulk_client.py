"""Speed and memory of `mal-client label` on a large file, against a stand-in server that answers at once.

The file names the same few small pictures over and over, eight boxes each; the server answers every box with itself as
mask, so that what is measured is the client. A second run is killed half way and taken up, to measure how long it takes
until it labels again. Fails when peak memory exceeds 1.5 GB or taking up exceeds 30 s.
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
from mal_client.dataset.journal import journal_path
from PIL import Image

from deploy.demo.baselines import box_filled

BOXES_AN_IMAGE = 8
PICTURES = 16
WIDTH, HEIGHT = 160, 120
MAX_PEAK_MIB = 1430
MAX_TAKE_UP_S = 30.0


class StandIn(labeling_pb2_grpc.LabelingServiceServicer, model_pb2_grpc.ModelServiceServicer):
    """Answers every box with a mask that was made beforehand: the boxes of all images are the same."""

    def __init__(self) -> None:
        self._model = types_pb2.ModelRef(name="stand-in", checkpoint_sha256="0" * 64, branch=types_pb2.BRANCH_STUDENT)
        self._masks = [box_filled(box, (HEIGHT, WIDTH)) for box in boxes()]

    def GetServerInfo(self, request: model_pb2.GetServerInfoRequest, context: Any) -> model_pb2.GetServerInfoResponse:
        """Limits as a real server's."""
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
        """Single images are answered too."""
        results = [self._result(one, at) for at, one in enumerate(request.instances)]
        yield labeling_pb2.LabelImageResponse(results=results, model=self._model)

    def LabelImages(
        self, request_iterator: Iterator[labeling_pb2.LabelImagesRequest], context: Any
    ) -> Iterator[labeling_pb2.LabelImagesResponse]:
        """One answer an item, in order."""
        for item in request_iterator:
            yield labeling_pb2.LabelImagesResponse(
                item_id=item.item_id,
                response=next(self.LabelImage(item.request, context)),
            )

    def _result(self, one: types_pb2.Instance, at: int) -> types_pb2.InstanceResult:
        mask = self._masks[at % BOXES_AN_IMAGE]
        code = types_pb2.CocoRle(height=mask.height, width=mask.width, counts=mask.counts)
        return types_pb2.InstanceResult(
            instance_id=one.instance_id, masks=[types_pb2.Mask(coco_rle=code)], score=0.75, area_px=900
        )


def boxes() -> list[tuple[float, float, float, float]]:
    """The boxes of every image."""
    return [(4.0 + 19 * at, 3.0 + 7 * at, 16.5, 30.0 + at) for at in range(BOXES_AN_IMAGE)]


def serve(port_file: Path) -> None:
    """Runs the stand-in server until it is killed."""
    server = grpc.server(futures.ThreadPoolExecutor(4), options=[("grpc.max_receive_message_length", -1)])
    stand_in = StandIn()  # type: ignore[abstract]  # nobody changes its model
    labeling_pb2_grpc.add_LabelingServiceServicer_to_server(stand_in, server)
    model_pb2_grpc.add_ModelServiceServicer_to_server(stand_in, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    port_file.with_suffix(".part").write_text(str(port))
    port_file.with_suffix(".part").replace(port_file)
    server.wait_for_termination()


def write_file(folder: Path, count: int) -> None:
    """A COCO file of `count` boxes, written row by row, and its few pictures."""
    (folder / "images").mkdir()
    rng = np.random.default_rng(1)
    for at in range(PICTURES):
        pixels = np.repeat(np.repeat(rng.integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8), 8, 0), 8, 1)
        Image.fromarray(pixels).save(folder / "images" / f"{at}.png")
    with (folder / "in.json").open("w") as file:
        file.write('{"categories": [{"id": 1, "name": "cup"}], "images": [')
        for image in range(-(-count // BOXES_AN_IMAGE)):
            row = {"id": image, "file_name": f"{image % PICTURES}.png", "width": WIDTH, "height": HEIGHT}
            file.write((", " if image else "") + json.dumps(row))
        file.write('], "annotations": [')
        shapes = boxes()
        for at in range(count):
            x, y, w, h = shapes[at % BOXES_AN_IMAGE]
            row = {
                "id": at,
                "image_id": at // BOXES_AN_IMAGE,
                "category_id": 1,
                "bbox": [x, y, w, h],
                "area": w * h,
                "iscrowd": 0,
            }
            file.write((", " if at else "") + json.dumps(row))
        file.write("]}")


def label(folder: Path, port: str, output: str) -> subprocess.Popen[str]:
    """Starts the client; its progress comes as JSON lines on stderr."""
    command = [sys.executable, "-m", "mal_client.cli.main", "label", "--server", f"127.0.0.1:{port}", "--log", "json"]
    command += ["--annotations", f"{folder}/in.json", "--images", f"{folder}/images", "--output", f"{folder}/{output}"]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def wait(process: subprocess.Popen[str]) -> tuple[float, float]:
    """Peak memory in MiB and processor seconds of a run that must end well."""
    drain = threading.Thread(target=process.stderr.read if process.stderr else str)
    drain.start()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    drain.join()
    if process.returncode:
        raise SystemExit(f"the client ended with {process.returncode}")
    return usage.ru_maxrss / 1024, usage.ru_utime + usage.ru_stime


def seconds_to_first_answer(process: subprocess.Popen[str]) -> float:
    """From the start of a run to its first line of progress."""
    start = time.perf_counter()
    for line in process.stderr or ():
        if json.loads(line)["event"] == "progress":
            return time.perf_counter() - start
    raise SystemExit("the client ended before its first answer")


def measure(folder: Path, port: str, count: int) -> dict[str, float]:
    """One undisturbed run, and one that is killed half way and taken up; their outputs must be equal."""
    start = time.perf_counter()
    peak_mib, cpu_s = wait(label(folder, port, "whole.json"))
    whole_s = time.perf_counter() - start

    killed = label(folder, port, "killed.json")
    ledger = journal_path(folder / "killed.json")
    half = 110 * count
    while not ledger.exists() or ledger.stat().st_size < half:
        time.sleep(0.02)
        if killed.poll() is not None:
            break
    killed.kill()
    killed.communicate()
    again = label(folder, port, "killed.json")
    take_up_s = seconds_to_first_answer(again)
    again_peak_mib, _ = wait(again)
    if (folder / "whole.json").read_bytes() != (folder / "killed.json").read_bytes():
        raise SystemExit("the run that was taken up wrote another file")
    return {
        "boxes": count,
        "seconds": whole_s,
        "boxes_per_second": count / whole_s,
        "boxes_per_cpu_second": count / cpu_s,
        "peak_mib": peak_mib,
        "take_up_seconds": take_up_s,
        "take_up_peak_mib": again_peak_mib,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Speed and memory of bulk labeling.")
    parser.add_argument("--boxes", type=int, default=40_000, help="annotations in the file (default %(default)d)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve is not None:
        serve(arguments.serve)
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_file(folder, arguments.boxes)
        port_file = folder / "port"
        server = subprocess.Popen([sys.executable, __file__, "--serve", str(port_file)])
        try:
            while not port_file.exists() and server.poll() is None:
                time.sleep(0.05)
            found = measure(folder, port_file.read_text(), arguments.boxes)
        finally:
            server.kill()
            server.wait()
    if arguments.json:
        print(json.dumps(found))
    else:
        for key, value in found.items():
            print(f"{key:22}{value:12.1f}")
    peak_mib = max(found["peak_mib"], found["take_up_peak_mib"])
    if peak_mib > MAX_PEAK_MIB or found["take_up_seconds"] > MAX_TAKE_UP_S:
        print(f"promised are {MAX_PEAK_MIB} MiB and {MAX_TAKE_UP_S:g} s", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
