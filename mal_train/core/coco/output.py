"""Labeled COCO files: what a label adds to its row, and a file that is written whole or not at all."""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mal_train.core.atomic_io import atomic_write
from mal_train.core.coco.annotations import Annotation, CocoFile, ImageInfo, JsonId, Reason, called
from mal_train.core.masks.rle import encode_region

PROVENANCE_KEY = "mask_auto_labeler"
"""Top-level key of a labeled file that says what made its masks."""

_CHUNK = 2000


def answer_fields(
    segmentation: Mapping[str, Any],
    area: float,
    score: float,
    flags: Sequence[str] = (),
    agreement: float | None = None,
) -> dict[str, Any]:
    """Fields that a label adds to its annotation, the same whoever made it.

    Args:
        segmentation: COCO run-length code, `Rle.to_coco()`.
        area: mask pixels.
        score: in [0, 1].
        flags: names such as BOX_CLIPPED.
        agreement: IoU of student and teacher in [0, 1], written when it was asked for.
    """
    fields = {"segmentation": dict(segmentation), "area": float(area), "score": float(score), "flags": list(flags)}
    if agreement is not None:
        fields["agreement"] = float(agreement)
    return fields


def error_fields(reason: str, message: str) -> dict[str, Any]:
    """Fields that a box without a label gets: `error` with a reason to sort by and a sentence to read."""
    return {"error": {"reason": str(reason), "message": message}}


def labeled_file(
    coco: CocoFile,
    answers: Mapping[JsonId, Mapping[str, Any]],
    provenance: Mapping[str, Any] | None = None,
    keep: Collection[JsonId] = (),
) -> dict[str, Any]:
    """The user's file with masks: every row in its place, every field and the box as given, answers laid over.

    A labeled row gets `answer_fields`, whose `area` is that of the mask. A row that failed, or had a fault when it
    was read, keeps its fields and gets `error`, score 0, area 0 and, where the image size is known, an empty mask, so
    that COCO tools still load the file and worst-first order shows it first. A row without any answer counts as
    failed (NOT_ANSWERED): nothing is skipped in silence. Crowd rows are copied with the flag CROWD.

    Args:
        coco: the file that was labeled.
        answers: by annotation id, `answer_fields` or `error_fields`.
        provenance: what made the masks; stored under `PROVENANCE_KEY`, in place of an earlier one.
        keep: ids whose rows are copied as they are (masks that the user wants to keep).
    """
    rows = [
        labeled_row(
            row,
            annotation,
            coco.images,
            None if annotation.id is None else answers.get(annotation.id),
            is_kept=annotation.id is not None and annotation.id in keep,
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
    answer: Mapping[str, Any] | None,
    *,
    is_kept: bool = False,
) -> Any:
    """One row of `labeled_file`: `row` as the file holds it and `annotation` as it was read.

    Args:
        row: what stands in the file, of any type.
        annotation: the same, read.
        images: of the file, by id.
        answer: `answer_fields` or `error_fields`; None when there is none.
        is_kept: copied as it is unless there is an answer.
    """
    if not isinstance(row, dict):
        return row
    if answer is None and is_kept:
        return row
    if answer is None and annotation.problem is None and annotation.iscrowd:
        return {**row, "flags": [str(Reason.CROWD)]}
    if answer is None:
        missing = Reason.NOT_ANSWERED, f"{called(annotation.id)}: no label was made"
        reason, text = missing if annotation.problem is None else (str(annotation.reason), annotation.problem)
        answer = error_fields(reason, text)
    return _answered(images, row, annotation, answer)


def write_json_atomic(path: Path, obj: Mapping[str, Any]) -> None:
    """Writes an object as JSON so that the file is the old one or the new one, whatever happens in between.

    NaN in the user's own fields is written as they gave it (Python and pycocotools read it).

    Raises:
        OutputError: folder missing, no permission, disk full; the old file is intact and no temporary file stays.
    """
    with atomic_write(path) as file:
        for piece in _json_pieces(obj):
            file.write(piece.encode("ascii"))
        file.write(b"\n")


def _json_pieces(obj: Mapping[str, Any]) -> Iterator[str]:
    """JSON text of an object in pieces: one string of a million annotations would double the memory."""
    yield "{"
    for at, (key, value) in enumerate(obj.items()):
        yield f"{', ' if at else ''}{json.dumps(str(key))}: "
        if not isinstance(value, list):
            yield json.dumps(value)
            continue
        yield "["
        for start in range(0, len(value), _CHUNK):
            yield (", " if start else "") + json.dumps(value[start : start + _CHUNK])[1:-1]
        yield "]"
    yield "}"


def _answered(
    images: Mapping[JsonId, ImageInfo], row: Mapping[str, Any], annotation: Annotation, fields: Mapping[str, Any]
) -> dict[str, Any]:
    # What an earlier run left must not stand beside this run's answer.
    answered = {key: value for key, value in row.items() if key not in ("error", "score", "flags", "agreement")}
    answered.setdefault("iscrowd", 0)
    if "error" not in fields:
        return {**answered, **fields}
    image = images.get(annotation.image_id) if annotation.image_id is not None else None
    answered.pop("segmentation", None)
    if image is not None and image.width is not None and image.height is not None:
        nothing = np.zeros((0, 0), dtype=np.bool_)
        answered["segmentation"] = encode_region(nothing, 0, 0, (image.height, image.width)).to_coco()
    return {**answered, "area": 0.0, "score": 0.0, "flags": [], **fields}
