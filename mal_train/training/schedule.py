"""Learning rate and loss weights as functions of the optimizer step. No torch, and no state to save.

`compat: tao` reproduces two properties of the published loop: the rate lags one step behind (the first step uses the
peak), and the loss weights ramp up during epoch 0 only and jump to their full value at epoch 1.
"""

import math
from dataclasses import dataclass

from mal_train.core.settings import Compat


@dataclass(frozen=True)
class CosineSchedule:
    """Linear warm-up, then half cosine waves down to a floor.

    Attributes:
        peak: learning rate at the end of the warm-up.
        floor: learning rate at the end.
        warmup_epochs: length of the warm-up, in epochs; may be a fraction.
        num_epochs: length of the training, in epochs.
        num_wave: number of half waves after the warm-up; 1 decreases monotonically.
    """

    peak: float
    floor: float
    warmup_epochs: float
    num_epochs: float
    num_wave: float = 1.0

    def at_epoch(self, epoch: float) -> float:
        """Returns the learning rate after `epoch` epochs.

        >>> [round(CosineSchedule(3e-6, 6e-7, 1, 10).at_epoch(e), 9) for e in (0.5, 5.5, 10)]
        [1.5e-06, 1.8e-06, 6e-07]
        """
        if epoch < self.warmup_epochs:
            return self.peak * epoch / self.warmup_epochs
        if self.num_epochs <= self.warmup_epochs:
            return self.peak
        done = (epoch - self.warmup_epochs) / (self.num_epochs - self.warmup_epochs)
        return self.floor + (self.peak - self.floor) * 0.5 * (1.0 + math.cos(math.pi * self.num_wave * done))

    def at_step(self, step: int, steps_per_epoch: int, compat: Compat) -> float:
        """Returns the learning rate of an optimizer step, counted from 0 over all epochs.

        `none`: the first step has a small rate, the last one the floor. `tao`: the first step has the peak, and step n
        the rate at the start of step n − 1.
        """
        if compat is Compat.TAO:
            return self.peak if step == 0 else self.at_epoch((step - 1) / steps_per_epoch)
        return self.at_epoch((step + 1) / steps_per_epoch)


def ramp(step: int, length: int, steps_per_epoch: int, compat: Compat) -> float:
    """Returns the fraction in [0, 1] of a loss weight at an optimizer step; it reaches 1 after `length` steps.

    `none` starts above 0 and continues over epochs; `tao` starts at 0 and is 1 from epoch 1 on.
    """
    if length <= 0:
        return 1.0
    if compat is Compat.TAO:
        return min(1.0, step / length) if step < steps_per_epoch else 1.0
    return min(1.0, (step + 1) / length)
