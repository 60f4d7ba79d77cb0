"""The `.malckpt` file: the whole contract between the trainer and whoever labels. Weights, settings, categories.

    age v1 file, or bare when no key was given      `sealed`
      safetensors                                   `tensorfile`
        student.* teacher.*                         weights
        training/NNNNN/…                            tensors of the training state, in a `resume` file
        __metadata__                                strings: schema, requires, kind; and as JSON (`tree`): model,
                                                    labeler, categories, provenance, training

No pickle is read or written: such a file can hold wrong numbers, but it cannot run anything. A recipient is public, so
a file sealed for one may come from anybody; pin its SHA-256 (`sha256_of`), or seal by a passphrase, where that matters.
"""

import hashlib
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor

from mal_train.core.errors import Altered, CheckpointError, ConfigError, NonFiniteTraining, Truncated, UnknownLayout
from mal_train.core.settings import LabelerConfig
from mal_train.kernel.checkpoint.age_header import SealInfo
from mal_train.kernel.checkpoint.encrypted_file import SealedFile, padding, write_sealed
from mal_train.kernel.checkpoint.json_tree import Tree, from_json, to_json
from mal_train.kernel.checkpoint.keys import DecryptionKey, EncryptionKey
from mal_train.kernel.checkpoint.tensorfile import FILLER, MAX_JSON, Head, TensorFileReader, parts
from mal_train.kernel.networks.network import ModelConfig

SCHEMA = "mal-ckpt/1"
REQUIRES = "mask-auto-labeler 0.1"
"""The first version that reads this schema; it stands in the file, so that an older one can name it."""
WEIGHT_PREFIXES = ("student.", "teacher.")
TRAINING_PREFIX = "training/"
FINITE_STEP = 1 << 22
"""Elements looked at in one go."""

Kind: TypeAlias = Literal["weights", "resume"]
TrainingState: TypeAlias = dict[str, Tree]
"""Lightning's dict without the weights: optimizer_states, loops, lr_schedulers, callbacks, …; see `tree.Tree`."""


@dataclass(frozen=True)
class Checkpoint:
    """What a `.malckpt` holds.

    Attributes:
        model: shape of the network.
        labeler: how boxes become masks.
        weights: "student.…" and "teacher.…" → tensor; on the CPU after loading, and float32 there where they lay as
            float16. A file of the student alone serves its answer and no other (`MalNetwork.load`).
        categories: of the training annotations, as their COCO file has them.
        provenance: where it comes from (versions, license of the starting weights, figures, …); `tree.Tree`s.
        kind: `resume` has a training state, `weights` has none.
        training: everything else that training needs to go on.
        seal: how the file was sealed, after loading; `seal.how == "none"` is to be told to the user.
        sha256: of the file as it was read, hex, after loading; as `sha256_of` where nobody has written to it since.
    """

    model: ModelConfig
    labeler: LabelerConfig
    weights: Mapping[str, Tensor]
    categories: list[dict[str, Any]] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)
    kind: Kind = "weights"
    training: TrainingState | None = None
    seal: SealInfo | None = field(default=None, compare=False)
    sha256: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if (self.kind == "resume") != (self.training is not None):
            raise CheckpointError(
                f"checkpoint of kind {self.kind!r}: 'resume' has a training state, 'weights' has none"
            )
        for name in self.weights:
            if not name.startswith(WEIGHT_PREFIXES):
                raise CheckpointError(f"weight {name!r}: names start with 'student.' or 'teacher.'")


@dataclass(frozen=True)
class CheckpointSummary:
    """What stands in a checkpoint beside its tensors.

    Attributes:
        schema: format of the content.
        requires: first version of this project that reads it.
        kind: see `Checkpoint`.
        model: see `Checkpoint`.
        labeler: see `Checkpoint`.
        categories: see `Checkpoint`.
        provenance: see `Checkpoint`.
        tensors: how many, training state included.
        tensor_bytes: their size.
    """

    schema: str
    requires: str
    kind: Kind
    model: ModelConfig
    labeler: LabelerConfig
    categories: list[dict[str, Any]]
    provenance: dict[str, Any]
    tensors: int
    tensor_bytes: int


@dataclass(frozen=True)
class CheckpointHeader:
    """What `inspect` shows.

    Attributes:
        file_bytes: size on disk.
        seal: how it is sealed.
        content: None for a sealed file when no key was given.
    """

    file_bytes: int
    seal: SealInfo
    content: CheckpointSummary | None


