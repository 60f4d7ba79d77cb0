"""What every task shares: its folder and how it ends, keys, devices, paths."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch

from mal_train.config.network import NetworkConfig
from mal_train.config.spec import Spec
from mal_train.core.console import Console
from mal_train.core.errors import ConfigError, OutputError
from mal_train.core.settings import LabelerConfig
from mal_train.core.yaml_config import dump
from mal_train.kernel.checkpoint import builtin
from mal_train.kernel.checkpoint.keys import DecryptionKey, EncryptionKey, parse_key
from mal_train.kernel.networks.backbones import default_crop_size
from mal_train.kernel.networks.network import ModelConfig
from mal_train.training.run_files import StatusFile

Task = Literal["train", "evaluate", "inference"]

LOCK = ".lock"
"""File in a task's folder that a run holds a lock on."""


@contextlib.contextmanager
def task_folder(spec: Spec, task: Task) -> Iterator[tuple[Path, StatusFile]]:
    """The task's folder with experiment.yaml in it, and a status.json that tells how the task ended.

    Raises:
        OutputError: the folder cannot be made or written to, or another run is writing there.
    """
    folder = spec.task_dir(task)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be made: {error.strerror}; choose another results_dir") from error
    with _alone_in(folder):
        yield from _told(spec, task, folder)


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keeps other runs out of a folder; the lock ends with the process, however that ends."""
    try:
        file = (folder / LOCK).open("a")
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {error.strerror}; choose another results_dir") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(
                f"{folder}: another run is writing there; wait for it to end or choose another results_dir"
            ) from None
        except OSError:
            # A file system without locks: nothing can be said, and a single run is no worse for it.
            pass
        yield


def _told(spec: Spec, task: Task, folder: Path) -> Iterator[tuple[Path, StatusFile]]:
    try:
        (folder / "experiment.yaml").write_text(dump(_as_run(spec, task).without_secrets()), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {error.strerror}; choose another results_dir") from error
    status = StatusFile(folder)
    status.write("STARTED", f"Starting MAL {task}.")
    try:
        yield folder, status
    except BaseException as error:
        # Whatever ends the task, Ctrl-C too, is written down before it goes on its way.
        with contextlib.suppress(OutputError):
            status.write("FAILURE", f"{type(error).__name__}: {error}")
        raise
    status.write("SUCCESS", f"{task.capitalize()} finished successfully.")


def _as_run(spec: Spec, task: Task) -> Spec:
    """The spec with the size of the crop that training takes from the backbone where none is given.

    In the other tasks it is the checkpoint's, and no size says so.
    """
    if task != "train":
        return spec
    try:
        size = train_crop_size(spec)
    except ConfigError:  # an unknown backbone, which the task itself tells
        return spec
    return spec.model_copy(update={"dataset": spec.dataset.model_copy(update={"crop_size": size})})


def model_config(section: NetworkConfig) -> ModelConfig:
    """Shape of the network that the spec asks for."""
    return ModelConfig(
        arch=section.arch,
        mask_head_num_convs=section.mask_head_num_convs,
        mask_head_hidden_channel=section.mask_head_hidden_channel,
        mask_head_out_channel=section.mask_head_out_channel,
        mask_scale_ratio_pre=section.mask_scale_ratio_pre,
        mask_scale_ratio=section.mask_scale_ratio,
        not_adjust_scale=section.not_adjust_scale,
        vit_dpr=section.vit_dpr,
    )


def keys_of(spec: Spec) -> tuple[EncryptionKey | None, DecryptionKey | None]:
    """What seals and what opens; a key that seals and can open serves for both unless `decryption_key` is given.

    The command line has refused secrets before (`config.load_spec`), so a secret found here stands in the file.
    """
    seal_with = parse_key(spec.encryption_key, purpose="encryption", source="yaml")
    open_with = parse_key(spec.decryption_key, purpose="decryption", source="yaml")
    if open_with is None and seal_with is not None:
        open_with = seal_with.decryption_key
    return seal_with, open_with


def choose_devices(gpus: tuple[int, ...], processes: int, screen: Console) -> list[torch.device]:
    """The device of each process: the GPUs that were asked for; the CPU for none, and, with one line, without CUDA.

    Raises:
        ConfigError: there are GPUs, but not those.
    """
    if gpus and not torch.cuda.is_available():
        screen.print("no CUDA on this machine: working on the CPU" + (f", {processes} times" if processes > 1 else ""))
        gpus = ()
    if not gpus:
        return [torch.device("cpu")] * processes
    missing = [gpu for gpu in gpus if gpu >= torch.cuda.device_count()]
    if missing:
        raise ConfigError(f"gpu_ids: {missing[0]}; this machine has GPUs 0 to {torch.cuda.device_count() - 1}")
    return [torch.device("cuda", gpu) for gpu in gpus]


def train_crop_size(spec: Spec) -> int:
    """Side in px of the crops to train on."""
    return spec.dataset.crop_size or default_crop_size(spec.model.arch)


def labeler_config(spec: Spec) -> LabelerConfig:
    """What the checkpoint will say about crops and thresholds, before any fit."""
    return spec.labeler_config(default_crop_size(spec.model.arch))


def existing_file(text: str | None, field: str) -> Path:
    """The path in a field; ConfigError when it is not given or no such file exists."""
    if not text:
        raise ConfigError(f"{field}: not given; it names a file")
    path = Path(text)
    if not path.is_file():
        raise ConfigError(f"{field}: {path}; no such file")
    return path


def checkpoint_file(text: str | None, field: str) -> Path:
    """The checkpoint in a field, `builtin` for the one in the package; ConfigError as `existing_file`."""
    return existing_file(str(builtin.resolve(text)) if text else None, field)


def existing_folder(text: str, field: str) -> Path:
    """The path in a field; ConfigError when it is not given or no such folder exists."""
    if not text:
        raise ConfigError(f"{field}: not given; it names a folder")
    path = Path(text)
    if not path.is_dir():
        raise ConfigError(f"{field}: {path}; no such folder")
    return path


def worker_threads() -> int:
    """Threads for decoding and encoding: one a processor, at most eight."""
    return max(1, min(8, len(os.sched_getaffinity(0))))
