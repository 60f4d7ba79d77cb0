"""Boxes of a detector as input: a COCO results list, read against the file that names its images and categories.

`score` of a row is the detector's and stays so in the output; the mask's own stands beside it as `mask_score`.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mal_train.core.coco.annotations import (
    Annotation,
    CocoFile,
    JsonId,
    Reason,
    called,
    is_id,
    kind,
    note_id,
    read_annotation,
    read_json,
    refuse_repeated,
)
from mal_train.core.errors import BadDataset

MASK_SCORE = "mask_score"


def read_detections(path: Path, coco: CocoFile) -> CocoFile:
    """The boxes of a results list `[{image_id, category_id, bbox, score, ...}]` in the place of a file's annotations.

    A row without an `id` gets one: counting from 1 in the order of the list, ids that rows bring along left out. The
    same list thus has the same ids in every process and on every day.

    Args:
        path: JSON.
        coco: names images and categories; its annotations are not looked at.

    Raises:
        BadDataset: no such file, no list, or an id that stands twice.
    """
    rows = read_json(path)
    if not isinstance(rows, list):
        hint = " (an object is an annotation file: give its path as ann_path)" if isinstance(rows, dict) else ""
        raise BadDataset(f"{path}: holds {kind(rows)}{hint}; a COCO results list is needed")
    rows = _numbered(rows, str(path))
    known = {row["id"] for row in coco.categories if is_id(row.get("id"))}
    annotations = [_with_score(read_annotation(row, at, coco.images, known)) for at, row in enumerate(rows)]
    return dataclasses.replace(coco, raw={**coco.raw, "annotations": rows}, annotations=annotations)


def with_detector_scores(labeled: Mapping[str, Any], detections: CocoFile) -> dict[str, Any]:
    """A `labeled_file` of detections with `score` as the detector gave it and the mask's own as `mask_score`."""
    rows = []
    for row, annotation in zip(labeled["annotations"], detections.annotations, strict=True):
        if not isinstance(row, dict) or "score" not in row:
            rows.append(row)
            continue
        kept = {key: value for key, value in row.items() if key != "score"}
        own = {"score": annotation.raw["score"]} if "score" in annotation.raw else {}
        rows.append({**kept, **own, MASK_SCORE: row["score"]})
    return {**labeled, "annotations": rows}


def _numbered(rows: list[Any], name: str) -> list[Any]:
    seen: set[JsonId] = set()
    twice: dict[JsonId, None] = {}
    for row in rows:
        if isinstance(row, dict) and is_id(row.get("id")):
            note_id(row["id"], seen, twice)
    refuse_repeated(twice, f"{name}: id")
    number = 0
    result = []
    for row in rows:
        if isinstance(row, dict) and "id" not in row:
            number += 1
            while number in seen:
                number += 1
            row = {**row, "id": number}  # noqa: PLW2901
        result.append(row)
    return result


def _with_score(annotation: Annotation) -> Annotation:
    score = annotation.raw.get("score")
    is_number = isinstance(score, int | float) and not isinstance(score, bool) and math.isfinite(score)
    if annotation.problem is not None or is_number:
        return annotation
    problem = f"{called(annotation.id)}: score {json.dumps(score)}; a finite number is needed in a results list"
    return dataclasses.replace(annotation, problem=problem, reason=Reason.BAD_SCORE)
