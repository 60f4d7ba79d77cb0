"""Wires network, losses, schedule and teacher into Lightning. The arithmetic lives in step, schedule and teacher.

Lightning brings the loop, mixed precision, gradient accumulation and resuming. What a step needs beyond the weights and
the optimizer's state (its rate, loss weights, random numbers) follows from its number, so that nothing else is saved.
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
from mal_train.training.step import LossWeights, StepLosses, mixed_losses, pseudo_label_losses, step_losses

NON_FINITE_LIMIT = 10
"""Steps in a row with a non-finite gradient after which training stops."""
BAD_IMAGE_SHARE = 0.01
"""Training stops when more than this share of the pictures cannot be read."""


@dataclass(frozen=True)
class LossSettings:
    """Weights and ramps of the losses, and the mean field's grid."""

    mil_weight: float = 4.0
    crf_weight: float = 0.5
    mil_steps: int = 1000
    crf_steps: int = 4000
    logit_weight: float = 0.0
    mask_weight: float = 4.0
    crf_size_ratio: int = 1


class MalModule(lightning.LightningModule):
    """Trains `network`.

    Args:
        network: student and teacher; changed in place.
        labeler_config: how labels will be made; validation may replace it with fitted thresholds.
        schedule: learning rate by step.
        losses: weights and ramps.
        mean_field: refines masks into targets for the student.
        optimizer: AdamW's settings.
        teacher_momentum: share of the teacher that stays at every step.
        seed: of the network's random numbers (stochastic depth), ≥ 0.
        learns_from_masks: whether any sample carries a mask, for those who watch.
        masks_are_guesses: an earlier model made the masks: they add to the box losses instead of replacing them.
        num_images: pictures in the training set, to know how many unreadable ones are too many.
        say: prints a line for people.
        ranks: the processes that train together; None: this one alone.
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
        say: Callable[[str], None] = print,
        ranks: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.ranks = ranks or ProcessGroup()
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
        self.say = say
        self.last_losses: StepLosses | None = None
        self.steps_skipped = 0
        self._skipped_in_a_row = 0
        self._bad_images: set[str] = set()

    @property
    def compat(self) -> Compat:
        """Whose oddities to keep."""
        return self.labeler_config.compat

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        batches = int(self.trainer.num_training_batches)
        return max(1, math.ceil(batches / self.trainer.accumulate_grad_batches))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return build_optimizer(self.network, self.optimizer_settings, fused=self.trainer.precision != "16-mixed")

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Moves the pixels; the size branches stay on the CPU."""
        del dataloader_idx
        return batch.to(device)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Random numbers of this batch, whatever was drawn before it."""
        self._note_bad_images(batch.bad_images)
        place = np.random.SeedSequence([self.seed, self.current_epoch, batch_idx, self.ranks.rank])
        torch.manual_seed(int(place.generate_state(1, np.uint64)[0]))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Both networks forward, and the losses that the batch's boxes and masks ask for."""
        del batch_idx
        student_view = normalize(batch.student_NHWC)
        teacher_view = normalize(batch.teacher_NHWC)
        student = self.network.logits(student_view, batch.size_class_N, Branch.STUDENT)
        weights = self.loss_weights(self.global_step)
        teacher = None
        if weights.crf > 0.0:  # nothing else asks for its answer
            teacher = self.network.logits(teacher_view, batch.size_class_N, Branch.TEACHER)
        with torch.autocast(self.device.type, enabled=False):
            # The jittered view's colors are not the object's: ours steers by the clean one.
            guide = student_view if self.compat is Compat.TAO else teacher_view

            def of_boxes(which: Tensor | slice) -> StepLosses:
                return step_losses(
                    student[which],
                    None if teacher is None else teacher[which],
                    guide[which],
                    batch.box_mask_NHW[which],
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
        seen = self.ranks.mean(torch.stack([loss.detach() for loss in losses]) * batch.weight)
        self.last_losses = StepLosses(*seen)
        return losses.total * batch.weight

    def loss_weights(self, step: int) -> LossWeights:
        """Weights of an optimizer step."""
        settings, length = self.losses, self.steps_per_epoch
        return LossWeights(
            settings.mil_weight * ramp(step, settings.mil_steps, length, self.compat),
            settings.crf_weight * ramp(step, settings.crf_steps, length, self.compat),
            settings.logit_weight,
            settings.mask_weight,
        )

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Sets the rate; drops a gradient that is not finite, and stops training at the tenth in a row."""
        set_rate(optimizer, self.schedule.at_step(self.global_step, self.steps_per_epoch, self.compat))
        gradients = [p.grad for p in self.network.student.parameters() if p.grad is not None]
        norms = torch.stack(torch._foreach_norm(gradients)) if gradients else torch.zeros(1)
        # All skip it or none does, however the gradients are spread over the processes.
        if not self.ranks.any(not bool(torch.isfinite(norms).all())):
            self._skipped_in_a_row = 0
            return
        optimizer.zero_grad(set_to_none=True)
        self.steps_skipped += 1
        self._skipped_in_a_row += 1
        self.say(f"step {self.global_step}: the gradient is not finite; the step is left out")
        if self._skipped_in_a_row >= NON_FINITE_LIMIT:
            self.ranks.stop(
                NonFiniteTraining(
                    f"{NON_FINITE_LIMIT} steps in a row up to step {self.global_step} had no finite gradient; lower "
                    "train.lr or set train.use_amp to false. The last checkpoint before them is intact"
                )
            )

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The optimizer's step, then the teacher's."""
        super().optimizer_step(*args, **kwargs)
        if not self._skipped_in_a_row:
            self.ranks.average_buffers(self.network.student)
            update_ema(self.network.teacher, self.network.student, self.teacher_momentum)

    def _note_bad_images(self, here: tuple[str, ...]) -> None:
        """Counts what any process could not read, so that all agree when it is too much."""
        if not self.ranks.any(bool(here)):
            return
        messages = self.ranks.gather(here)
        for message in messages:
            if message not in self._bad_images:
                self._bad_images.add(message)
                self.say(f"not trained on: {message}")
        allowed = max(1.0, BAD_IMAGE_SHARE * self.num_images)
        if len(self._bad_images) > allowed:
            self.ranks.stop(
                BadDataset(
                    f"{len(self._bad_images)} of {self.num_images} training pictures cannot be read, more than "
                    f"{BAD_IMAGE_SHARE:.0%}; the last: {messages[-1]}"
                )
            )
