"""Reads weight files of other programs (torch.save, safetensors) into names and tensors. Runs no code from them.

The only module that calls torch.load. Knows no layout: `pretrained` and `tao_import` interpret the names.
"""

import errno
import io
import struct
import zipfile
from itertools import islice
from pathlib import Path
from pickle import UnpicklingError  # only the exception: torch's restricted reader raises it
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file
from torch import Tensor
from torch.nn import Parameter

from mal_train.core.errors import ConfigError, UnknownLayout
from mal_train.kernel.checkpoint.trust import NO_POLICY, TrustPolicy

_Source: TypeAlias = Path | io.BytesIO
"""A file, or its bytes in memory."""

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
    zipfile.BadZipFile,
    NotImplementedError,
)
"""Exceptions of torch's reader for damaged or foreign bytes (from 16 000 damaged files)."""


def read_weight_file(path: Path, trust: TrustPolicy = NO_POLICY) -> dict[str, Tensor]:
    """Reads a file written by safetensors or torch.save (`.pt`, `.pth`, `.ckpt`). Returns name → tensor on the CPU.

    A dict under `state_dict` or `model` is unwrapped; entries other than tensors are ignored. The tensors take no more
    memory than the file, because a file from outside may claim more than it holds.

    Args:
        path: the file.
        trust: SHA-256 or signers that the file must have, checked before anything of it is parsed; takes its size in
            memory.

    Raises:
        ConfigError: no such file, or no permission.
        Untrusted: another SHA-256, or no signature of a trusted signer.
        UnknownLayout: neither format, damaged, compressed, encrypted by TAO, with pickled objects, without tensors, or
            with tensors that are not dense or claim more elements than the file holds.
    """
    if not path.is_file():
        raise ConfigError(f"weights {path}: no such file; give the path of a readable file")
    try:
        source = path if trust == NO_POLICY else _trusted(path, trust)
        content = _read_safetensors(source) if path.suffix == ".safetensors" else _read_torch(source, path)
    except OSError as error:
        if error.errno == errno.EINVAL:  # torch's reader seeks before the start of a truncated file
            raise UnknownLayout(f"weights {path}: damaged; the end of the file is missing") from error
        raise ConfigError(f"weights {path}: {error.strerror or error}; give the path of a readable file") from error
    except SafetensorError as error:
        raise UnknownLayout(f"weights {path}: not a complete safetensors file ({error})") from error
    tensors = {name: value for name, value in _unwrap(content, path).items() if isinstance(value, Tensor)}
    if not tensors:
        raise UnknownLayout(f"weights {path}: no tensors, only {_first_names(content)}")
    for name, tensor in tensors.items():
        _check_tensor(name, tensor, path)
    return tensors


def _trusted(path: Path, trust: TrustPolicy) -> io.BytesIO:
    """Returns the bytes of a file that were checked: nobody can exchange them before they are parsed."""
    content = io.BytesIO(path.read_bytes())
    trust.check(path, content)
    return content


def _check_tensor(name: str, tensor: Tensor, path: Path) -> None:
    """Raises UnknownLayout if a tensor is not dense or, as a view with strides of 0, larger than its elements."""
    if type(tensor) not in (Tensor, Parameter) or tensor.layout is not torch.strided or tensor.device.type != "cpu":
        raise UnknownLayout(
            f"weights {path}: {name!r} is no dense tensor on the CPU; save dense tensors with torch.save"
        )
    if tensor.is_quantized or tensor.is_complex():
        raise UnknownLayout(
            f"weights {path}: {name!r} has the type {tensor.dtype}; save it as float32, float16 or bfloat16"
        )
    stored = tensor.untyped_storage().nbytes()
    if tensor.numel() * tensor.element_size() > stored:
        raise UnknownLayout(
            f"weights {path}: {name!r} of shape {tuple(tensor.shape)} repeats {stored} bytes; "
            "save its contiguous() form with torch.save"
        )


def _check_entries(source: _Source, path: Path) -> None:
    """Raises UnknownLayout if the entries are larger than the file; compressed ones can be so by a factor of 1 000."""
    with zipfile.ZipFile(source) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
    stored = path.stat().st_size if isinstance(source, Path) else source.getbuffer().nbytes
    if size > stored:
        raise UnknownLayout(
            f"weights {path}: {size} bytes of entries in a file of {stored}; torch.save does not compress "
            "and stores each entry once; save the weights with it"
        )


def _read_safetensors(source: _Source) -> dict[str, Tensor]:
    return load_file(source) if isinstance(source, Path) else load(source.getvalue())


def _read_torch(source: _Source, path: Path) -> Any:
    try:
        if zipfile.is_zipfile(source):
            _check_entries(source, path)
        # weights_only: unrestricted unpickling would run code from the file.
        return torch.load(_rewound(source), map_location="cpu", weights_only=True)
    except READ_ERRORS as error:
        objects = _pickled_classes(source)
        if objects:
            raise UnknownLayout(
                f"weights {path}: pickled objects ({', '.join(objects)}), which can run code when read; if you trust "
                "the file, save its 'state_dict' alone to a new file with torch.save"
            ) from error
        raise UnknownLayout(f"weights {path}: not written by torch.save, or damaged") from error


def _pickled_classes(source: _Source) -> list[str]:
    """Returns the names of pickled classes in a file other than tensors and containers; empty for other files."""
    if not zipfile.is_zipfile(source):
        return []
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(_rewound(source)))
    except READ_ERRORS:
        return []


def _rewound(source: _Source) -> _Source:
    """Returns the source, bytes in memory from their start: zipfile leaves them at their end, and torch reads on."""
    if not isinstance(source, Path):
        source.seek(0)
    return source


def _unwrap(content: Any, path: Path) -> dict[str, Any]:
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and "state_dict_encrypted" in content:
            raise UnknownLayout(f"weights {path}: encrypted by TAO; save it without a key in TAO first")
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict):
        raise UnknownLayout(f"weights {path}: a {type(content).__name__}, not a dict of tensors")
    return {name: value for name, value in content.items() if isinstance(name, str)}


def _first_names(content: Any) -> str:
    # Only text: nested tuples that share their parts can be exponentially longer as text than in the file.
    return ", ".join(repr(name) for name in islice(content, 5) if isinstance(name, str)) or "nothing"
