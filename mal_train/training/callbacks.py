"""Joins the training loop to what watches it: validation, and the records for machines."""

import time
from collections.abc import Callable
from typing import Any

import lightning
import torch

from mal_train.core.masks.images import RgbImage
from mal_train.core.metrics.report import EvaluationReport
from mal_train.training.module import MalModule
from mal_train.training.panels import ContactSheet
from mal_train.training.run_files import MetricsFile, StatusFile, duration, figures_of, one_line
from mal_train.training.validation import Validated, Validation, Validator

ROW_EVERY = 10
"""Optimizer steps that share a row of metrics.csv: reading a loss makes the device wait."""


class ValidationCallback(lightning.Callback):
    """Runs the validator at the end of an epoch, every few epochs and after the last one.

    Args:
        validator: measures.
        interval: epochs between two validations.
        records: get the figures.
        say: prints a line for people.
        board: shows the worst masks; None shows none.
        clock: seconds, monotonic.

    Attributes:
        last: what the last validation found; None before the first.
        seconds: spent on validations.
    """

    def __init__(
        self,
        validator: Validator,
        interval: int,
        records: "MetricsCallback",
        say: Callable[[str], None],
        *,
        board: ContactSheet | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._validator = validator
        self._interval = interval
        self._records = records
        self._say = say
        self._board = board
        self._clock = clock
        self.last: Validation | None = None
        self.seconds = 0.0

    @property
    def validated(self) -> Validated | None:
        """What the last validation found, with the file it was made on; None before the first."""
        return None if self.last is None else Validated(self.last, self._validator.coco, self._validator.image_dir)

    @property
    def last_report(self) -> EvaluationReport | None:
        """Figures of the last validation."""
        return None if self.last is None else self.last.report

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Measures, and keeps fitted thresholds and calibration for the checkpoint that follows."""
        epoch = trainer.current_epoch + 1
        if not isinstance(pl_module, MalModule) or (epoch % self._interval and epoch != trainer.max_epochs):
            return
        began = self._clock()
        # Validation draws nothing, yet a library might: training's random numbers must not depend on it.
        with torch.random.fork_rng(devices=[]):
            found = self._validator.run(pl_module.network, pl_module.labeler_config)
        pl_module.network.train()
        if found.config != pl_module.labeler_config:
            small, medium, large = found.config.mask_thres
            self._say(f"fitted on the validation set: mask_thres small {small}, medium {medium}, large {large}")
            pl_module.labeler_config = found.config
        self.last = found
        self._records.validated(trainer, found.report)
        self._say(f"epoch {epoch}: {one_line(found.report)}; score: {found.config.score_meaning()}")
        if self._board is not None:
            self._board.show(found.compared, epoch, trainer.global_step)
        self.seconds += self._clock() - began


class MetricsCallback(lightning.Callback):
    """Keeps metrics.csv, TensorBoard and status.json up to date.

    Args:
        metrics: gets the rows.
        status: gets the lines.
        clock: seconds, monotonic.
    """

    def __init__(self, metrics: MetricsFile, status: StatusFile, clock: Callable[[], float] = time.monotonic) -> None:
        self._metrics = metrics
        self._status = status
        self._clock = clock
        self._sums: torch.Tensor | None = None
        self._batches = 0
        self._epoch_sums = torch.zeros(5, dtype=torch.float64)
        self._epoch_batches = 0
        self._since = self._epoch_since = 0.0
        self._step_then = 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Begins to count; a run that goes on inside an epoch hears of no epoch's start."""
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Begins to count."""
        del pl_module
        self._since = self._epoch_since = self._clock()
        self._step_then = trainer.global_step
        self._sums, self._batches = None, 0
        self._epoch_sums, self._epoch_batches = torch.zeros(5, dtype=torch.float64), 0

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Adds the losses; writes a row every ROW_EVERY steps and at the end of an epoch."""
        del outputs, batch
        if not isinstance(pl_module, MalModule) or pl_module.last_losses is None:
            return
        losses = torch.stack(list(pl_module.last_losses))
        self._sums = losses if self._sums is None else self._sums + losses
        self._batches += 1
        steps = trainer.global_step - self._step_then
        if steps >= ROW_EVERY or (trainer.is_last_batch and steps):
            self._write_row(trainer, steps)

    def _write_row(self, trainer: lightning.Trainer, steps: int) -> None:
        if self._sums is None:
            return
        sums = self._sums.double().cpu()
        total, mil, crf, logit, mask = (sums / self._batches).tolist()
        now = self._clock()
        figures = {
            "lr": float(trainer.optimizers[0].param_groups[0]["lr"]),
            "loss": total,
            "loss_mil": mil,
            "loss_crf": crf,
            "loss_logit": logit,
            "loss_mask": mask,
            "seconds_per_step": (now - self._since) / steps,
        }
        self._metrics.add("train", trainer.current_epoch + 1, trainer.global_step, figures)
        self._epoch_sums += sums
        self._epoch_batches += self._batches
        self._sums, self._batches = None, 0
        self._since, self._step_then = now, trainer.global_step

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """A line of status.json with the epoch's mean loss and the time left."""
        del pl_module
        epoch, last = trainer.current_epoch + 1, trainer.max_epochs or 0
        seconds = self._clock() - self._epoch_since
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

    def add_picture(self, name: str, picture: RgbImage, step: int) -> None:
        """A picture for TensorBoard."""
        self._metrics.add_picture(name, picture, step)

    def validated(self, trainer: lightning.Trainer, report: EvaluationReport) -> None:
        """A row and a line with the figures of a validation."""
        figures = figures_of(report)
        self._metrics.add("val", trainer.current_epoch + 1, trainer.global_step, figures)
        self._status.write("RUNNING", "Eval metrics generated.", kpi=figures)
