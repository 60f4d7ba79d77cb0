"""Writes and finds training checkpoints: Lightning's state through our sealed file, and the name of the newest one."""

import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import lightning
from lightning.fabric.plugins import CheckpointIO

from mal_train.core.errors import Altered, CheckpointError, MalError, OutputError, Truncated
from mal_train.distributed.process_group import ProcessGroup
from mal_train.kernel.checkpoint.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from mal_train.kernel.checkpoint.keys import DecryptionKey, EncryptionKey

LATEST = "mal_model_latest.malckpt"
PREFIX = "network."
"""Where the network sits in the Lightning module; our files name weights without it."""

Describe = Callable[[], Checkpoint]
"""Gives the moment's checkpoint without weights and training state."""
Resumed = Callable[[Checkpoint, "Position"], None]
"""Gets the checkpoint that training goes on from, and where in the data it stands."""


class Position(NamedTuple):
    """A place in the training data: epochs that are done, and batches of the one after them that are done."""

    epochs: int
    batches: int


class Terminated(MalError):
    """SIGTERM came; the state of that moment is in a checkpoint."""

    exit_code = 143


class SealedCheckpointIO(CheckpointIO):
    """Lightning's checkpoints as `.malckpt` files.

    Args:
        describe: model, labeler settings, categories and provenance of the moment.
        resumed: called when a checkpoint is read, before Lightning sees it; may refuse it by an error.
        seal_with: None writes files that are not encrypted.
        open_with: needed to resume from a sealed file.
    """

    def __init__(
        self,
        describe: Describe,
        resumed: Resumed,
        *,
        seal_with: EncryptionKey | None = None,
        open_with: DecryptionKey | None = None,
    ) -> None:
        self._describe = describe
        self._resumed = resumed
        self._seal_with = seal_with
        self._open_with = open_with

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Splits Lightning's state into weights and the rest, and writes both into one sealed file."""
        del storage_options
        rest = {key: value for key, value in checkpoint.items() if key != "state_dict"}
        weights = {name.removeprefix(PREFIX): value for name, value in checkpoint["state_dict"].items()}
        head = self._describe()
        whole = Checkpoint(
            head.model, head.labeler, weights, head.categories, head.provenance, kind="resume", training=rest
        )
        save_checkpoint(Path(path), whole, self._seal_with)

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Lightning's state again; tensors lie on the CPU."""
        del map_location, weights_only
        checkpoint = load_checkpoint(Path(path), self._open_with)
        self._resumed(checkpoint, position_of(checkpoint.training or {}))
        state = {PREFIX + name: value for name, value in checkpoint.weights.items()}
        return {**(checkpoint.training or {}), "state_dict": state}

    def remove_checkpoint(self, path: str | Path) -> None:
        """Deletes a file."""
        Path(path).unlink(missing_ok=True)


def position_of(training: dict[str, Any]) -> Position:
    """Where a training state of Lightning stands."""
    loops = training.get("loops", {}).get("fit_loop", {})
    if not loops:
        return Position(0, 0)
    batches = loops["epoch_loop.batch_progress"]
    done = 0 if batches["is_last_batch"] else int(batches["current"]["processed"])
    return Position(int(loops["epoch_progress"]["current"]["processed"]), done)


@dataclass
class Checkpoints(lightning.Callback):
    """Writes model_epoch_EEE_step_SSSSS.malckpt at intervals and at the end; LATEST points to the newest.

    Attributes:
        folder: where to.
        interval: epochs or steps between two.
        say: prints a line for people.
        by_step: whether `interval` counts optimizer steps.
        ranks: the processes that train together; the first one writes, and all must take part.
        written: the newest file of this run; None before the first.
    """

    folder: Path
    interval: int
    say: Callable[[str], None]
    by_step: bool = False
    ranks: ProcessGroup = field(default_factory=ProcessGroup)
    written: Path | None = None

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The step's file, when one is due; an epoch's last step waits for the validation."""
        del pl_module, outputs, batch
        if self.by_step and is_between_steps(trainer, batch_idx) and trainer.global_step % self.interval == 0:
            self.write(trainer)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """The epoch's file, when one is due."""
        del pl_module
        epoch = trainer.current_epoch + 1
        done = trainer.global_step if self.by_step else epoch
        if done % self.interval == 0 or epoch == trainer.max_epochs:
            self.write(trainer)

    def write(self, trainer: lightning.Trainer) -> Path:
        """A file of this moment, by all processes together; returns its path."""
        path = self.folder / f"model_epoch_{trainer.current_epoch:03d}_step_{trainer.global_step:05d}.malckpt"
        if path == self.written:
            return path
        trainer.save_checkpoint(path)
        if self.ranks.is_first:
            point_latest_to(path)
        self.written = path
        self.say(f"wrote {path}")
        return path


