"""Saves and loads `.malckpt` files: weights, settings and categories, all that training hands over to labeling.

    age v1 file, or plain without a key             `encrypted_file`
      safetensors                                   `tensorfile`
        student.* teacher.*                         weights
        training/NNNNN/…                            tensors of the training state, in a `resume` file
        __metadata__                                strings: schema, requires, kind, sha256; and as JSON (`json_tree`):
                                                    model, labeler, categories, provenance, training, int8

No pickle is read or written: a file can hold wrong numbers, but it cannot run code. Encryption authenticates the
content but, with a recipient, not its author: recipients are public keys. Where authorship matters, a `TrustPolicy`
requires a SHA-256 or a signature. User documentation calls an encrypted checkpoint "sealed".
"""

import hashlib
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from mal_train.core.errors import Altered, CheckpointError, NonFiniteTraining, Truncated, UnknownLayout
from mal_train.core.input_files import open_regular
from mal_train.core.settings import LabelerConfig
from mal_train.kernel.checkpoint.age_header import EncryptionInfo
from mal_train.kernel.checkpoint.age_streams import Sink
from mal_train.kernel.checkpoint.encrypted_file import EncryptedFile, chunk_padding, write_encrypted
from mal_train.kernel.checkpoint.json_tree import Tree, from_json, to_json
from mal_train.kernel.checkpoint.keys import DecryptionKey, EncryptionKey
from mal_train.kernel.checkpoint.metadata import (
    REQUIRES,
    SCHEMA,
    TRAINING_PREFIX,
    WEIGHT_PREFIXES,
    Kind,
    Settings,
    parse_settings,
)
from mal_train.kernel.checkpoint.tensorfile import (
    MAX_JSON,
    MAX_SHOWN,
    PADDING_NAME,
    TensorFileHeader,
    TensorFileReader,
    serialize,
)
from mal_train.kernel.checkpoint.trust import NO_POLICY, TrustPolicy
from mal_train.kernel.networks.network import ModelConfig
from mal_train.kernel.networks.quantization import Int8Calibration

FINITE_CHECK_CHUNK = 1 << 22
"""Elements checked for NaN and infinity at a time, which bounds the memory of the check."""

TrainingState: TypeAlias = dict[str, Tree]
"""Lightning's dict without the weights: optimizer_states, loops, lr_schedulers, callbacks, …"""


@dataclass(frozen=True)
class Checkpoint:
    """The content of a `.malckpt` file.

    Attributes:
        model: architecture of the network.
        labeler: settings that turn boxes into masks.
        weights: "student.…" and "teacher.…" → tensor. Loaded weights are on the CPU; those stored as float16 are
            converted to float32. A file may hold the student alone (`MalNetwork.load`).
        categories: categories of the training annotations, as in their COCO file.
        provenance: versions, license of the starting weights, metrics and more, as JSON-like trees.
        kind: `resume` has a training state, `weights` has none.
        training: the training state.
        int8: ranges with which the networks compute in int8; None: not calibrated.
        encryption: encryption of the loaded file; None if not loaded. Users should be warned of `mode == "none"`.
        sha256: SHA-256 of the loaded file as it was read, in hex; equals `sha256_of` unless the file has changed since.
        path: the loaded file; None if not loaded.
    """

    model: ModelConfig
    labeler: LabelerConfig
    weights: Mapping[str, Tensor]
    categories: list[dict[str, Any]] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)
    kind: Kind = "weights"
    training: TrainingState | None = None
    int8: Int8Calibration | None = None
    encryption: EncryptionInfo | None = field(default=None, compare=False)
    sha256: str = field(default="", compare=False)
    path: Path | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if (self.kind == "resume") != (self.training is not None):
            raise CheckpointError(
                f"checkpoint of kind {self.kind!r}: 'resume' needs a training state, 'weights' may have none"
            )
        for name in self.weights:
            if not name.startswith(WEIGHT_PREFIXES):
                raise CheckpointError(f"weight {name!r}: the name must start with 'student.' or 'teacher.'")


@dataclass(frozen=True)
class CheckpointSummary:
    """The content of a checkpoint without its tensors.

    Attributes:
        schema: version of the file format.
        requires: first version of this project that reads the format.
        kind: see `Checkpoint`.
        model: see `Checkpoint`.
        labeler: see `Checkpoint`.
        categories: see `Checkpoint`.
        provenance: see `Checkpoint`.
        int8: see `Checkpoint`.
        tensors: number of tensors, including the training state.
        tensor_bytes: total size of the tensors.
    """

    schema: str
    requires: str
    kind: Kind
    model: ModelConfig
    labeler: LabelerConfig
    categories: list[dict[str, Any]]
    provenance: dict[str, Any]
    int8: Int8Calibration | None
    tensors: int
    tensor_bytes: int


