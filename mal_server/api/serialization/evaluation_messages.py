"""Converts evaluation messages to domain types and back, and validates them. Pure functions, no calls.

Functions shared with labeling are in `labeling_messages`.
"""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from mal.v1 import evaluation_pb2, types_pb2

from mal_server.api.serialization.labeling_messages import (
    CallDefaults,
    Violations,
    check_item_id,
    read_box,
    read_image_source,
    read_instances,
    read_options,
    read_region,
)
from mal_server.config.limits import MAX_CATEGORIES, MAX_CATEGORY_CHARS, Limits
from mal_server.errors import FolderDenied, InvalidRequest
from mal_server.evaluation.resume_tokens import GroundTruth, ItemFailure
from mal_server.evaluation.run import (
    REQUEST_REFUSED,
    EvaluationRun,
    UnreadImage,
    refused_image,
)
from mal_server.inference.image_store import ImageSource
from mal_server.inference.requests import LabelRequest, OutputOptions
from mal_server.scheduling.priority import Priority
from mal_server.security.caller import Caller
from mal_train.core.coco.annotations import Annotation, JsonId
from mal_train.core.coco.left_out import LeftOut
from mal_train.core.images.container import ImageRegion
from mal_train.core.masks.geometry import Box
from mal_train.core.metrics.average_precision import AP_NAMES, LVIS_NAMES
from mal_train.core.metrics.lvis import Federation
from mal_train.core.metrics.miou import CocoMetrics, GroupMiou
from mal_train.core.metrics.report import CategoryRow, EvaluationReport
from mal_train.core.metrics.score_quality import ScoreQuality
from mal_train.core.settings import RotatedBoxes, RowRules
from mal_train.core.size_class import SIZE_NAMES
from mal_train.kernel.labeler.types import PredictOptions

MAX_WORST = 10_000
MAX_RECORDS_BYTES = 1024 * 1024 * 1024

MAX_MESSAGE = 500
"""Characters of the message of an object that was not measured."""

MEMORY_OF_A_RECORD = 400
"""Bytes of a record beside itself and the name of its image."""

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


_LVIS_FIELDS = dict(
    zip(
        LVIS_NAMES,
        (
            "ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ap_rare", "ap_common", "ap_frequent",
            "ar", "ar_small", "ar_medium", "ar_large",
        ),
        strict=True,
    )
)  # fmt: skip


@dataclass(frozen=True)
class EvaluateOptions:
    """The options of an evaluation, from the first message of its stream.

    Attributes:
        predict: options of the network.
        output: options by which probabilities become masks; `formats` is empty.
        priority: priority of its crops.
        caller: who calls.
        deadline: deadline of the call, in event-loop time.
        category_names: names by id, in the order of the report.
        images_total: number of images, as announced; 0 = unknown.
        worst_count: number of instances to list, lowest IoU first.
        dataset: (annotations, images) of a data set on the server; None: the stream has the images.
        rules: how the rows of that data set are read.
        federation: for LVIS's metrics; None: the ground truth is not federated.
        want_records: send the record of each image with its progress.
        resume_token: token of the evaluation to resume; empty = none.
        left_out: rows of a data set on the server that belong to no image.
    """

    predict: PredictOptions
    output: OutputOptions
    priority: Priority
    caller: Caller
    deadline: float
    category_names: Mapping[JsonId, str]
    images_total: int
    worst_count: int
    dataset: tuple[str, str] | None
    rules: RowRules
    federation: Federation | None
    want_records: bool
    resume_token: bytes
    left_out: LeftOut = field(default_factory=LeftOut)

    def label_request(
        self,
        image: ImageSource,
        expected_wh: tuple[int, int] | None,
        ids: tuple[int, ...],
        boxes: tuple[Box, ...],
        region: ImageRegion | None = None,
    ) -> LabelRequest:
        """Returns the request that labels one image of the evaluation, or a part of one."""
        return LabelRequest(
            image,
            expected_wh,
            ids,
            boxes,
            self.predict,
            self.output,
            self.priority,
            self.caller.name,
            self.deadline,
            region,
        )


