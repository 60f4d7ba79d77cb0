"""Compares the CPU time of the mean field with its unfolded reference in probability space, in one process.

Usage: python benchmarks/mean_field.py [--json FILE]. The reference is limited by memory bandwidth, so other processes
change its time, and the ratio, by up to a third.
"""

import argparse
import json
import platform
import runpy
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mal_train.losses.crf import MeanField, can_compile

# The reference belongs to the tests, which a script cannot import as a package.
REFERENCE = Path(__file__).resolve().parents[1] / "tests" / "mal_train" / "losses" / "unfold_mean_field.py"
unfold_mean_field: Callable[..., Tensor] = runpy.run_path(str(REFERENCE))["unfold_mean_field"]


def crops(num: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns smooth colors with noise, a blurred start, and a box over the center of each crop."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(num, 4, side // 8, side // 8, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
    guide = smooth[:, :3] + 0.05 * torch.randn(num, 3, side, side, generator=generator)
    box_mask = torch.zeros(num, side, side)
    box_mask[:, side // 6 : -side // 6, side // 5 : -side // 5] = 1
    return guide, torch.sigmoid(2 * smooth[:, 3]), box_mask


def cpu_seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def measure(num: int, side: int, num_iter: int, rounds: int) -> dict[str, float]:
    inputs = crops(num, side)
    variants: dict[str, Callable[[], Tensor]] = {
        "unfold": lambda: unfold_mean_field(*inputs, num_iter=num_iter),
        "eager": lambda: MeanField(num_iter=num_iter, compiled=False)(*inputs),
    }
    results: dict[str, float] = {}
    if can_compile(torch.device("cpu")):
        variants["compiled"] = lambda: MeanField(num_iter=num_iter, compiled=True)(*inputs)
        start = time.perf_counter()
        variants["compiled"]()
        results["first_compiled_call_s"] = time.perf_counter() - start
    expected = variants["unfold"]()
    for name, run in variants.items():
        results[f"{name}_pixels_differing"] = int((run() != expected).sum())
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, run in variants.items():
            seconds[name].append(cpu_seconds(run))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    results |= {f"{name}_ms": 1000 * median for name, median in medians.items()}
    results |= {f"{name}_times_faster": medians["unfold"] / medians[name] for name in medians if name != "unfold"}
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to FILE")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--side", type=int, default=128, help="side of the CRF grid in px")
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = measure(arguments.batch, arguments.side, arguments.iterations, arguments.rounds)
    for name, value in results.items():
        print(f"{name:28} {value:10.2f}")
    if arguments.json:
        environment = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
        settings = {name: value for name, value in vars(arguments).items() if name != "json"}
        arguments.json.write_text(
            json.dumps({"mean_field": results, "settings": settings, **environment}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
