"""Reads weight files that others wrote (torch.save, safetensors) into names and tensors. Runs no code from them.

The only place where torch.load is called. Knows no layout: `pretrained` and `foreign` make sense of the names.
"""

import errno
import struct
import zipfile
from pathlib import Path
from pickle import UnpicklingError  # the exception alone: torch's restricted reader raises it
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mal_train.core.errors import ConfigError, UnknownLayout

WRAPPERS = ("state_dict", "model")
"""Keys under which published files keep their weights, looked into in this order."""
DAMAGES = (UnpicklingError, RuntimeError, ValueError, LookupError, TypeError, EOFError, AssertionError, struct.error)
"""What torch's reader raises on damaged or foreign bytes (16 000 damaged files tried)."""


def read_weight_file(path: Path) -> dict[str, Tensor]:
    """Names → tensors (on the CPU) of a `.safetensors` file, or of one that torch.save wrote (`.pt`, `.pth`, `.ckpt`).

    A dict under `state_dict` or `model` is unwrapped; entries that are no tensors are passed over.

    Raises:
        ConfigError: no such file, or no permission.
        UnknownLayout: neither format, damaged, encrypted by TAO, holding pickled objects, or without any tensor.
    """
    if not path.is_file():
        raise ConfigError(f"weights {path}: no such file; give the path of a readable one")
    try:
        content = load_file(path) if path.suffix == ".safetensors" else _read_torch(path)
    except OSError as error:
        if error.errno == errno.EINVAL:  # torch's reader seeks before the start of a file that was cut short
            raise UnknownLayout(f"weights {path}: a damaged file; its end is missing") from error
        raise ConfigError(f"weights {path}: {error.strerror or error}; give the path of a readable file") from error
    except SafetensorError as error:
        raise UnknownLayout(f"weights {path}: not a whole safetensors file ({error})") from error
    tensors = {name: value for name, value in _unwrap(content, path).items() if isinstance(value, Tensor)}
    if not tensors:
        raise UnknownLayout(f"weights {path}: no tensors in it, only {_some(content)}")
    return tensors


def _read_torch(path: Path) -> Any:
    try:
        # Weights only: a full unpickling would run whatever code the file brings.
        return torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGES as error:
        objects = _objects(path)
        if objects:
            raise UnknownLayout(
                f"weights {path}: it holds pickled objects ({', '.join(objects)}), and reading those can run code; "
                "where the file is trusted, write its 'state_dict' alone to a new file with torch.save"
            ) from error
        raise UnknownLayout(f"weights {path}: not a file that torch.save wrote, or a damaged one") from error


def _objects(path: Path) -> list[str]:
    """The classes a file wants to build beyond tensors and containers; empty where it is not such a file."""
    if not zipfile.is_zipfile(path):
        return []
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except DAMAGES:
        return []


def _unwrap(content: Any, path: Path) -> dict[str, Any]:
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and "state_dict_encrypted" in content:
            raise UnknownLayout(f"weights {path}: encrypted by TAO's own codec; save it without a key there first")
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict):
        raise UnknownLayout(f"weights {path}: a {type(content).__name__}, not a dict of tensors")
    return {str(name): value for name, value in content.items()}


def _some(content: Any) -> str:
    return ", ".join(repr(name) for name in list(content)[:5]) or "nothing"
