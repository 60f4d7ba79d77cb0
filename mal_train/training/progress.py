"""Shows how training goes: a bar in a terminal, a line now and then elsewhere."""

import time
from collections.abc import Callable
from typing import Any

import lightning
from tqdm import tqdm

from mal_train.core.console import Console
from mal_train.training.module import MalModule

LINE_EVERY_S = 30.0


class Progress(lightning.Callback):
    """Rate, time left and losses of training.

    Args:
        screen: where to.
        clock: seconds, monotonic.
    """

    def __init__(self, screen: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._screen = screen
        self._clock = clock
        self._bar: tqdm[Any] | None = None
        self._is_open = False
        self._done = 0
        self._total = 0
        self._here = 0
        self._started = self._last_line = 0.0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Counts batches and the clock from here on; the first batch will say where that is."""
        del pl_module
        self._total = int(trainer.num_training_batches) * (trainer.max_epochs or 0)
        self._started = self._last_line = self._clock()
        self._here = 0
        self._is_open = False

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Opens the bar at the first batch: only now it shows how far into an epoch a resumed run goes on."""
        del pl_module, batch
        if not self._is_open:
            self._is_open = True
            self._done = int(trainer.num_training_batches) * trainer.current_epoch + batch_idx
            self._bar = self._screen.bar(self._total, self._done, "batch")

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """One batch further."""
        del outputs, batch, batch_idx
        self._done += 1
        self._here += 1
        now = self._clock()
        if self._here == 1:
            self._started = self._last_line = (
                now  # the first batch also starts the loader and compiles: no measure of the rest
            )
        if self._bar is not None and not self._bar.disable:
            self._bar.set_description_str(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}", refresh=False)
            # Reading a loss waits for the device, so only as often as people can see.
            if now - self._last_line > 0.5 or self._here == 1:
                self._bar.set_postfix_str(_losses(pl_module), refresh=False)
                self._last_line = now
            self._bar.update()
        elif now - self._last_line >= LINE_EVERY_S and self._here > 1:
            self._last_line = now
            seconds = (now - self._started) / (self._here - 1)
            left = tqdm.format_interval(int(seconds * (self._total - self._done)))
            self._screen.say(
                f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}, batch {self._done}/{self._total}, "
                f"{_pace(seconds)}, {left} left{_losses(pl_module, ', ')}"
            )

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Closes the bar."""
        del trainer, pl_module
        self.close()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Leaves no half a bar before the error's line."""
        del trainer, pl_module, exception
        self.close()

    def close(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _pace(seconds: float) -> str:
    """Batches a second, or seconds a batch where these are more, as the bar has it: 0.02 batch/s would tell little.

    >>> _pace(0.5), _pace(42.7)
    ('2.00 batch/s', '42.70 s/batch')
    """
    return f"{1 / seconds:.2f} batch/s" if seconds < 1 else f"{seconds:.2f} s/batch"


def _losses(module: lightning.LightningModule, before: str = "") -> str:
    if not isinstance(module, MalModule) or module.last_losses is None:
        return ""
    losses = module.last_losses
    mask = f", mask {float(losses.mask):.3f}" if module.learns_from_masks else ""
    return f"{before}loss {float(losses.total):.3f} (mil {float(losses.mil):.3f}, crf {float(losses.crf):.3f}{mask})"
