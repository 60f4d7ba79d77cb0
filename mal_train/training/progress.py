"""Shows epoch, rate, time left and losses of a training run."""

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning

from mal_train.core.console import LINE_EVERY_S, Console, ProgressBar
from mal_train.training.module import MalModule


class Progress(lightning.Callback):
    """Progress bar of training, or one line every 8 s where the console is no terminal.

    Args:
        console: the output.
        clock: monotonic seconds.
        line_every_s: seconds between the lines that are printed while the first batch runs, which compiles the step.
    """

    def __init__(
        self, console: Console, clock: Callable[[], float] = time.monotonic, *, line_every_s: float = LINE_EVERY_S
    ) -> None:
        self._console = console
        self._clock = clock
        self._line_every_s = line_every_s
        self._lines: RepeatedLine | None = None
        self._bar: ProgressBar | None = None
        self._is_first_batch = True

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Forgets an earlier run of this callback."""
        del trainer, pl_module
        self.close()

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Opens the bar at the first batch, which shows how far into an epoch a resumed run begins."""
        del pl_module, batch
        if self._bar is None:
            epoch_batches = int(trainer.num_training_batches)
            self._is_first_batch = True
            self._bar = self._console.progress(
                epoch_batches * (trainer.max_epochs or 0),
                "batch",
                initial=epoch_batches * trainer.current_epoch + batch_idx,
                clock=self._clock,
            )
            self._lines = RepeatedLine(self._console, "first batch: the step is compiled", self._line_every_s)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts one batch."""
        del outputs, batch, batch_idx
        if self._bar is None:
            return
        done = int(self._bar.n) + 1
        if self._is_first_batch:
            # The first batch also compiles; a line without a rate would be of little use.
            self._is_first_batch = False
            self._end_lines()
            first_s = self._clock() - self._bar.start_t
            self._console.print(f"first batch: {first_s:.1f} s, with the compilation")
            self._bar.restart_rate(done, postpone_line=True)
        label = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}"
        self._bar.update_to(done, partial(_losses, pl_module), label)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Closes the bar."""
        del trainer, pl_module
        self.close()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Closes the bar, so that the error's line is not appended to it."""
        del trainer, pl_module, exception
        self.close()

    def close(self) -> None:
        """Closes the bar, if one is open, and ends the lines of the first batch."""
        self._end_lines()
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _end_lines(self) -> None:
        if self._lines is not None:
            self._lines.end()
            self._lines = None


class RepeatedLine:
    """Prints a line every `every_s` seconds, from a thread, until `end`.

    Start it only after the processes of a data loader, and end it before any other process is forked: a process that is
    forked while the thread prints inherits the lock of the output, which nobody releases, and hangs at its first line.
    """

    def __init__(self, console: Console, line: str, every_s: float) -> None:
        self._is_ended = threading.Event()
        self._thread = threading.Thread(target=self._print, args=(console, line, every_s), daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Ends the thread; prints no line afterwards."""
        self._is_ended.set()
        self._thread.join()

    def _print(self, console: Console, line: str, every_s: float) -> None:
        while not self._is_ended.wait(every_s):
            console.print(line)


def _losses(module: lightning.LightningModule) -> str:
    if not isinstance(module, MalModule) or module.last_losses is None:
        return ""
    losses = module.last_losses
    mask = f", mask {float(losses.mask):.3f}" if module.learns_from_masks else ""
    return f"loss {float(losses.total):.3f} (mil {float(losses.mil):.3f}, crf {float(losses.crf):.3f}{mask})"
