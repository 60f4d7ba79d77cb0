"""The Lightning module: connects network, losses, schedule and teacher, which `step`, `schedule` and `ema` compute.

Lightning provides the loop, mixed precision, gradient accumulation and resuming. Learning rate, loss weights and random
seed of a step are functions of its index, so a checkpoint needs only the weights and the optimizer state.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning
import numpy as np
import torch
from torch import Tensor

from mal_train.core.errors import BadDataset, NonFiniteTraining
from mal_train.core.settings import Branch, Compat, LabelerConfig
from mal_train.data.datamodule import Batch
from mal_train.distributed.process_group import ProcessGroup
from mal_train.kernel.networks.network import MalNetwork, normalize
from mal_train.losses.crf import MeanField
from mal_train.training.ema import update_ema
from mal_train.training.optimizer import OptimizerSettings, build_optimizer, set_rate
from mal_train.training.schedule import CosineSchedule, ramp
from mal_train.training.step import (
    LossWeights,
    StepLosses,
    mixed_losses,
    pseudo_label_losses,
    step_losses,
    target_regions,
)

NON_FINITE_LIMIT = 10
"""Number of consecutive steps with a non-finite gradient after which training stops."""
MAX_UNREADABLE_FRACTION = 0.01
"""Training stops when more than this fraction of the images cannot be read."""


@dataclass(frozen=True)
class LossSettings:
    """Weights and ramp lengths of the losses, and the resolution of the mean field."""

    mil_weight: float = 4.0
    crf_weight: float = 0.5
    mil_steps: int = 1000
    crf_steps: int = 4000
    logit_weight: float = 0.0
    mask_weight: float = 4.0
    crf_size_ratio: int = 1


class MalModule(lightning.LightningModule):
    """Lightning module that trains `network`.

    Args:
        network: student and teacher; changed in place.
        labeler_config: labeler settings of the checkpoint; validation replaces them with fitted ones.
        schedule: learning rate by step.
        losses: weights and ramp lengths.
        mean_field: refines probabilities into target masks for the student.
        optimizer: settings of AdamW.
        teacher_momentum: momentum of the teacher's moving average, per step.
        seed: seed of stochastic depth, ≥ 0.
        num_images: number of training images; limits how many may be unreadable.
        learns_from_masks: True if any sample has a mask; used for the progress display only.
        uses_pseudo_labels: True if an earlier model predicted the masks: their loss is added to the box losses instead
            of replacing them.
        print_line: prints a line for the user.
        group: the processes that train together; None: a single process.
    """

    def __init__(
        self,
        network: MalNetwork,
        labeler_config: LabelerConfig,
        *,
        schedule: CosineSchedule,
        losses: LossSettings,
        mean_field: MeanField,
        optimizer: OptimizerSettings,
        teacher_momentum: float,
        seed: int,
        num_images: int,
        learns_from_masks: bool = False,
        uses_pseudo_labels: bool = False,
        print_line: Callable[[str], None] = print,
        group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.group = group or ProcessGroup()
        self.network = network
        self.labeler_config = labeler_config
        self.schedule = schedule
        self.losses = losses
        self.mean_field = mean_field
        self.optimizer_settings = optimizer
        self.teacher_momentum = teacher_momentum
        self.seed = seed
        self.num_images = num_images
        self.learns_from_masks = learns_from_masks
        self.uses_pseudo_labels = uses_pseudo_labels
        self.print_line = print_line
        self.last_losses: StepLosses | None = None
        self.steps_skipped = 0
        self._consecutive_skips = 0
        self._unreadable: set[str] = set()

    @property
    def compat(self) -> Compat:
        """Compatibility mode of the labeler settings."""
        return self.labeler_config.compat

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch."""
        batches = int(self.trainer.num_training_batches)
        return max(1, math.ceil(batches / self.trainer.accumulate_grad_batches))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Builds AdamW."""
        return build_optimizer(self.network, self.optimizer_settings, fused=self.trainer.precision != "16-mixed")

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Moves the batch to the device, except for the size classes, which stay on the CPU."""
        del dataloader_idx
        return batch.to(device)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Reports unreadable images, and seeds the random generator from seed, epoch, batch and rank."""
        self._count_unreadable(batch.bad_images)
        sequence = np.random.SeedSequence([self.seed, self.current_epoch, batch_idx, self.group.rank])
        torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Runs both networks, and computes the losses of the boxes and masks of the batch."""
        del batch_idx
        student_view = normalize(batch.student_NHWC)
        teacher_view = normalize(batch.teacher_NHWC)
        student = self.network.logits(student_view, batch.size_class_N, Branch.STUDENT)
        weights = self.loss_weights(self.global_step)
        teacher = None
        if weights.crf > 0.0:  # only the mean-field loss uses the teacher
            # A GPU would wait for the box masks to be read back.
            needed = target_regions(batch.box_mask_NHW) if self.device.type == "cpu" else None
            teacher = self.network.logits(teacher_view, batch.size_class_N, Branch.TEACHER, needed)
        with torch.autocast(self.device.type, enabled=False):
            # Color jitter changes the color edges of the student's view, so the clean view guides the mean field.
            guide = student_view if self.compat is Compat.TAO else teacher_view

            def of_boxes(index: Tensor | slice) -> StepLosses:
                return step_losses(
                    student[index],
                    None if teacher is None else teacher[index],
                    guide[index],
                    batch.box_mask_NHW[index],
                    refine=self.mean_field,
                    weights=weights,
                    compat=self.compat,
                    crf_size_ratio=self.losses.crf_size_ratio,
                )

            if batch.mask_MHW is None or batch.masked_M is None or batch.mask_weight_M is None:
                losses = of_boxes(slice(None))
            elif self.uses_pseudo_labels:
                losses = pseudo_label_losses(
                    student,
                    batch.mask_MHW,
                    batch.masked_M,
                    mask_weight_M=batch.mask_weight_M,
                    weight=weights.mask,
                    boxes=of_boxes(slice(None)),
                )
            else:
                losses = mixed_losses(student, batch.mask_MHW, batch.masked_M, weights.mask, of_boxes)
        means = self.group.mean(torch.stack([loss.detach() for loss in losses]) * batch.weight)
        self.last_losses = StepLosses(*means)
        return losses.total * batch.weight

    def loss_weights(self, step: int) -> LossWeights:
        """Returns the loss weights of an optimizer step."""
        settings, length = self.losses, self.steps_per_epoch
        return LossWeights(
            settings.mil_weight * ramp(step, settings.mil_steps, length, self.compat),
            settings.crf_weight * ramp(step, settings.crf_steps, length, self.compat),
            settings.logit_weight,
            settings.mask_weight,
        )

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Sets the learning rate, drops a non-finite gradient, and stops after `NON_FINITE_LIMIT` of them in a row."""
        set_rate(optimizer, self.schedule.at_step(self.global_step, self.steps_per_epoch, self.compat))
        gradients = [p.grad for p in self.network.student.parameters() if p.grad is not None]
        norms = torch.stack(torch._foreach_norm(gradients)) if gradients else torch.zeros(1)
        # With sharded gradients one process may see the NaN alone; all must skip the step together.
        if not self.group.any(not bool(torch.isfinite(norms).all())):
            self._consecutive_skips = 0
            return
        optimizer.zero_grad(set_to_none=True)
        self.steps_skipped += 1
        self._consecutive_skips += 1
        self.print_line(f"step {self.global_step}: the gradient is not finite; the step is skipped")
        if self._consecutive_skips >= NON_FINITE_LIMIT:
            self.group.abort(
                NonFiniteTraining(
                    f"{NON_FINITE_LIMIT} consecutive steps up to step {self.global_step} had a non-finite gradient; "
                    "lower train.lr or set train.use_amp to false. The last checkpoint before them is intact"
                )
            )

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Updates the student, then the teacher."""
        super().optimizer_step(*args, **kwargs)
        if not self._consecutive_skips:
            self.group.average_buffers(self.network.student)
            update_ema(self.network.teacher, self.network.student, self.teacher_momentum)

    def _count_unreadable(self, messages: tuple[str, ...]) -> None:
        """Reports and counts the unreadable images of all processes; stops training above the limit."""
        if not self.group.any(bool(messages)):
            return
        gathered = self.group.all_gather(messages)
        for message in gathered:
            if message not in self._unreadable:
                self._unreadable.add(message)
                self.print_line(f"image skipped: {message}")
        allowed = max(1.0, MAX_UNREADABLE_FRACTION * self.num_images)
        if len(self._unreadable) > allowed:
            self.group.abort(
                BadDataset(
                    f"{len(self._unreadable)} of {self.num_images} training images cannot be read, more than "
                    f"{MAX_UNREADABLE_FRACTION:.0%}; the last one: {gathered[-1]}"
                )
            )
