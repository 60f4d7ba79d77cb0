"""Measures a served model on images with ground truth: the client streams them, or names a data set on the server.

The server keeps nothing of an evaluation whose stream broke; it seals what it measured on each image and gives it to
this side, which brings it back in the next stream (`EvaluationRecords`).
"""

from __future__ import annotations

import hashlib
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc
from mal.v1 import evaluation_pb2, evaluation_pb2_grpc

from mal_client import codec
from mal_client.dataset import OnProgress, image_loader
from mal_client.errors import CallTimedOut, ServerFailed, from_rpc_error, is_broken_off, rpc_details
from mal_client.evaluation_records import EvaluationRecords
from mal_client.fleet import watchdog
from mal_client.image_files import ImageFiles
from mal_client.link import Link
from mal_client.types import Evaluation, LabelOptions, MeasuredInstance, Progress, ServerLimits
from mal_train.errors import BadDataset, BadImage
from mal_train.labeling.coco import Annotation, CocoFile, ImageInfo, JsonId, Reason, by_image, read_coco
from mal_train.labeling.evaluation_report import CategoryRow
from mal_train.labeling.rle import from_segmentation
from mal_train.labeling.score_quality import ScoreQuality
from mal_train.labeling.settings import SIZE_NAMES

MAX_STARTS = 5
"""How many streams without a new image there may be before the evaluation is given up."""

STALE = "RESUME_TOKEN_STALE"

RESTART_PAUSE_S = 2.0


def evaluate(
    client: Link,
    coco_json: Path,
    images_dir: Path | str,
    options: LabelOptions,
    *,
    worst_count: int = 100,
    on_progress: OnProgress | None = None,
    resume: Path | None = None,
) -> Evaluation:
    """See `Client.evaluate`."""
    coco = read_coco(coco_json)
    limits = client.server_info().limits
    sha256 = hashlib.sha256(coco_json.read_bytes()).hexdigest()
    job = {"annotations_sha256": sha256, "images": str(images_dir), "options": repr(options)}
    with closing(EvaluationRecords(resume, job)) as records:
        run = _Run(coco, images_dir, options=options, worst_count=worst_count, limits=limits, records=records)
        return _finished(client, run, on_progress)


def evaluate_on_server(
    client: Link,
    annotations: str,
    images: str,
    options: LabelOptions,
    *,
    worst_count: int = 100,
    on_progress: OnProgress | None = None,
    resume: Path | None = None,
) -> Evaluation:
    """See `Client.evaluate_on_server`."""
    job = {"on_server": [annotations, images], "options": repr(options)}
    with closing(EvaluationRecords(resume, job)) as records:
        return _finished(client, _ServerRun(annotations, images, options, worst_count, records), on_progress)


def _finished(client: Link, run: _Pass, on_progress: OnProgress | None) -> Evaluation:
    """Streams until there is a result; what earlier streams measured is brought back in the next one."""
    tries = 0
    while True:
        before = len(run.records)
        tries += 1
        pause_s = run.stream(client, on_progress, is_last=tries >= MAX_STARTS)
        if run.result is not None:
            found = run.evaluation(run.result)
            run.records.clear()
            return found
        if len(run.records) > before:
            tries = 0
        if tries >= MAX_STARTS:
            raise ServerFailed(f"{client.address}: ended the evaluation {tries} times without a result; see its log")
        client.pause(pause_s)


class _Pass(ABC):
    """What local data sets and those on the server share: the stream, what comes back, and the records."""

    def __init__(self, options: LabelOptions, worst_count: int, records: EvaluationRecords) -> None:
        self.result: evaluation_pb2.EvaluateResult | None = None
        self.records = records
        self._options = options
        self._worst_count = worst_count
        self._images_total = 0
        self._contents: dict[str, str] = {}
        """SHA-256 of each image's file that this side read."""
        self._skipped: Counter[str] = Counter()
        self._images_skipped = 0
        self._fault: Exception | None = None

    def stream(self, client: Link, on_progress: OnProgress | None, *, is_last: bool) -> float:
        """Runs one stream; when it brought no result, seconds to wait before another start."""
        silence = _Silence(client.timeout_s)
        self._begin()
        stub = evaluation_pb2_grpc.EvaluationServiceStub(client.open_channel())
        stream = stub.Evaluate(self._requests(silence))
        try:
            with watchdog(silence.is_over, stream.cancel):
                for response in stream:
                    silence.heard()
                    self._take(response, on_progress)
        except grpc.RpcError as error:
            if self._fault is not None:
                raise self._fault from None
            if silence.is_over():
                raise CallTimedOut(
                    f"{client.address}: no sign of the evaluation for {client.timeout_s:g} s; look whether the server "
                    "is alive, or allow more time"
                ) from error
            if rpc_details(error).reason == STALE and self.records.token:
                self.records.clear()
                return 0.0
            if is_last or not is_broken_off(error):
                raise from_rpc_error(client.address, error, None) from error
            return rpc_details(error).retry_after_s or RESTART_PAUSE_S
        finally:
            stream.cancel()  # type: ignore[no-untyped-call]
        return RESTART_PAUSE_S

    def evaluation(self, result: evaluation_pb2.EvaluateResult) -> Evaluation:
        """The server's figures, with the ids of the file and with what this side could not send."""
        return Evaluation(
            images=result.images,
            images_skipped=result.images_skipped + self._images_skipped,
            overall=codec.group_miou(result.overall),
            by_size={name: codec.group_miou(getattr(result, name)) for name in SIZE_NAMES},
            class_miou=result.class_miou if result.HasField("class_miou") else None,
            share_good=result.share_good if result.HasField("share_good") else None,
            empty_ground_truth=result.empty_ground_truth,
            ap_at_1=codec.coco_figures(result.ap_at_one),
            ap_at_score=codec.coco_figures(result.ap_at_score),
            score=_score_quality(result.score),
            categories=tuple(map(self._category, result.categories)),
            skipped=self._all_skipped(result),
            worst=tuple(map(self._measured, result.worst)),
            model=codec.model_ref(result.model),
        )

    def _take(self, response: evaluation_pb2.EvaluateResponse, on_progress: OnProgress | None) -> None:
        if response.HasField("result"):
            self.result = response.result
            return
        progress = response.progress
        self.records.add(
            progress.resume_token, progress.item_id, progress.record, self._contents.get(progress.item_id, "")
        )
        if on_progress is not None:
            on_progress(
                Progress(
                    images_done=progress.images_done + self._images_skipped,
                    images_total=self._images_total or progress.images_total,
                    boxes_done=progress.instances_done,
                    boxes_failed=self._skipped.total(),
                    running_miou=progress.running_miou if progress.HasField("running_miou") else None,
                )
            )

    @abstractmethod
    def _begin(self) -> None:
        """Before each stream."""

    @abstractmethod
    def _requests(self, silence: _Silence) -> Iterator[evaluation_pb2.EvaluateRequest]:
        """What is sent on one stream, from its first message on."""

    def _all_skipped(self, result: evaluation_pb2.EvaluateResult) -> dict[str, int]:
        counts = Counter(self._skipped)
        counts.update({row.reason: row.instances for row in result.skipped})
        return dict(counts.most_common())

    def _category(self, row: evaluation_pb2.CategoryFigures) -> CategoryRow:
        return CategoryRow(
            category_id=self._category_id(row.category.category_id),
            name=row.category.name,
            count=row.instances,
            miou=row.miou,
            share_good=row.share_good,
            mean_score=row.mean_score,
        )

    def _category_id(self, key: int) -> JsonId:
        return key

    @abstractmethod
    def _measured(self, row: evaluation_pb2.InstanceIou) -> MeasuredInstance:
        """A row of the result under the data set's own names."""


