"""Named tensors as a stream of safetensors bytes, and back, one tensor at a time. Knows nothing of keys or settings.

    u64 little-endian length | JSON: {name: dtype, shape, data_offsets}, "__metadata__": {str: str} | tensor bytes

The library (`safetensors`) reads and writes such files whole; this streams them, so that a sealed gigabyte takes no
second one. What is written here the library reads, and the other way round: test_checkpoint.py.
Format: https://github.com/huggingface/safetensors, "Format". Hosts are little-endian (x86-64, arm64).
"""

import json
import math
import struct
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from mal_train.core.errors import Altered, CheckpointError, Truncated, UnknownLayout
from mal_train.kernel.checkpoint.json_tree import parse

LENGTH_BYTES = 8
MAX_JSON = 100_000_000
"""The format's own limit for the JSON part, in bytes."""
FILLER = "padding"
"""Name of up to seven bytes that bring the tensors' total to a multiple of 8; passed over when read."""
MAX_ELEMENTS = 1 << 48
"""Beyond any file; keeps a forged shape from overflowing the allocator."""

_DTYPES = {
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F32": torch.float32,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """A row of the table: the tensor's bytes are start … end of what follows the JSON part."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size(self) -> int:
        """Bytes of the tensor."""
        return self.end - self.start


@dataclass(frozen=True)
class Head:
    """The JSON part, checked: rows in the order of their bytes, without holes or overlaps."""

    metadata: Mapping[str, str]
    entries: tuple[Entry, ...]


def parts(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], padding: Callable[[int], int]
) -> Iterator[memoryview]:
    """The bytes of the file, in order; each part may be dropped when the next is asked for.

    Args:
        tensors: dense ones, on any device, contiguous or not.
        metadata: free strings.
        padding: bytes to add to a content of that many, a multiple of 8 each time that is; they go as blanks behind
            the JSON, which the format allows.

    Raises:
        CheckpointError: a dtype or layout the format does not know, or more than 100 MB of JSON.
    """
    # Widest elements first, and a total that 8 divides: every tensor then lies aligned, as the format's readers want.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    table: dict[str, Any] = {"__metadata__": dict(metadata)}
    at = 0
    for name in order:
        table[name] = _row(name, tensors[name], at)
        at = table[name]["data_offsets"][1]
    filler = -at % 8
    if filler:
        table[FILLER] = {"dtype": "U8", "shape": [filler], "data_offsets": [at, at + filler]}
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    text += b" " * padding(LENGTH_BYTES + len(text) + at + filler)
    if len(text) > MAX_JSON:
        raise CheckpointError(f"settings and training state take {len(text)} B of JSON; the format holds {MAX_JSON} B")
    yield memoryview(struct.pack("<Q", len(text)) + text)
    for name in order:
        yield _bytes_of(tensors[name].detach().cpu().contiguous())
    yield memoryview(bytes(filler))


