"""Evaluation messages to domain types and back; starts nothing. What they share with labeling stands in `codec`."""

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, replace

from mal.v1 import evaluation_pb2, types_pb2

from mal_server.api.serialization.labeling_messages import (
    CallDefaults,
    Violations,
    check_item_id,
    read_box,
    read_image_source,
    read_instances,
    read_options,
)
from mal_server.config.limits import Limits
from mal_server.errors import InvalidRequest
from mal_server.evaluation.resume_tokens import GroundTruth, ItemFailure
from mal_server.evaluation.run import REFUSED, Evaluation
from mal_server.inference.image_store import Picture
from mal_server.inference.pipeline import LabelRequest, OutputOptions
from mal_server.scheduling.priority import Priority
from mal_train.core.coco.annotations import Annotation, JsonId
from mal_train.core.masks.geometry import Box
from mal_train.core.metrics.coco_ap import AP_NAMES
from mal_train.core.metrics.miou import Figures
from mal_train.core.metrics.report import EvaluationReport
from mal_train.core.settings import SIZE_NAMES
from mal_train.kernel.labeler.labeler import PredictOptions

MAX_WORST = 10_000
MAX_RECORDS_BYTES = 1024 * 1024 * 1024

_AP_FIELDS = dict(
    zip(
        AP_NAMES,
        (
            "ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large",
            "ar_max1", "ar_max10", "ar_max100", "ar_small", "ar_medium", "ar_large",
        ),
        strict=True,
    )
)  # fmt: skip


@dataclass(frozen=True)
class EvaluateOptions:
    """The first message of an evaluation.

    Attributes:
        run: how the network runs.
        answer: how probabilities become masks; they are written in no format.
        priority: who goes first.
        deadline: event-loop time.
        category_names: by id, in the order of the report.
        images_total: as announced; 0 = unknown.
        worst_count: instances to list, lowest IoU first.
        dataset: names of annotations and images on the server; None: images follow.
        want_records: each image's record is sent.
        resume_token: of the evaluation that is to go on; empty = none.
    """

    run: PredictOptions
    answer: OutputOptions
    priority: Priority
    deadline: float
    category_names: Mapping[JsonId, str]
    images_total: int
    worst_count: int
    dataset: tuple[str, str] | None
    want_records: bool
    resume_token: bytes

    def job(
        self, picture: Picture, wh: tuple[int, int] | None, ids: tuple[int, ...], boxes: tuple[Box, ...]
    ) -> LabelRequest:
        """What labels an image of this evaluation."""
        return LabelRequest(picture, wh, ids, boxes, self.run, self.answer, self.priority, self.deadline)


def read_evaluate_options(request: evaluation_pb2.EvaluateRequest, call: CallDefaults) -> EvaluateOptions:
    """The first message; raises RequestRefused when it is none or breaks the contract."""
    checks = Violations()
    if request.WhichOneof("message") != "options":
        checks.add("options", "the first message must hold the options")
    options = request.options
    run, answer, priority = read_options(options.label, call, checks, "options.label")
    if options.images_total < 0:
        checks.add("options.images_total", f"{options.images_total}; it must be 0 (unknown) or more")
    if not 0 <= options.worst_count <= MAX_WORST:
        checks.add("options.worst_count", f"{options.worst_count}; it must lie between 0 and {MAX_WORST}")
    names: dict[JsonId, str] = {c.category_id: c.name or str(c.category_id) for c in options.categories}
    if len(names) != len(options.categories):
        checks.add("options.categories", "a category_id stands twice")
    dataset = None
    if options.HasField("dataset"):
        dataset = (options.dataset.annotations, options.dataset.images)
        if not all(dataset):
            checks.add("options.dataset", "annotations and images are both needed, each FOLDER/PATH")
        if names or options.images_total:
            checks.add("options.dataset", "the data set brings its own categories and images")
    checks.raise_if_any()
    return EvaluateOptions(
        run=run,
        answer=replace(answer, formats=()),
        priority=priority,
        deadline=call.deadline,
        category_names=names,
        images_total=options.images_total,
        worst_count=options.worst_count,
        dataset=dataset,
        want_records=options.want_records,
        resume_token=options.resume_token,
    )


async def read_records(
    requests: AsyncIterator[evaluation_pb2.EvaluateRequest], options: EvaluateOptions, hold: Callable[[int], None]
) -> dict[str, bytes]:
    """The records that a caller brings for images of a data set on the server, by item id.

    Args:
        requests: the messages after the first.
        options: the first one.
        hold: told how many bytes more are held; may raise.

    Raises:
        RequestRefused: a message that holds none, one without a token in the options, or more than fits into memory.
    """
    found: dict[str, bytes] = {}
    size = 0
    async for request in requests:
        if request.WhichOneof("message") != "image" or not request.image.record:
            raise InvalidRequest([("image.record", "with a data set on the server, only records may follow")])
        if not options.resume_token:
            raise InvalidRequest([("options.resume_token", "records were sent, and no token that they belong to")])
        own = len(request.image.record) + len(request.image.item_id)
        hold(own)
        found[request.image.item_id] = request.image.record
        size += own
        if size > MAX_RECORDS_BYTES:
            raise InvalidRequest([("image.record", f"more than {MAX_RECORDS_BYTES} bytes of records")])
    return found


