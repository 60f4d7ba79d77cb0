"""Chooses the dtype of the forward pass: one rule for training, inference and the server."""

from enum import StrEnum
from pathlib import Path

import torch

from mal_train.core.errors import ConfigError


class Precision(StrEnum):
    """Dtype of the forward pass. `auto` is bfloat16 on devices with fast bfloat16 kernels, else float32."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def resolve(precision: Precision | str, device: torch.device) -> torch.dtype:
    """Returns the torch dtype of a precision on a device.

    Raises:
        ConfigError: float16 on a CPU, for which torch has no fast kernels.
    """
    precision = Precision(precision)
    if precision is Precision.AUTO:
        return torch.bfloat16 if _is_fast_at_bfloat16(device) else torch.float32
    if precision is Precision.FLOAT16 and device.type == "cpu":
        raise ConfigError("precision: float16 on a CPU is slower than float32; use auto, bfloat16 or float32")
    return {
        Precision.FLOAT32: torch.float32,
        Precision.BFLOAT16: torch.bfloat16,
        Precision.FLOAT16: torch.float16,
    }[precision]


def _is_fast_at_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8  # Ampere introduced bfloat16 tensor cores
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
