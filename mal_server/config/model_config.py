"""Settings of models and folders, and the `ModelPlan` that the loader receives. Reads no file."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import Field

from mal_train.core.settings import Branch, NetworkEngine, Precision
from mal_train.core.yaml_config import Sha256, Strict
from mal_train.kernel.checkpoint.trust import NO_POLICY, TrustPolicy

MAX_NAME_CHARS = 64
NAME = r"^[\w.@-]+$"
"""Names that are safe in logs and metric labels. They include `..`, so no path is made of one."""

NAME_RULE = f"a name has 1 to {MAX_NAME_CHARS} letters, digits and characters of '._@-'"

ModelName = Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS, pattern=NAME)]
GpuIds = tuple[Annotated[int, Field(ge=0, le=1023)], ...]


def is_name(text: str) -> bool:
    """Returns True for a valid model name, see `NAME_RULE`.

    >>> is_name("cats-2"), is_name("two words")
    (True, False)
    """
    return len(text) <= MAX_NAME_CHARS and re.fullmatch(NAME[1:-1], text) is not None


def name_from(checkpoint: Path) -> str:
    """Returns the default name of a model: the file name without suffix, "-" for each run of invalid characters.

    >>> name_from(Path("results/my model (2).malckpt"))
    'my-model-2'
    """
    return re.sub(r"[^\w.@]+", "-", checkpoint.stem).strip("-")[:MAX_NAME_CHARS] or "model"


class ModelSetting(Strict):
    """One of several models. Fields left null inherit the server-wide setting of the same name."""

    name: ModelName
    checkpoint: Path
    checkpoint_sha256: Sha256 | None = None
    decryption_key: str | None = Field(default=None, repr=False)
    branch: Branch | None = None
    network_engine: NetworkEngine | None = None
    precision: Precision | None = None
    gpu_ids: GpuIds | None = None
    cpu_workers: int | None = Field(default=None, ge=1, le=256)


class ModelFolder(Strict):
    """A folder whose checkpoints may be loaded while the server runs, the key that opens them, and which of them."""

    name: ModelName
    path: Path
    checkpoint_sha256: tuple[Sha256, ...] = Field(default=(), max_length=10_000)
    decryption_key: str | None = Field(default=None, repr=False)


class DataFolder(Strict):
    """A folder whose files requests may refer to."""

    name: ModelName
    path: Path


@dataclass(frozen=True)
class ModelPlan:
    """Everything needed to load one model.

    Attributes:
        name: name in requests and responses.
        checkpoint: path of the file.
        decryption_key: as in the settings; None: not encrypted.
        branch: used for requests that name none.
        precision: number format of the network, or auto.
        gpu_ids: one worker for each; (): CPU.
        cpu_workers: number of workers on the CPU.
        max_batch_size: crops in one device batch; the warm-up runs batches up to this size.
        trust: SHA-256 or signers that the file must have.
        network_engine: what runs the network.
    """

    name: str
    checkpoint: Path
    decryption_key: str | None = field(repr=False)
    branch: Branch
    precision: Precision
    gpu_ids: tuple[int, ...]
    cpu_workers: int
    max_batch_size: int
    trust: TrustPolicy = NO_POLICY
    network_engine: NetworkEngine = NetworkEngine.TORCH
