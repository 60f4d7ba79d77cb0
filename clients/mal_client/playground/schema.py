"""Reads, validates and writes the JSON messages between the page and its server. Knows nothing of HTTP and gRPC."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mal_client.errors import (
    CallCancelled,
    CallTimedOut,
    InvalidRequest,
    ItemError,
    ServerUnavailable,
    strip_box_number,
)
from mal_client.review.queue import FLAG_MEANINGS
from mal_client.types import BoxLabel, BoxXywh, LabelOptions, ModelRef, Point, ServerInfo
from mal_train.core.coco.fields import points_of
from mal_train.core.errors import BadImage, ConfigError, InputError, MalError
from mal_train.core.settings import Branch, can_compare

MAX_BOXES = 10_000
"""Boxes per request of the page; the client splits them by the limit of the labeling server."""

MAX_ID_CHARS = 64

Json = dict[str, Any]


class BadRequest(InputError):
    """A request that does not follow the schema, for example from a page of another version."""


@dataclass(frozen=True)
class PageBox:
    """A box with the ID that the page gave it; values that are not numbers are NaN, which fails only this box."""

    id: str
    box: BoxXywh
    points: tuple[Point, ...] = ()


@dataclass(frozen=True)
class LabelRequest:
    """Boxes of one image to label.

    Attributes:
        options: options of the image.
        groups: boxes by their options, one group for each threshold.
    """

    options: LabelOptions
    groups: tuple[tuple[LabelOptions, tuple[PageBox, ...]], ...]


def read_label_request(body: Any) -> LabelRequest:
    """Reads `{"boxes": [{"id", "box": [x, y, w, h], "points"?, "threshold"?}], "options": {"branch"?, "flip"?, …}}`.

    Raises:
        BadRequest: the body has another shape, an ID is repeated, or the branch is unknown.
        ConfigError: a threshold is outside (0, 1).
    """
    boxes, fields = member(body, "boxes", list), member(body, "options", dict)
    if len(boxes) > MAX_BOXES:
        raise BadRequest(f"boxes: {len(boxes)}; at most {MAX_BOXES} per request")
    image_threshold = _number_or_none(fields, "threshold")
    options = LabelOptions(
        _branch(fields.get("branch")),
        image_threshold,
        agreement=_flag(fields, "agreement"),
        flip=_flag(fields, "flip"),
        model=None if fields.get("model") is None else member(fields, "model", str),
    )
    groups: dict[float | None, list[PageBox]] = {}
    seen: set[str] = set()
    for row in boxes:
        box_id = member(row, "id", str)
        if len(box_id) > MAX_ID_CHARS:
            raise BadRequest(f"boxes: id {box_id[:MAX_ID_CHARS]!r}… has more than {MAX_ID_CHARS} characters")
        if box_id in seen:
            raise BadRequest(f"boxes: id {box_id!r} is used more than once")
        seen.add(box_id)
        threshold = _number_or_none(row, "threshold")
        box = PageBox(box_id, read_box(member(row, "box", list)), read_points(row))
        groups.setdefault(image_threshold if threshold is None else threshold, []).append(box)
    return LabelRequest(
        options,
        tuple((replace(options, threshold=threshold), tuple(group)) for threshold, group in groups.items()),
    )


def read_box(numbers: list[Any]) -> BoxXywh:
    """Returns x, y, w, h, with NaN for values that are not numbers, so that a bad box does not fail the others."""
    if len(numbers) != 4:
        return (math.nan, math.nan, math.nan, math.nan)
    x, y, w, h = (float(v) if _is_number(v) else math.nan for v in numbers)
    return (x, y, w, h)


def read_points(row: Mapping[str, Any]) -> tuple[Point, ...]:
    """Returns the `points` of a row, as in a COCO file. Raises BadRequest for another form."""
    points, problem = points_of(row)
    if problem is not None:
        raise BadRequest(problem)
    return points


def label_line(box_id: str, label: BoxLabel) -> Json:
    """Returns the line of one box."""
    if label.error is not None or label.rle is None:
        error = label.error or ItemError("INTERNAL", "", "label has no mask")
        return {"id": box_id, "error": error_json(error)}
    return {
        "id": box_id,
        "rle": label.rle.to_coco(),
        "score": label.score,
        "agreement": label.agreement,
        "area": label.area,
        "mask_box": label.mask_box,
        "flags": list(label.flags),
        "model": None if label.model is None else model_json(label.model),
        "batch_size": 0 if label.timing is None else label.timing.batch_size,
        "infer_s": 0.0 if label.timing is None else label.timing.infer_s,
    }


def error_json(error: ItemError) -> Json:
    """Returns an error as JSON; the page shows it beside its box."""
    return {"code": error.code, "reason": error.reason, "message": strip_box_number(error.message)}


def item_error(error: MalError) -> ItemError:
    """Converts the error of a call to the error of each of its boxes."""
    codes: tuple[tuple[type[MalError], str], ...] = (
        (ServerUnavailable, "UNAVAILABLE"),
        (CallTimedOut, "DEADLINE_EXCEEDED"),
        (CallCancelled, "CANCELLED"),
        (ConfigError, "INVALID_ARGUMENT"),
        (InputError, "INVALID_ARGUMENT"),
    )
    code = next((name for error_type, name in codes if isinstance(error, error_type)), "INTERNAL")
    reason = error.reason if isinstance(error, BadImage | InvalidRequest) else ""
    return ItemError(code, reason, str(error))


def model_json(model: ModelRef) -> Json:
    """Returns the name, weights and branch of a model."""
    return {"name": model.name, "checkpoint_sha256": model.checkpoint_sha256, "branch": str(model.branch)}


def server_json(address: str, info: ServerInfo) -> Json:
    """Returns the properties and limits of the labeling server that the page needs."""
    return {
        "address": address,
        "version": info.version,
        "model": model_json(info.model),
        "models": [row.model.name for row in info.models],
        "arch": info.arch,
        "devices": list(info.devices),
        "precision": info.precision,
        "mask_thresholds": list(info.mask_thresholds),
        "score_meaning": info.score_meaning(),
        "categories": list(info.categories.values()),
        "branches": [str(branch) for branch in info.known_branches],
        "can_agree": can_compare(info.known_branches),
        "flags": dict(FLAG_MEANINGS),
        "limits": vars(info.limits),
    }


def member(body: Any, name: str, expected: type[Any]) -> Any:
    """Returns a member of a JSON object. Raises BadRequest if it is missing or has another type."""
    value = body.get(name) if isinstance(body, dict) else None
    if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
        raise BadRequest(f"{name}: {type(value).__name__}; expected {expected.__name__}; reload the page")
    return value


def _branch(name: Any) -> Branch | None:
    if name is None:
        return None
    try:
        return Branch(name)
    except ValueError:
        raise BadRequest(f"branch: {name!r}; expected one of {', '.join(Branch)}") from None


def _flag(options: Mapping[str, Any], name: str) -> bool:
    value = options.get(name, False)
    if not isinstance(value, bool):
        raise BadRequest(f"{name}: {value!r}; expected true or false")
    return value


def _number_or_none(options: Mapping[str, Any], name: str) -> float | None:
    value = options.get(name)
    if value is not None and not _is_number(value):
        raise BadRequest(f"{name}: {value!r}; expected a number")
    return None if value is None else float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