def read_evaluate_options(request: evaluation_pb2.EvaluateRequest, defaults: CallDefaults) -> EvaluateOptions:
    """Decodes and validates the first message of an evaluation.

    Raises:
        InvalidRequest: the message has no options, or fields that break the contract.
        FolderDenied: a data set in a folder that the caller may not name.
    """
    violations = Violations()
    if request.WhichOneof("message") != "options":
        violations.add("options", "the first message must have the options")
    options = request.options
    predict, output, priority = read_options(options.label, defaults, violations, "options.label")
    if options.images_total < 0:
        violations.add("options.images_total", f"{options.images_total}; it must be 0 (unknown) or more")
    if not 0 <= options.worst_count <= MAX_WORST:
        violations.add("options.worst_count", f"{options.worst_count}; it must lie between 0 and {MAX_WORST}")
    names = _read_categories(options.categories, violations)
    dataset = None
    if options.HasField("dataset"):
        dataset = (options.dataset.annotations, options.dataset.images)
        if not all(dataset):
            violations.add("options.dataset", "annotations and images are both required, each as FOLDER/PATH")
        if names or options.images_total or options.is_federated:
            problem = "leave categories, images_total and is_federated unset: the data set defines them"
            violations.add("options.dataset", problem)
        for name in dataset:
            defaults.caller.check_folder(name.partition("/")[0])
    violations.raise_if_any()
    return EvaluateOptions(
        predict=predict,
        output=replace(output, formats=()),
        priority=priority,
        caller=defaults.caller,
        deadline=defaults.deadline,
        category_names=names,
        images_total=options.images_total,
        worst_count=options.worst_count,
        dataset=dataset,
        rules=RowRules(
            options.dataset.crowd_as_objects,
            RotatedBoxes.UPRIGHT if options.dataset.upright_boxes else RotatedBoxes.REFUSE,
        ),
        federation=Federation(_frequencies(options.categories)) if options.is_federated else None,
        want_records=options.want_records,
        resume_token=options.resume_token,
    )


async def read_records(
    requests: AsyncIterator[evaluation_pb2.EvaluateRequest], options: EvaluateOptions, reserve: Callable[[int], None]
) -> dict[str, bytes]:
    """Reads the records of images of a data set on the server, by item id.

    Args:
        requests: the messages after the first.
        options: those of the first message.
        reserve: receives the number of additional bytes held; may raise.

    Raises:
        InvalidRequest: a message without a record, no token in the options, or more than MAX_RECORDS_BYTES.
    """
    records: dict[str, bytes] = {}
    total = 0
    async for request in requests:
        if request.WhichOneof("message") != "image" or not request.image.record:
            raise InvalidRequest([("image.record", "missing; with options.dataset, send only records")])
        if not options.resume_token:
            raise InvalidRequest([("options.resume_token", "missing; records need the token of their evaluation")])
        size = len(request.image.record) + len(request.image.item_id)
        reserve(size + MEMORY_OF_A_RECORD)
        records[request.image.item_id] = request.image.record
        total += size
        if total > MAX_RECORDS_BYTES:
            raise InvalidRequest([("image.record", f"records take more than {MAX_RECORDS_BYTES} bytes")])
    return records


async def read_images(
    requests: AsyncIterator[evaluation_pb2.EvaluateRequest], options: EvaluateOptions, limits: Limits
) -> AsyncIterator[UnreadImage]:
    """Yields the images of an evaluation, numbered in order of arrival, with their objects counted but not read.

    Raises:
        InvalidRequest: a message without an image, or further objects of none.
    """
    index = -1
    async for request in requests:
        if request.WhichOneof("message") != "image":
            raise InvalidRequest([("image", "every message after the first must have an image")])
        image, objects = request.image, len(request.image.ground_truth)
        index += not image.continues
        if index < 0:
            raise InvalidRequest([("image.continues", "set in the first message, which has no image before it")])
        if objects > limits.max_boxes:
            rule = f"max_boxes is {limits.max_boxes}; send further objects in messages with `continues`"
            yield refused_image(image.item_id, objects, rule)
        else:
            read = partial(read_ground_truth, image, index, options, limits)
            yield UnreadImage(image.item_id, objects, request.ByteSize(), read)


