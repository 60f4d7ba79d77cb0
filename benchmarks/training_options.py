"""Measures the options of the training step: time and memory with gradient checkpointing and with torch.compile.

Each variant runs in a process of its own, because its peak memory is that of the process, with one thread.
"""

import argparse
import json
import subprocess
import sys
import time
from typing import Any

import lightning
import torch

from benchmarks.load.run import ROOT, environment
from benchmarks.timing import Table, peak_mib
from benchmarks.training_step import fit

OPTIONS = ("plain", "gradient_checkpointing", "compiled")
BATCH = {224: 8, 512: 4}
"""Crop size → batch size."""
STEPS = 3


class Clock(lightning.Callback):
    """Callback that measures each step."""

    def __init__(self) -> None:
        self.wall_s: list[float] = []
        self.cpu_s: list[float] = []
        self._began = (0.0, 0.0)

    def on_train_batch_start(self, trainer: lightning.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        """Records the start of the step."""
        del trainer, module, batch, batch_idx
        self._began = (time.perf_counter(), time.process_time())

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Records the times of the step."""
        del trainer, module, outputs, batch, batch_idx
        self.wall_s.append(time.perf_counter() - self._began[0])
        self.cpu_s.append(time.process_time() - self._began[1])


def run_variant(option: str, side: int, count: int) -> dict[str, float]:
    """Trains some steps; returns the seconds of the first one, the CPU seconds of the fastest, and MiB."""
    torch.set_num_threads(1)
    clock = Clock()
    fit(
        side,
        count,
        STEPS,
        clock,
        gradient_checkpointing=option == "gradient_checkpointing",
        compiled=option == "compiled",
    )
    return {"first_s": clock.wall_s[0], "step_s": min(clock.cpu_s[1:]), "peak_mib": peak_mib()}


def measured(option: str, side: int, count: int) -> dict[str, float]:
    """Runs a variant in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.training_options", "--variant", option, str(side), str(count)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, check=True, encoding="utf-8")
    values: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return values


def main() -> int:
    """Prints the table, or, as a child, the metrics of one variant."""
    if sys.argv[1:2] == ["--variant"]:
        print(json.dumps(run_variant(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
        return 0
    parser = argparse.ArgumentParser(description="Measure options of the training step.")
    parser.add_argument("--option", action="append", choices=OPTIONS, help="only this one; may be repeated")
    parser.add_argument("--crop", type=int, action="append", choices=BATCH, help="only this size; may be repeated")
    table = Table("training_options", "Options of the training step, ViT-tiny, one thread", parser)
    for side in table.arguments.crop or BATCH:
        for option in table.arguments.option or OPTIONS:
            values = measured(option, side, BATCH[side])
            name = f"crop {side}, batch {BATCH[side]}, {option}"
            table.add(f"{name}: first step, wall clock", values["first_s"], "s")
            table.add(f"{name}: step, CPU time", values["step_s"], "s")
            table.add(f"{name}: peak memory of the process", values["peak_mib"], "MiB")
    return table.finish()


if __name__ == "__main__":
    raise SystemExit(main())
