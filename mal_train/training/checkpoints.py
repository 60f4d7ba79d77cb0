"""Writes, finds and resumes training checkpoints: Lightning's state as encrypted `.malckpt` files."""

import dataclasses
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

from mal_train.core.atomic_io import atomic_write
from mal_train.core.errors import Altered, CheckpointError, OutputError, Terminated, Truncated
from mal_train.distributed.process_group import ProcessGroup
from mal_train.kernel.checkpoint.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from mal_train.kernel.checkpoint.keys import DecryptionKey, EncryptionKey

LATEST = "mal_model_latest.malckpt"
PREFIX = "network."
"""Prefix of the network's weights in the state of the Lightning module; files store the names without it."""

DescribeCheckpoint = Callable[[], Checkpoint]
"""Returns the current checkpoint without weights and training state."""
OnResume = Callable[[Checkpoint, "DataPosition"], None]
"""Receives the checkpoint to resume from and its position in the training data."""


class DataPosition(NamedTuple):
    """Number of finished epochs, and of finished batches of the next epoch."""

    epochs: int
    batches: int


class MalCheckpointIO(CheckpointIO):
    """Lightning plugin that stores checkpoints as `.malckpt` files.

    Args:
        describe: returns current model, labeler settings, categories and provenance.
        on_resume: called with a checkpoint that has been read, before Lightning gets it; raises an error to refuse it.
        encryption_key: key that encrypts the files; None: not encrypted.
        decryption_key: key that decrypts a file to resume from.
    """

    def __init__(
        self,
        describe: DescribeCheckpoint,
        on_resume: OnResume,
        *,
        encryption_key: EncryptionKey | None = None,
        decryption_key: DecryptionKey | None = None,
    ) -> None:
        self._describe = describe
        self._on_resume = on_resume
        self._encryption_key = encryption_key
        self._decryption_key = decryption_key

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Splits Lightning's state into weights and training state, and writes both to one file."""
        del storage_options
        training = {key: value for key, value in checkpoint.items() if key != "state_dict"}
        weights = {name.removeprefix(PREFIX): value for name, value in checkpoint["state_dict"].items()}
        complete = dataclasses.replace(self._describe(), weights=weights, kind="resume", training=training)
        save_checkpoint(Path(path), complete, self._encryption_key)

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Returns Lightning's state, with all tensors on the CPU."""
        del map_location, weights_only
        checkpoint = load_checkpoint(Path(path), self._decryption_key)
        self._on_resume(checkpoint, data_position(checkpoint.training or {}))
        state = {PREFIX + name: value for name, value in checkpoint.weights.items()}
        return {**(checkpoint.training or {}), "state_dict": state}

    def remove_checkpoint(self, path: str | Path) -> None:
        """Deletes a file."""
        Path(path).unlink(missing_ok=True)


def data_position(training: dict[str, Any]) -> DataPosition:
    """Returns the position in the training data of a training state of Lightning.

    Raises:
        CheckpointError: the state has another layout; Lightning would fail on it with any error.
    """
    try:
        for name, expected in _LAYOUT.items():
            if not isinstance(training.get(name, expected()), expected):
                raise TypeError(name)
        loops = training.get("loops", {}).get("fit_loop", {})
        if not loops:
            return DataPosition(0, 0)
        batches = loops["epoch_loop.batch_progress"]
        done = 0 if batches["is_last_batch"] else _count(batches["current"]["processed"])
        return DataPosition(_count(loops["epoch_progress"]["current"]["processed"]), done)
    except (AttributeError, LookupError, TypeError) as error:
        raise CheckpointError(
            f"training state: no layout that this version resumes from ({type(error).__name__}: {error}); resume from "
            "another checkpoint, or start a new training from its weights"
        ) from None


_LAYOUT: dict[str, type] = {
    **{"epoch": int, "global_step": int, "loops": dict, "callbacks": dict},
    **{"optimizer_states": list, "lr_schedulers": list},
}
"""Types of the parts of Lightning's training state."""


def _count(value: object) -> int:
    if not isinstance(value, int) or value < 0:
        raise TypeError(f"{value!r:.40} is not a count")
    return value


@dataclass
class CheckpointCallback(lightning.Callback):
    """Writes model_epoch_EEE_step_SSSSS.malckpt at intervals and after the last epoch; LATEST links to the newest.

    Attributes:
        folder: output folder.
        interval: epochs or optimizer steps between checkpoints.
        print_line: prints a line for the user.
        by_step: True if `interval` counts optimizer steps.
        group: the processes that train together; rank 0 writes, and all must take part.
        written: the newest file of this run; None before the first.
    """

    folder: Path
    interval: int
    print_line: Callable[[str], None]
    by_step: bool = False
    group: ProcessGroup = field(default_factory=ProcessGroup)
    written: Path | None = None

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Writes a checkpoint if one is due; after the last step of an epoch, the validation comes first."""
        del pl_module, outputs, batch
        if self.by_step and is_between_steps(trainer, batch_idx) and trainer.global_step % self.interval == 0:
            self.write(trainer)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Writes a checkpoint if one is due."""
        del pl_module
        epoch = trainer.current_epoch + 1
        done = trainer.global_step if self.by_step else epoch
        if done % self.interval == 0 or epoch == trainer.max_epochs:
            self.write(trainer)

    def write(self, trainer: lightning.Trainer) -> Path:
        """Writes a checkpoint of the current state and returns its path; all processes must call it."""
        path = self.folder / f"model_epoch_{trainer.current_epoch:03d}_step_{trainer.global_step:05d}.malckpt"
        if path == self.written:
            return path
        trainer.save_checkpoint(path)
        if self.group.is_rank_zero:
            point_latest_to(path)
        self.written = path
        self.print_line(f"wrote {path}")
        return path


