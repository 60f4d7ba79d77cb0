"""Labels parts of a COCO file in parquet: reads the rows of a part, labels their boxes, and writes the part's file.

The bytes of a part do not depend on the process that writes it, in float32. A part can therefore be labeled again.
"""

import json
import os
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Final

import torch

from mal_train.core import errors
from mal_train.core.atomic_io import atomic_write
from mal_train.core.coco.annotations import (
    Annotation,
    ImageInfo,
    JsonId,
    read_annotation,
    read_images,
    reject_duplicate_ids,
)
from mal_train.core.coco.output import PROVENANCE_KEY, error_fields, label_fields, labeled_row
from mal_train.core.coco.parquet_parts import Part
from mal_train.core.coco.parquet_reader import ParquetDataset, RowGroupReader
from mal_train.core.coco.parquet_records import ImageRow
from mal_train.core.coco.parquet_schema import Head
from mal_train.core.coco.parquet_writer import PartWriter
from mal_train.core.errors import ConfigError, DeviceLost, MalError
from mal_train.core.images.files import ImageFindings, ImageFolder, NewFindings
from mal_train.core.settings import COCO_RULES, NetworkEngine, RowRules
from mal_train.core.storage.addresses import Location, redact
from mal_train.core.version import distribution_version
from mal_train.kernel.checkpoint import builtin
from mal_train.kernel.checkpoint.keys import parse_key
from mal_train.kernel.checkpoint.trust import TrustPolicy
from mal_train.kernel.labeler.labeler import Labeler
from mal_train.kernel.labeler.load import load_labeler
from mal_train.kernel.labeler.types import Label
from mal_train.kernel.networks.precision import reported
from mal_train.offline.dataset_labeler import DEVICE_FAILED, LabelFailure, Row
from mal_train.offline.tta import TtaOptions, label_images

MAX_MESSAGES: Final = 10


@dataclass(frozen=True)
class PartJob:
    """Settings of the processes that label the parts of a dataset. Each process reads the files by itself.

    Attributes:
        dataset: the COCO file in parquet.
        dataset_sha256: its SHA-256.
        images: images by the file names of the dataset.
        output: folder of the parts.
        journal: journal of the job.
        manifest: first line of the journal, which identifies the job.
        provenance: what makes the masks; stored in each part.
        checkpoint: the checkpoint, or `builtin`.
        checkpoint_sha256: its SHA-256.
        key: where each machine finds the decryption key, file:PATH or env:NAME; None for a plain checkpoint.
        precision: see `Labeler`.
        tta: test-time augmentation and post-processing.
        batch_size: crops in a batch.
        rules: how rows are read.
        network_engine: what runs the network.
        version: version of this package.
    """

    dataset: Location
    dataset_sha256: str
    images: ImageFolder
    output: Path
    journal: Path
    manifest: bytes
    provenance: Mapping[str, Any]
    checkpoint: str
    checkpoint_sha256: str
    key: str | None
    precision: str
    tta: TtaOptions
    batch_size: int
    rules: RowRules = COCO_RULES
    network_engine: NetworkEngine = NetworkEngine.TORCH
    version: str = field(default_factory=distribution_version)

    def check_machine(self) -> None:
        """Raises ConfigError unless this machine has the version and the files of the job."""
        if distribution_version() != self.version:
            raise ConfigError(
                f"mask-auto-labeler {distribution_version()} on a machine of the cluster; the command has "
                f"{self.version}: install the same version on all machines"
            )
        base = self.images.base
        if isinstance(base, Path) and not base.is_dir():
            raise ConfigError(f"{base}: no such folder on a machine of the cluster; {_SHARED}")
        self.check_output()

    def check_precision(self, precision: str) -> None:
        """Raises ConfigError for another number format than that of the provenance, which has one with OpenVINO."""
        expected = self.provenance.get("precision", precision)
        if precision != expected:
            raise ConfigError(
                f"precision {precision} on a machine of the cluster, {expected} on that of the command: int8 differs "
                "between kinds of CPU; use machines of one kind, or precision: float32"
            )

    def check_output(self) -> None:
        """Raises ConfigError unless this machine sees the output folder, and it belongs to this job."""
        try:
            with self.journal.open("rb") as file:
                manifest = file.readline()
        except OSError:
            manifest = b""
        if manifest != self.manifest:
            raise ConfigError(
                f"{self.output}: not the output of this job on a machine of the cluster, or another job has begun "
                f"there; {_SHARED}, and run one job at a time in a folder"
            )


