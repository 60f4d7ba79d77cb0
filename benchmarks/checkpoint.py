"""Speed and memory of sealed checkpoints: 1 GiB of weights through a recipient key, beside the same file unsealed.

Each step runs in a process of its own; memory is its peak beyond imports and tensors. Fails when that exceeds 128 MiB.
Besides the clock's MiB/s it gives MiB per second of processor time, which other work on the machine disturbs less.
Usage: python benchmarks/checkpoint.py [MiB of weights, 1024 if not given]
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from mal_train.core.settings import LabelerConfig
from mal_train.kernel.checkpoint.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from mal_train.kernel.checkpoint.keys import parse_key, write_identity
from mal_train.kernel.networks.network import ModelConfig

LIMIT_MIB = 128
TENSOR_MIB = 16


def peak_mib() -> float:
    """Highest resident memory of this process so far."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def step(what: str, path: Path, key_text: str | None, mib: int) -> None:
    """One save or load, here; prints seconds and MiB beside the tensors."""
    key = parse_key(key_text, purpose="encryption", source="environment")
    base = peak_mib()
    if what == "save":
        count = TENSOR_MIB << 18
        weights = {f"student.{i:03d}": torch.rand(count) for i in range(mib // TENSOR_MIB)}
        checkpoint = Checkpoint(ModelConfig("vit-micro/16"), LabelerConfig(), weights)
        start, start_cpu = time.perf_counter(), time.process_time()
        save_checkpoint(path, checkpoint, key)
    else:
        start, start_cpu = time.perf_counter(), time.process_time()
        load_checkpoint(path, key.decryption_key if key else None)
    print(time.perf_counter() - start, time.process_time() - start_cpu, peak_mib() - base - mib)


class Figures(NamedTuple):
    """What one step gave."""

    rate: float
    cpu_rate: float
    beside: float


def measure(what: str, path: Path, key_text: str | None, mib: int) -> Figures:
    """The same in a new process."""
    command = [sys.executable, __file__, str(mib), what, str(path), key_text or ""]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    seconds, cpu_seconds, beside = (float(word) for word in output.split())
    return Figures(mib / seconds, mib / cpu_seconds, beside)


def main() -> int:
    """Prints the table; 1 when a step takes more memory than promised."""
    mib = int(sys.argv[1]) if len(sys.argv) > 1 else 1024
    if len(sys.argv) > 2:
        step(sys.argv[2], Path(sys.argv[3]), sys.argv[4] or None, mib)
        return 0
    worst = 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_identity(folder / "key")
        print(f"{mib} MiB of weights     MiB/s  of bare  MiB/CPU-s  MiB beside the tensors")
        for what in ("save", "load"):
            bare = measure(what, folder / "bare", None, mib)
            sealed = measure(what, folder / "sealed", f"file:{folder / 'key'}", mib)
            for how, got in (("bare", bare), ("sealed", sealed)):
                ratio = got.rate / bare.rate
                print(f"{what}, {how:6}          {got.rate:8.0f} {ratio:8.2f}  {got.cpu_rate:10.0f}  {got.beside:8.0f}")
            worst = max(worst, bare.beside, sealed.beside)
    if worst > LIMIT_MIB:
        print(f"memory beside the tensors: {worst:.0f} MiB; promised are {LIMIT_MIB}")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
