"""The sources of an evaluation: a local data set, sent image by image, or a data set on the server, sent by name."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from mal.v1 import evaluation_pb2, types_pb2

from mal_client.dataset.images import JobImages
from mal_client.errors import TOO_MANY_BOXES, ItemError, too_many_boxes
from mal_client.evaluation.checkpoint import EvaluationCheckpoint
from mal_client.evaluation.stream import MAX_SKIPPED, EvaluationSource, IdleTimeout
from mal_client.images.image_files import ImageFiles
from mal_client.images.image_input import EncodedImage
from mal_client.images.large_image import LargeImage
from mal_client.transport.base import Transport
from mal_client.transport.serialization import evaluation_messages
from mal_client.types import LabelOptions, MeasuredInstance, ServerInfo
from mal_train.core.coco.annotations import (
    Annotation,
    CocoFile,
    JsonId,
    Reason,
    by_image,
    id_order,
    row_name,
)
from mal_train.core.coco.fields import has_segmentation
from mal_train.core.coco.ground_truth import NO_SEGMENTATION, read_ground_truth
from mal_train.core.errors import BadGroundTruth, BadImage
from mal_train.core.metrics.report import Skipped
from mal_train.core.settings import COCO_RULES, RowRules
from mal_train.core.storage.read_ahead import ReadAhead

_PART = ".part"
"""Between the index of an image that is sent in several messages and the number of a message."""

_SERVER_NAME = re.compile(rf"image '(\d+)(?:{re.escape(_PART)}\d+)?': (?:image: )?")
"""Begin of a server's message on an image, which it knows by the id of its item."""

_SERVER_ROW = re.compile(r"annotation (\d{1,18}): ")
"""Begin of a server's message on an object, which it knows by its index."""

_Part = tuple[EncodedImage, list[evaluation_pb2.GroundTruth]]
"""An image or a part of one, and objects in it."""


class ServerDataset(EvaluationSource):
    """A data set on the server; its names and ids are the server's.

    Args:
        annotations: FOLDER/PATH of the COCO file.
        images: FOLDER/PATH or FOLDER of its images.
        options: options of labeling.
        worst_count: number of instances to list, lowest IoU first.
        rules: how crowd regions and rotated boxes are read.
    """

    def __init__(
        self, annotations: str, images: str, options: LabelOptions, worst_count: int, rules: RowRules = COCO_RULES
    ) -> None:
        super().__init__()
        self._rules = rules
        self._names = annotations, images
        self._options = options
        self._worst_count = worst_count

    def prepare(self, server: Transport) -> None:
        """Does nothing: the server keeps to its own limits."""

    def requests(
        self, checkpoint: EvaluationCheckpoint, idle_timeout: IdleTimeout
    ) -> Iterator[evaluation_pb2.EvaluateRequest]:
        """Yields the options, then the records of the checkpoint."""
        token = checkpoint.token
        yield evaluation_messages.evaluate_dataset(self._options, self._names, self._worst_count, token, self._rules)
        for item_id, record in checkpoint.items() if token else ():
            idle_timeout.reset()
            yield evaluation_messages.evaluate_record(item_id, record)

    def instance(self, row: evaluation_pb2.InstanceIou) -> MeasuredInstance:
        """Returns a row of the result; the server sends no box."""
        return MeasuredInstance(row.instance_id, row.item_id, row.item_id, (0.0, 0.0, 0.0, 0.0), row.iou, row.score)


