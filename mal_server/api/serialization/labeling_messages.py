"""Proto messages to domain types and back: only this file and its two sisters touch both. Checks; starts nothing.

`codec_evaluation` and `codec_model` hold what only those services need.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from google.protobuf.duration_pb2 import Duration
from google.rpc import status_pb2
from mal.v1 import labeling_pb2, types_pb2

from mal_server.api.serialization.status import status_of
from mal_server.config.limits import Limits
from mal_server.errors import InvalidRequest
from mal_server.inference.image_store import CachedImage, FileImage, InlineImage, Picture
from mal_server.inference.pipeline import InstanceResult, LabelRequest, OutputOptions, PartialResult, Timing
from mal_server.models.loader import ModelInfo
from mal_server.scheduling.priority import Priority
from mal_train.core.masks.encodings import EncodedMask, Polygons, Runs
from mal_train.core.masks.geometry import Box
from mal_train.core.masks.rle import Rle
from mal_train.core.settings import Branch, MaskFormat, can_compare
from mal_train.kernel.labeler.labeler import Label, PredictOptions

MAX_VIOLATIONS = 20
"""Listed of one request; one is enough to refuse it, and trailers must stay small."""

MAX_ITEM_ID_BYTES = 256
MAX_TOLERANCE_PX = 1000.0

_BRANCHES = {
    types_pb2.BRANCH_STUDENT: Branch.STUDENT,
    types_pb2.BRANCH_TEACHER: Branch.TEACHER,
    types_pb2.BRANCH_MIXED: Branch.MIXED,
}
_PRIORITIES = {types_pb2.PRIORITY_INTERACTIVE: Priority.INTERACTIVE, types_pb2.PRIORITY_BATCH: Priority.BATCH}
_FORMATS = {
    types_pb2.MASK_FORMAT_COCO_RLE: MaskFormat.RLE,
    types_pb2.MASK_FORMAT_UNCOMPRESSED_RLE: MaskFormat.UNCOMPRESSED,
    types_pb2.MASK_FORMAT_POLYGONS: MaskFormat.POLYGONS,
    types_pb2.MASK_FORMAT_PNG: MaskFormat.PNG,
}
_WIRE_BRANCHES = {branch: value for value, branch in _BRANCHES.items()}


class Violations:
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
            raise InvalidRequest(self._found)


_ALONE = "the served checkpoint holds the student alone"


@dataclass(frozen=True)
class CallDefaults:
    """What a job takes from the call that it came with, where its own options say nothing.

    Attributes:
        branch: the served model's default.
        priority: the method's default.
        deadline: event-loop time.
        branches: those that the served model can run.
    """

    branch: Branch
    priority: Priority
    deadline: float
    branches: tuple[Branch, ...] = tuple(Branch)


def read_job(
    request: labeling_pb2.LabelImageRequest, limits: Limits, call: CallDefaults, path: str = ""
) -> LabelRequest:
    """A request as a job; `path` goes before field names in messages.

    Raises:
        RequestRefused: lists the fields that break the contract.
    """
    checks = Violations()
    picture, expected_wh = read_image_source(request.image, checks, f"{path}image")
    ids, boxes = read_instances(request.instances, limits, checks, f"{path}instances")
    options, answer, priority = read_options(request.options, call, checks, f"{path}options")
    checks.raise_if_any()
    if isinstance(picture, InlineImage) and priority is Priority.INTERACTIVE:
        picture = InlineImage(picture.content, keep=True)  # bulk streams show each picture once
    return LabelRequest(picture, expected_wh, ids, boxes, options, answer, priority, call.deadline)


def read_image_source(
    source: types_pb2.ImageSource, checks: Violations, path: str
) -> tuple[Picture, tuple[int, int] | None]:
    """Where the picture comes from, and the (width, height) that the source states, if any."""
    kind = source.WhichOneof("source")
    picture: Picture = InlineImage(source.content)
    if kind is None:
        checks.add(f"{path}.content", "missing; send the encoded file")
    elif kind == "content_sha256":
        picture = CachedImage(source.content_sha256)
        if not re.fullmatch(r"[0-9a-f]{64}", source.content_sha256):
            checks.add(f"{path}.content_sha256", "it must be the 64 lower-case hex digits of a SHA-256")
    elif kind == "uri":
        folder, _, below = source.uri.partition("/")
        picture = FileImage(folder, below)
        if not folder or not below:
            checks.add(
                f"{path}.uri", "it must be FOLDER/PATH, a folder of GetServerInfoResponse.data_folders and a path"
            )
    width, height = source.expected_width, source.expected_height
    if width < 0 or height < 0 or (width == 0) != (height == 0):
        checks.add(f"{path}.expected_width", f"{width}x{height}; set width and height, both > 0, or neither")
    return picture, ((width, height) if width > 0 and height > 0 else None)


def read_instances(
    instances: Sequence[types_pb2.Instance], limits: Limits, checks: Violations, path: str
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
    options: types_pb2.LabelOptions, call: CallDefaults, checks: Violations, path: str
) -> tuple[PredictOptions, OutputOptions, Priority]:
    """How the network runs, how its answers are written, and who goes first."""
    branch = read_branch(options.branch, checks, f"{path}.branch") or call.branch
    if options.priority != types_pb2.PRIORITY_UNSPECIFIED and options.priority not in _PRIORITIES:
        checks.add(f"{path}.priority", f"{options.priority}; this server knows interactive and batch")
    priority = _PRIORITIES.get(options.priority, call.priority)
    if branch not in call.branches:
        checks.add(f"{path}.branch", f"{branch}; {_ALONE}")
    if options.compute_agreement and not can_compare(call.branches):
        checks.add(f"{path}.compute_agreement", f"true; {_ALONE}")
    answer = read_answer_options(options, checks, path)
    return PredictOptions(branch, agreement=options.compute_agreement, flip=options.flip_test), answer, priority


def read_answer_options(options: types_pb2.LabelOptions, checks: Violations, path: str) -> OutputOptions:
    """How probabilities become masks and how those are written."""
    threshold = options.threshold if options.HasField("threshold") else None
    if threshold is not None and not 0.0 < threshold < 1.0:
        checks.add(f"{path}.threshold", f"{threshold}; it must lie between 0 and 1")
    if not 0.0 <= options.polygon_tolerance_px <= MAX_TOLERANCE_PX:
        limit = f"it must lie between 0 and {MAX_TOLERANCE_PX:g} px"
        checks.add(f"{path}.polygon_tolerance_px", f"{options.polygon_tolerance_px}; {limit}")
    if options.min_component_area_px < 0:
        checks.add(f"{path}.min_component_area_px", f"{options.min_component_area_px}; it must be 0 or more")
    unknown = [form for form in options.formats if form not in _FORMATS]
    if unknown:
        checks.add(f"{path}.formats", f"{unknown[0]}; this server knows coco_rle, uncompressed_rle, polygons and png")
    if len(set(options.formats)) != len(options.formats):
        checks.add(f"{path}.formats", "a format stands twice")
    formats = tuple(_FORMATS[form] for form in options.formats if form in _FORMATS) or (MaskFormat.RLE,)
    return OutputOptions(
        threshold,
        options.min_component_area_px,
        formats,
        options.polygon_tolerance_px,
        options.resolve_overlaps,
    )


def read_branch(branch: "types_pb2.Branch.ValueType", checks: Violations, path: str) -> Branch | None:
    """The branch that a field names; None where it says nothing."""
    if branch != types_pb2.BRANCH_UNSPECIFIED and branch not in _BRANCHES:
        checks.add(path, f"{branch}; this server knows student, teacher and mixed")
    return _BRANCHES.get(branch)


def check_item_id(item_id: str, checks: Violations, path: str = "item_id") -> None:
    """Notes an item id that is too long to echo."""
    size = len(item_id.encode())
    if size > MAX_ITEM_ID_BYTES:
        checks.add(path, f"{size} bytes; at most {MAX_ITEM_ID_BYTES}")


def write_part(part: PartialResult, model: types_pb2.ModelRef) -> labeling_pb2.LabelImageResponse:
    """A part of the answers of a job."""
    return labeling_pb2.LabelImageResponse(
        results=[_write_answer(answer) for answer in part.answers], model=model, timing=_write_timing(part.timing)
    )


def write_item(item_id: str, part: PartialResult, model: types_pb2.ModelRef) -> labeling_pb2.LabelImagesResponse:
    """The answer of a bulk item."""
    return labeling_pb2.LabelImagesResponse(item_id=item_id, response=write_part(part, model))


def write_item_error(item_id: str, status: status_pb2.Status) -> labeling_pb2.LabelImagesResponse:
    """What is wrong with a bulk item; an id that is too long is cut."""
    echoed = item_id.encode()[:MAX_ITEM_ID_BYTES].decode(errors="ignore")
    return labeling_pb2.LabelImagesResponse(item_id=echoed, status=status)


def write_branches(branches: Iterable[Branch]) -> list["types_pb2.Branch.ValueType"]:
    """The branches that a model can run."""
    return [_WIRE_BRANCHES[branch] for branch in branches]


def write_model_ref(info: ModelInfo, branch: Branch) -> types_pb2.ModelRef:
    """Which weights answer."""
    return types_pb2.ModelRef(name=info.name, checkpoint_sha256=info.sha256, branch=_WIRE_BRANCHES[branch])


def _write_answer(answer: InstanceResult) -> types_pb2.InstanceResult:
    label = answer.outcome
    if not isinstance(label, Label):
        return types_pb2.InstanceResult(instance_id=answer.instance_id, status=status_of(label))
    return types_pb2.InstanceResult(
        instance_id=answer.instance_id,
        masks=[_write_mask(mask) for mask in answer.masks],
        score=label.score,
        agreement=label.agreement,
        area_px=label.area,
        mask_box=_write_box(label.mask_box),
        flags=[types_pb2.MaskFlag.Value(f"MASK_FLAG_{flag}") for flag in label.flags],
    )


def _write_mask(mask: EncodedMask) -> types_pb2.Mask:
    if isinstance(mask, Rle):
        return types_pb2.Mask(coco_rle=types_pb2.CocoRle(height=mask.height, width=mask.width, counts=mask.counts))
    if isinstance(mask, Runs):
        runs = types_pb2.UncompressedRle(height=mask.height, width=mask.width, counts=mask.counts)
        return types_pb2.Mask(uncompressed_rle=runs)
    if isinstance(mask, Polygons):
        rings = [types_pb2.PolygonRing(points=ring.points.ravel(), is_hole=ring.is_hole) for ring in mask.rings]
        return types_pb2.Mask(polygons=types_pb2.PolygonMask(height=mask.height, width=mask.width, rings=rings))
    return types_pb2.Mask(
        png=types_pb2.PngMask(
            height=mask.height,
            width=mask.width,
            x=mask.x,
            y=mask.y,
            crop_width=mask.crop_width,
            crop_height=mask.crop_height,
            content=mask.content,
        )
    )


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
