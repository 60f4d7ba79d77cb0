"""Builds labeled COCO files and writes them atomically."""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mal_train.core.coco.annotations import Annotation, CocoFile, ImageInfo, JsonId, Reason, row_name
from mal_train.core.coco.json_file import create_json
from mal_train.core.masks.geometry import box_pixels
from mal_train.core.masks.rle import encode_region

PROVENANCE_KEY = "mask_auto_labeler"
"""Top-level key of a labeled file with the provenance of its masks."""

MASK_SCORE = "mask_score"
"""Score of the mask in a row whose `score` is that of a detector."""

CORRECTED = "corrected"
"""Field of a row whose mask a user has corrected: it obeys the points of the row, of which one is in the box."""

_RESULT_FIELDS = ("error", "score", MASK_SCORE, "flags", "agreement", CORRECTED)
_ROWS_PER_CHUNK = 2000


def label_fields(
    segmentation: Mapping[str, Any],
    area: float,
    score: float,
    flags: Sequence[str] = (),
    agreement: float | None = None,
) -> dict[str, Any]:
    """Returns the fields that a label adds to its annotation, in the client and in local inference.

    Args:
        segmentation: COCO run-length encoding, `Rle.to_coco()`.
        area: number of mask pixels.
        score: score of the mask, in [0, 1].
        flags: names such as BOX_CLIPPED.
        agreement: IoU of the masks of student and teacher in [0, 1]; None omits the field.
    """
    fields = {"segmentation": dict(segmentation), "area": float(area), "score": float(score), "flags": list(flags)}
    if agreement is not None:
        fields["agreement"] = float(agreement)
    return fields


def mask_score_of(row: Mapping[str, Any]) -> Any:
    """Returns the score of the mask of a labeled row: `mask_score`, or `score` in a row without a detector's score."""
    return row.get(MASK_SCORE, row.get("score"))


def error_fields(reason: str, message: str) -> dict[str, Any]:
    """Returns the fields of a box without a label: `error` with a machine-readable reason and a message."""
    return {"error": {"reason": str(reason), "message": message}}


def labeled_file(
    coco: CocoFile,
    results: Mapping[JsonId, Mapping[str, Any]],
    provenance: Mapping[str, Any] | None = None,
    keep: Collection[JsonId] = (),
) -> dict[str, Any]:
    """Returns the user's file with masks. Keeps the order of rows, unknown fields and the boxes as given.

    A labeled row gets `label_fields`; its `area` is the area of the mask, and one with a point in its box gets
    `corrected`. A row that came with a `score`, as detections do, keeps it; the score of its mask is `mask_score`. A
    row with `flags` and without `mask_score` was labeled before: its `score` is that of the former mask and is
    replaced. A failed or invalid row keeps its fields and gets `error`, score 0, area 0 and, if the image size is
    known, an empty mask: COCO tools can load the file, and the row comes first when sorted by score. A row without a
    result counts as failed (NOT_ANSWERED), so no row is skipped silently. Crowd rows are copied with the flag CROWD.

    Args:
        coco: the file that was labeled.
        results: `label_fields` or `error_fields` by annotation id.
        provenance: origin of the masks, stored under `PROVENANCE_KEY`; replaces the entry of an earlier run.
        keep: ids of rows to copy unchanged unless there is a result (existing masks that the user keeps).
    """
    rows = [
        labeled_row(
            row,
            annotation,
            coco.images,
            None if annotation.id is None else results.get(annotation.id),
            keep_existing=annotation.id is not None and annotation.id in keep,
        )
        for row, annotation in zip(coco.raw["annotations"], coco.annotations, strict=True)
    ]
    labeled = {**coco.raw, "annotations": rows}
    labeled.pop(PROVENANCE_KEY, None)
    if provenance is not None:
        labeled[PROVENANCE_KEY] = dict(provenance)
    return labeled


