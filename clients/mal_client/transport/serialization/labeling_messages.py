"""Converts labeling and model messages to the client's types and back. Pure functions.

Only the modules of this package know both messages and the client's types.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from mal.v1 import labeling_pb2, model_pb2, types_pb2

from mal_client.errors import ItemError, item_error
from mal_client.images.image_input import EncodedImage
from mal_client.results.labels import BoxLabel, BoxPoints, BoxXywh, LabelOptions, ModelRef, Timing
from mal_client.results.server_info import ModelInfo, ModelStatus, ServerInfo, ServerLimits
from mal_train.core.errors import BadDataset
from mal_train.core.settings import Branch

if TYPE_CHECKING:
    from google.protobuf.duration_pb2 import Duration

    from mal_train.core.masks.points import Point
    from mal_train.core.masks.rle import Rle

_MAX_FLAGS = 64
_MAX_MASKS = 16
_MAX_SIDE_PX = 1 << 30
_ROUNDING = 1e-6

_BRANCH_TO_WIRE = {
    Branch.STUDENT: types_pb2.BRANCH_STUDENT,
    Branch.TEACHER: types_pb2.BRANCH_TEACHER,
    Branch.MIXED: types_pb2.BRANCH_MIXED,
}
_BRANCH_FROM_WIRE = {wire: branch for branch, wire in _BRANCH_TO_WIRE.items()}


def label_request(
    image: EncodedImage,
    boxes: Mapping[int, BoxXywh],
    points: BoxPoints,
    options: LabelOptions,
    sha256: str | None = None,
) -> labeling_pb2.LabelImageRequest:
    """Builds the request for one image; the keys of `boxes` become instance ids. With `sha256`, sends only the hash."""
    return labeling_pb2.LabelImageRequest(
        image=image_source(image, sha256),
        instances=[instance(key, box, points.get(key, ())) for key, box in boxes.items()],
        options=label_options(options),
    )


def bulk_request(
    item_id: str, image: EncodedImage, boxes: Mapping[int, BoxXywh], points: BoxPoints, options: LabelOptions
) -> labeling_pb2.LabelImagesRequest:
    """Builds the message with one item of a bulk stream."""
    return labeling_pb2.LabelImagesRequest(item_id=item_id, request=label_request(image, boxes, points, options))


def image_source(image: EncodedImage, sha256: str | None = None) -> types_pb2.ImageSource:
    """Builds the message with an encoded image, or with its SHA-256 (hex) if the server has it in its cache."""
    source = types_pb2.ImageSource(expected_width=image.width, expected_height=image.height)
    if image.region is not None:
        width, height = image.region.image_wh
        source.region.CopyFrom(
            types_pb2.ImageRegion(x=image.region.x0, y=image.region.y0, image_width=width, image_height=height)
        )
    if sha256 is None:
        source.content = image.content
    else:
        source.content_sha256 = sha256
    return source


def instance(instance_id: int, box: BoxXywh, points: Sequence[Point] = ()) -> types_pb2.Instance:
    """Builds the message of one box with its id and points."""
    x, y, width, height = box
    return types_pb2.Instance(
        instance_id=instance_id,
        box=types_pb2.Box(x=x, y=y, width=width, height=height),
        points=[
            types_pb2.Point(
                x=point.x,
                y=point.y,
                label=types_pb2.POINT_LABEL_POSITIVE if point.is_positive else types_pb2.POINT_LABEL_NEGATIVE,
            )
            for point in points
        ],
    )


def wire_text(text: str) -> str:
    r"""Returns text that protobuf can hold: an escape for each half of a surrogate pair, which JSON and paths can have.

    >>> print(wire_text("a" + chr(0xDCE9)))
    a\udce9
    """
    return text.encode(errors="backslashreplace").decode()


def label_options(options: LabelOptions) -> types_pb2.LabelOptions:
    """Builds the message of the options. Unset options stay unset: the server's or the checkpoint's values apply.

    `formats` is always unset: run-length codes are the smallest on the wire, and the client converts them to other
    formats with the functions that the server uses.
    """
    branch = types_pb2.BRANCH_UNSPECIFIED if options.branch is None else _BRANCH_TO_WIRE[options.branch]
    return types_pb2.LabelOptions(
        branch=branch,
        threshold=options.threshold,
        compute_agreement=options.agreement,
        flip_test=options.flip,
        min_component_area_px=options.min_component_area_px or None,
        model=wire_text(options.model or ""),
        resolve_overlaps=options.resolve_overlaps,
    )


def coco_rle(rle: Rle) -> types_pb2.CocoRle:
    """Builds the message of a mask."""
    return types_pb2.CocoRle(height=rle.height, width=rle.width, counts=rle.counts)


def box_labels(
    response: labeling_pb2.LabelImageResponse,
    boxes: Mapping[int, BoxXywh],
    size_wh: Callable[[], tuple[int, int] | None] = lambda: None,
) -> Iterable[tuple[int, BoxLabel]]:
    """Yields (instance id, label) for each result of a message.

    A result that the protocol does not allow is an error of its box (reason INVALID_RESULT).

    Args:
        response: the message of a server, which is not trusted.
        boxes: those of the request, by instance id.
        size_wh: returns width and height in px of the image, which every mask must have; None: unknown.

    Raises:
        KeyError: a result has an instance id that is not in `boxes`.
    """
    model = model_ref(response.model)
    times = _timing(response.timing)
    for result, mask in zip(response.results, _masks(response.results, size_wh), strict=True):
        yield result.instance_id, _box_label(result, boxes[result.instance_id], model, times, mask)


def model_ref(ref: types_pb2.ModelRef) -> ModelRef:
    """Decodes the weights that made a result; a branch unknown to this version becomes the student."""
    return ModelRef(ref.name, ref.checkpoint_sha256, _BRANCH_FROM_WIRE.get(ref.branch, Branch.STUDENT))


def model_info(model: model_pb2.ModelInfo) -> ModelInfo:
    """Decodes the description of a model; omits branches unknown to this version."""
    return ModelInfo(
        model=model_ref(model.ref),
        arch=model.arch,
        crop_size=model.crop_size,
        margin_rate=model.margin_rate,
        mask_thresholds=(model.mask_thresholds.small, model.mask_thresholds.medium, model.mask_thresholds.large),
        categories={category.category_id: category.name for category in model.categories},
        devices=tuple(model.devices),
        precision=model.precision,
        score_calibrated=model.score_calibrated,
        score_calibrated_with_flip=model.score_calibrated_with_flip,
        score_calibrated_resolved=model.score_calibrated_resolved,
        branches=tuple(_BRANCH_FROM_WIRE[branch] for branch in model.branches if branch in _BRANCH_FROM_WIRE),
        network_engine=model.network_engine or "torch",
    )


def model_status(status: model_pb2.ModelStatus) -> ModelStatus:
    """Decodes the state of a model in the server's memory."""
    is_retiring = status.state == model_pb2.MODEL_STATE_RETIRING
    return ModelStatus(model_info(status.model), status.calls, is_retiring, status.is_default)


