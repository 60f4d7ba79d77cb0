"""What an evaluation measures: a local data set, sent image by image, or one on the server, by its name."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mal.v1 import evaluation_pb2

from mal_client.dataset.run import image_loader
from mal_client.evaluation.checkpoint import EvaluationRecords
from mal_client.evaluation.stream import EvaluationPass, IdleTimeout
from mal_client.images.image_files import ImageFiles
from mal_client.transport.serialization import evaluation_messages
from mal_client.types import LabelOptions, MeasuredInstance, ServerLimits
from mal_train.core.coco.annotations import Annotation, CocoFile, ImageInfo, JsonId, Reason, by_image
from mal_train.core.errors import BadDataset, BadImage
from mal_train.core.masks.rle import from_segmentation


class ServerPass(EvaluationPass):
    """One pass over a data set on the server; names and ids are the server's."""

    def __init__(
        self, annotations: str, images: str, options: LabelOptions, worst_count: int, records: EvaluationRecords
    ) -> None:
        super().__init__(options, worst_count, records)
        self._names = annotations, images

    def _begin(self) -> None:
        """Nothing of an earlier stream is left to put back: the server opens the data set anew."""

    def _requests(self, silence: IdleTimeout) -> Iterator[evaluation_pb2.EvaluateRequest]:
        token = self.records.token
        yield evaluation_messages.evaluate_dataset(self._options, self._names, self._worst_count, token)
        for item_id, record in self.records.items() if token else ():
            silence.heard()
            yield evaluation_messages.evaluate_record(item_id, record)

    def _measured(self, row: evaluation_pb2.InstanceIou) -> MeasuredInstance:
        return MeasuredInstance(row.instance_id, row.item_id, row.item_id, (0.0, 0.0, 0.0, 0.0), row.iou, row.score)


class LocalPass(EvaluationPass):
    """One pass over a local data set. Rows are named by their place in the file, since ids may be of any JSON type."""

    def __init__(
        self,
        coco: CocoFile,
        images_dir: Path | str,
        *,
        options: LabelOptions,
        worst_count: int,
        limits: ServerLimits,
        records: EvaluationRecords,
    ) -> None:
        super().__init__(options, worst_count, records)
        self._coco = coco
        pictures = list(by_image(coco))
        self._work = [(image, rows) for image, rows in pictures if any(map(_has_truth, rows))]
        # Images without a true mask are not sent, and their rows are missed by the figures all the same.
        self._not_sent = Counter(
            str(Reason.CROWD if row.iscrowd else Reason.NO_GROUND_TRUTH)
            for _, rows in pictures
            if not any(map(_has_truth, rows))
            for row in rows
            if row.problem is None
        )
        self._images = {str(at): image for at, (image, _) in enumerate(self._work)}
        self._load = image_loader(ImageFiles(images_dir), limits)
        self._category_keys = _category_keys(coco)
        self._category_ids = {key: category_id for category_id, key in self._category_keys.items()}
        self._place = {id(row): at for at, row in enumerate(coco.annotations)}
        self._images_total = len(self._work)

    def _begin(self) -> None:
        self._skipped = self._coco.problem_counts() + self._not_sent
        self._images_skipped = 0

    def _requests(self, silence: IdleTimeout) -> Iterator[evaluation_pb2.EvaluateRequest]:
        # No window of our own: the server reads only so many images ahead, and gRPC then stops asking for more.
        names = self._coco.category_names
        categories = {key: names[category_id] for category_id, key in self._category_keys.items()}
        token = self.records.token
        yield evaluation_messages.evaluate_options(self._options, categories, len(self._work), self._worst_count, token)
        try:
            for item_id, (image, rows) in zip(self._images, self._work, strict=True):
                request = self._image_request(item_id, image, rows)
                silence.heard()
                if request is not None:
                    yield request
        except Exception as fault:
            # gRPC would report it as a failure of the server; the caller's thread raises it as what it is.
            self._fault = fault
            raise

    def _image_request(
        self, item_id: str, image: ImageInfo, rows: list[Annotation]
    ) -> evaluation_pb2.EvaluateRequest | None:
        truths = [truth for row in rows if row.problem is None and (truth := self._truth(row, image)) is not None]
        if not truths:
            return None
        try:
            picture = self._load(image)
            sha256 = self._contents[item_id] = hashlib.sha256(picture.content).hexdigest()
            record = self.records.get(item_id, sha256) if self.records.token else b""
            return evaluation_messages.evaluate_image(item_id, picture, truths, sha256 if record else None, record)
        except BadImage as error:
            self._images_skipped += 1
            self._skipped[error.reason] += sum(not truth.is_crowd for truth in truths)
            return None

    def _truth(self, row: Annotation, image: ImageInfo) -> evaluation_pb2.GroundTruth | None:
        if not row.raw.get("segmentation"):
            self._skipped[str(Reason.CROWD if row.iscrowd else Reason.NO_GROUND_TRUTH)] += 1
            return None
        try:
            width, height = image.size_wh or _frame_of(row)
            rle = from_segmentation(row.raw["segmentation"], height, width, f"annotation {row.id!r}")
        except BadDataset:
            self._skipped[str(Reason.BAD_GROUND_TRUTH)] += 1
            return None
        category = self._category_keys[row.category_id]
        return evaluation_messages.ground_truth(self._place[id(row)], row.box_xywh, category, rle, row.iscrowd)

    def _category_id(self, key: int) -> JsonId:
        found: JsonId = self._category_ids.get(key, key)
        return found

    def _measured(self, row: evaluation_pb2.InstanceIou) -> MeasuredInstance:
        annotation = self._coco.annotations[row.instance_id]
        image = self._images[row.item_id]
        return MeasuredInstance(
            annotation.id, annotation.image_id, image.file_name, annotation.box_xywh, row.iou, row.score
        )


def _has_truth(row: Annotation) -> bool:
    return row.problem is None and not row.iscrowd and bool(row.raw.get("segmentation"))


def _frame_of(row: Annotation) -> tuple[int, int]:
    """(width, height) that a run-length code states, for files that leave an image's size out."""
    segmentation = row.raw["segmentation"]
    size = segmentation.get("size") if isinstance(segmentation, dict) else None
    if not isinstance(size, list) or len(size) != 2:
        raise BadDataset(f"annotation {row.id!r}: polygons need the width and height of their image")
    return size[1], size[0]


def _category_keys(coco: CocoFile) -> dict[Any, int]:
    """Category ids on the wire: the file's own when all are int64, else their places from 1."""
    ids = list(coco.category_names)
    if all(isinstance(value, int) and -(2**63) <= value < 2**63 for value in ids):
        return {value: int(value) for value in ids}
    return {value: place for place, value in enumerate(ids, start=1)}