def labeled_row(
    row: Any,
    annotation: Annotation,
    images: Mapping[JsonId, ImageInfo],
    result: Mapping[str, Any] | None,
    *,
    keep_existing: bool = False,
) -> Any:
    """Returns one row of `labeled_file`.

    Args:
        row: JSON value of the row, of any type.
        annotation: the parsed row.
        images: images of the file, by id.
        result: `label_fields` or `error_fields`; None if there is no result.
        keep_existing: copy the row unchanged if there is no result.
    """
    if not isinstance(row, dict):
        return row
    if result is None and keep_existing:
        return row
    if result is None and annotation.problem is None and annotation.iscrowd:
        return {**row, "flags": [str(Reason.CROWD)]}
    if result is None:
        missing = Reason.NOT_ANSWERED, f"{row_name(annotation.id)}: no label was made"
        reason, text = missing if annotation.problem is None else (str(annotation.reason), annotation.problem)
        result = error_fields(reason, text)
    return _with_result(images, row, annotation, result)


def _is_corrected(annotation: Annotation, fields: Mapping[str, Any]) -> bool:
    """Returns True if a point states a pixel of the box; every mask obeys a negative one outside of it."""
    if not annotation.points:
        return False
    height, width = fields["segmentation"]["size"]
    region = box_pixels(annotation.box_xywh, (height, width))
    return any(point.is_positive or region.contains(*point.pixel) for point in annotation.points)


def write_json_atomic(path: Path, obj: Mapping[str, Any]) -> None:
    """Writes an object as JSON, atomically; compressed if the name ends in `.gz`.

    NaN in the user's fields is written as NaN, which Python and pycocotools read.

    Raises:
        OutputError: folder missing, no permission, disk full. The old file is unchanged and no temporary file remains.
    """
    with create_json(path) as file:
        for piece in _json_pieces(obj):
            file.write(piece.encode("ascii"))
        file.write(b"\n")


def _json_pieces(obj: Mapping[str, Any]) -> Iterator[str]:
    """Yields an object as JSON text in pieces; a single string for a million annotations would double the memory."""
    yield "{"
    for index, (key, value) in enumerate(obj.items()):
        yield f"{', ' if index else ''}{json.dumps(str(key))}: "
        if not isinstance(value, list):
            yield json.dumps(value)
            continue
        yield "["
        for start in range(0, len(value), _ROWS_PER_CHUNK):
            yield (", " if start else "") + json.dumps(value[start : start + _ROWS_PER_CHUNK])[1:-1]
        yield "]"
    yield "}"


def _with_result(
    images: Mapping[JsonId, ImageInfo], row: Mapping[str, Any], annotation: Annotation, fields: Mapping[str, Any]
) -> dict[str, Any]:
    has_own_score = "score" in row and (MASK_SCORE in row or "flags" not in row)
    # Remove the result of an earlier run.
    labeled = {key: value for key, value in row.items() if key not in _RESULT_FIELDS}
    labeled.setdefault("iscrowd", 0)
    scores = {"score": row["score"], MASK_SCORE: fields.get("score", 0.0)} if has_own_score else {}
    if "error" not in fields:
        if row.get("iscrowd") and not annotation.iscrowd:
            labeled["iscrowd"] = 0  # read as an object, and COCO ignores the mask of a crowd
        flags = [str(Reason.BOX_ROTATED)] if annotation.is_rotated else []
        corrected = {CORRECTED: True} if _is_corrected(annotation, fields) else {}
        return {**labeled, **fields, "flags": [*fields["flags"], *flags], **scores, **corrected}
    image = images.get(annotation.image_id) if annotation.image_id is not None else None
    labeled.pop("segmentation", None)
    if image is not None and image.width is not None and image.height is not None:
        empty = np.zeros((0, 0), dtype=np.bool_)
        labeled["segmentation"] = encode_region(empty, 0, 0, (image.height, image.width)).to_coco()
    return {**labeled, "area": 0.0, "score": 0.0, "flags": [], **fields, **scores}