_SHARED: Final = "give a path that all machines share"


@dataclass
class PartResult:
    """Counts of a finished part; the labels are in its file.

    Attributes:
        number: number of the part.
        rows: number of annotations.
        labeled: number of boxes with a mask; an empty mask counts.
        failed: number of boxes without a mask, by reason.
        messages: number of boxes without a mask by message, for up to `MAX_MESSAGES` different messages.
        notes: one sentence per invalid row of `images`.
        crowds: crowd regions, which were copied.
        findings: what the process found about images since its last part.
    """

    number: int
    rows: int = 0
    labeled: int = 0
    failed: dict[str, int] = field(default_factory=Counter)
    messages: dict[str, int] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    crowds: int = 0
    findings: ImageFindings = field(default_factory=lambda: ImageFindings(respelled={}, stretched=[], dropped=[]))

    def add_failure(self, reason: str, message: str) -> None:
        """Counts a box without a mask."""
        self.failed[reason] += 1
        if message in self.messages or len(self.messages) < MAX_MESSAGES:
            self.messages[message] += 1


class PartLabeler:
    """Labels tasks: lists of neighboring parts. Loads the checkpoint with the first task.

    An error is a message rather than an exception, so that the command learns its class and text.

    Args:
        job: settings.
        device: torch device.
        threads: threads that decode images and encode masks; on the CPU also those of a torch operator.
        exit_process: ends the process whose device works again only in a new one.
    """

    def __init__(self, job: PartJob, device: str, threads: int, exit_process: Callable[[int], Any] = os._exit) -> None:
        self._job, self._device, self._threads = job, device, threads
        self._findings = NewFindings(job.images)
        self._exit_process = exit_process
        self._is_device_lost = False
        self._opened: tuple[ParquetDataset, RowGroupReader, Labeler] | None = None

    def __call__(self, batch: Mapping[str, Sequence[str]]) -> Iterator[dict[str, list[str]]]:
        """Yields the message of each part as soon as its file is written, in the column `message`.

        Args:
            batch: tasks in the column `task`, from `encode_task`.
        """
        for task in batch["task"]:
            for message in self._messages([Part(*part) for part in json.loads(task)]):
                yield {"message": [message]}

    def _messages(self, parts: Sequence[Part]) -> Iterator[str]:
        if self._is_device_lost:
            self._exit_process(1)
        try:
            for result in self._label(parts):
                yield json.dumps({"result": vars(result)})
        except MalError as error:
            self._is_device_lost = isinstance(error, DeviceLost)
            yield json.dumps({"error": type(error).__name__, "message": str(error)})
        except Exception:  # a bug: an exception would reach the command as one of Ray, in a trace of Ray's own code
            yield json.dumps({"error": "MalError", "message": traceback.format_exc()})

    def _label(self, parts: Sequence[Part]) -> Iterator[PartResult]:
        dataset, reader, labeler = self._opened = self._opened or self._open()
        rows = reader.rows(dataset.row_groups[parts[0].row_group], parts[0].start)
        for part in parts:
            yield self._label_part(part, list(islice(rows, part.stop - part.start)), dataset.head, labeler)

    def _open(self) -> tuple[ParquetDataset, RowGroupReader, Labeler]:
        job = self._job
        job.check_machine()
        dataset = ParquetDataset(job.dataset)
        if dataset.sha256 != job.dataset_sha256:
            raise ConfigError(f"{job.dataset}: another file on a machine of the cluster, or it changed; {_SHARED}")
        if self._device == "cpu":
            torch.set_num_threads(self._threads)
        labeler, _ = load_labeler(
            builtin.resolve(job.checkpoint),
            key=parse_key(job.key, purpose="decryption", source="environment"),
            device=self._device,
            precision=job.precision,
            network_engine=job.network_engine,
            trust=TrustPolicy((job.checkpoint_sha256,)),
        )
        job.check_precision(reported(labeler.dtype))
        return dataset, RowGroupReader(dataset), labeler

    def _label_part(self, part: Part, rows: Sequence[ImageRow], head: Head, labeler: Labeler) -> PartResult:
        job, result = self._job, PartResult(part.number)
        parsed = [_ParsedRow.of(row, result, job.rules) for row in rows]
        _refuse_repeated_ids(parsed, redact(job.dataset))
        to_label = [row.to_label for row in parsed if row.to_label[1]]
        labels = label_images(labeler, to_label, job.images, job.tta, batch_size=job.batch_size, threads=self._threads)
        fields = {id(annotation): _fields(label, result) for annotation, label in labels}
        result.findings = self._findings.take()
        members = {key: value for key, value in head.members.items() if key != PROVENANCE_KEY}
        members[PROVENANCE_KEY] = dict(job.provenance)
        job.check_output()
        with atomic_write(job.output / part.name) as file, PartWriter(file) as writer:
            for row in parsed:
                writer.add(row.labeled(fields))
            writer.finish(Head(members, head.images, head.annotations))
        return result


