"""Measures the served model on local images with ground truth: the client streams them, the server compares.

The server keeps what it has measured only as long as its stream lives, so a broken stream starts the evaluation anew.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
from mal.v1 import evaluation_pb2, evaluation_pb2_grpc

from mal_client import codec
from mal_client.dataset import OnProgress, image_loader
from mal_client.errors import CallTimedOut, ServerFailed, from_rpc_error, rpc_code, rpc_details
from mal_client.fleet import watchdog
from mal_client.image_files import ImageFiles
from mal_client.types import Evaluation, LabelOptions, MeasuredInstance, Progress, ServerLimits
from mal_train.errors import BadDataset, BadImage
from mal_train.labeling.coco import Annotation, CocoFile, ImageInfo, Reason, by_image, read_coco
from mal_train.labeling.evaluation_report import CategoryRow
from mal_train.labeling.rle import from_segmentation
from mal_train.labeling.score_quality import ScoreQuality
from mal_train.labeling.settings import SIZE_NAMES

if TYPE_CHECKING:
    from mal_client.client import Client

MAX_STARTS = 3
"""How often an evaluation is begun anew after its stream broke."""

RESTART_PAUSE_S = 2.0


def evaluate(
    client: Client,
    coco_json: Path,
    images_dir: Path | str,
    options: LabelOptions,
    *,
    worst_count: int = 100,
    on_progress: OnProgress | None = None,
) -> Evaluation:
    """See `Client.evaluate`."""
    coco = read_coco(coco_json)
    info = client.server_info()
    for start in range(1, MAX_STARTS + 1):
        run = _Run(coco, images_dir, options, worst_count, info.limits)
        pause_s = run.stream(client, on_progress, is_last=start == MAX_STARTS)
        if run.result is not None:
            return run.evaluation(run.result)
        client.pause(pause_s)
    raise ServerFailed(f"{client.address}: ended the evaluation {MAX_STARTS} times without a result; see its log")


class _Run:
    """One pass over the data set. Rows are named by their place in the file, since ids may be of any JSON type."""

    def __init__(
        self, coco: CocoFile, images_dir: Path | str, options: LabelOptions, worst_count: int, limits: ServerLimits
    ) -> None:
        self.result: evaluation_pb2.EvaluateResult | None = None
        self._coco = coco
        self._options = options
        self._worst_count = worst_count
        self._work = [(image, rows) for image, rows in by_image(coco) if any(map(_has_truth, rows))]
        self._images = {str(at): image for at, (image, _) in enumerate(self._work)}
        self._load = image_loader(ImageFiles(images_dir), limits)
        self._category_keys = _category_keys(coco)
        self._category_ids = {key: category_id for category_id, key in self._category_keys.items()}
        self._place = {id(row): at for at, row in enumerate(coco.annotations)}
        self._skipped: Counter[str] = coco.problem_counts()
        self._images_skipped = 0
        self._fault: Exception | None = None

    def stream(self, client: Client, on_progress: OnProgress | None, *, is_last: bool) -> float:
        """Runs one stream; when it brought no result, seconds to wait before another start."""
        silence = _Silence(client.timeout_s)
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
            if is_last or rpc_code(error) is not grpc.StatusCode.UNAVAILABLE:
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
        elif response.HasField("progress") and on_progress is not None:
            progress = response.progress
            on_progress(
                Progress(
                    images_done=progress.images_done + self._images_skipped,
                    images_total=len(self._work),
                    boxes_done=progress.instances_done,
                    boxes_failed=self._skipped.total(),
                    running_miou=progress.running_miou if progress.HasField("running_miou") else None,
                )
            )

    def _requests(self, silence: _Silence) -> Iterator[evaluation_pb2.EvaluateRequest]:
        # No window of our own: the server reads only so many images ahead, and gRPC then stops asking for more.
        names = self._coco.category_names
        categories = {key: names[category_id] for category_id, key in self._category_keys.items()}
        yield codec.evaluate_options(self._options, categories, len(self._work), self._worst_count)
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
            return codec.evaluate_image(item_id, self._load(image), truths)
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

    def _all_skipped(self, result: evaluation_pb2.EvaluateResult) -> dict[str, int]:
        counts = Counter(self._skipped)
        counts.update({row.reason: row.instances for row in result.skipped})
        return dict(counts.most_common())

    def _category(self, row: evaluation_pb2.CategoryFigures) -> CategoryRow:
        key = row.category.category_id
        return CategoryRow(
            category_id=self._category_ids.get(key, key),
            name=row.category.name,
            count=row.instances,
            miou=row.miou,
            share_good=row.share_good,
            mean_score=row.mean_score,
        )

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
