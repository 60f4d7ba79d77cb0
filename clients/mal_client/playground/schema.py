"""What the page and its server say to each other, as JSON: read and checked here, written here. No HTTP, no gRPC."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mal_client.errors import CallCancelled, CallTimedOut, InvalidRequest, ItemError, ServerUnavailable
from mal_client.review.queue import FLAG_MEANINGS
from mal_client.types import BoxLabel, BoxXywh, LabelOptions, ModelRef, ServerInfo
from mal_train.core.errors import BadImage, ConfigError, InputError, MalError
from mal_train.core.settings import Branch, can_compare

MAX_BOXES = 10_000
"""Boxes of one call of the page; the server takes them in calls of its own limit."""

MAX_ID_CHARS = 64

Json = dict[str, Any]


class BadRequest(InputError):
    """The page sent something that this server cannot read; a page of another version, or no page at all."""


@dataclass(frozen=True)
class AskedBox:
    """A box under the page's name for it; numbers that are none become NaN, and the server answers for that box."""

    key: str
    box: BoxXywh


@dataclass(frozen=True)
class LabelRequest:
    """What the page asks.

    Attributes:
        options: for the whole image.
        groups: boxes by the options that they are to be labeled with, one group for each threshold.
    """

    options: LabelOptions
    groups: tuple[tuple[LabelOptions, tuple[AskedBox, ...]], ...]


def read_label_request(body: Any) -> LabelRequest:
    """`{"boxes": [{"id", "box": [x, y, w, h], "threshold"?}], "options": {"branch"?, "threshold"?, "flip"?, …}}`.

    Raises:
        BadRequest: of another shape, an id twice, an unknown branch.
        ConfigError: a threshold outside (0, 1).
    """
    boxes, given = member(body, "boxes", list), member(body, "options", dict)
    if len(boxes) > MAX_BOXES:
        raise BadRequest(f"boxes: {len(boxes)}; at most {MAX_BOXES} at a time")
    image_threshold = _number_or_none(given, "threshold")
    options = LabelOptions(
        _branch(given.get("branch")),
        image_threshold,
        agreement=_flag(given, "agreement"),
        flip=_flag(given, "flip"),
        model=None if given.get("model") is None else member(given, "model", str),
    )
    groups: dict[float | None, list[AskedBox]] = {}
    seen: set[str] = set()
    for row in boxes:
        key = member(row, "id", str)
        if len(key) > MAX_ID_CHARS or key in seen:
            raise BadRequest(f"boxes: id {key[:MAX_ID_CHARS]!r} is too long or stands there twice")
        seen.add(key)
        own = _number_or_none(row, "threshold")
        asked = AskedBox(key, read_box(member(row, "box", list)))
        groups.setdefault(image_threshold if own is None else own, []).append(asked)
    return LabelRequest(
        options,
        tuple((replace(options, threshold=threshold), tuple(of)) for threshold, of in groups.items()),
    )


def read_box(numbers: list[Any]) -> BoxXywh:
    """x, y, w, h; NaN for what is no number, so that one bad box does not take the others with it."""
    if len(numbers) != 4:
        return (math.nan, math.nan, math.nan, math.nan)
    x, y, w, h = (float(v) if _is_number(v) else math.nan for v in numbers)
    return (x, y, w, h)


def label_line(key: str, label: BoxLabel) -> Json:
    """One answer for the page."""
    if label.error is not None or label.rle is None:
        error = label.error or ItemError("INTERNAL", "", "the answer holds no mask")
        return {"id": key, "error": error_json(error)}
    return {
        "id": key,
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
    """Returns an error as JSON; the page shows it next to its box."""
    return {"code": error.code, "reason": error.reason, "message": error.message}


def failure(error: MalError) -> ItemError:
    """A failed call, as the error of each box that has no answer yet."""
    codes: tuple[tuple[type[MalError], str], ...] = (
        (ServerUnavailable, "UNAVAILABLE"),
        (CallTimedOut, "DEADLINE_EXCEEDED"),
        (CallCancelled, "CANCELLED"),
        (ConfigError, "INVALID_ARGUMENT"),
        (InputError, "INVALID_ARGUMENT"),
    )
    code = next((name for kind, name in codes if isinstance(error, kind)), "INTERNAL")
    reason = error.reason if isinstance(error, BadImage | InvalidRequest) else ""
    return ItemError(code, reason, str(error))


def model_json(model: ModelRef) -> Json:
    """Which weights answered."""
    return {"name": model.name, "checkpoint_sha256": model.checkpoint_sha256, "branch": str(model.branch)}


def server_json(address: str, info: ServerInfo) -> Json:
    """What the page shows of the labeling server, and what it has to keep to."""
    return {
        "address": address,
        "version": info.version,
        "model": model_json(info.model),
        "models": [one.model.name for one in info.models],
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


def member(body: Any, name: str, kind: type[Any]) -> Any:
    """A member of a JSON object. Raises BadRequest where it is missing or of another type."""
    value = body.get(name) if isinstance(body, dict) else None
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise BadRequest(f"{name}: {type(value).__name__}; {kind.__name__} is needed; reload the page")
    return value


def _branch(name: Any) -> Branch | None:
    if name is None:
        return None
    try:
        return Branch(name)
    except ValueError:
        raise BadRequest(f"branch: {name!r}; one of {', '.join(Branch)} is needed") from None


def _flag(given: Mapping[str, Any], name: str) -> bool:
    value = given.get(name, False)
    if not isinstance(value, bool):
        raise BadRequest(f"{name}: {value!r}; true or false is needed")
    return value


def _number_or_none(given: Mapping[str, Any], name: str) -> float | None:
    value = given.get(name)
    if value is not None and not _is_number(value):
        raise BadRequest(f"{name}: {value!r}; a number is needed")
    return None if value is None else float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
