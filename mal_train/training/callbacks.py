"""Lightning callbacks: validation after an epoch, and metrics for metrics.csv, TensorBoard and status.json."""

import time
from collections.abc import Callable
from typing import Any

import lightning
import torch

from mal_train.core.images.decoder import RgbImage
from mal_train.core.images.files import images_of, respelling_note
from mal_train.core.metrics.report import EvaluationReport
from mal_train.core.numbers import counted
from mal_train.training.module import MalModule
from mal_train.training.panels import ContactSheet
from mal_train.training.run_files import (
    VALIDATED,
    MetricsFile,
    StatusFile,
    duration,
    summary_line,
    validation_metrics,
)
from mal_train.training.validation import ValidationResult, ValidationSnapshot, Validator

STEPS_PER_ROW = 10
"""Optimizer steps that are averaged in a row of metrics.csv; reading a loss synchronizes the device."""


class ValidationCallback(lightning.Callback):
    """Runs the validator at the end of an epoch, every few epochs and after the last one.

    Args:
        validator: labels the validation set and compares.
        interval: epochs between validations.
        metrics: receives the results.
        print_line: prints a line for the user.
        contact_sheet: draws the worst masks; None to draw none.
        clock: monotonic clock, in seconds.

    Attributes:
        last: result of the last validation; None before the first.
        seconds: total time of all validations.
    """

    def __init__(
        self,
        validator: Validator,
        interval: int,
        metrics: "MetricsCallback",
        print_line: Callable[[str], None],
        *,
        contact_sheet: ContactSheet | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._validator = validator
        self._interval = interval
        self._metrics = metrics
        self._print_line = print_line
        self._contact_sheet = contact_sheet
        self._clock = clock
        self.last: ValidationResult | None = None
        self.seconds = 0.0

    @property
    def snapshot(self) -> ValidationSnapshot | None:
        """Result of the last validation and its data set; None before the first."""
        if self.last is None:
            return None
        return ValidationSnapshot(self.last, self._validator.coco, self._validator.image_dir)

    @property
    def last_report(self) -> EvaluationReport | None:
        """Metrics of the last validation; None before the first."""
        return None if self.last is None else self.last.report

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Validates if due, and stores fitted thresholds and calibration in the module for the next checkpoint."""
        epoch = trainer.current_epoch + 1
        if not isinstance(pl_module, MalModule) or (epoch % self._interval and epoch != trainer.max_epochs):
            return
        start = self._clock()
        self._print_line(f"epoch {epoch}: validating")
        # Isolate the random state: training must not depend on random numbers that a library draws here.
        with torch.random.fork_rng(devices=[]):
            result = self._validator.run(pl_module.network, pl_module.labeler_config)
        pl_module.network.train()
        if result.config != pl_module.labeler_config:
            small, medium, large = result.config.mask_thres
            self._print_line(f"fitted on the validation set: mask_thres small {small}, medium {medium}, large {large}")
            pl_module.labeler_config = result.config
        if self.last is None and (note := respelling_note(images_of(self._validator.image_dir))) is not None:
            self._print_line(note)
        self.last = result
        self._metrics.add_validation(trainer, result)
        self._print_line(f"epoch {epoch}: {_summary(result)}")
        if self._contact_sheet is not None and result.compared:
            self._contact_sheet.write(result.compared, epoch, trainer.global_step)
        self.seconds += self._clock() - start


class MetricsCallback(lightning.Callback):
    """Writes metrics.csv, TensorBoard events and status.json during training.

    Args:
        metrics: receives the rows.
        status: receives the lines.
        clock: monotonic clock, in seconds.
    """

    def __init__(self, metrics: MetricsFile, status: StatusFile, clock: Callable[[], float] = time.monotonic) -> None:
        self._metrics = metrics
        self._status = status
        self._clock = clock
        self._sums: torch.Tensor | None = None
        self._batches = 0
        self._epoch_sums = torch.zeros(5, dtype=torch.float64)
        self._epoch_batches = 0
        self._row_start = self._epoch_start = 0.0
        self._row_step = 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Resets sums and clock; Lightning skips on_train_epoch_start in a run that resumes inside an epoch."""
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Resets sums and clock."""
        del pl_module
        self._row_start = self._epoch_start = self._clock()
        self._row_step = trainer.global_step
        self._sums, self._batches = None, 0
        self._epoch_sums, self._epoch_batches = torch.zeros(5, dtype=torch.float64), 0

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Sums the losses; writes their means to metrics.csv every `STEPS_PER_ROW` steps and at the end of an epoch."""
        del outputs, batch
        if not isinstance(pl_module, MalModule) or pl_module.last_losses is None:
            return
        losses = torch.stack(list(pl_module.last_losses))
        self._sums = losses if self._sums is None else self._sums + losses
        self._batches += 1
        steps = trainer.global_step - self._row_step
        if steps >= STEPS_PER_ROW or (trainer.is_last_batch and steps):
            self._write_row(trainer, steps)

    def _write_row(self, trainer: lightning.Trainer, steps: int) -> None:
        if self._sums is None:
            return
        sums = self._sums.double().cpu()
        total, mil, crf, logit, mask = (sums / self._batches).tolist()
        now = self._clock()
        values = {
            "lr": float(trainer.optimizers[0].param_groups[0]["lr"]),
            "loss": total,
            "loss_mil": mil,
            "loss_crf": crf,
            "loss_logit": logit,
            "loss_mask": mask,
            "seconds_per_step": (now - self._row_start) / steps,
        }
        self._metrics.add("train", trainer.current_epoch + 1, trainer.global_step, values)
        self._epoch_sums += sums
        self._epoch_batches += self._batches
        self._sums, self._batches = None, 0
        self._row_start, self._row_step = now, trainer.global_step

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Writes a line of status.json with the mean loss of the epoch and the remaining time."""
        del pl_module
        epoch, last = trainer.current_epoch + 1, trainer.max_epochs or 0
        seconds = self._clock() - self._epoch_start
        steps = max(1, int(trainer.num_training_batches) // trainer.accumulate_grad_batches)
        mean = float(self._epoch_sums[0] / max(1, self._epoch_batches))
        progress = {
            "epoch": epoch,
            "step": trainer.global_step,
            "max_epoch": last,
            "max_step": steps * last,
            "time_per_epoch": duration(seconds),
            "time_per_step": f"{seconds / steps:.3f}",
            "eta": duration(seconds * (last - epoch)),
        }
        self._status.write("RUNNING", "Training loop in progress", progress=progress)
        self._status.write("RUNNING", "Train metrics generated.", kpi={"train_loss": mean}, progress=progress)

    def add_image(self, name: str, image: RgbImage, step: int) -> None:
        """Adds an image (h, w, 3) uint8 to the TensorBoard events."""
        self._metrics.add_image(name, image, step)

    def add_validation(self, trainer: lightning.Trainer, result: ValidationResult) -> None:
        """Writes a row and a line with the metrics of a validation."""
        metrics = {**validation_metrics(result.report), **result.proxy.metrics()}
        epoch, step = trainer.current_epoch + 1, trainer.global_step
        self._metrics.add("val", epoch, step, metrics)
        self._status.write("RUNNING", VALIDATED, kpi=metrics, progress={"epoch": epoch, "step": step})


def _summary(result: ValidationResult) -> str:
    """Returns the metrics of a validation as one line of text."""
    if result.report.overall.count:
        return f"{summary_line(result.report)}; score: {result.config.score_meaning()}"
    values = [f"{name} {value:.3f}" for name, value in result.proxy.metrics().items() if value is not None]
    boxes = counted(result.proxy.count, "box")
    return f"{', '.join(values) or 'no box could be labeled'} over {boxes}; no masks to compare with"
