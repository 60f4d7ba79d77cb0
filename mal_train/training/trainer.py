"""Builds Lightning's trainer for the processes and devices at hand, runs it, and puts its errors into our words."""

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

from mal_train.core.errors import BadDataset, ConfigError, OutOfDeviceMemory, OutputError
from mal_train.core.settings import Compat
from mal_train.data.datamodule import BoxDataModule, shared_memory_error
from mal_train.distributed.process_group import PATIENCE, Followed, Launched, ProcessGroup, lost_process
from mal_train.distributed.sharding import SealedFSDP
from mal_train.kernel.networks.precision import Precision, resolve
from mal_train.training.checkpoints import SealedCheckpointIO
from mal_train.training.module import MalModule


@dataclass(frozen=True)
class FitSettings:
    """How the loop runs.

    Attributes:
        strategy: `auto`, `ddp` or `fsdp`.
        num_nodes: machines.
        num_epochs: passes over the boxes.
        accum_grad_batches: batches whose gradients make one step.
        use_amp: mixed precision where the device is fast at it.
        cudnn_benchmark: let cuDNN try its algorithms.
        cudnn_deterministic: let it use only those that give the same bits every time.
    """

    strategy: str
    num_nodes: int
    num_epochs: int
    accum_grad_batches: int
    use_amp: bool
    cudnn_benchmark: bool
    cudnn_deterministic: bool


def check_strategy(strategy: str, devices: Sequence[torch.device]) -> None:
    """ConfigError for fsdp without GPUs."""
    if strategy == "fsdp" and devices[0].type != "cuda":
        raise ConfigError("strategy: fsdp shares the networks between GPUs, and there are none here; use ddp or auto")


def build_trainer(
    settings: FitSettings,
    module: MalModule,
    devices: Sequence[torch.device],
    *,
    callbacks: list[lightning.Callback],
    io: SealedCheckpointIO,
    folder: Path,
) -> lightning.Trainer:
    """The trainer of this process.

    Args:
        settings: how the loop runs.
        module: what it trains; knows the processes that train together.
        devices: of the processes on this machine.
        callbacks: watch and save.
        io: writes and reads checkpoints.
        folder: where Lightning would leave what nobody asked for.
    """
    mixed: Any = {torch.float32: "32-true", torch.bfloat16: "bf16-mixed", torch.float16: "16-mixed"}
    device = devices[module.ranks.world.local_rank]
    dtype = resolve(Precision.AUTO if settings.use_amp else Precision.FLOAT32, device)
    on_gpu = device.type == "cuda"
    if settings.use_amp and on_gpu and dtype is torch.float32:
        dtype = torch.float16  # GPUs before Ampere are fast at float16 only
    gpus = [device.index for device in devices]
    return lightning.Trainer(
        accelerator="gpu" if on_gpu else "cpu",
        devices=gpus if on_gpu else len(devices),
        num_nodes=settings.num_nodes,
        strategy=_strategy(settings.strategy, module, module.ranks),
        precision=mixed[dtype],
        max_epochs=settings.num_epochs,
        accumulate_grad_batches=settings.accum_grad_batches,
        callbacks=callbacks,
        plugins=[io],
        default_root_dir=str(folder),
        # Our loader knows its process's share.
        use_distributed_sampler=False,
        # Files, bars and rows are our callbacks' work.
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _strategy(name: str, module: MalModule, ranks: ProcessGroup) -> Strategy | str:
    if name == "fsdp":
        return SealedFSDP(module.network, Launched(ranks.world), PATIENCE)
    if ranks.size == 1:
        return "auto"
    return DDPStrategy(
        cluster_environment=Launched(ranks.world),
        timeout=PATIENCE,
        # The module averages them where the teacher is to follow.
        broadcast_buffers=False,
        # Under compat tao a batch may hold only boxes of no size branch, which leave the mask head unused.
        find_unused_parameters=module.compat is Compat.TAO,
    )


def fit(
    trainer: lightning.Trainer, module: MalModule, data: BoxDataModule, resume: Path | None, settings: FitSettings
) -> None:
    """Trains.

    Raises:
        MalError: in our words.
        KeyboardInterrupt: Ctrl-C.
    """
    try:
        with _cudnn(settings), lost_process():
            trainer.fit(module, datamodule=data, ckpt_path=None if resume is None else str(resume))
    except Followed:
        raise
    except SystemExit:
        # Lightning's answer to Ctrl-C.
        raise KeyboardInterrupt("interrupted; the last checkpoint is whole") from None
    except (BadDataset, OutputError) as error:
        # From a loader process the message comes with that process's stack before it.
        kind = type(error)
        raise kind(str(error).strip().rpartition(f"{kind.__name__}: ")[2]) from error
    except torch.OutOfMemoryError as error:
        raise OutOfDeviceMemory(
            f"a training batch does not fit into {module.device}: lower train.batch_size (train.accum_grad_batches "
            f"makes up for it) or dataset.crop_size ({error})"
        ) from error
    except (OSError, RuntimeError) as error:
        if not _is_full(error):
            raise
        # Files of ours have said so themselves by now.
        raise shared_memory_error("where the loader processes keep their locks") from error


def _is_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it hides (Lightning tears down and fails at that too), says "no space left"."""
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
def quiet() -> Iterator[None]:
    """Keeps the libraries' hints off the screen: they speak of their own interfaces, which nobody here uses."""
    names = ("lightning.pytorch", "lightning.fabric", "lightning", "torch.utils.cpp_extension")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"lightning\..*")
        # A parameter of one row has strides of no consequence, which DDP remarks on.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
