"""Compares a training step with its lower bound: forward and backward pass of the student, forward of the teacher.

    python -m benchmarks.training_step [--published DIR] [--json FILE]

The loop of Lightning trains the real module (losses, mean field, AdamW, teacher) on a batch in memory; after each step
the lower bound runs with the same network, crops and precision. CPU time of one thread, medians. With --published, a
checkout of NVIDIA's tao_pytorch_backend, adds the time of the published step beside ours.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any, Literal

import lightning
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.side_by_side.training import ARCH, compare_training
from benchmarks.timing import Table
from mal_train.core.masks.geometry import random_margins
from mal_train.core.settings import Branch, LabelerConfig, Precision
from mal_train.data.datamodule import Batch
from mal_train.kernel.networks.network import MalNetwork, ModelConfig, normalize
from mal_train.kernel.networks.precision import resolve
from mal_train.losses.crf import MeanField
from mal_train.training.compilation import compile_backbones
from mal_train.training.module import LossSettings, MalModule
from mal_train.training.optimizer import OptimizerSettings
from mal_train.training.schedule import CosineSchedule
from mal_train.training.trainer import quiet_libraries

WARM_UP = 2
CASES = ((224, 8, 7), (512, 2, 5))
"""Crop size, batch size, measured steps."""
ROUNDS = 3
"""Steps of the published code."""
MARGINS = (0.0, 1.2)
"""Default of train.margin_rate."""


class StepTimer(lightning.Callback):
    """Callback that measures each training step and its lower bound."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.lower_bounds: list[float] = []
        self._began = 0.0

    def on_train_batch_start(self, trainer: lightning.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        """Records the start of the step."""
        del trainer, module, batch, batch_idx
        self._began = time.process_time()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Records both times of this step after the warm-up."""
        del outputs
        ended = time.process_time()
        network: MalNetwork = module.network
        network.student.zero_grad(set_to_none=True)
        with trainer.strategy.precision_plugin.forward_context():
            student = network.logits(normalize(batch.student_NHWC), batch.size_class_N, Branch.STUDENT)
            network.logits(normalize(batch.teacher_NHWC), batch.size_class_N, Branch.TEACHER)
        torch.autograd.backward(student.sum())
        lower_bound = time.process_time() - ended
        if batch_idx >= WARM_UP:
            self.steps.append(ended - self._began)
            self.lower_bounds.append(lower_bound)


class RepeatedBatch(Dataset[Batch]):
    """Data set of one batch, repeated `times` times."""

    def __init__(self, batch: Batch, times: int) -> None:
        self.batch = batch
        self.times = times

    def __len__(self) -> int:
        return self.times

    def __getitem__(self, index: int) -> Batch:
        """Returns the batch."""
        return self.batch


def unchanged(batch: Any) -> Any:
    """Returns the batch; the default function of the loader would convert its fields."""
    return batch


def random_batch(side: int, count: int) -> Batch:
    """Returns noise with boxes that lie in the crops as in training; size classes alternate."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=generator)
    rng = np.random.default_rng(0)
    box = torch.zeros(count, side, side, dtype=torch.uint8)
    for mask in box:
        left, top, right, bottom = random_margins(rng, MARGINS)  # in halves of the box
        width, height = side / (2 + left + right), side / (2 + top + bottom)
        mask[round(top * height) : side - round(bottom * height), round(left * width) : side - round(right * width)] = 1
    return Batch(pixels, pixels, box, torch.arange(count) % 3, ())


def default_precision() -> Literal["bf16-mixed", "32-true"]:
    """Returns Lightning's name of the precision in which this CPU trains by default."""
    return "bf16-mixed" if resolve(Precision.AUTO, torch.device("cpu")) is torch.bfloat16 else "32-true"


def fit(
    side: int,
    count: int,
    steps: int,
    callback: lightning.Callback,
    *,
    gradient_checkpointing: bool = False,
    compiled: bool = False,
) -> None:
    """Trains `steps` steps on one batch of `count` crops, on the CPU."""
    torch.manual_seed(0)
    network = MalNetwork(ModelConfig(ARCH))
    network.student.set_grad_checkpointing(gradient_checkpointing)
    if compiled:
        compile_backbones(network)
    module = MalModule(
        network,
        LabelerConfig(crop_size=side),
        schedule=CosineSchedule(1e-4, 1e-6, 0.0, 1.0),
        losses=LossSettings(mil_steps=0, crf_steps=0, logit_weight=0.01),
        mean_field=MeanField(),
        optimizer=OptimizerSettings(),
        teacher_momentum=0.996,
        seed=0,
        num_images=count,
    )
    with quiet_libraries():
        trainer = lightning.Trainer(
            accelerator="cpu",
            precision=default_precision(),
            max_epochs=1,
            callbacks=[callback],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        repeated = RepeatedBatch(random_batch(side, count), steps)
        trainer.fit(module, train_dataloaders=DataLoader(repeated, batch_size=None, collate_fn=unchanged))


def measure(side: int, count: int, steps: int) -> tuple[float, float]:
    """Returns the median seconds of (step, lower bound)."""
    timer = StepTimer()
    fit(side, count, WARM_UP + steps, timer)
    return statistics.median(timer.steps), statistics.median(timer.lower_bounds)


def main() -> int:
    """Prints the table."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description="Measure a training step.")
    parser.add_argument("--published", type=Path, metavar="DIR", help="checkout of the published repository")
    title = f"A training step of {ARCH} in {default_precision()} against its lower bound, CPU time of one thread"
    table = Table("training_step", title, parser)
    for side, count, steps in CASES:
        step, lower_bound = measure(side, count, steps)
        table.add(f"crop {side}, batch {count}: lower bound", lower_bound, "s")
        table.add(f"crop {side}, batch {count}: step", step, "s")
        table.add(f"crop {side}, batch {count}: step / lower bound", step / lower_bound, "x", most=1.10)
    if table.arguments.published is not None:
        compare_training(table, table.arguments.published.resolve(), ROUNDS)
    return table.finish()


if __name__ == "__main__":
    raise SystemExit(main())
