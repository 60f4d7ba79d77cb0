"""Measures speed and memory of encrypted checkpoints against unencrypted ones: 1 GiB of weights, a recipient key.

Each step runs in its own process; memory is its peak beyond imports and tensors, at most 128 MiB. Besides MiB/s, the
table has MiB per second of CPU time, which other processes affect less.
Usage: python -m benchmarks.checkpoint [MiB of weights, default 1024]
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.timing import peak_mib
from mal_train.core.settings import LabelerConfig
from mal_train.kernel.checkpoint.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from mal_train.kernel.checkpoint.keys import parse_key, write_identity
from mal_train.kernel.networks.network import ModelConfig

LIMIT_MIB = 128
TENSOR_MIB = 16


def step(operation: str, path: Path, key_text: str | None, mib: int) -> None:
    """Saves or loads in this process; prints seconds, CPU seconds and extra MiB."""
    key = parse_key(key_text, purpose="encryption", source="environment")
    base = peak_mib()
    if operation == "save":
        count = TENSOR_MIB << 18
        weights = {f"student.{i:03d}": torch.rand(count) for i in range(mib // TENSOR_MIB)}
        checkpoint = Checkpoint(ModelConfig("vit-micro/16"), LabelerConfig(), weights)
        start, start_cpu = time.perf_counter(), time.process_time()
        save_checkpoint(path, checkpoint, key)
    else:
        start, start_cpu = time.perf_counter(), time.process_time()
        load_checkpoint(path, key.decryption_key if key else None)
    print(time.perf_counter() - start, time.process_time() - start_cpu, peak_mib() - base - mib)


class StepResult(NamedTuple):
    """Result of one step.

    Attributes:
        rate: MiB/s.
        cpu_rate: MiB per second of CPU time.
        extra_mib: peak memory beyond imports and tensors.
    """

    rate: float
    cpu_rate: float
    extra_mib: float


def measure(operation: str, path: Path, key_text: str | None, mib: int) -> StepResult:
    """Runs a step in a new process."""
    command = [sys.executable, "-m", "benchmarks.checkpoint", str(mib), operation, str(path), key_text or ""]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    seconds, cpu_seconds, extra_mib = (float(word) for word in output.split())
    return StepResult(mib / seconds, mib / cpu_seconds, extra_mib)


def main() -> int:
    """Prints the table; returns 1 if a step exceeds the memory limit."""
    mib = int(sys.argv[1]) if len(sys.argv) > 1 else 1024
    if len(sys.argv) > 2:
        step(sys.argv[2], Path(sys.argv[3]), sys.argv[4] or None, mib)
        return 0
    worst = 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_identity(folder / "key")
        print(f"{mib} MiB of weights     MiB/s  of plain  MiB/CPU-s  extra MiB")
        for operation in ("save", "load"):
            plain = measure(operation, folder / "plain", None, mib)
            encrypted = measure(operation, folder / "encrypted", f"file:{folder / 'key'}", mib)
            for variant, result in (("plain", plain), ("encrypted", encrypted)):
                ratio = result.rate / plain.rate
                print(
                    f"{operation}, {variant:9}       {result.rate:8.0f} {ratio:9.2f}  {result.cpu_rate:9.0f}  "
                    f"{result.extra_mib:9.0f}"
                )
            worst = max(worst, plain.extra_mib, encrypted.extra_mib)
    if worst > LIMIT_MIB:
        print(f"extra memory: {worst:.0f} MiB; the limit is {LIMIT_MIB} MiB")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