class LocalDataset(EvaluationSource):
    """A local COCO file with its images.

    On the wire, images and annotations are named by their index, since ids in the file may be of any JSON type.

    Args:
        coco: the COCO file.
        files: its images.
        options: options of labeling.
        worst_count: number of instances to list, lowest IoU first.
    """

    def __init__(
        self,
        coco: CocoFile,
        files: ImageFiles,
        *,
        options: LabelOptions,
        worst_count: int,
    ) -> None:
        super().__init__()
        self._coco = coco
        self._options = options
        self._worst_count = worst_count
        # In the order of pycocotools: masks of equal scores count in the order in which the server receives them.
        images = sorted(by_image(coco), key=lambda item: id_order(item[0].id))
        self._sent = [(image, rows) for image, rows in images if any(map(_has_ground_truth, rows))]
        # Images without a ground-truth mask are not sent, but their rows count as skipped.
        self._not_sent = [row for _, rows in images if not any(map(_has_ground_truth, rows)) for row in rows]
        self._invalid = [row for row in coco.annotations if row.problem is not None][:MAX_SKIPPED]
        self._image_of = {str(index): image for index, (image, _) in enumerate(self._sent)}
        self._files = files
        self._infos: dict[str, ServerInfo] = {}
        """Description of each server, by its address."""
        self._max_boxes = 1
        self._wire_ids = _wire_ids_of_categories(coco)
        self._category_ids = {wire_id: category_id for category_id, wire_id in self._wire_ids.items()}
        self._row_index = {id(row): index for index, row in enumerate(coco.annotations)}
        self._content_sha256: dict[str, str] = {}
        self._is_federated = any(image.is_federated for image in coco.images.values())
        self.images_total = len(self._sent)

    def prepare(self, server: Transport) -> None:
        """Keeps to the limits of the server, which is asked for them once. Raises ClientError, as `server_info`."""
        if server.address not in self._infos:
            self._infos[server.address] = server.server_info()
        info = self._infos[server.address]
        self._images = JobImages(
            self._files,
            [image for image, _ in self._sent],
            info.limits,
            info.of_model(self._options.model).margin_rate,
            resolve_overlaps=self._options.resolve_overlaps,
        )
        self._max_boxes = max(1, info.limits.max_boxes)

    def notes(self) -> list[str]:
        """Returns a sentence on each way in which images were not used as their names and files say."""
        return self._images.notes()

    def requests(
        self, checkpoint: EvaluationCheckpoint, idle_timeout: IdleTimeout
    ) -> Iterator[evaluation_pb2.EvaluateRequest]:
        """Yields the options, then each image that can be read; an image with a record is sent as its hash."""
        self.skipped = self._coco.problem_counts()
        self.images_skipped = self.items_sent = 0
        self.skipped_rows = [Skipped(row.id, row.image_id, str(row.reason), row.problem or "") for row in self._invalid]
        for row in self._not_sent:
            if row.problem is None:
                self._skip(row, _reason_without_mask(row), NO_SEGMENTATION)
        yield evaluation_messages.evaluate_options(
            self._options,
            self._categories(),
            self.images_total,
            self._worst_count,
            checkpoint.token,
            is_federated=self._is_federated,
        )
        # No window here: the server stops reading at its own limit, and gRPC then stops asking for requests.
        try:
            for index, load in self._loaders():
                for request in self._image_requests(checkpoint, index, load):
                    idle_timeout.reset()
                    self.items_sent += 1
                    yield request
                idle_timeout.reset()
        except Exception as error:
            # gRPC would report it as a failed call; the stream raises this exception instead.
            self.failure = error
            raise

    def _loaders(self) -> Iterator[tuple[int, Callable[[], EncodedImage]]]:
        """Yields the index of each image and the function that reads its file; remote images are read ahead."""
        indices = range(len(self._sent))
        if not self._files.is_remote:
            yield from ((index, partial(self._images.stored, index)) for index in indices)
            return
        with ReadAhead(indices, self._images.stored, EncodedImage.size_bytes, str) as ahead:
            yield from ((index, partial(ahead.take, index)) for index in ahead)

    def has_image(self, item_id: str) -> bool:
        """Returns True for the id of an image that is sent, or of a part of it; older servers send no id."""
        return item_id.partition(_PART)[0] in self._image_of or not item_id

    def content_sha256(self, item_id: str) -> str:
        """Returns the SHA-256 of a file that was read for this evaluation."""
        return self._content_sha256.get(item_id, "")

    def message(self, text: str) -> str:
        """Returns a message of the server, with the names of the file in place of an item id or an instance id."""
        row = _SERVER_ROW.match(text)
        if row is not None and int(row[1]) < len(self._coco.annotations):
            return f"{row_name(self._coco.annotations[int(row[1])].id)}: {text[row.end() :]}"
        named = _SERVER_NAME.match(text)
        image = None if named is None else self._image_of.get(named[1])
        return text if named is None or image is None else f"{image.file_name}: {text[named.end() :]}"

    def category_id(self, wire_id: int) -> JsonId:
        """Returns the category id in the file; "" for that of rows without one."""
        category_id: JsonId | None = self._category_ids.get(wire_id, wire_id)
        return "" if category_id is None else category_id

    def instance(self, row: evaluation_pb2.InstanceIou) -> MeasuredInstance:
        """Returns a row of the result with the ids, file name and box of the file."""
        if row.instance_id < 0:
            raise LookupError(row.instance_id)
        annotation = self._coco.annotations[row.instance_id]
        image = self._image_of[row.item_id]
        return MeasuredInstance(
            annotation.id, annotation.image_id, image.file_name, annotation.box_xywh, row.iou, row.score
        )

    def _categories(self) -> list[types_pb2.Category]:
        names, frequencies = self._coco.used_category_names, self._coco.category_frequencies
        return [
            evaluation_messages.category(wire_id, names[key], "" if key is None else frequencies.get(key, ""))
            for key, wire_id in self._wire_ids.items()
        ]

    def _image_requests(
        self, checkpoint: EvaluationCheckpoint, index: int, load: Callable[[], EncodedImage]
    ) -> Iterator[evaluation_pb2.EvaluateRequest]:
        """Yields the request of an image, or several: for many objects, or one for each window of a large image."""
        image, rows = self._sent[index]
        wire_ids = (self._wire_ids.get(key) for key in image.not_exhaustive_category_ids or ())
        not_exhaustive = [wire_id for wire_id in wire_ids if wire_id is not None]
        for part, (encoded, truths) in enumerate(self._parts(index, self._masked(rows), load)):
            name = f"{index}{_PART}{part}" if part else str(index)
            sha256 = self._content_sha256[name] = hashlib.sha256(encoded.content).hexdigest()
            record = checkpoint.get(name, sha256) if checkpoint.token else b""
            yield evaluation_messages.evaluate_image(
                name,
                encoded,
                truths,
                sha256 if record else None,
                record,
                continues=part > 0,
                not_exhaustive=not_exhaustive,
            )

    def _masked(self, rows: list[Annotation]) -> list[Annotation]:
        """Returns the rows with a mask, and skips the others."""
        masked = []
        for row in rows:
            if row.problem is None and has_segmentation(row.raw):
                masked.append(row)
            elif row.problem is None:
                self._skip(row, _reason_without_mask(row), NO_SEGMENTATION)
        return masked

    def _parts(self, index: int, rows: list[Annotation], load: Callable[[], EncodedImage]) -> Iterator[_Part]:
        """Yields an image with its objects, or parts of it with some each; nothing after skipping the rows."""
        try:
            large = self._images.large(index)
            encoded = load() if large is None else None
        except BadImage as error:
            self._skip_image(rows, error.reason, str(error))
            return
        if large is not None:
            yield from self._windows(large, rows)
        elif encoded is not None:
            yield from self._complete(encoded, rows, self._sent[index][0].file_name)

    def _complete(self, encoded: EncodedImage, rows: list[Annotation], file_name: str) -> Iterator[_Part]:
        """Yields a complete image, with as many objects each time as the server takes in one message."""
        # The file may state no size; polygons then need that of the image.
        measured = self._measured(rows, encoded.size_wh())
        if len(measured) > self._max_boxes and self._options.resolve_overlaps:
            message = too_many_boxes(file_name, len(measured), self._max_boxes)
            self._skip_image([row for row, _ in measured], TOO_MANY_BOXES, message)
            return
        for first in range(0, len(measured), self._max_boxes):
            yield encoded, [truth for _, truth in measured[first : first + self._max_boxes]]

    def _windows(self, large: LargeImage, rows: list[Annotation]) -> Iterator[_Part]:
        """Yields the window of each object, then the crowd regions, which need no pixels, with the last of them."""
        measured = self._measured(rows, large.header.size_wh)
        objects = [(row, truth) for row, truth in measured if not row.iscrowd]
        crowds = [truth for row, truth in measured if row.iscrowd]
        last: EncodedImage | None = None
        for index, _, part in large.parts([row.box_xywh for row, _ in objects], self._images.margin_rate):
            row, truth = objects[index]
            if isinstance(part, ItemError):
                self._skip(row, part.reason, part.message)
                continue
            last = part
            yield part, [truth]
        if last is None:
            self.images_skipped += bool(objects)
        else:
            for first in range(0, len(crowds), self._max_boxes):
                yield last, crowds[first : first + self._max_boxes]

    def _measured(
        self, rows: list[Annotation], size_wh: tuple[int, int] | None
    ) -> list[tuple[Annotation, evaluation_pb2.GroundTruth]]:
        """Returns the rows whose mask can be read, with the message of each."""
        return [(row, truth) for row in rows if (truth := self._ground_truth(row, size_wh)) is not None]

    def _ground_truth(self, row: Annotation, size_wh: tuple[int, int] | None) -> evaluation_pb2.GroundTruth | None:
        try:
            rle = read_ground_truth(row.raw, None if size_wh is None else (size_wh[1], size_wh[0]), "mask")
        except BadGroundTruth as error:
            self._skip(row, Reason.CROWD if row.iscrowd else error.reason, str(error))
            return None
        category = self._wire_ids[row.category_id]
        return evaluation_messages.ground_truth(self._row_index[id(row)], row.box_xywh, category, rle, row.iscrowd)

    def _skip_image(self, rows: Iterable[Annotation], reason: str, message: str) -> None:
        self.images_skipped += 1
        for row in rows:
            if not row.iscrowd:
                self._skip(row, reason, message)

    def _skip(self, row: Annotation, reason: str, message: str) -> None:
        self.skipped[str(reason)] += 1
        if reason != Reason.CROWD and len(self.skipped_rows) < MAX_SKIPPED:
            self.skipped_rows.append(Skipped(row.id, row.image_id, str(reason), f"{row_name(row.id)}: {message}"))


def _has_ground_truth(row: Annotation) -> bool:
    return row.problem is None and not row.iscrowd and has_segmentation(row.raw)


def _reason_without_mask(row: Annotation) -> Reason:
    return Reason.CROWD if row.iscrowd else Reason.NO_GROUND_TRUTH


def _wire_ids_of_categories(coco: CocoFile) -> dict[Any, int]:
    """Maps category ids, and None, to ids on the wire: the same ids if all are int64, else numbers from 1."""
    ids = list(coco.used_category_names)
    integers = {value: value for value in ids if isinstance(value, int) and -(2**63) <= value < 2**63}
    return integers if len(integers) == len(ids) else {value: number for number, value in enumerate(ids, start=1)}
