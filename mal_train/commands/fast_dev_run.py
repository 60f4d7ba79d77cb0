"""`mal-train train --fast-dev-run`: takes a training through every phase on a few batches and images, and checks each.

Like Lightning's `fast_dev_run`, it finds a fault before a long run, not at its end. It also goes through what
Lightning's leaves out: the ramps of the losses, the fits of the validation, checkpoints and the report. Network, crop,
batch and devices stay those of the spec, so that a batch that does not fit in memory fails here.
"""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch

from mal_train.commands.common import checkpoint_keys
from mal_train.config.spec import Spec
from mal_train.core.coco.annotations import Annotation, CocoFile
from mal_train.core.coco.fields import has_segmentation
from mal_train.core.console import Console
from mal_train.core.errors import BadDataset, CheckpointError, ConfigError, NonFiniteTraining
from mal_train.core.numbers import counted
from mal_train.data.annotations import TrainingBoxes
from mal_train.kernel.checkpoint.checkpoint import load_checkpoint
from mal_train.training.calibration import MIN_INSTANCES
from mal_train.training.callbacks import ValidationCallback
from mal_train.training.module import MalModule
from mal_train.training.validation import has_masks

EPOCHS = 2
STEPS_PER_EPOCH = 2
RAMP_STEPS = 2
"""Length of the ramps at most: the first step is inside the ramp, later ones have the full weights."""
MAX_ACCUMULATED = 2
VALIDATION_MASKS = 80
"""Enough to fit thresholds and calibration: every four of five folds of the images keep over 50 masks."""
MASKS_PER_IMAGE = 8


def shortened(spec: Spec) -> Spec:
    """Returns the spec with a schedule of a few steps and an output folder of its own; the rest stays as it is.

    The folder is `<output folder>-fast-dev-run`. Nothing is resumed and nothing is published.
    """
    section, folder = spec.train, spec.task_dir("train")
    train = section.model_copy(
        update={
            "num_epochs": EPOCHS,
            "warmup_epochs": min(section.warmup_epochs, 1.0),
            "accum_grad_batches": min(section.accum_grad_batches, MAX_ACCUMULATED),
            "checkpoint_interval": 1,
            "checkpoint_interval_unit": "epoch",
            "validation_interval": EPOCHS,
            "loss_mil_step": min(section.loss_mil_step, RAMP_STEPS),
            "loss_crf_step": min(section.loss_crf_step, RAMP_STEPS),
            "resume_training_checkpoint_path": None,
            "results_dir": str(folder.parent / f"{folder.name or 'train'}-fast-dev-run"),
        }
    )
    return spec.model_copy(update={"train": train, "publish_to": ""})