def is_between_steps(trainer: lightning.Trainer, batch_idx: int) -> bool:
    """Returns True if a batch ended an optimizer step inside an epoch; a partial step cannot be saved."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0 and not trainer.is_last_batch


class PreemptionHandler(lightning.Callback):
    """Ends training on SIGTERM: finishes the current optimizer step, writes a checkpoint, and raises Terminated.

    The signal need not reach more than one process. Under SLURM, SIGUSR1 (sbatch --signal) has the same effect.

    Args:
        checkpoints: writes the checkpoint.
    """

    def __init__(self, checkpoints: CheckpointCallback) -> None:
        self._checkpoints = checkpoints
        self._group = checkpoints.group
        # A plain attribute: setting a threading.Event in a handler can wait for a lock that the interrupted code holds.
        self._is_requested = False
        self._signals = [signal.SIGTERM, *([signal.SIGUSR1] if self._group.env.launcher == "SLURM" else [])]

    @contextmanager
    def handle_signals(self) -> Iterator[None]:
        """Handles the signals inside the block; does nothing outside the main thread, where Python allows no handlers.

        After an error, one of several processes ignores the signals until it exits: a launcher that signals the others
        when the first one exits must not kill a process that has just saved, which would change its exit code.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in self._signals}
        self._install_handlers()
        try:
            yield
        except BaseException:  # any error ends the process
            if self._group.world_size > 1:
                before = dict.fromkeys(before, signal.SIG_IGN)
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _install_handlers(self) -> None:
        for number in self._signals:
            signal.signal(number, self._request)

    def _request(self, *_: object) -> None:
        self._is_requested = True

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Installs the handlers again: Lightning has replaced them.

        Lightning's handler would communicate with the other processes from inside the handler and interrupt a step.
        """
        del trainer, pl_module
        if threading.current_thread() is threading.main_thread():
            self._install_handlers()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ends training between optimizer steps if a signal has arrived."""
        del pl_module, outputs, batch
        if is_between_steps(trainer, batch_idx):
            self._end_if_requested(trainer)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Ends training at the end of an epoch if a signal has arrived."""
        del pl_module
        self._end_if_requested(trainer)

    def _end_if_requested(self, trainer: lightning.Trainer) -> None:
        if not self._group.any(self._is_requested):
            return
        path = self._checkpoints.write(trainer)
        self._group.abort(Terminated(f"terminated after saving {path}; run the same command again to resume"))


def point_latest_to(path: Path) -> None:
    """Atomically replaces LATEST in the same folder with a link to `path`; a copy where links are not supported.

    Raises:
        OutputError: neither can be created.
    """
    latest = path.with_name(LATEST)
    temporary = path.with_name(f".{LATEST}.link")
    try:
        temporary.unlink(missing_ok=True)
        try:
            temporary.symlink_to(path.name)
        except OSError:
            with path.open("rb") as source, atomic_write(latest) as copy:
                shutil.copyfileobj(source, copy)
        else:
            temporary.replace(latest)
    except OSError as error:
        raise OutputError(f"{latest}: cannot be written: {error.strerror}") from error


def newest_checkpoint(folder: Path) -> Path | None:
    """Returns the target of LATEST, or the newest file by epoch and step without LATEST; None without checkpoints."""
    return next(iter(newest_first(folder)), None)


def newest_first(folder: Path) -> list[Path]:
    """Returns the target of LATEST and all older files, newest first; all files without LATEST."""
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
    # A user may point LATEST to an older file, to continue from there; newer files are then ignored.
    return [newest, *(numbered[n] for n in order if match is None or n < (int(match[1]), int(match[2])))]


def newest_intact(folder: Path, decryption_key: DecryptionKey | None, print_line: Callable[[str], None]) -> Path | None:
    """Returns the newest checkpoint that is neither truncated nor altered; None without checkpoints.

    Reads each candidate to its end, and reports damaged ones. Alterations are detected in encrypted files only.

    Raises:
        Truncated, Altered: there are checkpoints, but all are damaged.
        CheckpointError: the newest intact one cannot be read for another reason, such as a wrong key.
    """
    damaged: CheckpointError | None = None
    for path in newest_first(folder):
        try:
            load_checkpoint(path, decryption_key)
        except (Truncated, Altered) as error:
            damaged = damaged or error
            print_line(f"{error}; trying the checkpoint before it")
        else:
            return path
    if damaged is not None:
        raise damaged
    return None


_NAME = re.compile(r"model_epoch_(\d+)_step_(\d+)\.malckpt")