def save_checkpoint(path: Path, checkpoint: Checkpoint, key: EncryptionKey | None) -> SealInfo:
    """Write the file, all or nothing, and tell how it was sealed; tell the user when that is "none".

    Tensors go to disk one at a time: besides them it takes some MiB, and a copy of a tensor only where it lies on a
    device or is not contiguous. A passphrase needs about twice the file in memory.

    Raises:
        NonFiniteTraining: a weight is NaN or infinite. Nothing is written; a good older file stays.
        CheckpointError: the training state or the provenance holds something that the format does not know.
        OutputError: disk full, no permission, folder missing. The old file is intact.
        ConfigError: see `sealed.write_sealed`.
    """
    for name, tensor in checkpoint.weights.items():
        if not _all_finite(tensor):
            raise NonFiniteTraining(f"{path}: weight {name} holds NaN or infinity; not written, the older file stays")
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
    if checkpoint.training is not None:
        metadata["training"] = to_json(checkpoint.training, "training", tensors, TRAINING_PREFIX)
    return write_sealed(path, parts(tensors, metadata, padding), key)


def load_checkpoint(path: Path, key: DecryptionKey | None, *, weights_only_kind: bool = False) -> Checkpoint:
    """Read a file of either kind. Nothing of it is handed out before its last byte has verified.

    Args:
        path: the file.
        key: None for a file that is not encrypted, and only for such.
        weights_only_kind: pass over the training state: the result has kind `weights`, and a resume file then takes no
            more memory than its weights.

    Raises:
        WrongKey, Truncated, Altered: see `sealed.SealedFile.read_into`. A file that is not encrypted has no seal that
            could break: of its damages only those of form are found.
        UnknownLayout: not a file of ours, or of a schema that this version does not read; it names the one that does.
        CheckpointError: the file cannot be read, or a weight in it is NaN or infinite.
    """

    def wanted(head: Head) -> set[str]:
        return {e.name for e in head.entries if e.name != FILLER and not (weights_only_kind and _is_training(e.name))}

    with _open(path) as file:
        settings, tensors = _read(file, key, wanted)
        seal, sha256 = file.seal, file.sha256()
    # float16 is a way to lie on disk: everybody computes from float32.
    weights = {
        name: tensor.float() if tensor.dtype is torch.float16 else tensor
        for name, tensor in tensors.items()
        if not _is_training(name)
    }
    for name, tensor in weights.items():
        if not _all_finite(tensor):
            raise CheckpointError(f"{path}: weight {name} holds NaN or infinity; train it again or take an older file")
    training = None
    if settings.kind == "resume" and not weights_only_kind:
        training = _training_state(settings.training_json, tensors, path)
    return Checkpoint(
        model=settings.model,
        labeler=settings.labeler,
        weights=weights,
        categories=settings.categories,
        provenance=settings.provenance,
        kind="weights" if training is None else "resume",
        training=training,
        seal=seal,
        sha256=sha256,
    )


def read_header(path: Path, key: DecryptionKey | None) -> CheckpointHeader:
    """What `inspect` shows. With a key the whole file is verified, and only its settings are kept in memory.

    Raises:
        As `load_checkpoint`, but a sealed file without a key is no error: what can be known without one is given. A
        key is passed over where the file is not encrypted; `seal` says that it is not.
    """
    with _open(path) as file:
        if file.seal.how == "none":
            key = None
        elif key is None:
            return CheckpointHeader(file.file_bytes, file.seal, None)
        settings, _ = _read(file, key, lambda head: ())
        entries = [entry for entry in settings.head.entries if entry.name != FILLER]
        summary = CheckpointSummary(
            schema=SCHEMA,
            requires=settings.head.metadata.get("requires", ""),
            kind=settings.kind,
            model=settings.model,
            labeler=settings.labeler,
            categories=settings.categories,
            provenance=settings.provenance,
            tensors=len(entries),
            tensor_bytes=sum(entry.size for entry in entries),
        )
        return CheckpointHeader(file.file_bytes, file.seal, summary)


def sha256_of(path: Path) -> str:
    """SHA-256 of the file as it lies on disk, in hex: names a checkpoint in answers and manifests.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


@dataclass(frozen=True)
class _Settings:
    """The metadata, read and checked."""

    head: Head
    kind: Kind
    model: ModelConfig
    labeler: LabelerConfig
    categories: list[dict[str, Any]]
    provenance: dict[str, Any]
    training_json: str


def _all_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite, in steps that keep the memory it takes small."""
    if not tensor.is_floating_point():
        return True
    flat = tensor.detach().reshape(-1)
    steps = (flat[at : at + FINITE_STEP] for at in range(0, flat.numel(), FINITE_STEP))
    # A finite sum proves it with no temporary; a sum that overflowed proves nothing and is looked at again.
    return all(bool(step.sum().isfinite()) or bool(step.isfinite().all()) for step in steps)