def is_between_steps(trainer: lightning.Trainer, batch_idx: int) -> bool:
    """Whether a batch ended an optimizer step inside an epoch: half a step cannot be kept."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0 and not trainer.is_last_batch


class PreemptionHandler(lightning.Callback):
    """Ends training on SIGTERM: after the step at hand, with a checkpoint of that moment.

    It is enough that one of several processes gets the signal. Under SLURM, SIGUSR1 (sbatch --signal) means the same.

    Args:
        checkpoints: writes it.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self._checkpoints = checkpoints
        self._ranks = checkpoints.ranks
        self._asked = threading.Event()
        self._signals = [signal.SIGTERM, *([signal.SIGUSR1] if self._ranks.world.launcher == "SLURM" else [])]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Listens for the signals inside the block; only the main thread may, elsewhere nothing is changed."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in self._signals}
        self._listen()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _listen(self) -> None:
        for number in self._signals:
            signal.signal(number, lambda *_: self._asked.set())

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Listens again: Lightning has put a handler of its own in between.

        That one would talk to the other processes from inside the handler, and end a step halfway.
        """
        del trainer, pl_module
        if threading.current_thread() is threading.main_thread():
            self._listen()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Writes and raises, when asked to; only between optimizer steps."""
        del pl_module, outputs, batch
        if is_between_steps(trainer, batch_idx):
            self._end_if_asked(trainer)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """The same at the end of an epoch."""
        del pl_module
        self._end_if_asked(trainer)

    def _end_if_asked(self, trainer: lightning.Trainer) -> None:
        if not self._ranks.any(self._asked.is_set()):
            return
        path = self._checkpoints.write(trainer)
        self._ranks.stop(Terminated(f"terminated after saving {path}; the same command goes on from there"))


def point_latest_to(path: Path) -> None:
    """Makes LATEST in the same folder a link to `path`, in one step; a copy where links do not exist.

    Raises:
        OutputError: neither could be made.
    """
    latest = path.with_name(LATEST)
    temporary = path.with_name(f".{LATEST}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        try:
            temporary.symlink_to(path.name)
        except OSError:
            shutil.copyfile(path, temporary)
        temporary.replace(latest)
    except OSError as error:
        raise OutputError(f"{latest}: cannot be written: {error.strerror}") from error


def newest_checkpoint(folder: Path) -> Path | None:
    """The file that LATEST means; the newest by epoch and step where LATEST is missing; None where there is none."""
    return next(iter(newest_first(folder)), None)


def newest_first(folder: Path) -> list[Path]:
    """The file that LATEST means and those before it, by epoch and step; all where LATEST is missing."""
    numbered = {
        (int(match[1]), int(match[2])): path
        for path in folder.glob("model_epoch_*_step_*.malckpt")
        if (match := _NAME.match(path.name))
    }
    order = sorted(numbered, reverse=True)
    latest = folder / LATEST
    if not latest.exists():
        return [numbered[number] for number in order]
    newest = latest.resolve()
    match = _NAME.match(newest.name)
    # LATEST may have been pointed back by hand: what is newer than it is then not wanted.
    return [newest, *(numbered[n] for n in order if match is None or n < (int(match[1]), int(match[2])))]


def newest_whole(folder: Path, open_with: DecryptionKey | None, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is neither truncated nor, if sealed, altered; says which are. None where none exists.

    Each candidate is read to its end, for only then is it known to be whole.

    Raises:
        Truncated, Altered: there are checkpoints, and none of them is whole.
        CheckpointError: the newest cannot be used for another reason, such as a wrong key.
    """
    damaged: CheckpointError | None = None
    for path in newest_first(folder):
        try:
            load_checkpoint(path, open_with)
        except (Truncated, Altered) as error:
            damaged = damaged or error
            say(f"{error}; trying the one before")
        else:
            return path
    if damaged is not None:
        raise damaged
    return None


_NAME = re.compile(r"model_epoch_(\d+)_step_(\d+)\.malckpt")