def load_request(name: str, folder: str, path: str, branch: Branch | None) -> model_pb2.LoadModelRequest:
    """Builds a request to load a checkpoint under a name."""
    wire = types_pb2.BRANCH_UNSPECIFIED if branch is None else _BRANCH_TO_WIRE[branch]
    return model_pb2.LoadModelRequest(name=wire_text(name), folder=wire_text(folder), path=wire_text(path), branch=wire)


def server_info(response: model_pb2.GetServerInfoResponse) -> ServerInfo:
    """Decodes the description of a server."""
    limits, default = response.limits, model_info(response.model)
    return ServerInfo(
        version=response.version,
        model=default.model,
        arch=default.arch,
        crop_size=default.crop_size,
        margin_rate=default.margin_rate,
        mask_thresholds=default.mask_thresholds,
        categories=default.categories,
        limits=ServerLimits(
            max_request_bytes=limits.max_request_bytes,
            max_response_bytes=limits.max_response_bytes,
            max_boxes=limits.max_boxes,
            max_pixels=limits.max_pixels,
            max_side=limits.max_side,
            max_image_bytes=limits.max_image_bytes,
            max_items_in_flight=limits.max_items_in_flight,
            image_cache_bytes=limits.image_cache_bytes,
            max_points=limits.max_points,
        ),
        devices=tuple(response.devices),
        precision=response.precision,
        score_calibrated=default.score_calibrated,
        score_calibrated_with_flip=default.score_calibrated_with_flip,
        score_calibrated_resolved=default.score_calibrated_resolved,
        branches=default.branches,
        network_engine=default.network_engine,
        models=tuple(map(model_info, response.models)),
        data_folders=tuple(response.data_folders),
    )


def flag_name(flag: int) -> str:
    """Returns the name of a flag, without its prefix; FLAG_<number> for a flag of a newer server."""
    try:
        return types_pb2.MaskFlag.Name(flag).removeprefix("MASK_FLAG_")  # type: ignore[arg-type]
    except ValueError:
        return f"FLAG_{flag}"


