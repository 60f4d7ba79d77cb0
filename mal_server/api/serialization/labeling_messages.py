"""Converts labeling messages to domain types and back, and validates them. Pure functions, no calls.

Only the modules of this package know both messages and domain types; `evaluation_messages` and `model_messages` import
the shared functions from here.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import status_pb2
from mal.v1 import labeling_pb2, types_pb2

from mal_server.api.serialization.status import status_of
from mal_server.api.serialization.wire import extend, submessage
from mal_server.config.limits import Limits
from mal_server.errors import InvalidRequest
from mal_server.inference.image_store import CachedImage, FileImage, ImageSource, InlineImage
from mal_server.inference.requests import (
    InstanceResult,
    LabelRequest,
    OutputOptions,
    PartialResult,
    Timing,
)
from mal_server.models.loader import ModelInfo
from mal_server.scheduling.priority import Priority
from mal_server.security.caller import NOBODY, Caller
from mal_train.core.images.container import ImageRegion
from mal_train.core.images.header import MAX_FRAME_PIXELS
from mal_train.core.masks.encodings import EncodedMask, PngCrop, Polygons, Runs
from mal_train.core.masks.geometry import Box
from mal_train.core.masks.points import MAX_POINTS, Point
from mal_train.core.masks.rle import Rle
from mal_train.core.settings import Branch, MaskFormat, can_compare
from mal_train.kernel.labeler.types import Label, PredictOptions

MAX_VIOLATIONS = 20
"""Violations reported for one request; gRPC trailers must stay small."""

MAX_ITEM_ID_BYTES = 256
MAX_TOLERANCE_PX = 1000.0

NUMBERS_OF_A_RESULT = 100
"""Numbers whose writing takes as long as that of a result without its masks."""

NUMBERS_OF_A_RING = 20
"""The same for a ring beside its points."""

BYTES_OF_A_NUMBER = 100
"""Bytes of a run-length code or a PNG whose copying takes as long as writing a number."""

_RESULTS = labeling_pb2.LabelImageResponse.RESULTS_FIELD_NUMBER
_ITEM_RESPONSE = labeling_pb2.LabelImagesResponse.RESPONSE_FIELD_NUMBER

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
_POINT_LABELS = (types_pb2.POINT_LABEL_POSITIVE, types_pb2.POINT_LABEL_NEGATIVE)
_WIRE_BRANCHES = {branch: value for value, branch in _BRANCHES.items()}


class Violations:
    """Violations of the contract by one request, each under the path of its field."""

    def __init__(self) -> None:
        self._found: list[tuple[str, str]] = []

    def add(self, field: str, problem: str) -> None:
        """Adds a violation; ignores it once MAX_VIOLATIONS are known."""
        if len(self._found) < MAX_VIOLATIONS:
            self._found.append((field, problem))

    def raise_if_any(self) -> None:
        """Raises InvalidRequest with all violations, if there are any."""
        if self._found:
            raise InvalidRequest(self._found)


_STUDENT_ONLY = "the served checkpoint has only the student network"


@dataclass(frozen=True)
class CallDefaults:
    """Defaults of one call for options that a request leaves unset.

    Attributes:
        branch: default of the served model.
        priority: default of the method.
        deadline: deadline of the call, in event-loop time.
        branches: branches that the served model can run.
        caller: who calls.
    """

    branch: Branch
    priority: Priority
    deadline: float
    branches: tuple[Branch, ...] = tuple(Branch)
    caller: Caller = NOBODY


def read_label_request(
    request: labeling_pb2.LabelImageRequest, limits: Limits, defaults: CallDefaults, path: str = ""
) -> LabelRequest:
    """Decodes and validates a request; `path` precedes the names of its fields in violations.

    Raises:
        InvalidRequest: fields break the contract; it lists all of them.
        FolderDenied: a file of the server in a folder that the caller may not name.
    """
    violations = Violations()
    source, expected_wh = read_image_source(request.image, defaults.caller, violations, f"{path}image")
    ids, boxes = read_instances(request.instances, limits, violations, f"{path}instances")
    points = _read_points(request.instances[: len(ids)], violations, f"{path}instances")
    predict, output, priority = read_options(request.options, defaults, violations, f"{path}options")
    region = read_region(request.image, violations, f"{path}image", resolves_overlaps=request.options.resolve_overlaps)
    violations.raise_if_any()
    if isinstance(source, InlineImage) and priority is Priority.INTERACTIVE:
        source = replace(source, keep=True)  # a bulk stream sends each image once, so caching is useless
    caller, deadline = defaults.caller.name, defaults.deadline
    return LabelRequest(source, expected_wh, ids, boxes, predict, output, priority, caller, deadline, region, points)


def read_region(
    message: types_pb2.ImageSource, violations: Violations, path: str, *, resolves_overlaps: bool
) -> ImageRegion | None:
    """Decodes the place of an image in a larger one; None for a complete image."""
    if not message.HasField("region"):
        return None
    region = message.region
    width, height = region.image_width, region.image_height
    if width <= 0 or height <= 0 or width * height > MAX_FRAME_PIXELS:
        violations.add(f"{path}.region", f"an image of {width}x{height} px; it must have 1 to {MAX_FRAME_PIXELS} px")
    if resolves_overlaps:
        violations.add(f"{path}.region", "set with resolve_overlaps; overlaps are resolved on complete images")
    return ImageRegion(region.x, region.y, (width, height))


def read_image_source(
    message: types_pb2.ImageSource, caller: Caller, violations: Violations, path: str
) -> tuple[ImageSource, tuple[int, int] | None]:
    """Decodes the source of an image and its expected (width, height) in px; None if the client states no size.

    Raises:
        FolderDenied: a file of the server in a folder that the caller may not name.
    """
    source: ImageSource = InlineImage(message.content, owner=caller.token)
    match message.WhichOneof("source"):
        case None:
            violations.add(f"{path}.content", "missing; send the encoded file")
        case "content_sha256":
            source = CachedImage(message.content_sha256, caller.token)
            if not re.fullmatch(r"[0-9a-f]{64}", message.content_sha256):
                violations.add(f"{path}.content_sha256", "it must be the 64 lower-case hex digits of a SHA-256")
        case "uri":
            folder, _, relative_path = message.uri.partition("/")
            source = FileImage(folder, relative_path)
            if not folder or not relative_path:
                violations.add(
                    f"{path}.uri", "it must be FOLDER/PATH, with a FOLDER of GetServerInfoResponse.data_folders"
                )
            caller.check_folder(folder)
    width, height = message.expected_width, message.expected_height
    if width < 0 or height < 0 or (width == 0) != (height == 0):
        violations.add(f"{path}.expected_width", f"{width}x{height}; set width and height, both > 0, or neither")
    return source, ((width, height) if width > 0 and height > 0 else None)


def read_instances(
    instances: Sequence[types_pb2.Instance], limits: Limits, violations: Violations, path: str
) -> tuple[tuple[int, ...], tuple[Box, ...]]:
    """Decodes ids and boxes, in order. The numbers of a box are checked later: a bad box fails alone."""
    if len(instances) > limits.max_boxes:
        violations.add(path, f"{len(instances)} boxes; max_boxes is {limits.max_boxes}")
        return (), ()
    seen: set[int] = set()
    for index, instance in enumerate(instances):
        if not instance.HasField("box"):
            violations.add(f"{path}[{index}].box", "missing")
        if instance.instance_id in seen:
            violations.add(f"{path}[{index}].instance_id", f"{instance.instance_id} is used more than once")
        seen.add(instance.instance_id)
    boxes = tuple(read_box(instance.box) for instance in instances)
    return tuple(instance.instance_id for instance in instances), boxes


def read_box(box: types_pb2.Box) -> Box:
    """Returns x, y, width, height in px, without checking them."""
    return (box.x, box.y, box.width, box.height)


def _read_points(
    instances: Sequence[types_pb2.Instance], violations: Violations, path: str
) -> tuple[tuple[Point, ...], ...] | None:
    """Decodes the points of each instance, without checking their numbers; None if there are none."""
    if not any(instance.points for instance in instances):
        return None
    return tuple(
        _read_points_of(instance, violations, f"{path}[{index}].points") for index, instance in enumerate(instances)
    )


def _read_points_of(instance: types_pb2.Instance, violations: Violations, path: str) -> tuple[Point, ...]:
    """Decodes the first MAX_POINTS + 1 points of an instance: that many fail its box, so more are not needed."""
    points = []
    for number, point in enumerate(instance.points[: MAX_POINTS + 1]):
        if point.label not in _POINT_LABELS:
            violations.add(f"{path}[{number}].label", f"{point.label}; this server knows positive and negative")
        points.append(Point(point.x, point.y, point.label == types_pb2.POINT_LABEL_POSITIVE))
    return tuple(points)


def read_options(
    options: types_pb2.LabelOptions, defaults: CallDefaults, violations: Violations, path: str
) -> tuple[PredictOptions, OutputOptions, Priority]:
    """Decodes the options of the network, the options of its output, and the priority."""
    branch = read_branch(options.branch, violations, f"{path}.branch") or defaults.branch
    if options.priority != types_pb2.PRIORITY_UNSPECIFIED and options.priority not in _PRIORITIES:
        violations.add(f"{path}.priority", f"{options.priority}; this server knows interactive and batch")
    priority = _PRIORITIES.get(options.priority, defaults.priority)
    if branch not in defaults.branches:
        violations.add(f"{path}.branch", f"{branch}; {_STUDENT_ONLY}")
    if options.compute_agreement and not can_compare(defaults.branches):
        violations.add(f"{path}.compute_agreement", f"true; {_STUDENT_ONLY}")
    output = read_output_options(options, violations, path)
    return PredictOptions(branch, agreement=options.compute_agreement, flip=options.flip_test), output, priority


def read_output_options(options: types_pb2.LabelOptions, violations: Violations, path: str) -> OutputOptions:
    """Decodes the options for postprocessing probabilities into masks, and for encoding the masks."""
    threshold = options.threshold if options.HasField("threshold") else None
    if threshold is not None and not 0.0 < threshold < 1.0:
        violations.add(f"{path}.threshold", f"{threshold}; it must lie between 0 and 1")
    if not 0.0 <= options.polygon_tolerance_px <= MAX_TOLERANCE_PX:
        limit = f"it must lie between 0 and {MAX_TOLERANCE_PX:g} px"
        violations.add(f"{path}.polygon_tolerance_px", f"{options.polygon_tolerance_px}; {limit}")
    if options.min_component_area_px < 0:
        violations.add(f"{path}.min_component_area_px", f"{options.min_component_area_px}; it must be 0 or more")
    return OutputOptions(
        threshold,
        options.min_component_area_px,
        _read_formats(options, violations, f"{path}.formats"),
        options.polygon_tolerance_px,
        options.resolve_overlaps,
    )


def _read_formats(options: types_pb2.LabelOptions, violations: Violations, path: str) -> tuple[MaskFormat, ...]:
    if len(options.formats) > len(_FORMATS):
        violations.add(path, f"{len(options.formats)} formats; at most {len(_FORMATS)}, each once")
        return ()
    unknown = [form for form in options.formats if form not in _FORMATS]
    if unknown:
        violations.add(path, f"{unknown[0]}; this server knows coco_rle, uncompressed_rle, polygons and png")
    if len(set(options.formats)) != len(options.formats):
        violations.add(path, "a format is named more than once")
    return tuple(_FORMATS[form] for form in options.formats if form in _FORMATS) or (MaskFormat.RLE,)


def read_branch(branch: "types_pb2.Branch.ValueType", violations: Violations, path: str) -> Branch | None:
    """Decodes a branch; None if it is unspecified, or unknown, which is a violation."""
    if branch != types_pb2.BRANCH_UNSPECIFIED and branch not in _BRANCHES:
        violations.add(path, f"{branch}; this server knows student, teacher and mixed")
    return _BRANCHES.get(branch)


def check_item(item: labeling_pb2.LabelImagesRequest) -> None:
    """Raises InvalidRequest for an item id that is too long."""
    violations = Violations()
    check_item_id(item.item_id, violations, "item_id")
    violations.raise_if_any()


def check_item_id(item_id: str, violations: Violations, path: str) -> None:
    """Adds a violation for an item id that is too long to echo."""
    size = len(item_id.encode())
    if size > MAX_ITEM_ID_BYTES:
        violations.add(path, f"{size} bytes; at most {MAX_ITEM_ID_BYTES}")


def size_of(result: PartialResult) -> int:
    """Returns about how many numbers the messages of a result have; writing 10 000 takes about a millisecond."""
    return sum(NUMBERS_OF_A_RESULT + sum(map(_numbers, one.masks)) for one in result.results)


def _numbers(mask: EncodedMask) -> int:
    if isinstance(mask, Runs):
        return len(mask.counts)
    if isinstance(mask, Polygons):
        return mask.rings.points.size + NUMBERS_OF_A_RING * len(mask.rings)
    return len(mask.counts if isinstance(mask, Rle) else mask.content) // BYTES_OF_A_NUMBER


def write_response(result: PartialResult, model: types_pb2.ModelRef) -> bytes:
    """Returns the encoded LabelImageResponse with some of the results of a request."""
    return b"".join(_response(result, model))


def write_item(item_id: str, result: PartialResult, model: types_pb2.ModelRef) -> bytes:
    """Returns the encoded LabelImagesResponse with the results of a bulk item."""
    head = labeling_pb2.LabelImagesResponse(item_id=item_id).SerializeToString()
    return b"".join([head, *submessage(_ITEM_RESPONSE, _response(result, model))])


def write_item_error(item_id: str, status: status_pb2.Status) -> bytes:
    """Returns the encoded LabelImagesResponse with the error of a bulk item; an id that is too long is truncated."""
    echoed = item_id.encode()[:MAX_ITEM_ID_BYTES].decode(errors="ignore")
    return labeling_pb2.LabelImagesResponse(item_id=echoed, status=status).SerializeToString()


def _response(result: PartialResult, model: types_pb2.ModelRef) -> list[bytes]:
    """Returns an encoded LabelImageResponse in parts: its results one by one, then its other fields."""
    parts = [part for one in result.results for part in submessage(_RESULTS, [_write_result(one).SerializeToString()])]
    rest = labeling_pb2.LabelImageResponse(model=model, timing=_write_timing(result.timing))
    return [*parts, rest.SerializeToString()]


def write_branches(branches: Iterable[Branch]) -> list["types_pb2.Branch.ValueType"]:
    """Converts the branches that a model can run to their wire values."""
    return [_WIRE_BRANCHES[branch] for branch in branches]


def write_model_ref(info: ModelInfo, branch: Branch) -> types_pb2.ModelRef:
    """Builds the message with the name, the checkpoint and the branch of the model that labels."""
    return types_pb2.ModelRef(name=info.name, checkpoint_sha256=info.sha256, branch=_WIRE_BRANCHES[branch])


def _write_result(result: InstanceResult) -> types_pb2.InstanceResult:
    label = result.outcome
    if not isinstance(label, Label):
        return types_pb2.InstanceResult(instance_id=result.instance_id, status=status_of(label))
    message = types_pb2.InstanceResult(
        instance_id=result.instance_id,
        score=label.score,
        agreement=label.agreement,
        area_px=label.area,
        mask_box=_write_box(label.mask_box),
        flags=[types_pb2.MaskFlag.Value(f"MASK_FLAG_{flag}") for flag in label.flags],
    )
    for mask in result.masks:
        _write_mask(mask, message.masks.add())
    return message


def _write_mask(mask: EncodedMask, message: types_pb2.Mask) -> None:
    """Fills a message that is a part of its result already: to put it in afterwards would copy all of it."""
    match mask:
        case Rle():
            _set(message.coco_rle, height=mask.height, width=mask.width, counts=mask.counts)
        case Runs():
            _set(message.uncompressed_rle, height=mask.height, width=mask.width)
            extend(message.uncompressed_rle.counts, mask.counts)
        case Polygons():
            _set(message.polygons, height=mask.height, width=mask.width)
            for ring in mask.rings:
                # As floats, which the field holds: protobuf takes three times as long to convert integers.
                numbers = ring.points.ravel().astype(np.float32)
                extend(message.polygons.rings.add(is_hole=ring.is_hole).points, numbers)
        case PngCrop():
            _set(message.png, height=mask.height, width=mask.width, x=mask.x, y=mask.y, content=mask.content)
            _set(message.png, crop_width=mask.crop_width, crop_height=mask.crop_height)


def _set(message: Message, **values: int | bytes) -> None:
    for name, value in values.items():
        setattr(message, name, value)


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
