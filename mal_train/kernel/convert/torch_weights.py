"""Reads weight files of other programs (torch.save, safetensors) into names and tensors. Runs no code from them.

The only module that calls torch.load. Knows no layout: `pretrained` and `tao_import` interpret the names.
"""

import errno
import struct
import zipfile
from pathlib import Path
from pickle import UnpicklingError  # only the exception: torch's restricted reader raises it
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mal_train.core.errors import ConfigError, UnknownLayout

WRAPPERS = ("state_dict", "model")
"""Keys that hold the weights in published files, in order of precedence."""
READ_ERRORS = (
    UnpicklingError,
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    EOFError,
    AssertionError,
    struct.error,
)
"""Exceptions of torch's reader for damaged or foreign bytes (from 16 000 damaged files)."""


def read_weight_file(path: Path) -> dict[str, Tensor]:
    """Reads a file written by safetensors or torch.save (`.pt`, `.pth`, `.ckpt`). Returns name → tensor on the CPU.

    A dict under `state_dict` or `model` is unwrapped; entries other than tensors are ignored.

    Raises:
        ConfigError: no such file, or no permission.
        UnknownLayout: neither format, damaged, encrypted by TAO, with pickled objects, or without tensors.
    """
    if not path.is_file():
        raise ConfigError(f"weights {path}: no such file; give the path of a readable file")
    try:
        content = load_file(path) if path.suffix == ".safetensors" else _read_torch(path)
    except OSError as error:
        if error.errno == errno.EINVAL:  # torch's reader seeks before the start of a truncated file
            raise UnknownLayout(f"weights {path}: damaged; the end of the file is missing") from error
        raise ConfigError(f"weights {path}: {error.strerror or error}; give the path of a readable file") from error
    except SafetensorError as error:
        raise UnknownLayout(f"weights {path}: not a complete safetensors file ({error})") from error
    tensors = {name: value for name, value in _unwrap(content, path).items() if isinstance(value, Tensor)}
    if not tensors:
        raise UnknownLayout(f"weights {path}: no tensors, only {_first_names(content)}")
    return tensors


def _read_torch(path: Path) -> Any:
    try:
        # weights_only: unrestricted unpickling would run code from the file.
        return torch.load(path, map_location="cpu", weights_only=True)
    except READ_ERRORS as error:
        objects = _pickled_classes(path)
        if objects:
            raise UnknownLayout(
                f"weights {path}: pickled objects ({', '.join(objects)}), which can run code when read; if you trust "
                "the file, save its 'state_dict' alone to a new file with torch.save"
            ) from error
        raise UnknownLayout(f"weights {path}: not written by torch.save, or damaged") from error


def _pickled_classes(path: Path) -> list[str]:
    """Returns the names of pickled classes in a file other than tensors and containers; empty for other files."""
    if not zipfile.is_zipfile(path):
        return []
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except READ_ERRORS:
        return []


def _unwrap(content: Any, path: Path) -> dict[str, Any]:
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and "state_dict_encrypted" in content:
            raise UnknownLayout(f"weights {path}: encrypted by TAO; save it without a key in TAO first")
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict):
        raise UnknownLayout(f"weights {path}: a {type(content).__name__}, not a dict of tensors")
    return {str(name): value for name, value in content.items()}


def _first_names(content: Any) -> str:
    return ", ".join(repr(name) for name in list(content)[:5]) or "nothing"