async def read_truths(
    requests: AsyncIterator[evaluation_pb2.EvaluateRequest], options: EvaluateOptions, limits: Limits
) -> AsyncIterator[GroundTruth]:
    """The images of an evaluation, numbered as they come; raises RequestRefused for a message that holds none."""
    place = 0
    async for request in requests:
        if request.WhichOneof("message") != "image":
            raise InvalidRequest([("image", "every message after the first must hold an image")])
        yield read_truth(request.image, place, options, limits)
        place += 1


def read_truth(
    image: evaluation_pb2.EvaluateImage, place: int, options: EvaluateOptions, limits: Limits
) -> GroundTruth:
    """An image with ground truth. What breaks the contract is a fault of this image alone."""
    checks = Violations()
    check_item_id(image.item_id, checks, "image.item_id")
    picture, expected_wh = read_image_source(image.image, checks, "image.image")
    annotations = tuple(_read_annotation(one, place) for one in image.ground_truth)
    # Of two objects with one id the evaluator counts the first, so only that one is labeled.
    wanted: dict[int, types_pb2.Instance] = {}
    for one in image.ground_truth:
        if not one.is_crowd:
            wanted.setdefault(one.instance.instance_id, one.instance)
    ids, boxes = read_instances(list(wanted.values()), limits, checks, "image.ground_truth")
    try:
        checks.raise_if_any()
    except InvalidRequest as error:
        return GroundTruth(image.item_id, annotations, None, ItemFailure(REFUSED, str(error)))
    return GroundTruth(image.item_id, annotations, options.job(picture, expected_wh, ids, boxes), None, image.record)


def write_progress(run: Evaluation, options: EvaluateOptions, record: bytes) -> evaluation_pb2.EvaluateResponse:
    """How far an evaluation is; with the last image's record where they are wanted."""
    return evaluation_pb2.EvaluateResponse(
        progress=evaluation_pb2.EvaluateProgress(
            images_done=len(run.item_ids),
            images_total=options.images_total,
            instances_done=run.instances,
            running_miou=run.running_miou,
            item_id=run.item_ids[-1],
            resume_token=run.records.token if options.want_records else b"",
            record=record,
        )
    )


def write_result(
    report: EvaluationReport, run: Evaluation, options: EvaluateOptions, model: types_pb2.ModelRef
) -> evaluation_pb2.EvaluateResponse:
    """The figures of an evaluation."""
    miou, score = report.miou, report.score
    sizes = {
        name: evaluation_pb2.GroupMiou(instances=miou.count_by_size[name], miou=miou.by_size[name])
        for name in SIZE_NAMES
    }
    return evaluation_pb2.EvaluateResponse(
        result=evaluation_pb2.EvaluateResult(
            images=len(run.item_ids) - run.skipped_images,
            images_skipped=run.skipped_images,
            overall=evaluation_pb2.GroupMiou(instances=miou.count, miou=miou.overall),
            small=sizes["small"],
            medium=sizes["medium"],
            large=sizes["large"],
            class_miou=miou.class_mean,
            share_good=report.share_good,
            empty_ground_truth=report.empty_ground_truth,
            ap_at_one=_write_coco_figures(report.ap_at_1),
            ap_at_score=_write_coco_figures(report.ap_at_score),
            score=evaluation_pb2.ScoreQuality(
                mean_score=score.mean_score,
                bias=score.bias,
                calibration_error=score.calibration_error,
                rank_correlation=score.spearman,
                bad_instances=score.bad_count,
                bad_in_worst_fifth=score.bad_in_worst_fifth,
            ),
            categories=[
                evaluation_pb2.CategoryFigures(
                    category=types_pb2.Category(category_id=_integer(row.category_id), name=row.name),
                    instances=row.count,
                    miou=row.miou,
                    share_good=row.share_good,
                    mean_score=row.mean_score,
                )
                for row in report.categories
            ],
            skipped=[
                evaluation_pb2.SkippedCount(reason=reason, instances=count)
                for reason, count in report.skipped_by_reason.items()
            ],
            worst=[
                evaluation_pb2.InstanceIou(
                    item_id=run.item_ids[_integer(row.image_id)],
                    instance_id=_integer(row.annotation_id),
                    iou=row.iou,
                    score=row.score,
                )
                for row in report.worst_first[: options.worst_count]
            ],
            model=model,
        )
    )


def _read_annotation(one: evaluation_pb2.GroundTruth, place: int) -> Annotation:
    raw: dict[str, object] = {}
    if one.HasField("mask"):
        raw["segmentation"] = {"size": [one.mask.height, one.mask.width], "counts": one.mask.counts}
    instance = one.instance
    return Annotation(instance.instance_id, place, one.category_id, read_box(instance.box), one.is_crowd, raw)


def _write_coco_figures(figures: Figures) -> evaluation_pb2.CocoFigures:
    return evaluation_pb2.CocoFigures(**{_AP_FIELDS[name]: value for name, value in figures.items()})


def _integer(value: JsonId) -> int:
    """An id that this server made or read as an integer."""
    if not isinstance(value, int):
        raise TypeError(f"{value!r} is no integer")
    return value
