"""Proto messages to domain types and back: the only file that touches both. Checks requests; starts nothing."""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass

from google.protobuf.duration_pb2 import Duration
from google.rpc import status_pb2
from mal.v1 import evaluation_pb2, labeling_pb2, model_pb2, types_pb2

from mal_server.batcher import Priority
from mal_server.config import Limits
from mal_server.errors import RequestRefused
from mal_server.evaluation import Evaluation, Truth
from mal_server.interceptors import status_of
from mal_server.loading import ModelInfo
from mal_server.pipeline import Answer, Job, Part, Timing
from mal_train.labeling.coco import Annotation, JsonId
from mal_train.labeling.coco_ap import AP_NAMES
from mal_train.labeling.evaluation_report import EvaluationReport
from mal_train.labeling.geometry import Box
from mal_train.labeling.labeler import Label, RunOptions
from mal_train.labeling.miou import Figures
from mal_train.labeling.rle import Rle
from mal_train.labeling.settings import SIZE_NAMES, Branch

MAX_VIOLATIONS = 20
"""Listed of one request; one is enough to refuse it, and trailers must stay small."""

MAX_ITEM_ID_BYTES = 256
MAX_WORST = 10_000

REFUSED = "REQUEST_REFUSED"
"""Reason under which an evaluation counts the objects of an image whose message breaks the contract."""

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

_BRANCHES = {
    types_pb2.BRANCH_STUDENT: Branch.STUDENT,
    types_pb2.BRANCH_TEACHER: Branch.TEACHER,
    types_pb2.BRANCH_MIXED: Branch.MIXED,
}
_PRIORITIES = {types_pb2.PRIORITY_INTERACTIVE: Priority.INTERACTIVE, types_pb2.PRIORITY_BATCH: Priority.BATCH}
_WIRE_BRANCHES = {branch: value for value, branch in _BRANCHES.items()}


class Checks:
    """Collects what is wrong with a request, each under its field's path."""

    def __init__(self) -> None:
        self._found: list[tuple[str, str]] = []

    def add(self, field: str, text: str) -> None:
        """Notes a violation."""
        if len(self._found) < MAX_VIOLATIONS:
            self._found.append((field, text))

    def raise_if_any(self) -> None:
        """Raises RequestRefused when something was noted."""
        if self._found:
            raise RequestRefused(self._found)


@dataclass(frozen=True)
class Call:
    """What a job takes from the call that it came with, where its own options say nothing.

    Attributes:
        branch: the served model's default.
        priority: the method's default.
        deadline: event-loop time.
    """

    branch: Branch
    priority: Priority
    deadline: float


def read_job(request: labeling_pb2.LabelImageRequest, limits: Limits, call: Call, path: str = "") -> Job:
    """A request as a job; `path` goes before field names in messages.

    Raises:
        RequestRefused: lists the fields that break the contract.
    """
    checks = Checks()
    expected_wh = read_image_source(request.image, checks, f"{path}image")
    ids, boxes = read_instances(request.instances, limits, checks, f"{path}instances")
    options, threshold, priority = read_options(request.options, call, checks, f"{path}options")
    checks.raise_if_any()
    return Job(request.image.content, expected_wh, ids, boxes, options, threshold, priority, call.deadline)


def read_image_source(source: types_pb2.ImageSource, checks: Checks, path: str) -> tuple[int, int] | None:
    """(width, height) that the source states, if any."""
    if source.WhichOneof("source") is None:
        checks.add(f"{path}.content", "missing; send the encoded file")
    width, height = source.expected_width, source.expected_height
    if width < 0 or height < 0 or (width == 0) != (height == 0):
        checks.add(f"{path}.expected_width", f"{width}x{height}; set width and height, both > 0, or neither")
    return (width, height) if width > 0 and height > 0 else None


def read_instances(
    instances: Sequence[types_pb2.Instance], limits: Limits, checks: Checks, path: str
) -> tuple[tuple[int, ...], tuple[Box, ...]]:
    """Ids and boxes, in order. What the numbers of a box say is judged later, box by box."""
    if len(instances) > limits.max_boxes:
        checks.add(path, f"{len(instances)} boxes; the limit max_boxes is {limits.max_boxes}")
        return (), ()
    seen: set[int] = set()
    for index, instance in enumerate(instances):
        if not instance.HasField("box"):
            checks.add(f"{path}[{index}].box", "missing")
        if instance.instance_id in seen:
            checks.add(f"{path}[{index}].instance_id", f"{instance.instance_id} stands twice in the request")
        seen.add(instance.instance_id)
    boxes = tuple(read_box(instance.box) for instance in instances)
    return tuple(instance.instance_id for instance in instances), boxes