def read_ground_truth(
    image: evaluation_pb2.EvaluateImage, index: int, options: EvaluateOptions, limits: Limits
) -> GroundTruth:
    """Decodes an image with ground truth. With fields that break the contract, this image alone fails."""
    violations = Violations()
    check_item_id(image.item_id, violations, "image.item_id")
    judged = len(image.not_exhaustive_category_ids)
    if judged > MAX_CATEGORIES:
        violations.add("image.not_exhaustive_category_ids", f"{judged} categories; at most {MAX_CATEGORIES}")
    if image.continues and options.output.resolve_overlaps:
        violations.add("image.continues", "resolve_overlaps needs all objects of an image in one message")
    annotations = tuple(_read_annotation(one, index) for one in image.ground_truth)
    # The evaluator counts the first of several objects with one id, so only that one is labeled.
    instances: dict[int, types_pb2.Instance] = {}
    for one in image.ground_truth:
        if not one.is_crowd:
            instances.setdefault(one.instance.instance_id, one.instance)
    ids, boxes = read_instances(list(instances.values()), limits, violations, "image.ground_truth")
    for number, one in enumerate(image.ground_truth):
        if one.instance.points:
            violations.add(
                f"image.ground_truth[{number}].instance.points", "set; an evaluation compares masks of boxes"
            )
    try:
        source, expected_wh = read_image_source(image.image, options.caller, violations, "image.image")
        region = read_region(image.image, violations, "image.image", resolves_overlaps=options.output.resolve_overlaps)
        violations.raise_if_any()
    except (InvalidRequest, FolderDenied) as error:
        failure = ItemFailure(REQUEST_REFUSED, str(error))
        return GroundTruth(image.item_id, annotations, None, failure, continues=image.continues)
    request = options.label_request(source, expected_wh, ids, boxes, region)
    return GroundTruth(
        image.item_id,
        annotations,
        request,
        None,
        image.record,
        continues=image.continues,
        not_exhaustive=frozenset(image.not_exhaustive_category_ids),
    )


def write_progress(run: EvaluationRun, options: EvaluateOptions, record: bytes) -> evaluation_pb2.EvaluateResponse:
    """Builds the progress message after the latest image, with the record of that image if it has one."""
    return evaluation_pb2.EvaluateResponse(
        progress=evaluation_pb2.EvaluateProgress(
            images_done=run.images,
            images_total=options.images_total,
            instances_done=run.instances,
            running_miou=run.running_miou,
            item_id=run.item_ids[-1],
            resume_token=run.tokens.token if options.want_records else b"",
            record=record,
        )
    )