def _is_training(name: str) -> bool:
    return name.startswith(TRAINING_PREFIX)


def _open(path: Path) -> SealedFile:
    try:
        return SealedFile(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def _read(
    file: SealedFile, key: DecryptionKey | None, wanted: Callable[[Head], Container[str]]
) -> tuple[_Settings, dict[str, Tensor]]:
    """Settings and the wanted tensors, after the last byte has verified."""
    if file.seal.how == "none":
        _refuse_foreign(file)
    name = str(file.path)
    found: list[_Settings] = []

    def choose(head: Head) -> Container[str]:
        found.append(_settings(head, name))
        return wanted(head)

    reader = TensorFileReader(name, file.content_bytes, choose)
    try:
        file.read_into(reader, key)
    except OSError as error:
        raise CheckpointError(f"{name}: cannot be read: {error.strerror}") from error
    reader.finish()
    return found[0], reader.tensors


def _refuse_foreign(file: SealedFile) -> None:
    """A bare file must look like safetensors; say what else it looks like. Nothing of it is interpreted."""
    start = file.head(512)
    if start.startswith((b"PK\x03\x04", b"\x80")) or start[257:262] == b"ustar":
        raise UnknownLayout(
            f"{file.path}: looks like a pickled PyTorch file, which is not opened here; "
            "`mal-train import` turns checkpoints of known layouts into .malckpt"
        )
    if start.startswith(b"-----BEGIN AGE"):
        raise UnknownLayout(f"{file.path}: an armored age file; only the binary form is read (`age` without -a)")
    if len(start) < 9:
        raise Truncated(f"{file.path}: {len(start)} bytes; the end of the file is missing")
    if start[8:9] != b"{" or int.from_bytes(start[:8], "little") > MAX_JSON:
        raise UnknownLayout(f"{file.path}: neither an age file nor safetensors; not a checkpoint of this project")


def _settings(head: Head, name: str) -> _Settings:
    """The metadata, every field of it checked; and every tensor has a place."""
    _check_schema(head.metadata, name)
    for entry in head.entries:
        if not entry.name.startswith((*WEIGHT_PREFIXES, TRAINING_PREFIX)) and entry.name != FILLER:
            raise UnknownLayout(f"{name}: tensor {entry.name!r} is neither a weight nor of the training state")
    try:
        kind = cast(Kind, head.metadata["kind"])
        model, labeler, categories, provenance = (
            from_json(head.metadata[part], {}) for part in ("model", "labeler", "categories", "provenance")
        )
    except KeyError as error:
        raise Altered(f"{name}: {error} is missing from its settings") from None
    except ValueError as error:
        raise Altered(f"{name}: its settings are damaged: {error}") from None
    if kind not in ("weights", "resume") or not isinstance(categories, list) or not isinstance(provenance, dict):
        raise Altered(f"{name}: its kind, categories or provenance are not what they should be")
    try:
        shape, masks = ModelConfig.from_dict(model), LabelerConfig.from_dict(labeler)
    except (ConfigError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UnknownLayout(
            f"{name}: its model or labeler settings are not known to this version ({error}); it may need a newer one"
        ) from error
    return _Settings(head, kind, shape, masks, categories, provenance, head.metadata.get("training", ""))


def _check_schema(metadata: Mapping[str, str], name: str) -> None:
    schema = metadata.get("schema")
    if schema is None:
        raise UnknownLayout(f"{name}: safetensors without a schema; not a checkpoint of this project")
    if schema != SCHEMA:
        raise UnknownLayout(
            f"{name}: schema {schema!r}; this version reads {SCHEMA!r}. "
            f"It takes {metadata.get('requires', 'the version that wrote it')} or newer"
        )


def _training_state(text: str, tensors: Mapping[str, Tensor], path: Path) -> TrainingState:
    try:
        training = from_json(text, tensors)
    except ValueError as error:
        raise Altered(f"{path}: its training state is damaged: {error}") from None
    if not isinstance(training, dict):
        raise Altered(f"{path}: its training state is no dict")
    return training