class _ServerRun(_Pass):
    """One pass over a data set on the server; names and ids are the server's."""

    def __init__(
        self, annotations: str, images: str, options: LabelOptions, worst_count: int, records: EvaluationRecords
    ) -> None:
        super().__init__(options, worst_count, records)
        self._names = annotations, images

    def _begin(self) -> None:
        """Nothing of an earlier stream is left to put back: the server opens the data set anew."""

    def _requests(self, silence: _Silence) -> Iterator[evaluation_pb2.EvaluateRequest]:
        token = self.records.token
        yield codec.evaluate_dataset(self._options, self._names, self._worst_count, token)
        for item_id, record in self.records.items() if token else ():
            silence.heard()
            yield codec.evaluate_record(item_id, record)

    def _measured(self, row: evaluation_pb2.InstanceIou) -> MeasuredInstance:
        return MeasuredInstance(row.instance_id, row.item_id, row.item_id, (0.0, 0.0, 0.0, 0.0), row.iou, row.score)


class _Run(_Pass):
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
        self._work = [(image, rows) for image, rows in by_image(coco) if any(map(_has_truth, rows))]
        self._images = {str(at): image for at, (image, _) in enumerate(self._work)}
        self._load = image_loader(ImageFiles(images_dir), limits)
        self._category_keys = _category_keys(coco)
        self._category_ids = {key: category_id for category_id, key in self._category_keys.items()}
        self._place = {id(row): at for at, row in enumerate(coco.annotations)}
        self._images_total = len(self._work)

    def _begin(self) -> None:
        self._skipped = self._coco.problem_counts()
        self._images_skipped = 0

    def _requests(self, silence: _Silence) -> Iterator[evaluation_pb2.EvaluateRequest]:
        # No window of our own: the server reads only so many images ahead, and gRPC then stops asking for more.
        names = self._coco.category_names
        categories = {key: names[category_id] for category_id, key in self._category_keys.items()}
        token = self.records.token
        yield codec.evaluate_options(self._options, categories, len(self._work), self._worst_count, token)
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
            return codec.evaluate_image(item_id, picture, truths, sha256 if record else None, record)
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
        return codec.ground_truth(self._place[id(row)], row.box_xywh, category, rle, row.iscrowd)

    def _category_id(self, key: int) -> JsonId:
        found: JsonId = self._category_ids.get(key, key)
        return found

    def _measured(self, row: evaluation_pb2.InstanceIou) -> MeasuredInstance:
        annotation = self._coco.annotations[row.instance_id]
        image = self._images[row.item_id]
        return MeasuredInstance(
            annotation.id, annotation.image_id, image.file_name, annotation.box_xywh, row.iou, row.score
        )


def _score_quality(score: evaluation_pb2.ScoreQuality) -> ScoreQuality:
    return ScoreQuality(
        mean_score=score.mean_score if score.HasField("mean_score") else None,
        bias=score.bias if score.HasField("bias") else None,
        calibration_error=score.calibration_error if score.HasField("calibration_error") else None,
        spearman=score.rank_correlation if score.HasField("rank_correlation") else None,
        bad_count=score.bad_instances,
        bad_in_worst_fifth=score.bad_in_worst_fifth if score.HasField("bad_in_worst_fifth") else None,
    )


class _Silence:
    """How long nothing has moved in either direction."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._since = time.monotonic()

    def heard(self) -> None:
        """Something moved."""
        self._since = time.monotonic()

    def is_over(self) -> bool:
        """It lasts too long."""
        return time.monotonic() - self._since > self._limit_s


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