def encode_task(parts: Sequence[Part]) -> str:
    """Encodes a task for `PartLabeler`."""
    return json.dumps(parts)


def decode_message(text: str) -> PartResult:
    """Returns the result in a message of `PartLabeler`; raises the error in it.

    Raises:
        MalError: of the class that the process raised.
    """
    message = json.loads(text)
    if "error" in message:
        error: type[MalError] = getattr(errors, message["error"], MalError)
        raise error(message["message"])
    return PartResult(**message["result"])


@dataclass(frozen=True)
class _ParsedRow:
    """Row of the dataset with its parsed image, if there is one, and annotations."""

    row: ImageRow
    images: Mapping[JsonId, ImageInfo]
    annotations: Sequence[Annotation]

    @classmethod
    def of(cls, row: ImageRow, result: PartResult, rules: RowRules) -> "_ParsedRow":
        """Parses a row, and counts its annotations and the invalid ones of them."""
        images = {} if row.index is None else dict(read_images([row.image], result.notes, row.index))
        annotations = [read_annotation(value, at, images, rules) for at, value in row.annotations]
        result.rows += len(annotations)
        for annotation in annotations:
            result.crowds += annotation.problem is None and annotation.iscrowd
            if annotation.problem is not None:
                result.add_failure(str(annotation.reason), annotation.problem)
        return cls(row, images, annotations)

    @property
    def to_label(self) -> Row:
        """The image with its valid boxes; boxes have an image."""
        boxes = [annotation for annotation in self.annotations if annotation.problem is None and not annotation.iscrowd]
        return next(iter(self.images.values()), _NO_IMAGE), boxes

    def labeled(self, fields: Mapping[int, Mapping[str, Any]]) -> ImageRow:
        """Returns the row with the fields of each label, by the identity of its annotation."""
        annotations = [
            (at, labeled_row(value, annotation, self.images, fields.get(id(annotation))))
            for (at, value), annotation in zip(self.row.annotations, self.annotations, strict=True)
        ]
        return ImageRow(self.row.index, self.row.image, annotations)


def _refuse_repeated_ids(rows: Sequence[_ParsedRow], name: str) -> None:
    """Raises BadDataset for an id that is used twice in a part; the command has compared those of all parts."""
    images = [image_id for row in rows for image_id in row.images]
    annotations = [one.id for row in rows for one in row.annotations if one.id is not None]
    for kind, ids in (("image", images), ("annotation", annotations)):
        reject_duplicate_ids([value for value, count in Counter(ids).items() if count > 1], f"{name}: {kind} id")


_NO_IMAGE: Final = ImageInfo(0, "", None, None)


def _fields(label: Label | LabelFailure, result: PartResult) -> dict[str, Any]:
    """Returns the fields of a label or failure, and counts it. Raises DeviceLost for a failure of the device."""
    if isinstance(label, Label):
        result.labeled += 1
        return label_fields(label.rle.to_coco(), label.area, label.score, label.flags, label.agreement)
    if label.reason == DEVICE_FAILED:
        raise DeviceLost(label.message)
    result.add_failure(label.reason, label.message)
    return error_fields(label.reason, label.message)
