"""Streams named tensors as safetensors bytes and back, one tensor at a time. Knows nothing of keys or settings.

    u64 little-endian length | JSON: {name: dtype, shape, data_offsets}, "__metadata__": {str: str} | tensor bytes

The library (`safetensors`) reads and writes complete files; streaming saves a second copy in memory when the file is
encrypted. Both read what the other writes (test_checkpoint.py).
Format: https://github.com/huggingface/safetensors, "Format". Hosts are little-endian (x86-64, arm64).
"""

import hashlib
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
MAX_JSON = 16 << 20
"""Limit of the JSON header, in bytes; that of the format is 100 MB. Parsed, a header takes up to thirty times as much
memory. Ten thousand tensors need two million bytes."""
MAX_DIMENSIONS = 16
MAX_SHOWN = 300
"""Characters of a reason that a message repeats; names in a file may be as long as its header."""
DIGEST_NAME = "sha256"
"""Metadata with the SHA-256 of the content, in hex, which finds a changed bit in a file that is not encrypted. It is
computed with `NO_DIGEST` in its place. Earlier files have none."""
NO_DIGEST = "0" * 64
PADDING_NAME = "padding"
"""Name of the tensor of up to 7 bytes that brings the total size of the tensors to a multiple of 8; readers skip it."""
MAX_ELEMENTS = 1 << 48
"""Exceeds any file; a limit for forged shapes, which could overflow the allocator."""

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
class TensorEntry:
    """A row of the header. The bytes of the tensor are start … end of the data that follows the header."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size(self) -> int:
        """Size of the tensor in bytes."""
        return self.end - self.start


@dataclass(frozen=True)
class TensorFileHeader:
    """The validated JSON header. Entries are in the order of their bytes, without gaps or overlaps."""

    metadata: Mapping[str, str]
    entries: tuple[TensorEntry, ...]


def serialize(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], padding: Callable[[int], int]
) -> Iterator[memoryview]:
    """Yields the bytes of the file in order. A buffer may be dropped when the next one is requested.

    Args:
        tensors: dense tensors on any device, contiguous or not.
        metadata: arbitrary strings; `DIGEST_NAME` is added. The tensors are read twice: for it, and for the file.
        padding: returns the number of bytes to add to a content of the given size, a multiple of 8 if that is one. They
            are written as blanks after the JSON, which the format allows.

    Raises:
        CheckpointError: a dtype or layout that the format lacks, or more than `MAX_JSON`.
    """
    # Widest elements first, and a total divisible by 8: every tensor is then aligned, as readers of the format expect.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    table: dict[str, Any] = {"__metadata__": {**metadata, DIGEST_NAME: NO_DIGEST}}
    end = 0
    for name in order:
        table[name] = _row(name, tensors[name], end)
        end = table[name]["data_offsets"][1]
    alignment = -end % 8
    if alignment:
        table[PADDING_NAME] = {"dtype": "U8", "shape": [alignment], "data_offsets": [end, end + alignment]}
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    text += b" " * padding(LENGTH_BYTES + len(text) + end + alignment)
    if len(text) > MAX_JSON:
        raise CheckpointError(f"settings and training state: {len(text)} B of JSON; the limit is {MAX_JSON} B")

    def data() -> Iterator[memoryview]:
        for name in order:
            yield _bytes_of(tensors[name].detach().cpu().contiguous())
        yield memoryview(bytes(alignment))

    digest = hashlib.sha256(struct.pack("<Q", len(text)) + text)
    for buffer in data():
        digest.update(buffer)
    text = text.replace(_digest_member(NO_DIGEST), _digest_member(digest.hexdigest()))
    yield memoryview(struct.pack("<Q", len(text)) + text)
    yield from data()


class TensorFileReader:
    """A sink that receives the bytes of a file in order and fills tensors with them.

    Tensors are allocated once the header is complete. They may be used only after `finish`, which the caller calls when
    the last byte is authenticated.

    Attributes:
        tensors: the selected tensors by name.
    """

    def __init__(
        self,
        name: str,
        content_bytes: int,
        select: Callable[[TensorFileHeader], Container[str]],
        *,
        verify_digest: bool = True,
    ) -> None:
        """Prepares to read.

        Args:
            name: name of the file in error messages.
            content_bytes: size of the complete content; no more than that is ever allocated.
            select: receives the header and returns the names of the tensors to keep, or raises to refuse the file.
            verify_digest: compare the content with the digest in its header, if there is one; False where decryption
                authenticates it.
        """
        self.tensors: dict[str, Tensor] = {}
        self._name = name
        self._content_bytes = content_bytes
        self._select = select
        self._header = bytearray()
        self._header_end = LENGTH_BYTES
        self._complete = False
        self._targets: list[tuple[int, memoryview | None]] = []
        self._position = 0
        self._verify_digest = verify_digest
        self._expected = ""
        self._digest: hashlib._Hash | None = None

    def write(self, data: bytes | memoryview, /) -> None:
        """Receives the next bytes.

        Raises:
            UnknownLayout, Truncated, Altered: as soon as the header is complete.
        """
        size = len(data)
        if self._targets and (target := self._targets[-1][1]) is not None and self._position + size < len(target):
            # The fast path of nearly all calls; a gigabyte takes a hundred thousand.
            target[self._position : self._position + size] = data
            self._position += size
            if self._digest is not None:
                self._digest.update(data)
            return
        rest = memoryview(data)
        if not self._complete:
            rest = self._read_header(rest)
        if self._digest is not None:
            self._digest.update(rest)
        while rest and self._targets:
            size, target = self._targets[-1]
            count = min(size - self._position, len(rest))
            if target is not None:
                target[self._position : self._position + count] = rest[:count]
            self._position += count
            rest = rest[count:]
            if self._position == size:
                self._targets.pop()
                self._position = 0

    def finish(self) -> None:
        """Checks the tensors after the last byte.

        Raises:
            Truncated: a tensor is incomplete.
            Altered: the content differs from its digest, or a bool tensor holds values other than 0 and 1.
        """
        if not self._complete or self._targets:
            raise Truncated(f"{self._name}: the end of the file is missing")
        if self._digest is not None and self._digest.hexdigest() != self._expected:
            raise Altered(f"{self._name}: the content differs from its digest; the file was altered, do not use it")
        for name, tensor in self.tensors.items():
            # A bool tensor with other bytes than 0 and 1 is undefined behavior in the code that computes with it.
            if tensor.dtype == torch.bool and bool((tensor.view(torch.uint8) > 1).any()):
                raise Altered(f"{self._name}: tensor {name} is of dtype bool and holds values other than 0 and 1")

    def _read_header(self, data: memoryview) -> memoryview:
        """Collects the header and allocates the tensors; returns the bytes of `data` that follow the header."""
        while data and len(self._header) < self._header_end:
            count = self._header_end - len(self._header)
            self._header += data[:count]
            data = data[count:]
            if self._header_end == len(self._header) == LENGTH_BYTES:
                self._header_end += self._json_length(int.from_bytes(self._header, "little"))
        if len(self._header) == self._header_end:
            header = _parse_header(bytes(self._header[LENGTH_BYTES:]), self._name)
            self._start_digest(header.metadata.get(DIGEST_NAME))
            self._header.clear()
            self._allocate(header)
            self._complete = True
        return data

    def _start_digest(self, digest: str | None) -> None:
        if digest is None or not self._verify_digest:
            return
        member = _digest_member(digest)
        if len(digest) != len(NO_DIGEST) or self._header.count(member) != 1:
            raise Altered(f"{self._name}: the header is damaged: {DIGEST_NAME} is no digest")
        self._expected = digest
        self._digest = hashlib.sha256(self._header.replace(member, _digest_member(NO_DIGEST)))

    def _json_length(self, length: int) -> int:
        if not 2 <= length <= MAX_JSON:
            raise UnknownLayout(f"{self._name}: the content is not safetensors; not a checkpoint of this project")
        if LENGTH_BYTES + length > self._content_bytes:
            raise Truncated(f"{self._name}: the end of the file is missing")
        return length

    def _allocate(self, header: TensorFileHeader) -> None:
        selected = self._select(header)
        expected = self._header_end + (header.entries[-1].end if header.entries else 0)
        if expected > self._content_bytes:
            missing = expected - self._content_bytes
            raise Truncated(f"{self._name}: the end of the file is missing ({missing} bytes)")
        if expected < self._content_bytes:
            raise Altered(f"{self._name}: {self._content_bytes - expected} bytes follow the last tensor")
        for entry in reversed(header.entries):
            target = None
            if entry.name in selected:
                self.tensors[entry.name] = torch.empty(entry.shape, dtype=entry.dtype)
                target = _bytes_of(self.tensors[entry.name])
            if entry.size:
                self._targets.append((entry.size, target))


def _digest_member(digest: str) -> bytes:
    """Returns the digest as it stands in the JSON text. No value holds these bytes: its quotation marks are escaped."""
    return f'"{DIGEST_NAME}":"{digest}"'.encode()


def _row(name: str, tensor: Tensor, start: int) -> dict[str, Any]:
    if tensor.dtype not in _DTYPE_NAMES or tensor.layout is not torch.strided or tensor.is_meta:
        raise CheckpointError(
            f"tensor {name}: {tensor.dtype}, {tensor.layout}; a checkpoint holds dense tensors of standard dtypes"
        )
    end = start + tensor.numel() * tensor.element_size()
    return {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}


def _bytes_of(tensor: Tensor) -> memoryview:
    """Returns the memory of a contiguous CPU tensor as a writable view."""
    return memoryview(cast(Any, tensor.reshape(-1).view(torch.uint8).numpy()))


def _parse_header(text: bytes, name: str) -> TensorFileHeader:
    if not text.startswith(b"{"):
        raise UnknownLayout(f"{name}: the content is not safetensors; not a checkpoint of this project")
    try:
        table = parse(text)
        metadata = table.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("metadata are not all strings")
        return TensorFileHeader(metadata, _entries(table))
    except ValueError as error:
        raise Altered(f"{name}: the header is damaged: {str(error)[:MAX_SHOWN]}") from None


def _entries(table: dict[str, Any]) -> tuple[TensorEntry, ...]:
    entries = []
    for name, row in table.items():
        if not isinstance(row, dict) or set(row) != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"tensor {name!r} lacks dtype, shape or data_offsets")
        dtype, shape, offsets = row["dtype"], row["shape"], row["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise ValueError(f"tensor {name!r} has dtype {dtype!r}")
        if not _are_counts(shape, MAX_DIMENSIONS) or not _are_counts(offsets, 2) or len(offsets) != 2:
            raise ValueError(f"tensor {name!r} has an invalid shape or invalid offsets")
        entries.append(TensorEntry(name, _DTYPES[dtype], tuple(shape), *offsets))
    entries.sort(key=lambda entry: (entry.start, entry.end))
    end = 0
    for entry in entries:
        if entry.start != end or entry.size != math.prod(entry.shape) * entry.dtype.itemsize:
            raise ValueError(
                f"tensor {entry.name!r} does not follow the tensor before it, or its size does not match its shape"
            )
        # A side of 0 counts as 1: the strides of an empty tensor are products of its other sides.
        if math.prod(max(side, 1) for side in entry.shape) > MAX_ELEMENTS:
            raise ValueError(f"tensor {entry.name!r} has shape {entry.shape}")
        end = entry.end
    return tuple(entries)


def _are_counts(value: object, most: int) -> bool:
    """Returns True for a list of up to `most` integers from 0 to `MAX_ELEMENTS`."""
    is_short = isinstance(value, list) and len(value) <= most
    return is_short and all(type(item) is int and 0 <= item <= MAX_ELEMENTS for item in cast(list[object], value))
