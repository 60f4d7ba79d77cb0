"""Compares crops/s of the server with the same Labeler in process, and measures the latency that an idle server adds.

Alternates in one run: the Labeler labels images in this process; then 32 closed-loop clients in other processes load
the server. Reports two ratios: by wall time, excluding the CPU time of the clients (they share the cores with the
server), and by CPU time per crop, which is meaningful on a busy machine too. Weights are those of the built-in model,
or random ones, which does not affect speed. The latency is measured with a fake network, so that the difference is that
of the call alone.

In process, the Labeler gets the eight boxes of one image at a time; the server batches the crops of 32 such requests.

    python -m benchmarks.serving [--json]          latency and both models, about five minutes
    python -m benchmarks.serving --arch vit-deit-tiny/16 --crop 224 [--rounds 3] [--seconds 20] [--json]
"""

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grpc
import torch
from mal.v1 import labeling_pb2, types_pb2

from benchmarks.load.client import LABEL_IMAGE, Plan
from benchmarks.load.fake_server import FakePredictor
from benchmarks.load.images import LoadImage, draw_images, save_images
from benchmarks.load.run import ROOT, Server, environment, fake_server, run_clients, split_plan, wait_for_address
from mal_train.core.images.decoder import decode_image
from mal_train.core.settings import LabelerConfig
from mal_train.core.threads import spin_briefly
from mal_train.kernel.checkpoint import builtin
from mal_train.kernel.checkpoint.checkpoint import Checkpoint, save_checkpoint
from mal_train.kernel.labeler.labeler import Labeler
from mal_train.kernel.labeler.load import load_labeler
from mal_train.kernel.networks.network import MalNetwork, ModelConfig

BOXES = 8
CLIENTS = 32
POLL_INTERVAL_S = 0.1
"""Interval between reads of the server's metrics; each read costs milliseconds of its CPU time."""


@dataclass(frozen=True)
class Case:
    """Model, duration of its measurement, and lower bound of served / in process."""

    arch: str
    crop: int
    rounds: int
    seconds: float
    least: float


CASES = (Case("vit-deit-small/16", 512, 2, 30.0, 0.98), Case(builtin.BUILTIN, 224, 3, 10.0, 0.95))


@dataclass(frozen=True)
class Span:
    """Work in an interval: crops, wall seconds, CPU seconds of the worker, and CPU seconds of its clients."""

    crops: float
    wall_s: float
    cpu_s: float
    clients_cpu_s: float = 0.0

    @property
    def crops_per_s(self) -> float:
        """Crops per wall second, excluding the CPU time of the clients."""
        return self.crops / (self.wall_s - self.clients_cpu_s / (os.cpu_count() or 1))

    @property
    def cpu_s_per_crop(self) -> float:
        """CPU seconds per crop."""
        return self.cpu_s / self.crops


def write_checkpoint(path: Path, arch: str, crop_size: int) -> None:
    """Writes an unencrypted checkpoint with random weights, or the built-in model, which has its own crop size."""
    if arch == builtin.BUILTIN:
        path.symlink_to(builtin.resolve(Path(arch)))
        return
    torch.manual_seed(0)
    network = MalNetwork(ModelConfig(arch))
    weights = {name: tensor.detach() for name, tensor in network.state_dict().items()}
    save_checkpoint(path, Checkpoint(network.config, LabelerConfig(crop_size=crop_size), weights, []), None)


def in_process(labeler: Labeler, images: list[LoadImage], seconds: float) -> Span:
    """Labels images for at least `seconds`."""
    wall, cpu, crops = time.perf_counter(), time.process_time(), 0
    for image in itertools.cycle(images):
        crops += len(labeler.label(decode_image(image.content), image.boxes, batch_size=BOXES))
        if time.perf_counter() - wall >= seconds:
            break
    return Span(crops, time.perf_counter() - wall, time.process_time() - cpu)


class ModelServer(Server):
    """`mal-server serve` with metrics."""

    def __init__(self, folder: Path, checkpoint: Path, settings: list[str]) -> None:
        port_file, config = folder / "port", folder / "server.yaml"
        port_file.unlink(missing_ok=True)
        config.write_text(f"checkpoint: {checkpoint}\ngpu_ids: []\nlisten: {{port: 0}}\nmetrics: {{port: 0}}\n")
        line = "from mal_server.cli import run; run()"
        command = [sys.executable, "-c", line, "serve", "-c", str(config), "--port-file", str(port_file), *settings]
        env = environment()
        del env["OMP_NUM_THREADS"]  # as in production and in this process
        with (folder / "server.log").open("w") as log:
            process = subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=log)
        super().__init__(process, wait_for_address(process, port_file), folder / "none")
        (self._metrics,) = re.findall(r"metrics=(\S+)", (folder / "server.log").read_text())

    def crops(self) -> float:
        """Returns the number of crops processed so far."""
        with urllib.request.urlopen(self._metrics, timeout=60) as response:
            (count,) = re.findall(r"^mal_batch_crops_sum (\S+)$", response.read().decode(), re.MULTILINE)
        return float(count)


