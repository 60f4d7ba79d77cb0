"""What serving costs: crops/s through the server against the same Labeler in process, and the latency it adds at idle.

In turn, in one run: the Labeler labels pictures in this process; then 32 closed-loop clients in processes of their own
keep the server busy. Two ratios: by the clock, with the clients' own CPU time left out (they share the machine's cores
with the server); and by CPU time a crop, which means something on a busy machine too. Random weights: speed does not
depend on them. The idle figure takes the stand-in network: nothing but the way there and back is in the difference.

In process the Labeler gets a picture's eight boxes at a time; the server forms batches of what 32 such requests bring.

    python -m benchmarks.serving [--json]          the idle figure and both models: about five minutes
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

from benchmarks.load.caller import LABEL_IMAGE, Plan
from benchmarks.load.deck import DeckImage, draw_deck, save_deck
from benchmarks.load.run import ROOT, Server, environment, loading, shared, stand_in, wait_for_address
from benchmarks.load.stand_in import StandIn
from mal_train.core.masks.images import decode_image
from mal_train.core.settings import LabelerConfig
from mal_train.core.threads import wait_passively
from mal_train.kernel.checkpoint.checkpoint import Checkpoint, save_checkpoint
from mal_train.kernel.labeler.labeler import Labeler, load_labeler
from mal_train.kernel.networks.network import MalNetwork, ModelConfig

BOXES = 8
CLIENTS = 32
LOOK_S = 0.1
"""Between looks at the server's figures; each look costs it milliseconds of CPU time, which count as its work."""


@dataclass(frozen=True)
class Subject:
    """A model, how long it is measured, and what is promised of served ÷ in process."""

    arch: str
    crop: int
    rounds: int
    seconds: float
    must: float


SUBJECTS = (Subject("vit-deit-small/16", 512, 2, 30.0, 0.95), Subject("vit-deit-tiny/16", 224, 3, 10.0, 0.85))


@dataclass(frozen=True)
class Span:
    """Work of some time: crops, seconds by the clock, CPU seconds of who did it and of the clients beside it."""

    crops: float
    wall_s: float
    cpu_s: float
    clients_cpu_s: float = 0.0

    @property
    def crops_per_s(self) -> float:
        """By the clock, without the share of the machine that the clients took."""
        return self.crops / (self.wall_s - self.clients_cpu_s / (os.cpu_count() or 1))

    @property
    def cpu_s_a_crop(self) -> float:
        """CPU seconds."""
        return self.cpu_s / self.crops


def write_checkpoint(path: Path, arch: str, crop_size: int) -> None:
    """Random weights, not encrypted."""
    torch.manual_seed(0)
    network = MalNetwork(ModelConfig(arch))
    weights = {name: tensor.detach() for name, tensor in network.state_dict().items()}
    save_checkpoint(path, Checkpoint(network.config, LabelerConfig(crop_size=crop_size), weights, []), None)


def in_process(labeler: Labeler, deck: list[DeckImage], seconds: float) -> Span:
    """Labels whole pictures for at least so long."""
    wall, cpu, crops = time.perf_counter(), time.process_time(), 0
    for picture in itertools.cycle(deck):
        crops += len(labeler.label(decode_image(picture.content), picture.boxes, batch_size=BOXES))
        if time.perf_counter() - wall >= seconds:
            break
    return Span(crops, time.perf_counter() - wall, time.process_time() - cpu)


class ModelServer(Server):
    """`mal-server serve` with figures."""

    def __init__(self, folder: Path, checkpoint: Path, settings: list[str]) -> None:
        port_file, config = folder / "port", folder / "server.yaml"
        port_file.unlink(missing_ok=True)
        config.write_text(f"checkpoint: {checkpoint}\ngpu_ids: []\nlisten: {{port: 0}}\nmetrics: {{port: 0}}\n")
        line = "import sys; from mal_server.cli import main; sys.exit(main())"
        command = [sys.executable, "-c", line, "serve", "-c", str(config), "--port-file", str(port_file), *settings]
        env = environment()
        del env["OMP_NUM_THREADS"]  # as in a server's life, and as in this process
        with (folder / "server.log").open("w") as log:
            process = subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=log)
        super().__init__(process, wait_for_address(process, port_file), folder / "none")
        (self._metrics,) = re.findall(r"metrics=(\S+)", (folder / "server.log").read_text())

    def crops(self) -> float:
        """Crops that ran so far."""
        with urllib.request.urlopen(self._metrics, timeout=60) as answer:
            (count,) = re.findall(r"^mal_batch_crops_sum (\S+)$", answer.read().decode(), re.MULTILINE)
        return float(count)