class TensorFileReader:
    """Takes the bytes in order and fills tensors, which it allocates when the JSON part has come.

    Nothing may be used before `finish`, which is called when the seal has verified the last byte.

    Attributes:
        tensors: the chosen ones by name.
    """

    def __init__(self, name: str, content_bytes: int, choose: Callable[[Head], Container[str]]) -> None:
        """Prepare to read.

        Args:
            name: of the file, for messages.
            content_bytes: how many bytes will come if nothing is missing; no more than that is ever allocated.
            choose: gets the JSON part, may refuse it by raising, and names the tensors to keep.
        """
        self.tensors: dict[str, Tensor] = {}
        self._name = name
        self._content_bytes = content_bytes
        self._choose = choose
        self._start = bytearray()
        self._json_end = LENGTH_BYTES
        self._complete = False
        self._targets: list[tuple[int, memoryview | None]] = []
        self._at = 0

    def write(self, part: bytes) -> None:
        """Take the next bytes; UnknownLayout, Truncated or Altered as soon as the JSON part shows it."""
        size = len(part)
        if self._targets and (target := self._targets[-1][1]) is not None and self._at + size < len(target):
            # Nearly all calls end here, and there are a hundred thousand a gigabyte.
            target[self._at : self._at + size] = part
            self._at += size
            return
        data = memoryview(part)
        if not self._complete:
            data = self._take_json(data)
        while data and self._targets:
            size, target = self._targets[-1]
            count = min(size - self._at, len(data))
            if target is not None:
                target[self._at : self._at + count] = data[:count]
            self._at += count
            data = data[count:]
            if self._at == size:
                self._targets.pop()
                self._at = 0

    def finish(self) -> None:
        """To be called when all bytes have come and verified. Truncated unless they filled every tensor."""
        if not self._complete or self._targets:
            raise Truncated(f"{self._name}: the end of the file is missing")
        for name, tensor in self.tensors.items():
            # Any other byte than 0 and 1 in a bool tensor is undefined behavior in the code that computes with it.
            if tensor.dtype == torch.bool and bool((tensor.view(torch.uint8) > 1).any()):
                raise Altered(f"{self._name}: tensor {name} is of bool and holds other values")

    def _take_json(self, data: memoryview) -> memoryview:
        """Gather the JSON part and prepare the tensors; returns what follows it in `data`."""
        while data and len(self._start) < self._json_end:
            count = self._json_end - len(self._start)
            self._start += data[:count]
            data = data[count:]
            if self._json_end == len(self._start) == LENGTH_BYTES:
                self._json_end += self._json_length(int.from_bytes(self._start, "little"))
        if len(self._start) == self._json_end:
            head = _parse_head(bytes(self._start[LENGTH_BYTES:]), self._name)
            self._start.clear()
            self._prepare(head)
            self._complete = True
        return data

    def _json_length(self, length: int) -> int:
        if not 2 <= length <= MAX_JSON:
            raise UnknownLayout(f"{self._name}: its content is not safetensors; not a checkpoint of this project")
        if LENGTH_BYTES + length > self._content_bytes:
            raise Truncated(f"{self._name}: the end of the file is missing")
        return length

    def _prepare(self, head: Head) -> None:
        wanted = self._choose(head)
        expected = self._json_end + (head.entries[-1].end if head.entries else 0)
        if expected > self._content_bytes:
            missing = expected - self._content_bytes
            raise Truncated(f"{self._name}: the end of the file is missing ({missing} bytes)")
        if expected < self._content_bytes:
            raise Altered(f"{self._name}: {self._content_bytes - expected} bytes follow its last tensor")
        for entry in reversed(head.entries):
            target = None
            if entry.name in wanted:
                self.tensors[entry.name] = torch.empty(entry.shape, dtype=entry.dtype)
                target = _bytes_of(self.tensors[entry.name])
            if entry.size:
                self._targets.append((entry.size, target))


def _row(name: str, tensor: Tensor, start: int) -> dict[str, Any]:
    if tensor.dtype not in _DTYPE_NAMES or tensor.layout is not torch.strided or tensor.is_meta:
        raise CheckpointError(f"tensor {name}: {tensor.dtype}, {tensor.layout}; a checkpoint holds plain dense ones")
    end = start + tensor.numel() * tensor.element_size()
    return {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor; writing to it writes to the tensor."""
    return memoryview(cast(Any, tensor.reshape(-1).view(torch.uint8).numpy()))


def _parse_head(text: bytes, name: str) -> Head:
    if not text.startswith(b"{"):
        raise UnknownLayout(f"{name}: its content is not safetensors; not a checkpoint of this project")
    try:
        table = parse(text)
        metadata = table.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("the metadata are not all strings")
        return Head(metadata, _entries(table))
    except ValueError as error:
        raise Altered(f"{name}: its table of tensors is damaged: {error}") from None


def _entries(table: dict[str, Any]) -> tuple[Entry, ...]:
    entries = []
    for name, row in table.items():
        if not isinstance(row, dict) or set(row) != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"tensor {name!r} lacks dtype, shape or data_offsets")
        dtype, shape, offsets = row["dtype"], row["shape"], row["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise ValueError(f"tensor {name!r} is of dtype {dtype!r}")
        if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
            raise ValueError(f"tensor {name!r} has a shape or offsets that are no counts")
        entries.append(Entry(name, _DTYPES[dtype], tuple(shape), *offsets))
    entries.sort(key=lambda entry: (entry.start, entry.end))
    at = 0
    for entry in entries:
        if entry.start != at or entry.size != math.prod(entry.shape) * entry.dtype.itemsize:
            raise ValueError(f"tensor {entry.name!r} does not follow the one before, or its size is not its shape's")
        # A side of 0 counts as 1 here: the strides of an empty tensor are products of the other sides.
        if math.prod(max(side, 1) for side in entry.shape) > MAX_ELEMENTS:
            raise ValueError(f"tensor {entry.name!r} has shape {entry.shape}")
        at = entry.end
    return tuple(entries)


def _are_counts(value: object) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item <= MAX_ELEMENTS for item in value)
