"""Parts that the commands share: output folder and status, keys, devices, paths."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch

from mal_train.config.network import NetworkConfig
from mal_train.config.spec import Spec
from mal_train.core.atomic_io import remove_stale_temporaries, write_text
from mal_train.core.coco.image_urls import image_urls
from mal_train.core.coco.members import annotation_file
from mal_train.core.coco.parquet_schema import is_parquet
from mal_train.core.console import Console
from mal_train.core.errors import ConfigError, OutputError, Terminated
from mal_train.core.images.files import ImageFolder, Images, UrlImages
from mal_train.core.locked_file import no_follow, try_lock
from mal_train.core.settings import LabelerConfig
from mal_train.core.storage.addresses import Location, is_remote, join, parse_location, redact
from mal_train.core.storage.hosts import AllowedHosts
from mal_train.core.storage.writing import check_writable as check_address_writable
from mal_train.core.storage.writing import upload, upload_folder
from mal_train.core.yaml_config import dump
from mal_train.distributed.env import TUNER
from mal_train.distributed.launch import SAVE_GRACE_S
from mal_train.kernel.checkpoint import builtin
from mal_train.kernel.checkpoint.keys import DecryptionKey, EncryptionKey, parse_key
from mal_train.kernel.checkpoint.trust import TrustPolicy
from mal_train.kernel.networks.backbones import default_crop_size
from mal_train.kernel.networks.network import ModelConfig
from mal_train.training.run_files import StatusFile

Task = Literal["train", "evaluate", "inference"]

LOCK = ".lock"
"""File in the output folder that a running command locks."""
LOCK_POLL_S = 0.2


@contextlib.contextmanager
def task_folder(spec: Spec, task: Task) -> Iterator[tuple[Path, StatusFile]]:
    """Creates and locks the output folder, writes experiment.yaml, and records start and end in status.json.

    Yields:
        The folder and its status.json.

    Raises:
        OutputError: the folder cannot be created or written, or another run is using it.
    """
    folder = spec.task_dir(task)
    if spec.publish_to:
        if not is_remote(parse_location(spec.publish_to)):
            raise ConfigError(f"publish_to: {spec.publish_to}; give an address (s3://…): the files are in {folder}")
        check_address_writable(join(spec.publish_to, f"{task}/status.json"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be created: {error.strerror}; choose another results_dir") from error
    with _locked(folder):
        yield from _recorded(spec, task, folder)


@contextlib.contextmanager
def handle_sigterm() -> Iterator[None]:
    """Raises Terminated in the block when SIGTERM arrives; does nothing outside the main thread, as Python demands."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(*_: object) -> None:
    raise Terminated("terminated by SIGTERM")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Locks a folder against other runs; the kernel releases the lock when the process ends.

    The trial of a search waits for a former run of it, which may still write its last checkpoint.

    Raises:
        OutputError: another run has the lock, or the folder is not writable.
    """
    deadline = time.monotonic() + (SAVE_GRACE_S if TUNER in os.environ else 0.0)
    try:
        descriptor = no_follow(folder / LOCK, os.O_WRONLY | os.O_CREAT)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {error.strerror}; choose another results_dir") from error
    with os.fdopen(descriptor, "wb") as file:
        while not _try_lock(file.fileno()):
            if time.monotonic() >= deadline:
                raise OutputError(f"{folder}: in use by another run; wait for it to end or choose another results_dir")
            time.sleep(LOCK_POLL_S)
        yield


def _try_lock(descriptor: int) -> bool:
    """Locks an open file; returns False if another process has the lock, True also where there are no locks."""
    try:
        return try_lock(descriptor)
    except OSError:  # the file system has no locks
        return True


def _recorded(spec: Spec, task: Task, folder: Path) -> Iterator[tuple[Path, StatusFile]]:
    """Writes experiment.yaml, and the start and the end of the command to status.json; uploads the files at the end."""
    remove_stale_temporaries(folder)
    write_text(folder / "experiment.yaml", dump(_with_crop_size(spec, task).without_secrets()))
    status = StatusFile(folder)
    status.write("STARTED", f"Starting MAL {task}.")
    try:
        yield folder, status
        if spec.publish_to:
            upload_folder(folder, str(join(spec.publish_to, task)), skip=(LOCK, status.path.name))
        status.write("SUCCESS", f"{task.capitalize()} finished successfully.")
        if spec.publish_to:  # the last file, which says that all are there
            upload(status.path, str(join(spec.publish_to, f"{task}/{status.path.name}")))
    except BaseException as error:
        # Everything that ends the command is recorded, KeyboardInterrupt included.
        with contextlib.suppress(OutputError):
            status.write("FAILURE", f"{type(error).__name__}: {error}")
        raise


def _with_crop_size(spec: Spec, task: Task) -> Spec:
    """Returns the spec of a training with the backbone's crop size filled in; other commands use the checkpoint's."""
    if task != "train":
        return spec
    try:
        size = train_crop_size(spec)
    except ConfigError:  # an unknown backbone; the command reports it
        return spec
    return spec.model_copy(update={"dataset": spec.dataset.model_copy(update={"crop_size": size})})


def model_config(section: NetworkConfig) -> ModelConfig:
    """Returns the network settings of section `model`."""
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


def checkpoint_keys(spec: Spec) -> tuple[EncryptionKey | None, DecryptionKey | None]:
    """Returns the keys that encrypt and decrypt checkpoints.

    If `decryption_key` is not given, an encryption key that can also decrypt is used for both. `load_spec` refuses
    secrets on the command line, so a secret here comes from the file.
    """
    encryption_key = parse_key(spec.encryption_key, purpose="encryption", source="yaml")
    decryption_key = parse_key(spec.decryption_key, purpose="decryption", source="yaml")
    if decryption_key is None and encryption_key is not None:
        decryption_key = encryption_key.decryption_key
    return encryption_key, decryption_key


def trust_policy(spec: Spec, checkpoint: str | Path, sha256: str | None) -> TrustPolicy:
    """Returns what a checkpoint must have: the signature of one of trusted_signers, and the SHA-256 if one is given."""
    return builtin.trust_for(checkpoint, TrustPolicy(() if sha256 is None else (sha256,), spec.trusted_signers))


def choose_devices(gpus: tuple[int, ...], processes: int, console: Console) -> list[torch.device]:
    """Returns the device of each process: the given GPUs, or the CPU if none are given.

    Without CUDA, prints a line and returns the CPU.

    Args:
        gpus: GPU indices; empty for the CPU.
        processes: number of processes.
        console: prints the line.

    Raises:
        ConfigError: this machine has GPUs, but not the given ones.
    """
    if gpus and not torch.cuda.is_available():
        console.print(
            "no CUDA on this machine: using the CPU" + (f" in {processes} processes" if processes > 1 else "")
        )
        gpus = ()
    if not gpus:
        return [torch.device("cpu")] * processes
    missing = [gpu for gpu in gpus if gpu >= torch.cuda.device_count()]
    if missing:
        raise ConfigError(f"gpu_ids: {missing[0]}; this machine has GPUs 0 to {torch.cuda.device_count() - 1}")
    return [torch.device("cuda", gpu) for gpu in gpus]


def train_crop_size(spec: Spec) -> int:
    """Returns the side length of the training crops, in px."""
    return spec.dataset.crop_size or default_crop_size(spec.model.arch)


def labeler_config(spec: Spec) -> LabelerConfig:
    """Returns the labeler settings that a new checkpoint stores, before validation fits any."""
    return spec.labeler_config(default_crop_size(spec.model.arch))


def local_path(text: str, field: str) -> Path:
    """Returns the path in a field that takes no address; raises ConfigError for one, without its secrets."""
    location = parse_location(text)
    if is_remote(location):
        raise ConfigError(f"{field}: {redact(location)}; read from local disks only: copy it, and give the path")
    return Path(location)


def existing_file(text: str | None, field: str) -> Path:
    """Returns the path in a field; raises ConfigError if the field is empty or the file does not exist.

    A folder of parquet parts is a file, too.
    """
    if not text:
        raise ConfigError(f"{field}: not given; give the path of a file")
    path = local_path(text, field)
    if not path.is_file() and not (path.is_dir() and is_parquet(path)):
        raise ConfigError(f"{field}: {path}; no such file")
    return path


@contextlib.contextmanager
def input_file(text: str | None, field: str) -> Iterator[Location]:
    """Yields where the COCO file in a field can be read several times: its path, a local copy, or parquet in place.

    Raises:
        ConfigError: the field is empty, the file does not exist, or the address is not usable.
        StorageError, StoreUnreachable, OutputError: as `local_copy`.
    """
    location = parse_location(text or "")
    if is_remote(location):
        with annotation_file(location) as path:
            yield path
    else:
        yield existing_file(text, field)


def image_folder(spec: Spec, text: str, field: str, annotations: Location) -> Images:
    """Returns the images of a COCO file: those in the folder or prefix in a field, or at the URLs of their rows.

    Raises:
        ConfigError: the field is empty, the folder does not exist, or both it and dataset.coco_url_hosts are given.
        BadDataset: dataset.coco_url_hosts is given, and the file has no URLs.
    """
    hosts = spec.dataset.coco_url_hosts
    if hosts:
        if text:
            raise ConfigError(f"{field}: {redact(text)}; dataset.coco_url_hosts takes its place; give one of them")
        allowed = AllowedHosts.parse(hosts, "dataset.coco_url_hosts")
        return UrlImages(image_urls(annotations), allowed, spec.limits.images())
    location = parse_location(text)
    return ImageFolder(
        location if text and is_remote(location) else existing_folder(text, field), limits=spec.limits.images()
    )


def checkpoint_file(text: str | None, field: str) -> Path:
    """Returns the checkpoint in a field (`builtin`: the model in the package); raises ConfigError without one."""
    if not text:
        raise ConfigError(
            f"{field}: not given; give a .malckpt file, or {builtin.BUILTIN} for the model in the package"
        )
    return existing_file(str(builtin.resolve(local_path(text, field))), field)


def existing_folder(text: str, field: str) -> Path:
    """Returns the path in a field; raises ConfigError if the field is empty or the folder does not exist."""
    if not text:
        raise ConfigError(f"{field}: not given; give the path of a folder")
    path = local_path(text, field)
    if not path.is_dir():
        raise ConfigError(f"{field}: {path}; no such folder")
    return path


def worker_threads() -> int:
    """Returns the number of threads that decode images and encode masks: one per core, at most eight."""
    return max(1, min(8, len(os.sched_getaffinity(0))))
