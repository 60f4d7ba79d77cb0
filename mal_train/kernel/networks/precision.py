"""Chooses the dtype of the forward pass: one rule for training, inference and the server."""

from pathlib import Path

import torch

from mal_train.core.errors import ConfigError
from mal_train.core.settings import NetworkEngine, Precision


def resolve(
    precision: Precision | str, device: torch.device, engine: NetworkEngine | str = NetworkEngine.TORCH
) -> torch.dtype:
    """Returns the torch dtype of a precision on a device.

    Raises:
        ConfigError: the engine does not run on the device, or not in this precision; or float16 on a CPU, for which
            torch has no fast kernels.
    """
    precision = Precision(precision)
    if NetworkEngine(engine) is NetworkEngine.OPENVINO:
        return _openvino_dtype(precision, device)
    if precision is Precision.AUTO:
        return torch.bfloat16 if _is_fast_at_bfloat16(device) else torch.float32
    if precision is Precision.INT8:
        raise ConfigError("precision: int8 with network_engine: torch; use network_engine: openvino, on a CPU")
    if precision is Precision.FLOAT16 and device.type == "cpu":
        raise ConfigError("precision: float16 on a CPU is slower than float32; use auto, bfloat16 or float32")
    return {
        Precision.FLOAT32: torch.float32,
        Precision.BFLOAT16: torch.bfloat16,
        Precision.FLOAT16: torch.float16,
    }[precision]


def reported(dtype: torch.dtype) -> str:
    """Returns the name by which results are compared: the dtype's, and for int8 also the range of its weights.

    >>> reported(torch.bfloat16)
    'bfloat16'
    """
    if dtype is torch.int8 and not has_int8_dot_product():
        return "int8_reduced_range"
    return str(dtype).removeprefix("torch.")


def _openvino_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    if device.type != "cpu":
        raise ConfigError(f"network_engine: openvino on {device}; it runs on CPUs: use torch, or no GPUs (gpu_ids: [])")
    if precision in (Precision.BFLOAT16, Precision.FLOAT16):
        raise ConfigError(f"precision: {precision} with network_engine: openvino; use auto, float32 or int8")
    return torch.int8 if precision is Precision.INT8 else torch.float32


def _is_fast_at_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8  # Ampere introduced bfloat16 tensor cores
    return not _cpu_flags().isdisjoint({"avx512_bf16", "amx_bf16"})


def has_int8_dot_product() -> bool:
    """Returns True if the CPU adds products of bytes in 32 bits in one instruction, as int8 kernels need to be fast."""
    return not _cpu_flags().isdisjoint({"avx512_vnni", "avx_vnni", "amx_int8", "asimddp"})


def _cpu_flags() -> set[str]:
    """Returns the features that Linux names of the CPU; none on other systems."""
    try:
        return set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return set()