@dataclass(frozen=True)
class CheckpointHeader:
    """The description of a checkpoint that `mal-train inspect` prints.

    Attributes:
        file_bytes: size on disk.
        encryption: encryption of the file.
        content: None for an encrypted file that is read without a key.
    """

    file_bytes: int
    encryption: EncryptionInfo
    content: CheckpointSummary | None


def save_checkpoint(path: Path, checkpoint: Checkpoint, key: EncryptionKey | None) -> EncryptionInfo:
    """Writes a checkpoint atomically and returns its encryption. Callers should warn users of mode "none".

    Tensors are written one at a time: beside the checkpoint this takes some MiB, and a copy of a tensor that is on a
    device or not contiguous. A passphrase takes about twice the file size in memory.

    Raises:
        NonFiniteTraining: a weight is NaN or infinite. Nothing is written; an older file stays.
        CheckpointError: the training state or the provenance holds a value that the format cannot store.
        OutputError: disk full, no permission, folder missing. The old file is intact.
        ConfigError: see `encrypted_file.write_encrypted`.
    """
    for name, tensor in checkpoint.weights.items():
        if not _all_finite(tensor):
            raise NonFiniteTraining(f"{path}: weight {name} holds NaN or infinity; the file is not written")
    tensors: dict[str, Tensor] = dict(checkpoint.weights)
    metadata = {
        "schema": SCHEMA,
        "requires": REQUIRES,
        "kind": checkpoint.kind,
        "model": to_json(checkpoint.model.to_dict(), "model"),
        "labeler": to_json(checkpoint.labeler.to_dict(), "labeler"),
        "categories": to_json(checkpoint.categories, "categories"),
        "provenance": to_json(checkpoint.provenance, "provenance"),
    }
    if checkpoint.int8 is not None:
        metadata["int8"] = to_json(checkpoint.int8.to_dict(), "int8")
    if checkpoint.training is not None:
        metadata["training"] = to_json(checkpoint.training, "training", tensors, TRAINING_PREFIX)
    return write_encrypted(path, serialize(tensors, metadata, chunk_padding), key)


def load_checkpoint(
    path: Path, key: DecryptionKey | None, *, skip_training_state: bool = False, trust: TrustPolicy = NO_POLICY
) -> Checkpoint:
    """Loads a checkpoint of either kind, after its last byte is authenticated.

    Args:
        path: the file.
        key: None for a plain file, and only for one.
        skip_training_state: loads the weights alone: the result has kind `weights`, and a resume file takes no more
            memory than its weights.
        trust: SHA-256 or signers that the file must have; checked on the open file before anything is parsed.

    Raises:
        Untrusted: see `TrustPolicy.check`.
        WrongKey, Truncated, Altered: see `EncryptedFile.read_into`. A plain file is not authenticated; its digest finds
            damage, but anybody can write one that fits. Earlier files have none: there, only damage to the
            structure is found.
        UnknownLayout: not a checkpoint of this project, or of a schema that this version does not read.
        CheckpointError: the file cannot be read, or a weight is NaN or infinite.
    """

    def select(header: TensorFileHeader) -> set[str]:
        names = {entry.name for entry in header.entries if entry.name != PADDING_NAME}
        return {name for name in names if not (skip_training_state and _is_training(name))}

    with _open(path, trust) as file:
        settings, tensors = _read(file, key, select)
        encryption, sha256 = file.encryption, file.sha256()
    # float16 is a storage format only: all computation starts from float32.
    weights = {
        name: tensor.float() if tensor.dtype is torch.float16 else tensor
        for name, tensor in tensors.items()
        if not _is_training(name)
    }
    for name, tensor in weights.items():
        if not _all_finite(tensor):
            raise CheckpointError(f"{path}: weight {name} holds NaN or infinity; train again or use an older file")
    training = None
    if settings.kind == "resume" and not skip_training_state:
        training = _training_state(settings.training_json, tensors, path)
    return Checkpoint(
        model=settings.model,
        labeler=settings.labeler,
        weights=weights,
        categories=settings.categories,
        provenance=settings.provenance,
        kind="weights" if training is None else "resume",
        training=training,
        int8=settings.int8,
        encryption=encryption,
        sha256=sha256,
        path=path,
    )


def read_header(path: Path, key: DecryptionKey | None) -> CheckpointHeader:
    """Returns the description of a checkpoint. Its tensors are verified, but not kept in memory.

    Args:
        path: the file.
        key: None leaves `content` of an encrypted file None. The key is ignored for a plain file.

    Raises:
        CheckpointError: see `load_checkpoint`.
    """
    with _open(path) as file:
        if file.encryption.mode == "none":
            key = None
        elif key is None:
            return CheckpointHeader(file.file_bytes, file.encryption, None)
        settings, _ = _read(file, key, lambda header: ())
        entries = [entry for entry in settings.header.entries if entry.name != PADDING_NAME]
        summary = CheckpointSummary(
            schema=SCHEMA,
            requires=settings.header.metadata.get("requires", ""),
            kind=settings.kind,
            model=settings.model,
            labeler=settings.labeler,
            categories=settings.categories,
            provenance=settings.provenance,
            int8=settings.int8,
            tensors=len(entries),
            tensor_bytes=sum(entry.size for entry in entries),
        )
        return CheckpointHeader(file.file_bytes, file.encryption, summary)


