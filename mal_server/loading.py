"""From a checkpoint on disk to workers that are loaded and warm. Knows nothing of requests or of gRPC."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mal_server.config import ServerConfig
from mal_server.worker import Worker
from mal_train.errors import ConfigError, DeviceError
from mal_train.labeling.labeler import Crop, RunOptions, load_labeler
from mal_train.labeling.settings import Branch, LabelerConfig
from mal_train.model.checkpoint import sha256_of
from mal_train.model.keys import parse_key


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
    """

    name: str
    sha256: str
    arch: str
    labeler: LabelerConfig
    categories: tuple[dict[str, Any], ...]
    branch: Branch
    devices: tuple[str, ...]
    precision: str


@dataclass(frozen=True)
class Loaded:
    """A model on its devices."""

    info: ModelInfo
    workers: tuple[Worker, ...]


def load_model(config: ServerConfig) -> Loaded:
    """Loads the configured checkpoint once for each device.

    Raises:
        ConfigError: a key, a GPU or a precision that does not exist here.
        CheckpointError: the file cannot be used; its message says why.
    """
    if not config.checkpoint.is_file():
        raise ConfigError(f"checkpoint: {config.checkpoint}: no such file")
    key = parse_key(config.decryption_key, purpose="decryption", where="yaml")
    devices = pick_devices(config.gpu_ids)
    loaded = [load_labeler(config.checkpoint, key=key, device=device, precision=config.precision) for device in devices]
    labeler, checkpoint = loaded[0]
    info = ModelInfo(
        name=config.served_name,
        sha256=sha256_of(config.checkpoint),
        arch=checkpoint.model.arch,
        labeler=labeler.config,
        categories=tuple(checkpoint.categories),
        branch=config.branch,
        devices=devices,
        precision=str(labeler.dtype).removeprefix("torch."),
    )
    return Loaded(info, tuple(Worker(one, device) for (one, _), device in zip(loaded, devices, strict=True)))


def pick_devices(gpu_ids: Sequence[int]) -> tuple[str, ...]:
    """Torch device names; the CPU for no ids, and, with one printed line, where the machine has no CUDA."""
    if not gpu_ids:
        return ("cpu",)
    if not torch.cuda.is_available():
        print("mal-server: no CUDA on this machine; using the CPU", flush=True)
        return ("cpu",)
    count = torch.cuda.device_count()
    missing = [i for i in gpu_ids if i >= count]
    if missing:
        raise ConfigError(f"gpu_ids: {missing} not on this machine; it has {count} GPUs, numbered from 0")
    return tuple(f"cuda:{i}" for i in gpu_ids)


async def warm_up(worker: Worker, branch: Branch, max_batch_size: int) -> None:
    """Runs one crop, and on a GPU a full batch, so that the first caller does not pay for kernels and memory.

    Raises:
        DeviceError: the network gives no finite probabilities.
    """
    crop = worker.predictor.prepare(np.zeros((64, 64, 3), np.uint8), [(8.0, 8.0, 48.0, 48.0)])[0]
    if not isinstance(crop, Crop):
        raise DeviceError(f"{worker.name}: the warm-up crop was refused: {crop}")
    for size in (1,) if worker.name == "cpu" else (1, max_batch_size):
        for outcome in await worker.run(RunOptions(branch), [crop] * size):
            if isinstance(outcome, Exception):
                raise outcome
            if not np.isfinite(outcome.prob).all():
                raise DeviceError(f"{worker.name}: the network gives probabilities that are not finite")
