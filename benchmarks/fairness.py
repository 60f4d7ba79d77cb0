"""Measures one caller with one call at a time beside another with many streams of the same priority, on a fake network.

The streams come from one connection and keep the device saturated; the calls have one box each. Without turns a call
waits for all that the streams have queued.

    python -m benchmarks.fairness [--streams 64] [--boxes 8] [--calls 200] [--batch-ms 20]
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from mal.v1 import labeling_pb2, labeling_pb2_grpc, types_pb2

from benchmarks.load.images import LoadImage, draw_images
from benchmarks.load.run import ROOT, environment, fake_server
from benchmarks.load.summary import percentile

OPTIONS = types_pb2.LabelOptions(priority=types_pb2.PRIORITY_INTERACTIVE)
IN_FLIGHT = 8
WARM_S = 3.0


def request_of(image: LoadImage, boxes: int) -> labeling_pb2.LabelImageRequest:
    """Returns a request for the first boxes of an image."""
    indices = list(range(boxes))
    return labeling_pb2.LabelImageRequest.FromString(image.request(indices, indices, OPTIONS))


def flood(address: str, streams: int, boxes: int) -> None:
    """Sends items in many streams of one connection until it is killed; refused items are simply replaced."""
    item = labeling_pb2.LabelImagesRequest(item_id="x", request=request_of(draw_images(1, boxes, seed=2)[0], boxes))

    def endless() -> Iterator[labeling_pb2.LabelImagesRequest]:
        while True:
            yield item

    def run(stub: Any) -> None:
        for response in stub.LabelImages(endless()):
            if response.status.code:
                time.sleep(0.05)

    from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415  in this process only

    with grpc.insecure_channel(address) as channel, ThreadPoolExecutor(streams) as pool:
        stub: Any = labeling_pb2_grpc.LabelingServiceStub(channel)
        list(pool.map(run, [stub] * streams))


@contextmanager
def flooded(address: str, streams: int, boxes: int) -> Iterator[None]:
    """Runs `flood` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.fairness", "--flood", address]
    process = subprocess.Popen(
        [*command, "--streams", str(streams), "--boxes", str(boxes)], env=environment(), cwd=ROOT
    )
    try:
        time.sleep(WARM_S)
        yield
    finally:
        process.kill()
        process.wait()


def latencies_ms(address: str, calls: int) -> tuple[list[float], int]:
    """Returns the durations of calls with one box, one at a time, and the number of refused ones."""
    request, found, refused = request_of(draw_images(1, 1, seed=1)[0], 1), [], 0
    with grpc.insecure_channel(address) as channel:
        stub: Any = labeling_pb2_grpc.LabelingServiceStub(channel)
        for _ in range(calls):
            began = time.perf_counter()
            try:
                list(stub.LabelImage(request))
                found.append((time.perf_counter() - began) * 1000)
            except grpc.RpcError:
                refused += 1
                time.sleep(0.05)
    return found or [float("inf")], refused


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a single caller beside one with many streams.")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--boxes", type=int, default=8)
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--batch-ms", type=float, default=20.0)
    parser.add_argument("--flood", metavar="HOST:PORT")
    args = parser.parse_args()
    if args.flood:
        flood(args.flood, args.streams, args.boxes)
        return
    with (
        tempfile.TemporaryDirectory() as name,
        fake_server(Path(name), "--batch-ms", str(args.batch_ms)) as server,
    ):
        latencies_ms(server.address, 5)
        alone, _ = latencies_ms(server.address, args.calls)
        with flooded(server.address, args.streams, args.boxes):
            beside, refused = latencies_ms(server.address, args.calls)
    for row, found, count in (("alone", alone, 0), (f"beside {args.streams} streams", beside, refused)):
        p50, p99 = percentile(found, 50), percentile(found, 99)
        print(f"one call at a time, {row}: p50 {p50:.1f} ms, p99 {p99:.1f} ms, refused {count}")


if __name__ == "__main__":
    main()
