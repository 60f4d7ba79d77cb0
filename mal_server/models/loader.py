"""From a checkpoint on disk to workers on their devices. Knows nothing of requests or of gRPC."""

import gc
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mal_server.config.model_config import ModelPlan
from mal_server.inference.worker import Predictor, Worker
from mal_train.core.errors import CheckpointError, ConfigError, OutOfDeviceMemory
from mal_train.core.settings import Branch, LabelerConfig, branches_of
from mal_train.kernel.checkpoint import builtin
from mal_train.kernel.checkpoint.checkpoint import Checkpoint, load_checkpoint
from mal_train.kernel.checkpoint.keys import parse_key
from mal_train.kernel.labeler.labeler import Labeler, build_labeler
from mal_train.kernel.networks.backbones import backbone_size


@dataclass(frozen=True)
class ModelInfo:
    """What clients may know of a model.

    Attributes:
        name: on this server.
        sha256: of the checkpoint file, hex.
        arch: backbone.
        labeler: crop, margin, thresholds.
        categories: as in the COCO file it was trained on.
        branch: answers where a request names none.
        devices: torch names, one a worker.
        precision: number format of the network.
        has_teacher: whether the checkpoint holds both networks; a file of one answers as the student alone.
    """

    name: str
    sha256: str
    arch: str
    labeler: LabelerConfig
    categories: tuple[dict[str, Any], ...]
    branch: Branch
    devices: tuple[str, ...]
    precision: str
    has_teacher: bool = True

    @property
    def branches(self) -> tuple[Branch, ...]:
        """What may be asked of it."""
        return branches_of(has_teacher=self.has_teacher)


@dataclass(frozen=True)
class LoadedModel:
    """A model on its devices.

    Attributes:
        info: what it is.
        workers: one a device, or several on the CPU.
        reference: the same weights in float32 on the CPU, for the self-test; None: there is nothing to compare with.
        small_side: of the crops in which every network is compared with the reference, px; None: as they are served.
        batch_sizes: of the warm-up with crops as they are served, beyond the few crops of the self-test.
    """

    info: ModelInfo
    workers: tuple[Worker, ...]
    reference: Predictor | None = None
    small_side: int | None = None
    batch_sizes: tuple[int, ...] = ()


def load_model(plan: ModelPlan) -> LoadedModel:
    """Opens a checkpoint once and puts its network on every device.

    Raises:
        ConfigError: a key, a GPU or a precision that does not exist here.
        CheckpointError: the file cannot be used; its message says why.
        OutOfDeviceMemory: the weights do not fit beside what is on the device already.
    """
    checkpoint, sha256 = read_checkpoint(plan)
    devices = pick_devices(plan.gpu_ids, plan.cpu_workers)
    reference = build_labeler(checkpoint, precision="float32")
    if plan.branch not in branches_of(has_teacher=reference.network.has_teacher):
        raise ConfigError(f"branch: {plan.branch}; {plan.checkpoint} holds the student alone, serve that")
    labelers = [_on_device(checkpoint, reference, device, plan.precision) for device in devices]
    info = ModelInfo(
        name=plan.name,
        sha256=sha256,
        arch=checkpoint.model.arch,
        labeler=reference.config,
        categories=tuple(checkpoint.categories),
        branch=plan.branch,
        devices=devices,
        precision=str(labelers[0].dtype).removeprefix("torch."),
        has_teacher=reference.network.has_teacher,
    )
    workers = tuple(
        Worker(labeler, device, _thread_setting(len(devices)) if device == "cpu" else None)
        for labeler, device in zip(labelers, devices, strict=True)
    )
    return LoadedModel(
        info,
        workers,
        # Against itself it would say nothing.
        None if all(_is_reference(labeler) for labeler in labelers) else reference,
        small_side(info.arch, reference.config.crop_size),
        warm_up_sizes(labelers[0], plan.max_batch_size),
    )


def read_checkpoint(plan: ModelPlan) -> tuple[Checkpoint, str]:
    """The checkpoint, verified to its last byte, and the SHA-256 of its file. Errors as `load_model`."""
    path = _existing(plan.checkpoint)
    key = parse_key(plan.decryption_key, purpose="decryption", where="yaml")
    before = path.stat()
    checkpoint = load_checkpoint(path, key, weights_only_kind=True)
    after = path.stat()
    if before.st_ino == after.st_ino and (before.st_mtime_ns, before.st_size) != (after.st_mtime_ns, after.st_size):
        raise CheckpointError(f"{path}: was written to while it was read; load it again once it is complete")
    # Of the bytes that were read, whatever stands in the place of the file by now: answers name the checkpoint by it.
    return checkpoint, checkpoint.sha256


def small_side(arch: str, crop_size: int) -> int:
    """Side in px of the self-test's small crops: about a quarter of what is served, four patches at least.

    In a ViT a crop of a quarter of the side takes a sixteenth of the time. What differs between number formats and
    devices shows in it as well.
    """
    patch = backbone_size(arch).patch
    return min(crop_size, max(crop_size // (4 * patch), 4) * patch)


def warm_up_sizes(labeler: Labeler, max_batch_size: int) -> tuple[int, ...]:
    """Batch sizes whose kernels and memory the first callers should not wait for.

    On a CPU a single crop: the first batch of another size takes an eighth more CPU time than the next ones
    (ViT-tiny in bfloat16), and running it beforehand would take all of it.
    """
    if labeler.device.type == "cpu":
        return (1,)
    doubled = [1 << bits for bits in range(max_batch_size.bit_length())]
    return tuple(sorted({*doubled, max_batch_size}))


def pick_devices(gpu_ids: Sequence[int], cpu_workers: int = 1) -> tuple[str, ...]:
    """Torch device names; the CPU for no ids, and, with one printed line, where the machine has no CUDA."""
    if not gpu_ids:
        return ("cpu",) * cpu_workers
    if not torch.cuda.is_available():
        print("mal-server: no CUDA on this machine; using the CPU", flush=True)
        return ("cpu",) * cpu_workers
    count = torch.cuda.device_count()
    missing = [i for i in gpu_ids if i >= count]
    if missing:
        raise ConfigError(f"gpu_ids: {missing} not on this machine; it has {count} GPUs, numbered from 0")
    return tuple(f"cuda:{i}" for i in gpu_ids)


def free_memory() -> None:
    """Gives back what a model that nobody holds any more had taken; takes some milliseconds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _on_device(checkpoint: Checkpoint, reference: Labeler, device: str, precision: str) -> Labeler:
    if device == "cpu":
        # Weights are only read: workers on the CPU share those of the reference.
        return Labeler(reference.network, checkpoint.labeler, device=device, precision=precision)
    try:
        return build_labeler(checkpoint, device=device, precision=precision)
    except torch.OutOfMemoryError as error:
        raise OutOfDeviceMemory(f"the weights do not fit into {device}: {error}") from error


def _is_reference(labeler: Labeler) -> bool:
    return labeler.device.type == "cpu" and labeler.dtype is torch.float32


def _thread_setting(workers: int) -> Callable[[], None] | None:
    """To be called on a CPU worker's thread: its part of the cores. A single worker keeps torch's own choice."""
    if workers == 1:
        return None
    share = max(1, len(os.sched_getaffinity(0)) // workers)
    return lambda: torch.set_num_threads(share)


def _existing(path: Path) -> Path:
    path = builtin.resolve(path)
    if not path.is_file():
        raise ConfigError(f"checkpoint: {path}: no such file")
    # A link such as …_latest may be set anew at any moment; what it means now is what is read.
    return path.resolve()
