"""Loads a checkpoint from disk into workers on their devices. Knows nothing of requests or gRPC."""

import gc
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mal_server.config.limits import MAX_CATEGORIES, MAX_CATEGORY_CHARS
from mal_server.config.model_config import ModelPlan
from mal_server.inference.worker import Predictor, Worker
from mal_train.core.errors import CheckpointError, ConfigError, OutOfDeviceMemory
from mal_train.core.settings import Branch, LabelerConfig, NetworkEngine, Precision, branches_of
from mal_train.kernel.checkpoint import builtin
from mal_train.kernel.checkpoint.checkpoint import Checkpoint, load_checkpoint
from mal_train.kernel.checkpoint.keys import parse_key
from mal_train.kernel.labeler.engine import TorchEngine
from mal_train.kernel.labeler.labeler import Labeler
from mal_train.kernel.labeler.load import build_labeler, calibration_of, labeler_of
from mal_train.kernel.networks.backbones import backbone_size
from mal_train.kernel.networks.precision import reported


@dataclass(frozen=True)
class ModelInfo:
    """Facts about a model that clients can read.

    Attributes:
        name: name of the model on this server.
        sha256: SHA-256 of the checkpoint file, in hex.
        arch: backbone.
        labeler: crop, margin, thresholds.
        categories: as in the COCO file that the model was trained on.
        branch: used for requests that name none.
        devices: torch device of each worker.
        precision: number format of the network, from `precision.reported`.
        network_engine: what runs the network.
        has_teacher: the checkpoint holds student and teacher; otherwise it serves as the student only.
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
    network_engine: NetworkEngine = NetworkEngine.TORCH

    @property
    def branches(self) -> tuple[Branch, ...]:
        """Branches that requests may name."""
        return branches_of(has_teacher=self.has_teacher)


@dataclass(frozen=True)
class LoadedModel:
    """A model on its devices.

    Attributes:
        info: facts about the model.
        workers: one for each GPU, or several on the CPU.
        reference: the same weights in float32 on the CPU, for the self-test; None: the workers are such themselves.
        small_side: side in px of the crops on which every network is compared with the reference; None: crop_size.
        batch_sizes: batches of full-size crops that the warm-up runs after the self-test.
    """

    info: ModelInfo
    workers: tuple[Worker, ...]
    reference: Predictor | None = None
    small_side: int | None = None
    batch_sizes: tuple[int, ...] = ()


def load_model(plan: ModelPlan) -> LoadedModel:
    """Reads a checkpoint once and puts its network on every device.

    Raises:
        ConfigError: the key, GPU, precision or branch is not available.
        CheckpointError: the file is unusable.
        OutOfDeviceMemory: the weights do not fit into the free memory of a device.
    """
    checkpoint, sha256 = read_checkpoint(plan)
    _check_categories(checkpoint, plan.checkpoint)
    devices = pick_devices(plan.gpu_ids, plan.cpu_workers)
    reference = build_labeler(checkpoint, precision=Precision.FLOAT32)
    if plan.branch not in branches_of(has_teacher=reference.network.has_teacher):
        raise ConfigError(f"branch: {plan.branch}; {plan.checkpoint} holds only the student; set branch: student")
    # Workers on the CPU share a labeler and its weights.
    on_device = {device: _on_device(checkpoint, reference, device, plan) for device in dict.fromkeys(devices)}
    labelers = [on_device[device] for device in devices]
    info = ModelInfo(
        name=plan.name,
        sha256=sha256,
        arch=checkpoint.model.arch,
        labeler=reference.config,
        categories=tuple(checkpoint.categories),
        branch=plan.branch,
        devices=devices,
        precision=reported(labelers[0].dtype),
        has_teacher=reference.network.has_teacher,
        network_engine=plan.network_engine,
    )
    workers = tuple(
        Worker(labeler, device, _thread_setting(len(devices)) if device == "cpu" else None)
        for labeler, device in zip(labelers, devices, strict=True)
    )
    return LoadedModel(
        info,
        workers,
        # A float32 worker on the CPU needs no comparison with itself.
        None if all(_is_reference(labeler) for labeler in labelers) else reference,
        # The graphs of OpenVINO are compiled for one size of crops, so the self-test runs those that serve.
        None if plan.network_engine == NetworkEngine.OPENVINO else small_side(info.arch, reference.config.crop_size),
        warm_up_sizes(labelers[0], plan.max_batch_size),
    )


def read_checkpoint(plan: ModelPlan) -> tuple[Checkpoint, str]:
    """Returns a checkpoint, verified to its last byte, and the SHA-256 of its file.

    Raises:
        ConfigError: the file does not exist, or the key is not available.
        CheckpointError: the file is unusable, or not one that the settings trust.
    """
    path = _existing(plan.checkpoint)
    key = parse_key(plan.decryption_key, purpose="decryption", source="yaml")
    before = path.stat()
    checkpoint = load_checkpoint(path, key, skip_training_state=True, trust=plan.trust)
    after = path.stat()
    if before.st_ino == after.st_ino and (before.st_mtime_ns, before.st_size) != (after.st_mtime_ns, after.st_size):
        raise CheckpointError(f"{path}: changed while it was read; load it again once it is complete")
    # The hash of the bytes that were read, even if the path refers to another file by now.
    return checkpoint, checkpoint.sha256


def _check_categories(checkpoint: Checkpoint, path: Path) -> None:
    """Raises CheckpointError for categories that take long to list: every client asks for them."""
    names = [name for category in checkpoint.categories if isinstance(name := category.get("name"), str)]
    longest = max(map(len, names), default=0)
    if len(checkpoint.categories) > MAX_CATEGORIES or longest > MAX_CATEGORY_CHARS:
        raise CheckpointError(
            f"{path}: {len(checkpoint.categories)} categories, the longest name has {longest} characters; a served "
            f"model has at most {MAX_CATEGORIES}, with names of {MAX_CATEGORY_CHARS}"
        )


def small_side(arch: str, crop_size: int) -> int:
    """Returns the side in px of the self-test's small crops: about a quarter of the served crops, four patches or more.

    With a quarter of the side a ViT takes a sixteenth of the time, and faults of a number format or device still show.

    >>> small_side("vit-deit-base/16", 512)
    128
    """
    patch = backbone_size(arch).patch
    return min(crop_size, max(crop_size // (4 * patch), 4) * patch)


def warm_up_sizes(labeler: Labeler, max_batch_size: int) -> tuple[int, ...]:
    """Returns the batch sizes to run before the first request: powers of two up to `max_batch_size`.

    None on a CPU, where a ViT-base takes seconds for a crop of 512 px: the small crops of the self-test pack all
    weights, and after that the first batch of a size takes an eighth longer than the next ones (ViT-tiny in bfloat16).
    """
    if labeler.device.type == "cpu":
        return ()
    doubled = [1 << bits for bits in range(max_batch_size.bit_length())]
    return tuple(sorted({*doubled, max_batch_size}))


def pick_devices(gpu_ids: Sequence[int], cpu_workers: int = 1) -> tuple[str, ...]:
    """Returns torch device names. Without ids, or without CUDA (which prints a line), they are `cpu`."""
    if not gpu_ids:
        return ("cpu",) * cpu_workers
    if not torch.cuda.is_available():
        print("mal-server: no CUDA on this machine; using the CPU", flush=True)
        return ("cpu",) * cpu_workers
    count = torch.cuda.device_count()
    missing = [gpu_id for gpu_id in gpu_ids if gpu_id >= count]
    if missing:
        raise ConfigError(f"gpu_ids: {missing} not available; this machine has {count} GPUs, numbered from 0")
    return tuple(f"cuda:{gpu_id}" for gpu_id in gpu_ids)


def free_memory() -> None:
    """Frees the memory of models without references; takes some milliseconds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _on_device(checkpoint: Checkpoint, reference: Labeler, device: str, plan: ModelPlan) -> Labeler:
    if device == "cpu":
        # Shares the weights of the reference, since none writes to them.
        return labeler_of(
            reference.network,
            checkpoint.labeler,
            calibration_of(checkpoint.sha256, checkpoint.int8),
            precision=plan.precision,
            network_engine=plan.network_engine,
        )
    try:
        return build_labeler(checkpoint, device=device, precision=plan.precision, network_engine=plan.network_engine)
    except torch.OutOfMemoryError as error:
        raise OutOfDeviceMemory(f"the weights do not fit into {device}: {error}") from error


def _is_reference(labeler: Labeler) -> bool:
    is_torch = isinstance(labeler.engine, TorchEngine)
    return is_torch and labeler.device.type == "cpu" and labeler.dtype is torch.float32


def _thread_setting(workers: int) -> Callable[[], None] | None:
    """Returns a function that limits torch to an equal part of the cores, to be called on each CPU worker's thread.

    A single worker keeps torch's default.
    """
    if workers == 1:
        return None
    threads = max(1, len(os.sched_getaffinity(0)) // workers)
    return lambda: torch.set_num_threads(threads)


def _existing(path: Path) -> Path:
    path = builtin.resolve(path)
    if not path.is_file():
        raise ConfigError(f"checkpoint: {path}: no such file")
    # A link such as …_latest may change at any moment, so it is resolved once.
    return path.resolve()
