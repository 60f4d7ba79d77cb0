"""Learning rate and loss weights as functions of the optimizer step. Plain numbers: no torch, no state to save.

`compat: tao` keeps two oddities of the published loop: the rate lags a step behind (the first step runs at the peak),
and the losses ramp up during epoch 0 only, jumping to full weight at epoch 1.
"""

import math
from dataclasses import dataclass

from mal_train.core.settings import Compat


@dataclass(frozen=True)
class CosineSchedule:
    """Linear warm-up, then half cosine waves down to a floor (§5 of the method).

    Attributes:
        peak: learning rate at the end of the warm-up.
        floor: learning rate at the end.
        warmup_epochs: length of the warm-up, fractions allowed.
        num_epochs: length of the training.
        num_wave: half waves after the warm-up; 1 falls once.
    """

    peak: float
    floor: float
    warmup_epochs: float
    num_epochs: float
    num_wave: float = 1.0

    def at_epoch(self, epoch: float) -> float:
        """Rate at a point in time, counted in epochs.

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
        """Rate of optimizer step number `step`, counted from 0 over the whole training.

        Ours: the first step has a small rate, the last one the floor. `tao`: the first step has the peak, and each
        later one the rate of the moment before the step before it.
        """
        if compat is Compat.TAO:
            return self.peak if step == 0 else self.at_epoch((step - 1) / steps_per_epoch)
        return self.at_epoch((step + 1) / steps_per_epoch)


def ramp(step: int, length: int, steps_per_epoch: int, compat: Compat) -> float:
    """Share in [0, 1] of a loss's weight at optimizer step `step`; it reaches 1 after `length` steps.

    Ours starts above 0 and runs over the whole training; `tao` starts at 0 and ends with epoch 0.
    """
    if length <= 0:
        return 1.0
    if compat is Compat.TAO:
        return min(1.0, step / length) if step < steps_per_epoch else 1.0
    return min(1.0, (step + 1) / length)