def read_box(box: types_pb2.Box) -> Box:
    """x, y, width, height, unchecked."""
    return (box.x, box.y, box.width, box.height)


def read_options(
    options: types_pb2.LabelOptions, call: Call, checks: Checks, path: str
) -> tuple[RunOptions, float | None, Priority]:
    """How the network runs, the threshold if one is given, and who goes first."""
    branch = call.branch
    if options.branch != types_pb2.BRANCH_UNSPECIFIED:
        if options.branch not in _BRANCHES:
            checks.add(f"{path}.branch", f"{options.branch}; this server knows student, teacher and mixed")
        branch = _BRANCHES.get(options.branch, call.branch)
    threshold = options.threshold if options.HasField("threshold") else None
    if threshold is not None and not 0.0 < threshold < 1.0:
        checks.add(f"{path}.threshold", f"{threshold}; it must lie between 0 and 1")
    if options.priority != types_pb2.PRIORITY_UNSPECIFIED and options.priority not in _PRIORITIES:
        checks.add(f"{path}.priority", f"{options.priority}; this server knows interactive and batch")
    priority = _PRIORITIES.get(options.priority, call.priority)
    return RunOptions(branch, agreement=options.compute_agreement, flip=options.flip_test), threshold, priority


def check_item_id(item_id: str, checks: Checks, path: str = "item_id") -> None:
    """Notes an item id that is too long to echo."""
    size = len(item_id.encode())
    if size > MAX_ITEM_ID_BYTES:
        checks.add(path, f"{size} bytes; at most {MAX_ITEM_ID_BYTES}")


@dataclass(frozen=True)
class EvaluateOptions:
    """The first message of an evaluation.

    Attributes:
        run: how the network runs.
        threshold: in (0, 1); None = the checkpoint's by size.
        priority: who goes first.
        deadline: event-loop time.
        category_names: by id, in the order of the report.
        images_total: as announced; 0 = unknown.
        worst_count: instances to list, lowest IoU first.
    """

    run: RunOptions
    threshold: float | None
    priority: Priority
    deadline: float
    category_names: Mapping[JsonId, str]
    images_total: int
    worst_count: int


def read_evaluate_options(request: evaluation_pb2.EvaluateRequest, call: Call) -> EvaluateOptions:
    """The first message; raises RequestRefused when it is none or breaks the contract."""
    checks = Checks()
    if request.WhichOneof("message") != "options":
        checks.add("options", "the first message must hold the options")
    options = request.options
    run, threshold, priority = read_options(options.label, call, checks, "options.label")
    if options.images_total < 0:
        checks.add("options.images_total", f"{options.images_total}; it must be 0 (unknown) or more")
    if not 0 <= options.worst_count <= MAX_WORST:
        checks.add("options.worst_count", f"{options.worst_count}; it must lie between 0 and {MAX_WORST}")
    names: dict[JsonId, str] = {c.category_id: c.name or str(c.category_id) for c in options.categories}
    if len(names) != len(options.categories):
        checks.add("options.categories", "a category_id stands twice")
    checks.raise_if_any()
    return EvaluateOptions(run, threshold, priority, call.deadline, names, options.images_total, options.worst_count)


async def read_truths(
    requests: AsyncIterator[evaluation_pb2.EvaluateRequest], options: EvaluateOptions, limits: Limits
) -> AsyncIterator[Truth]:
    """The images of an evaluation, numbered as they come; raises RequestRefused for a message that holds none."""
    place = 0
    async for request in requests:
        if request.WhichOneof("message") != "image":
            raise RequestRefused([("image", "every message after the first must hold an image")])
        yield read_truth(request.image, place, options, limits)
        place += 1


def read_truth(image: evaluation_pb2.EvaluateImage, place: int, options: EvaluateOptions, limits: Limits) -> Truth:
    """An image with ground truth. What breaks the contract is a fault of this image alone."""
    checks = Checks()
    check_item_id(image.item_id, checks, "image.item_id")
    expected_wh = read_image_source(image.image, checks, "image.image")
    annotations = tuple(_read_annotation(one, place) for one in image.ground_truth)
    # Of two objects with one id the evaluator counts the first, so only that one is labelled.
    wanted: dict[int, types_pb2.Instance] = {}
    for one in image.ground_truth:
        if not one.is_crowd:
            wanted.setdefault(one.instance.instance_id, one.instance)
    ids, boxes = read_instances(list(wanted.values()), limits, checks, "image.ground_truth")
    try:
        checks.raise_if_any()
    except RequestRefused as error:
        return Truth(image.item_id, annotations, None, (REFUSED, str(error)))
    job = Job(
        image.image.content,
        expected_wh,
        ids,
        boxes,
        options.run,
        options.threshold,
        options.priority,
        options.deadline,
    )
    return Truth(image.item_id, annotations, job)