def encryption_of(path: Path) -> EncryptionInfo:
    """Returns the encryption of a file; reads its age header only. Raises CheckpointError."""
    with _open(path) as file:
        return file.encryption


def reencrypt(
    source: Path, old_key: DecryptionKey | None, target: Path, new_key: EncryptionKey | None
) -> EncryptionInfo:
    """Copies a checkpoint with another encryption, or none; the content stays the same, byte for byte.

    The source is verified to its last byte before anything is written. A plain copy is readable by its owner alone. The
    content is in memory once; with a passphrase, twice.

    Returns:
        The encryption of the copy.

    Raises:
        CheckpointError: see `load_checkpoint`.
        OutputError: the target cannot be written, or exists.
    """
    with _open(source) as file:
        content = bytearray()
        _read(file, old_key, lambda header: (), content)
    mode = 0o600 if new_key is None else 0o666
    return write_encrypted(target, [memoryview(content)], new_key, mode=mode, overwrite=False)


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of the file on disk, in hex. It identifies a checkpoint in results and manifests.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        with open_regular(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def _all_finite(tensor: Tensor) -> bool:
    """Returns True if no element is NaN or infinite."""
    if not tensor.is_floating_point():
        return True
    flat = tensor.detach().reshape(-1)
    chunks = (flat[start : start + FINITE_CHECK_CHUNK] for start in range(0, flat.numel(), FINITE_CHECK_CHUNK))
    # A finite sum proves it without a temporary; an infinite sum may be an overflow of finite elements.
    return all(bool(chunk.sum().isfinite()) or bool(chunk.isfinite().all()) for chunk in chunks)


def _is_training(name: str) -> bool:
    return name.startswith(TRAINING_PREFIX)


def _open(path: Path, trust: TrustPolicy = NO_POLICY) -> EncryptedFile:
    try:
        return EncryptedFile(path, trust)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def _read(
    file: EncryptedFile,
    key: DecryptionKey | None,
    select: Callable[[TensorFileHeader], Container[str]],
    content: bytearray | None = None,
) -> tuple[Settings, dict[str, Tensor]]:
    """Returns the settings and the selected tensors, after the last byte is authenticated; `content` receives all."""
    if file.encryption.mode == "none":
        _refuse_foreign(file)
    name = str(file.path)
    settings: list[Settings] = []

    def check_and_select(header: TensorFileHeader) -> Container[str]:
        settings.append(parse_settings(header, name))
        return select(header)

    is_plain = file.encryption.mode == "none"
    reader = TensorFileReader(name, file.content_bytes, check_and_select, verify_digest=is_plain)
    try:
        file.read_into(reader if content is None else _Copy(reader, content), key)
    except OSError as error:
        raise CheckpointError(f"{name}: cannot be read: {error.strerror}") from error
    reader.finish()
    return settings[0], reader.tensors


class _Copy:
    """A sink that passes what it receives on, and keeps it."""

    def __init__(self, sink: Sink, content: bytearray) -> None:
        self._sink, self._content = sink, content

    def write(self, data: bytes | memoryview, /) -> None:
        """Receives the next bytes."""
        self._sink.write(data)
        self._content += data


def _refuse_foreign(file: EncryptedFile) -> None:
    """Raises an error that names the format of a plain file that is not safetensors. Nothing of it is interpreted."""
    start = file.first_bytes(512)
    if start.startswith((b"PK\x03\x04", b"\x80")) or start[257:262] == b"ustar":
        raise UnknownLayout(
            f"{file.path}: a pickled PyTorch file, which could run code and is not read; "
            "`mal-train import` converts checkpoints of known layouts to .malckpt"
        )
    if start.startswith(b"-----BEGIN AGE"):
        raise UnknownLayout(f"{file.path}: an armored age file; only the binary format is read (`age` without -a)")
    if len(start) < 9:
        raise Truncated(f"{file.path}: {len(start)} bytes; the end of the file is missing")
    if start[8:9] != b"{" or int.from_bytes(start[:8], "little") > MAX_JSON:
        raise UnknownLayout(f"{file.path}: neither an age file nor safetensors; not a checkpoint of this project")


def _training_state(text: str, tensors: Mapping[str, Tensor], path: Path) -> TrainingState:
    try:
        training = from_json(text, tensors)
    except ValueError as error:
        raise Altered(f"{path}: the training state is damaged: {str(error)[:MAX_SHOWN]}") from None
    if not isinstance(training, dict):
        raise Altered(f"{path}: the training state is not a dict")
    return training
