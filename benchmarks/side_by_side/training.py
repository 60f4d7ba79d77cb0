"""Compares our training step with the published one."""

import contextlib
import tempfile
from pathlib import Path

import torch

from benchmarks.inputs import SIZES
from benchmarks.side_by_side.sides import medians, side, write_data
from benchmarks.timing import Table
from mal_train.core.settings import Precision
from mal_train.kernel.networks.precision import resolve

ARCH = "vit-deit-tiny/16"
CROPS = (224, 512)


def compare_training(table: Table, published: Path, rounds: int) -> None:
    """Adds the rows of the training step of ViT-tiny, batches of 4, for each crop size.

    Each side has as many threads as torch gives it. The published step runs in bfloat16 too where the CPU is fast at
    it.
    """
    default = resolve(Precision.AUTO, torch.device("cpu"))
    for crop_size in CROPS:
        with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
            write_data(Path(name), 1, SIZES["640x480"])
            options = ["--data", name, "--arch", ARCH, "--crop", str(crop_size), "--published", str(published)]
            sides = {
                f"published, {precision}": stack.enter_context(
                    side("published", *options, "--train", "--precision", precision)
                )
                for precision in dict.fromkeys(("float32", str(default).removeprefix("torch.")))
            }
            bases = list(sides)
            sides["ours, default"] = stack.enter_context(side("our_training", "--crop", str(crop_size)))
            seconds = medians(sides, rounds)
        for name, value in seconds.items():
            table.add(f"batch 4, crop {crop_size}: {name}", value, "s")
        for base in bases:
            table.add(f"batch 4, crop {crop_size}: {base} / ours", seconds[base] / seconds["ours, default"], "x")