def cpu_of(pid: int) -> float:
    """Returns the CPU seconds of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def served(server: ModelServer, image_folder: Path, seconds: float, warm_s: float) -> Span:
    """Measures the server for `seconds` after a warm-up under load, then kills the clients."""
    plan = Plan(server.address, clients=CLIENTS, seconds=10 * seconds + 600, boxes=BOXES)
    with run_clients(split_plan(plan, 2), image_folder) as load:
        time.sleep(max(load.start_at - time.monotonic(), 0) + warm_s)

        def now() -> tuple[float, float, float, float]:
            clients = sum(cpu_of(process.pid) for process in load.processes)
            return server.crops(), time.perf_counter(), server.cpu_s(), clients

        def wait_for_batch_end() -> None:
            n_crops = server.crops()
            while server.crops() == n_crops:
                time.sleep(POLL_INTERVAL_S)

        # From the end of a batch to the end of a batch: one batch may take as long as the measurement.
        wait_for_batch_end()
        before = now()
        time.sleep(seconds)
        wait_for_batch_end()
        after = now()
        for process in load.processes:
            process.kill()
    return Span(*(b - a for a, b in zip(before, after, strict=True)))


def compare(arch: str, crop_size: int, rounds: int, seconds: float) -> dict[str, Any]:
    """Measures both in alternation; returns the medians of the rounds."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = draw_images(8, BOXES, seed=1)
        save_images(images, folder)
        write_checkpoint(folder / "model.malckpt", arch, crop_size)
        labeler, _ = load_labeler(folder / "model.malckpt")
        if labeler.config.crop_size != crop_size:
            raise SystemExit(f"crop {crop_size}: {arch} has crops of {labeler.config.crop_size} px")
        in_process(labeler, images[:1], 0.0)
        server = ModelServer(folder, folder / "model.malckpt", [])
        try:
            pairs = []
            for _ in range(rounds):
                pairs.append((in_process(labeler, images, seconds), served(server, folder, seconds, warm_s=2.0)))
        finally:
            server.process.kill()
            server.process.wait()
    return {
        "arch": arch,
        "crop": crop_size,
        "dtype": str(labeler.dtype).removeprefix("torch."),
        "in_process_crops_per_s": statistics.median(local.crops_per_s for local, _ in pairs),
        "served_crops_per_s": statistics.median(remote.crops_per_s for _, remote in pairs),
        "ratio_by_clock": statistics.median(remote.crops_per_s / local.crops_per_s for local, remote in pairs),
        "ratio_by_cpu": statistics.median(local.cpu_s_per_crop / remote.cpu_s_per_crop for local, remote in pairs),
        "cpu_ms_per_crop": statistics.median(local.cpu_s_per_crop * 1000 for local, _ in pairs),
        "rounds": [[asdict(local), asdict(remote)] for local, remote in pairs],
    }


def idle(calls: int) -> dict[str, float]:
    """Measures one client with one box: the median latency added to the same work in this process."""
    predictor, images = FakePredictor(), draw_images(4, BOXES, seed=1)
    local_ms, remote_ms = [], []
    with (
        tempfile.TemporaryDirectory() as name,
        fake_server(Path(name), "--batch-ms", "0") as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub: Any = channel.unary_stream(LABEL_IMAGE, None, labeling_pb2.LabelImageResponse.FromString)
        for number in range(calls):
            image = images[number % len(images)]
            began = time.perf_counter()
            predictor.label(decode_image(image.content), image.boxes[:1])
            local_ms.append((time.perf_counter() - began) * 1000)
            request = image.request([0], [number], types_pb2.LabelOptions())
            began = time.perf_counter()
            list(stub(request))
            remote_ms.append((time.perf_counter() - began) * 1000)
    added = [b - a for a, b in zip(local_ms, remote_ms, strict=True)][calls // 10 :]
    return {
        "in_process_p50_ms": statistics.median(local_ms),
        "served_p50_ms": statistics.median(remote_ms),
        "added_p50_ms": statistics.median(added),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare the throughput of the server with the Labeler in process.")
    parser.add_argument("--arch", metavar="ARCH", help="measure only this network")
    parser.add_argument("--crop", type=int, default=224, help="crop size (default: %(default)d)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds (default: %(default)d)")
    parser.add_argument("--seconds", type=float, default=10.0, help="seconds per measurement (default: %(default)g)")
    parser.add_argument("--calls", type=int, default=300, help="calls to measure the latency (default: %(default)d)")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    args = parser.parse_args()
    cases = CASES if args.arch is None else (Case(args.arch, args.crop, args.rounds, args.seconds, 0.0),)
    missed = []
    results: dict[str, Any] = {"idle": show("idle", idle(args.calls), is_shown=not args.json)}
    for case in cases:
        metrics = compare(case.arch, case.crop, case.rounds, case.seconds)
        results[case.arch] = show(f"{case.arch} {case.crop}", metrics, is_shown=not args.json)
        missed += [case.arch] if metrics["ratio_by_clock"] < case.least else []
    if args.json:
        print(json.dumps(results))
    for name in missed:
        print(f"missed: {name}, served / in process by wall time", file=sys.stderr)
    return 1 if missed else 0


def show(name: str, metrics: dict[str, Any], *, is_shown: bool) -> dict[str, Any]:
    """Prints the metrics of a measurement if `is_shown`; returns them."""
    for key, value in metrics.items():
        if is_shown and key != "rounds":
            print(f"{name:24}{key:24}{value if isinstance(value, str | int) else f'{value:.3f}'}", flush=True)
    return metrics


if __name__ == "__main__":
    if "OMP_WAIT_POLICY" not in os.environ and "GOMP_SPINCOUNT" not in os.environ:
        spin_briefly()  # as the server does; torch is imported already, so the process restarts
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.serving", *sys.argv[1:]])
    raise SystemExit(main())