class FastDevRun(lightning.Callback):
    """Limits the data of a training, prints each phase when it has ended, and checks what it did.

    Args:
        spec: the spec, from `shortened`.
        console: prints the phases.
        world_size: processes of the training.

    Attributes:
        phases: names of the phases that have ended, in order.
    """

    def __init__(self, spec: Spec, console: Console, world_size: int) -> None:
        self._spec, self._console = spec, console
        self._begin = time.monotonic()
        self._boxes_needed = STEPS_PER_EPOCH * spec.train.accum_grad_batches * spec.train.batch_size * world_size
        self._boxes: TrainingBoxes | None = None
        self._validation: CocoFile | None = None
        self._step = 0
        self._teacher = 0.0
        self._seen: Counter[str] = Counter()
        self.phases: list[str] = []

    @contextmanager
    def reported(self) -> Iterator[None]:
        """Prints the phases that have ended if the block raises an error."""
        try:
            yield
        except BaseException:  # an interruption, too
            self._console.print(f"fast-dev-run: failed; phases that ran: {', '.join(self.phases) or 'none'}")
            raise

    def few_boxes(self, boxes: TrainingBoxes) -> TrainingBoxes:
        """Returns the first boxes of the file, enough for the steps: half of them with a mask, as far as there are."""
        count = min(self._boxes_needed, len(boxes))
        has_mask = np.array([mask is not None for mask in boxes.masks] or [False] * len(boxes))
        masked, plain = np.flatnonzero(has_mask), np.flatnonzero(~has_mask)
        n_masked = min(len(masked), max(-(-count // 2), count - len(plain)))
        self._boxes = boxes.take(np.sort(np.concatenate([masked[:n_masked], plain[: count - n_masked]])))
        return self._boxes

    def few_masks(self, coco: CocoFile) -> CocoFile:
        """Returns a validation file with the first masks only, a few of each image; without masks, the first boxes."""
        with_masks, chosen = has_masks(coco), list[Annotation]()
        of_image: Counter[object] = Counter()
        for row in coco.annotations:
            is_used = row.problem is None and not row.iscrowd and (not with_masks or has_segmentation(row.raw))
            if is_used and of_image[row.image_id] < MASKS_PER_IMAGE and len(chosen) < VALIDATION_MASKS:
                of_image[row.image_id] += 1
                chosen.append(row)
        images = {name: image for name, image in coco.images.items() if name in of_image}
        self._validation = replace(coco, images=images, annotations=chosen)
        return self._validation

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Notes the data and the network."""
        assert isinstance(pl_module, MalModule)
        assert self._boxes is not None
        self._end("data", self._boxes.summary(reasons=False))
        student = pl_module.network.student
        millions = sum(parameter.numel() for parameter in student.parameters()) / 1e6
        self._end("network", f"{millions:.1f} M parameters, {pl_module.device}, {trainer.precision}")
        self._teacher = _digest(pl_module.network.teacher)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes the losses of a step, with the weights of the ramps."""
        del outputs, batch, batch_idx
        assert isinstance(pl_module, MalModule)
        if pl_module.last_losses is None:
            return
        values = {
            name: float(loss) for name, loss in zip(pl_module.last_losses._fields, pl_module.last_losses, strict=True)
        }
        # Of each batch, not of each step: of accumulated ones, another batch may have had the loss.
        self._seen.update(name for name, value in values.items() if value > 0.0)
        if trainer.global_step == self._step:
            return
        weights = pl_module.loss_weights(self._step)
        self._step = trainer.global_step
        losses = ", ".join(f"{name} {value:.3g}" for name, value in values.items() if value or name == "total")
        self._end(f"step {self._step}", f"weights: MIL {weights.mil:g}, CRF {weights.crf:g}; losses: {losses}")

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Checks steps, losses, teacher and validation; validation and checkpoint have ended before.

        Raises:
            NonFiniteTraining: no step changed the network.
            ConfigError: a loss was never computed, or the teacher did not follow.
            BadDataset: no box of the validation set could be labeled.
        """
        assert isinstance(pl_module, MalModule)
        if pl_module.steps_skipped >= self._step:
            raise NonFiniteTraining(
                f"all {self._step} steps had a non-finite gradient; lower train.lr or set train.use_amp to false"
            )
        self._check_losses()
        self._check_teacher(pl_module)
        validation = next((one for one in trainer.callbacks if isinstance(one, ValidationCallback)), None)  # type: ignore[attr-defined]
        self._check_validation(pl_module, validation)

    def _check_losses(self) -> None:
        section, masks = self._spec.train, () if self._boxes is None else self._boxes.masks
        uses_boxes = not masks or section.supervision == "pseudo" or None in masks
        wanted = {
            "mil": section.loss_mil_weight if uses_boxes else 0.0,
            "crf": section.loss_crf_weight if uses_boxes else 0.0,
            "mask": section.loss_mask_weight if any(mask is not None for mask in masks) else 0.0,
        }
        for name, weight in wanted.items():
            if weight and not self._seen[name]:
                raise ConfigError(
                    f"train.loss_{name}_weight: {weight:g}, but the loss was 0 in all {self._step} steps; check the "
                    "boxes, dataset.crop_size and train.margin_rate"
                )
        used = ", ".join(name for name, weight in wanted.items() if weight)
        self._end("losses", f"every configured loss was above 0: {used}")

    def _check_teacher(self, module: MalModule) -> None:
        momentum = self._spec.model.teacher_momentum
        moved = _digest(module.network.teacher) != self._teacher
        if not moved and momentum < 1.0:
            raise ConfigError(
                f"train.lr: {self._spec.train.lr:g}: the teacher (model.teacher_momentum {momentum:g}) did not change "
                f"in {self._step} steps; give a higher rate"
            )
        self._end("teacher", f"{'follows' if moved else 'does not follow'} the student, momentum {momentum:g}")

    def _check_validation(self, module: MalModule, callback: ValidationCallback | None) -> None:
        result = None if callback is None else callback.last
        if result is None or self._validation is None:
            self._end("validation", "none: dataset.val_ann_path or dataset.load_mask leaves it out")
            return
        masks = result.report.overall.count
        if not masks and not result.proxy.count:
            raise BadDataset(
                f"dataset.val_ann_path: none of {counted(len(self._validation.annotations), 'box')} could be labeled: "
                f"{dict(result.report.skipped)}; check dataset.val_img_dir"
            )
        self._end(
            "validation", f"{counted(masks, 'mask')} of {counted(len(self._validation.images), 'image')} compared"
        )
        config = module.labeler_config
        fits_thresholds = self._spec.fits_thresholds and masks > 0
        self._end("thresholds", f"{'fitted' if fits_thresholds else 'not fitted'}: {config.mask_thres}")
        self._end("calibration", config.score_meaning() if config.calibration else f"not fitted{self._why(masks)}")

    def _why(self, masks: int) -> str:
        """Returns the reason why no calibration is fitted, for a message."""
        if not self._spec.fits_calibration:
            return ", as train.fit_calibration or compat says"
        needed = f"any four of the five folds must have {MIN_INSTANCES} that are not empty"
        return f": {counted(masks, 'mask')} compared; {needed}"

    def finish(self, checkpoint: Path, folder: Path) -> str:
        """Reads the checkpoint and the report back, and returns the closing line.

        Raises:
            CheckpointError: the checkpoint cannot be read, or the report is missing.
        """
        encryption_key, key = checkpoint_keys(self._spec)
        size = f"{checkpoint}, {checkpoint.stat().st_size / 2**20:.1f} MiB"
        if encryption_key is not None and key is None:
            self._end("checkpoint", f"{size}; not read back, which needs decryption_key")
        else:
            self._end("checkpoint", f"{size}; {len(load_checkpoint(checkpoint, key).weights)} weights read back")
        report = folder / "report.html"
        if not report.is_file():
            raise CheckpointError(f"{report}: not written")
        self._end("report", str(report))
        seconds = time.monotonic() - self._begin
        return f"fast-dev-run: all phases ran in {seconds:.0f} s: {', '.join(self.phases)}"

    def _end(self, phase: str, text: str) -> None:
        self.phases.append(phase)
        self._console.print(f"fast-dev-run: {phase} ({time.monotonic() - self._begin:.1f} s): {text}")


def _digest(network: torch.nn.Module) -> float:
    """Returns the sum of all parameters that this process holds, in float64; equal weights have equal sums."""
    return float(sum(parameter.detach().double().sum().cpu() for parameter in network.parameters()))
