"""Builds Lightning's trainer for the processes and devices of a run, runs it, and translates its errors."""

import errno
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch._dynamo.exc import TorchDynamoException

from mal_train.core.errors import BadDataset, ConfigError, OutOfDeviceMemory, OutputError
from mal_train.core.settings import Compat, Precision
from mal_train.data.datamodule import BoxDataModule, shared_memory_error
from mal_train.distributed.process_group import (
    COLLECTIVE_TIMEOUT,
    ExternalLauncherEnvironment,
    ProcessGroup,
    SilentExit,
    lost_process_errors,
)
from mal_train.distributed.sharding import FullStateFSDP
from mal_train.kernel.networks.precision import resolve
from mal_train.training.checkpoints import MalCheckpointIO
from mal_train.training.compilation import compilation_error
from mal_train.training.module import MalModule


@dataclass(frozen=True)
class FitSettings:
    """Settings of the training loop.

    Attributes:
        strategy: `auto`, `ddp` or `fsdp`.
        num_nodes: number of machines.
        num_epochs: number of epochs.
        accum_grad_batches: batches per optimizer step.
        use_amp: use mixed precision where the device is fast at it.
        cudnn_benchmark: let cuDNN time its algorithms and use the fastest.
        cudnn_deterministic: let cuDNN use deterministic algorithms only.
    """

    strategy: str
    num_nodes: int
    num_epochs: int
    accum_grad_batches: int
    use_amp: bool
    cudnn_benchmark: bool
    cudnn_deterministic: bool


def check_strategy(strategy: str, devices: Sequence[torch.device]) -> None:
    """Raises ConfigError for fsdp without GPUs."""
    if strategy == "fsdp" and devices[0].type != "cuda":
        raise ConfigError("strategy: fsdp; it needs GPUs, and this run uses the CPU; use ddp or auto")


def build_trainer(
    settings: FitSettings,
    module: MalModule,
    devices: Sequence[torch.device],
    *,
    callbacks: list[lightning.Callback],
    io: MalCheckpointIO,
    folder: Path,
) -> lightning.Trainer:
    """Builds the trainer of this process.

    Args:
        settings: settings of the loop.
        module: the module to train; its `group` gives the processes that train together.
        devices: devices of the processes on this machine, by local rank.
        callbacks: Lightning callbacks.
        io: writes and reads checkpoints.
        folder: Lightning's default output folder; the settings below make it write nothing.
    """
    mixed: Any = {torch.float32: "32-true", torch.bfloat16: "bf16-mixed", torch.float16: "16-mixed"}
    device = devices[module.group.env.local_rank]
    dtype = resolve(Precision.AUTO if settings.use_amp else Precision.FLOAT32, device)
    on_gpu = device.type == "cuda"
    if settings.use_amp and on_gpu and dtype is torch.float32:
        dtype = torch.float16  # GPUs before Ampere have fast float16, but no fast bfloat16
    gpus = [device.index for device in devices]
    return lightning.Trainer(
        accelerator="gpu" if on_gpu else "cpu",
        devices=gpus if on_gpu else len(devices),
        num_nodes=settings.num_nodes,
        strategy=_strategy(settings.strategy, module, module.group),
        precision=mixed[dtype],
        max_epochs=settings.num_epochs,
        accumulate_grad_batches=settings.accum_grad_batches,
        callbacks=callbacks,
        plugins=[io],
        default_root_dir=str(folder),
        # BoxDataModule distributes the samples.
        use_distributed_sampler=False,
        # Our callbacks write checkpoints, metrics and progress.
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _strategy(name: str, module: MalModule, group: ProcessGroup) -> Strategy | str:
    if name == "fsdp":
        return FullStateFSDP(module.network, ExternalLauncherEnvironment(group.env), COLLECTIVE_TIMEOUT)
    if group.world_size == 1:
        return "auto"
    return DDPStrategy(
        cluster_environment=ExternalLauncherEnvironment(group.env),
        timeout=COLLECTIVE_TIMEOUT,
        # MalModule averages the buffers before it updates the teacher.
        broadcast_buffers=False,
        # Under compat tao a box may belong to no size class; a batch of such boxes does not use the mask head.
        find_unused_parameters=module.compat is Compat.TAO,
    )


def fit(
    trainer: lightning.Trainer, module: MalModule, data: BoxDataModule, resume: Path | None, settings: FitSettings
) -> None:
    """Trains, and translates the errors of torch and Lightning.

    Raises:
        MalError: data, settings, device or disk caused the error.
        KeyboardInterrupt: SIGINT arrived.
    """
    try:
        with _cudnn(settings), lost_process_errors():
            trainer.fit(module, datamodule=data, ckpt_path=None if resume is None else str(resume))
    except SilentExit:
        raise
    except SystemExit:
        # Lightning exits on SIGINT.
        raise KeyboardInterrupt("interrupted; the last checkpoint is intact") from None
    except (BadDataset, OutputError) as error:
        # torch puts the stack trace of a loader process before the message of its error; keep the message alone.
        cls = type(error)
        raise cls(str(error).strip().rpartition(f"{cls.__name__}: ")[2]) from error
    except TorchDynamoException as error:
        raise compilation_error(error) from error
    except torch.OutOfMemoryError as error:
        raise OutOfDeviceMemory(
            f"{module.device}: out of memory for a training batch; lower train.batch_size and raise "
            f"train.accum_grad_batches, or lower dataset.crop_size ({error})"
        ) from error
    except (OSError, RuntimeError) as error:
        if not _is_no_space_left(error):
            raise
        # Errors of output files are OutputErrors already, so this one is about shared memory.
        raise shared_memory_error("where the loader processes keep their locks") from error


def _is_no_space_left(error: BaseException | None) -> bool:
    """Returns True if the error or one in its context is ENOSPC: a failure of Lightning's teardown may hide it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            return True
        error = error.__context__
    return False


@contextmanager
def _cudnn(settings: FitSettings) -> Iterator[None]:
    backend = torch.backends.cudnn
    before = backend.benchmark, backend.deterministic
    backend.benchmark, backend.deterministic = settings.cudnn_benchmark, settings.cudnn_deterministic
    try:
        yield
    finally:
        backend.benchmark, backend.deterministic = before


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Suppresses hints and warnings of Lightning and torch about their own APIs."""
    names = ("lightning.pytorch", "lightning.fabric", "lightning", "torch.utils.cpp_extension")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\..*")
        # DDP warns of the strides of one-row parameters, where they have no effect.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