def write_progress(run: Evaluation, options: EvaluateOptions) -> evaluation_pb2.EvaluateResponse:
    """How far an evaluation is."""
    return evaluation_pb2.EvaluateResponse(
        progress=evaluation_pb2.EvaluateProgress(
            images_done=len(run.item_ids),
            images_total=options.images_total,
            instances_done=run.instances,
            running_miou=run.running_miou,
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


def write_part(part: Part, model: types_pb2.ModelRef) -> labeling_pb2.LabelImageResponse:
    """A part of the answers of a job."""
    return labeling_pb2.LabelImageResponse(
        results=[_write_answer(answer) for answer in part.answers], model=model, timing=_write_timing(part.timing)
    )


def write_item(item_id: str, part: Part, model: types_pb2.ModelRef) -> labeling_pb2.LabelImagesResponse:
    """The answer of a bulk item."""
    return labeling_pb2.LabelImagesResponse(item_id=item_id, response=write_part(part, model))


def write_item_error(item_id: str, status: status_pb2.Status) -> labeling_pb2.LabelImagesResponse:
    """What is wrong with a bulk item; an id that is too long is cut."""
    echoed = item_id.encode()[:MAX_ITEM_ID_BYTES].decode(errors="ignore")
    return labeling_pb2.LabelImagesResponse(item_id=echoed, status=status)


def write_model_ref(info: ModelInfo, branch: Branch) -> types_pb2.ModelRef:
    """Which weights answer."""
    return types_pb2.ModelRef(name=info.name, checkpoint_sha256=info.sha256, branch=_WIRE_BRANCHES[branch])


def write_server_info(info: ModelInfo, limits: Limits, version: str) -> model_pb2.GetServerInfoResponse:
    """What the server serves and accepts."""
    small, medium, large = info.labeler.mask_thres
    images = limits.images()
    return model_pb2.GetServerInfoResponse(
        version=version,
        model=model_pb2.ModelInfo(
            ref=write_model_ref(info, info.branch),
            arch=info.arch,
            crop_size=info.labeler.crop_size,
            margin_rate=info.labeler.margin_rate,
            mask_thresholds=model_pb2.SizeThresholds(small=small, medium=medium, large=large),
            categories=[_write_category(index, category) for index, category in enumerate(info.categories)],
            score_calibrated=info.labeler.calibration is not None,
        ),
        limits=model_pb2.ServerLimits(
            max_request_bytes=limits.max_request_bytes,
            max_response_bytes=limits.max_response_bytes,
            max_boxes=limits.max_boxes,
            max_pixels=images.max_pixels,
            max_side=images.max_side,
            max_image_bytes=images.max_bytes,
            max_items_in_flight=limits.max_items_in_flight,
        ),
        devices=info.devices,
        precision=info.precision,
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


def _write_answer(answer: Answer) -> types_pb2.InstanceResult:
    label = answer.outcome
    if not isinstance(label, Label):
        return types_pb2.InstanceResult(instance_id=answer.instance_id, status=status_of(label))
    return types_pb2.InstanceResult(
        instance_id=answer.instance_id,
        masks=[types_pb2.Mask(coco_rle=_write_rle(label.rle))],
        score=label.score,
        agreement=label.agreement,
        area_px=label.area,
        mask_box=_write_box(label.mask_box),
        flags=[types_pb2.MaskFlag.Value(f"MASK_FLAG_{flag}") for flag in label.flags],
    )


def _write_rle(rle: Rle) -> types_pb2.CocoRle:
    return types_pb2.CocoRle(height=rle.height, width=rle.width, counts=rle.counts)


def _write_box(box: Box | None) -> types_pb2.Box | None:
    return None if box is None else types_pb2.Box(x=box[0], y=box[1], width=box[2], height=box[3])


def _write_timing(timing: Timing) -> types_pb2.Timing:
    return types_pb2.Timing(
        queue=_write_seconds(timing.queue_s),
        decode=_write_seconds(timing.decode_s),
        infer=_write_seconds(timing.infer_s),
        finish=_write_seconds(timing.finish_s),
        batch_size=timing.batch_size,
    )


def _write_seconds(seconds: float) -> Duration:
    duration = Duration()
    duration.FromMicroseconds(round(seconds * 1e6))
    return duration


def _write_category(index: int, category: dict[str, object]) -> types_pb2.Category:
    category_id, name = category.get("id"), category.get("name")
    fits = isinstance(category_id, int) and -(2**63) <= category_id < 2**63
    return types_pb2.Category(
        category_id=category_id if isinstance(category_id, int) and fits else index + 1,
        name=name if isinstance(name, str) else "",
    )