def write_result(
    report: EvaluationReport, run: EvaluationRun, options: EvaluateOptions, model: types_pb2.ModelRef
) -> evaluation_pb2.EvaluateResponse:
    """Builds the last message of an evaluation, with its metrics."""
    groups = {name: _write_group(report.by_size[name]) for name in SIZE_NAMES}
    messages = run.messages()
    return evaluation_pb2.EvaluateResponse(
        result=evaluation_pb2.EvaluateResult(
            images=run.images - run.skipped_images,
            images_skipped=run.skipped_images,
            overall=_write_group(report.overall),
            small=groups["small"],
            medium=groups["medium"],
            large=groups["large"],
            class_miou=report.class_miou,
            share_good=report.share_good,
            empty_ground_truth=report.empty_ground_truth,
            ap_at_one=write_coco_metrics(report.ap_at_1),
            ap_at_score=write_coco_metrics(report.ap_at_score),
            lvis_at_one=_write_lvis_metrics(report.lvis_at_1),
            lvis_at_score=_write_lvis_metrics(report.lvis_at_score),
            score=_write_score_quality(report.score),
            categories=[_write_category(row) for row in report.categories],
            skipped=[
                evaluation_pb2.SkippedCount(
                    reason=reason, instances=count, message=messages.get(reason, "")[:MAX_MESSAGE]
                )
                for reason, count in run.skipped(report).items()
            ],
            worst=[
                evaluation_pb2.InstanceIou(
                    item_id=run.name_of(row.image_id),
                    instance_id=_integer(row.annotation_id),
                    iou=row.iou,
                    score=row.score,
                )
                for row in report.worst[: options.worst_count]
            ],
            model=model,
        )
    )


def write_coco_metrics(metrics: CocoMetrics) -> evaluation_pb2.CocoFigures:
    """Builds the message of COCO's metrics; None stays unset."""
    return evaluation_pb2.CocoFigures(**{_AP_FIELDS[name]: value for name, value in metrics.items()})


def _write_lvis_metrics(metrics: CocoMetrics) -> evaluation_pb2.LvisFigures | None:
    """Builds the message of LVIS's metrics; None without any."""
    if not metrics:
        return None
    return evaluation_pb2.LvisFigures(**{_LVIS_FIELDS[name]: value for name, value in metrics.items()})


def _frequencies(categories: Sequence[types_pb2.Category]) -> dict[JsonId, str]:
    return {one.category_id: one.frequency for one in categories if one.frequency}


def _read_categories(categories: Sequence[types_pb2.Category], violations: Violations) -> dict[JsonId, str]:
    if len(categories) > MAX_CATEGORIES:
        violations.add("options.categories", f"{len(categories)} categories; at most {MAX_CATEGORIES}")
        return {}
    names: dict[JsonId, str] = {one.category_id: one.name or str(one.category_id) for one in categories}
    if len(names) != len(categories):
        violations.add("options.categories", "a category_id is used more than once")
    longest = max((len(one.name) for one in categories), default=0)
    if longest > MAX_CATEGORY_CHARS:
        violations.add("options.categories", f"a name of {longest} characters; at most {MAX_CATEGORY_CHARS}")
    return names


def _read_annotation(one: evaluation_pb2.GroundTruth, image_index: int) -> Annotation:
    raw: dict[str, object] = {}
    if one.HasField("mask"):
        raw["segmentation"] = {"size": [one.mask.height, one.mask.width], "counts": one.mask.counts}
    instance = one.instance
    return Annotation(instance.instance_id, image_index, one.category_id, read_box(instance.box), one.is_crowd, raw)


def _write_group(group: GroupMiou) -> evaluation_pb2.GroupMiou:
    return evaluation_pb2.GroupMiou(instances=group.count, miou=group.miou)


def _write_score_quality(score: ScoreQuality) -> evaluation_pb2.ScoreQuality:
    return evaluation_pb2.ScoreQuality(
        mean_score=score.mean_score,
        bias=score.bias,
        calibration_error=score.calibration_error,
        rank_correlation=score.spearman,
        bad_instances=score.bad_count,
        bad_in_worst_fifth=score.bad_in_worst_fifth,
    )


def _write_category(row: CategoryRow) -> evaluation_pb2.CategoryFigures:
    return evaluation_pb2.CategoryFigures(
        category=types_pb2.Category(category_id=_integer(row.category_id), name=row.name),
        instances=row.count,
        miou=row.miou,
        share_good=row.share_good,
        mean_score=row.mean_score,
    )


def _integer(value: JsonId) -> int:
    """Narrows an id to int: in an evaluation by a server all ids are integers."""
    if not isinstance(value, int):
        raise TypeError(f"{value!r} is not an integer")
    return value