def _box_label(
    result: types_pb2.InstanceResult, box: BoxXywh, model: ModelRef, timing: Timing, mask: Rle | ItemError
) -> BoxLabel:
    index = result.instance_id
    if isinstance(mask, ItemError):
        return BoxLabel(index, box, error=mask, model=model, timing=timing)
    try:
        _check_values(result, mask)
    except BadDataset as invalid:
        return BoxLabel(index, box, error=_invalid_result(invalid), model=model, timing=timing)
    return BoxLabel(
        index=index,
        box=box,
        rle=mask,
        score=result.score,
        agreement=result.agreement if result.HasField("agreement") else None,
        area=result.area_px,
        mask_box=_box(result.mask_box) if result.HasField("mask_box") else None,
        flags=tuple(flag_name(flag) for flag in result.flags),
        model=model,
        timing=timing,
    )


def _masks(
    results: Sequence[types_pb2.InstanceResult], size_wh: Callable[[], tuple[int, int] | None]
) -> list[Rle | ItemError]:
    """Returns the mask of each result, decoded and checked, or the error of its box."""
    # Imported late: it loads OpenCV and pycocotools, which would double the time to import the client.
    from mal_train.core.masks.rle import read_codes  # noqa: PLC0415

    codes = [_code(result) for result in results]
    found = [code for code in codes if not isinstance(code, ItemError)]
    size = size_wh() if found else None
    masks = iter(read_codes([code for code in found if size in (None, code[1::-1])]))
    return [code if isinstance(code, ItemError) else _mask(code, size, masks) for code in codes]


def _code(result: types_pb2.InstanceResult) -> tuple[int, int, bytes] | ItemError:
    """Returns height, width and counts of the mask of a result, or the error of its box."""
    error = item_error(result.status) if result.HasField("status") else None
    if error is not None:
        return error
    for mask in result.masks[:_MAX_MASKS]:
        if mask.HasField("coco_rle"):
            code = mask.coco_rle
            return code.height, code.width, code.counts
    return ItemError("UNIMPLEMENTED", "MASK_FORMAT", "the result has no run-length code; update the client")


def _mask(
    code: tuple[int, int, bytes], size_wh: tuple[int, int] | None, masks: Iterator[Rle | BadDataset]
) -> Rle | ItemError:
    """Returns the next of `masks`, those of images of the right size, or an error."""
    height, width, _ = code
    if size_wh not in (None, (width, height)):
        expected_width, expected_height = size_wh or (0, 0)
        problem = BadDataset(f"mask: {width}x{height} px; the image has {expected_width}x{expected_height} px")
        return _invalid_result(problem)
    mask = next(masks)
    return _invalid_result(mask) if isinstance(mask, BadDataset) else mask


def _invalid_result(problem: BadDataset) -> ItemError:
    return ItemError("INTERNAL", "INVALID_RESULT", f"the server's result is invalid: {problem}; see its log")


def _check_values(result: types_pb2.InstanceResult, rle: Rle) -> None:
    """Raises BadDataset for a number out of its range."""
    for name, value in (("score", result.score), ("agreement", result.agreement)):
        # False for NaN.
        if not 0 <= value <= 1 + _ROUNDING:
            raise BadDataset(f"{name}: {value}; it must be from 0 to 1")
    if not 0 <= result.area_px <= rle.height * rle.width:
        raise BadDataset(f"area_px: {result.area_px}; the image has {rle.height * rle.width} px")
    box = _box(result.mask_box) if result.HasField("mask_box") else None
    if box is not None and not all(0 <= value <= _MAX_SIDE_PX for value in box):
        raise BadDataset(f"mask_box: {box}; it must be inside the image")
    if len(result.flags) > _MAX_FLAGS:
        raise BadDataset(f"flags: {len(result.flags)}; there are at most {_MAX_FLAGS}")


def _box(box: types_pb2.Box) -> BoxXywh:
    return (box.x, box.y, box.width, box.height)


def _timing(timing: types_pb2.Timing) -> Timing:
    return Timing(
        queue_s=_seconds(timing.queue),
        decode_s=_seconds(timing.decode),
        infer_s=_seconds(timing.infer),
        finish_s=_seconds(timing.finish),
        batch_size=timing.batch_size,
    )


def _seconds(duration: Duration) -> float:
    return duration.seconds + duration.nanos / 1e9
