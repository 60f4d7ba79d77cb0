"""`train.compile`: compiles the backbones with torch.compile, in place, so that their weights keep their names."""

import torch

from mal_train.core.errors import ConfigError
from mal_train.kernel.networks.network import MalNetwork
from mal_train.losses.crf import can_compile


def check_compilation(strategy: str, gradient_checkpointing: bool, device: torch.device) -> None:
    """Checks that backbones can be compiled, before the data is read.

    Raises:
        ConfigError: there is no compiler, or another setting excludes it.
    """
    if not can_compile(device):
        needed = "a C++ compiler (g++, clang++ or CXX)" + ("" if device.type == "cpu" else " and Triton")
        raise ConfigError(
            f"train.compile: true; {device.type} needs {needed}, and torch.compile must be enabled "
            "(TORCH_COMPILE_DISABLE); install it, or set train.compile to false"
        )
    if strategy == "fsdp":
        raise ConfigError("train.compile: true; it is not tested with strategy fsdp; use ddp, or set it to false")
    if gradient_checkpointing:
        raise ConfigError(
            "train.compile: true; train.gradient_checkpointing is true too, and a compiled backbone decides itself "
            "what it keeps for the backward pass; set one of them to false"
        )


def compile_backbones(network: MalNetwork) -> None:
    """Compiles both backbones. The heads are not: their shapes follow the size classes of each batch.

    A copy of a backbone, as labelers make it, is not compiled.
    """
    for part in (network.student, network.teacher):
        part.backbone.compile()


def compilation_error(error: Exception) -> ConfigError:
    """Returns the error for a compilation that failed during training."""
    reason = " ".join(str(error).split())[:300]
    return ConfigError(f"train.compile: true; torch.compile failed: {reason}; set it to false")
