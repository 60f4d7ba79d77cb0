"""Measures the built-in model on the CPU by how its threads wait: a lone crop, and batches of eight.

Each policy runs in its own process, since OpenMP reads it once: as the server sets it (`threads.spin_briefly`), as
training does (`threads.wait_passively`), as libgomp does by itself, and with one thread. Each is measured alone, beside
one busy process, and while a thread for each core decodes images in the same process, as the server's pool does.

    python -m benchmarks.threads [--seconds S] [--json FILE]        a minute and a half
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from benchmarks.load.images import draw_images
from benchmarks.timing import Table
from mal_train.core.images.decoder import decode_image
from mal_train.core.threads import spin_briefly
from mal_train.kernel.checkpoint import builtin
from mal_train.kernel.labeler.load import load_labeler
from mal_train.kernel.labeler.types import Crop

POLICIES = {
    "sleeping": {"OMP_WAIT_POLICY": "PASSIVE"},
    "libgomp's default": {"GOMP_SPINCOUNT": "300000"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
"""Environment of the other policies; libgomp spins 300 000 rounds where no policy is set."""
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")
BATCH = 8


@contextmanager
def busy_process() -> Iterator[None]:
    """Runs one process that always computes."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


@contextmanager
def decoding(contents: Sequence[bytes]) -> Iterator[None]:
    """Runs a thread for each core that decodes images."""
    is_over = threading.Event()

    def decode(content: bytes) -> None:
        while not is_over.is_set():
            decode_image(content)

    threads = [
        threading.Thread(target=decode, args=(contents[index % len(contents)],)) for index in range(os.cpu_count() or 1)
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        is_over.set()
        for thread in threads:
            thread.join()


def measure(seconds: float) -> dict[str, float]:
    """Measures this process; returns milliseconds a crop by situation and number of crops."""
    labeler, _ = load_labeler(builtin.resolve(builtin.BUILTIN))
    images = draw_images(4, BATCH, seed=1)
    prepared = labeler.prepare(decode_image(images[0].content), images[0].boxes)
    crops = [crop for crop in prepared if isinstance(crop, Crop)]

    def ms_per_crop(batch: Sequence[Crop]) -> float:
        taken: list[float] = []
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(taken) < 3:
            began = time.perf_counter()
            labeler.predict(batch)
            taken.append((time.perf_counter() - began) * 1000 / len(batch))
        return statistics.median(taken)

    situations: dict[str, AbstractContextManager[None]] = {
        "alone": nullcontext(),
        "beside a busy process": busy_process(),
        "beside decoding": decoding([image.content for image in images]),
    }
    results = {}
    ms_per_crop(crops)
    for name, situation in situations.items():
        with situation:
            results[f"{name}, lone crop"] = ms_per_crop(crops[:1])
            results[f"{name}, batch of {BATCH}"] = ms_per_crop(crops)
    return results


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description="Measure how threads wait on the CPU.")
    parser.add_argument("--seconds", type=float, default=2.0, help="seconds per measurement (default: %(default)g)")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    if "--measure" in sys.argv:
        print(json.dumps(measure(parser.parse_args().seconds)))
        return 0
    table = Table("threads", "Built-in model on the CPU, wall time of a crop by how threads wait", parser)
    for name in VARIABLES:
        os.environ.pop(name, None)
    inherited = dict(os.environ)
    spin_briefly()
    results = {}
    for policy, variables in {"as the server": dict(os.environ), **POLICIES}.items():
        command = [sys.executable, "-m", "benchmarks.threads", "--measure", "--seconds", str(table.arguments.seconds)]
        root = Path(__file__).parents[1]
        run = subprocess.run(
            command, cwd=root, env=inherited | variables, check=True, capture_output=True, text=True, timeout=600
        )
        results[policy] = json.loads(run.stdout)
        for name, value in results[policy].items():
            table.add(f"{policy}: {name}", value, "ms")
    for name, value in results["as the server"].items():
        best = min(other[name] for other in results.values())
        table.add(f"as the server ÷ best policy: {name}", value / best, "x")
    return table.finish()


if __name__ == "__main__":
    raise SystemExit(main())