def cpu_of(pid: int) -> float:
    """CPU seconds of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def served(server: ModelServer, deck_folder: Path, seconds: float, warm_s: float) -> Span:
    """What the server does in so long, once every client has its request there. The clients are ended then."""
    plan = Plan(server.address, clients=CLIENTS, seconds=10 * seconds + 600, boxes=BOXES)
    with loading(shared(plan, 2), deck_folder) as load:
        time.sleep(max(load.start_at - time.monotonic(), 0) + warm_s)

        def now() -> tuple[float, float, float, float]:
            clients = sum(cpu_of(process.pid) for process in load.processes)
            return server.crops(), time.perf_counter(), server.cpu_s(), clients

        def wait_for_batch_end() -> None:
            reached = server.crops()
            while server.crops() == reached:
                time.sleep(LOOK_S)

        # From batch end to batch end: a batch may take as long as the whole measurement.
        wait_for_batch_end()
        before = now()
        time.sleep(seconds)
        wait_for_batch_end()
        after = now()
        for process in load.processes:
            process.kill()
    return Span(*(b - a for a, b in zip(before, after, strict=True)))


def compare(arch: str, crop_size: int, rounds: int, seconds: float) -> dict[str, Any]:
    """Both ways in turn; medians of the rounds."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        deck = draw_deck(8, BOXES, seed=1)
        save_deck(deck, folder)
        write_checkpoint(folder / "model.malckpt", arch, crop_size)
        labeler, _ = load_labeler(folder / "model.malckpt")
        in_process(labeler, deck[:1], 0.0)
        server = ModelServer(folder, folder / "model.malckpt", [])
        try:
            pairs = []
            for _ in range(rounds):
                pairs.append((in_process(labeler, deck, seconds), served(server, folder, seconds, warm_s=2.0)))
        finally:
            server.process.kill()
            server.process.wait()
    return {
        "arch": arch,
        "crop": crop_size,
        "dtype": str(labeler.dtype).removeprefix("torch."),
        "in_process_crops_per_s": statistics.median(own.crops_per_s for own, _ in pairs),
        "served_crops_per_s": statistics.median(other.crops_per_s for _, other in pairs),
        "ratio_by_clock": statistics.median(other.crops_per_s / own.crops_per_s for own, other in pairs),
        "ratio_by_cpu": statistics.median(own.cpu_s_a_crop / other.cpu_s_a_crop for own, other in pairs),
        "cpu_ms_a_crop": statistics.median(own.cpu_s_a_crop * 1000 for own, _ in pairs),
        "rounds": [[asdict(own), asdict(other)] for own, other in pairs],
    }


def idle(calls: int) -> dict[str, float]:
    """One client, one box: the median of what each call takes longer than the same work in this process just before."""
    kernel, deck = StandIn(), draw_deck(4, BOXES, seed=1)
    own, other = [], []
    with (
        tempfile.TemporaryDirectory() as name,
        stand_in(Path(name), "--batch-ms", "0") as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub: Any = channel.unary_stream(LABEL_IMAGE, None, labeling_pb2.LabelImageResponse.FromString)
        for number in range(calls):
            picture = deck[number % len(deck)]
            began = time.perf_counter()
            kernel.label(decode_image(picture.content), picture.boxes[:1])
            own.append((time.perf_counter() - began) * 1000)
            request = picture.request([0], [number], types_pb2.LabelOptions())
            began = time.perf_counter()
            list(stub(request))
            other.append((time.perf_counter() - began) * 1000)
    added = [b - a for a, b in zip(own, other, strict=True)][calls // 10 :]
    return {
        "in_process_p50_ms": statistics.median(own),
        "served_p50_ms": statistics.median(other),
        "added_p50_ms": statistics.median(added),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="What serving costs.")
    parser.add_argument("--arch", help="measure this one alone")
    parser.add_argument("--crop", type=int, default=224, help="crop size (default %(default)d)")
    parser.add_argument("--rounds", type=int, default=3, help="default %(default)d")
    parser.add_argument("--seconds", type=float, default=10.0, help="each way, each round (default %(default)g)")
    parser.add_argument("--calls", type=int, default=300, help="of the idle figure (default %(default)d)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    args = parser.parse_args()
    subjects = SUBJECTS if args.arch is None else (Subject(args.arch, args.crop, args.rounds, args.seconds, 0.0),)
    missed = []
    found: dict[str, Any] = {"idle": show("idle", idle(args.calls), is_shown=not args.json)}
    for one in subjects:
        figures = compare(one.arch, one.crop, one.rounds, one.seconds)
        found[one.arch] = show(f"{one.arch} {one.crop}", figures, is_shown=not args.json)
        missed += [one.arch] if figures["ratio_by_clock"] < one.must else []
    if args.json:
        print(json.dumps(found))
    for name in missed:
        print(f"missed: {name}, served by in process, by the clock", file=sys.stderr)
    return 1 if missed else 0


def show(name: str, figures: dict[str, Any], *, is_shown: bool) -> dict[str, Any]:
    """Prints figures as they come."""
    for key, value in figures.items():
        if is_shown and key != "rounds":
            print(f"{name:24}{key:24}{value if isinstance(value, str | int) else f'{value:.3f}'}", flush=True)
    return figures


if __name__ == "__main__":
    if "OMP_WAIT_POLICY" not in os.environ:
        wait_passively()  # as our commands do, but torch is imported already
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.serving", *sys.argv[1:]])
    raise SystemExit(main())
