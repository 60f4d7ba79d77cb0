"""Reads the boxes of a detector: a COCO results list, with the annotation file that names its images and categories.

In the output, `score` remains the detector's score and `mask_score` is the score of the mask.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mal_train.core.coco.annotations import (
    Annotation,
    CocoFile,
    JsonId,
    Reason,
    finite_number,
    is_id,
    read_annotation,
    read_json,
    record_id,
    reject_duplicate_ids,
    row_name,
)
from mal_train.core.coco.json_values import as_json, json_type
from mal_train.core.errors import BadDataset

MASK_SCORE = "mask_score"


def read_detections(path: Path, coco: CocoFile) -> CocoFile:
    """Returns `coco` with the rows of a results list `[{image_id, category_id, bbox, score, ...}]` as annotations.

    Rows without an `id` are numbered from 1 in list order, skipping the ids of other rows. Ids are therefore the same
    in every process and in every run.

    Args:
        path: JSON file with the results list.
        coco: names the images and categories; its annotations are ignored.

    Raises:
        BadDataset: the file is missing or not a list, or an id is repeated.
    """
    rows = read_json(path)
    if not isinstance(rows, list):
        hint = " (an object is an annotation file: give its path as ann_path)" if isinstance(rows, dict) else ""
        raise BadDataset(f"{path}: holds {json_type(rows)}{hint}; it must be a COCO results list")
    rows = _numbered(rows, str(path))
    known = {row["id"] for row in coco.categories if is_id(row.get("id"))}
    annotations = [_with_score(read_annotation(row, n, coco.images, known)) for n, row in enumerate(rows)]
    return dataclasses.replace(coco, raw={**coco.raw, "annotations": rows}, annotations=annotations)


def with_detector_scores(labeled: Mapping[str, Any], detections: CocoFile) -> dict[str, Any]:
    """Returns a `labeled_file` of detections with the detector's `score` and the score of the mask as `mask_score`."""
    rows = []
    for row, annotation in zip(labeled["annotations"], detections.annotations, strict=True):
        if not isinstance(row, dict) or "score" not in row:
            rows.append(row)
            continue
        other_fields = {key: value for key, value in row.items() if key != "score"}
        detector_score = {"score": annotation.raw["score"]} if "score" in annotation.raw else {}
        rows.append({**other_fields, **detector_score, MASK_SCORE: row["score"]})
    return {**labeled, "annotations": rows}


def _numbered(rows: list[Any], name: str) -> list[Any]:
    seen: set[JsonId] = set()
    repeated: dict[JsonId, None] = {}
    for row in rows:
        if isinstance(row, dict) and is_id(row.get("id")):
            record_id(row["id"], seen, repeated)
    reject_duplicate_ids(repeated, f"{name}: id")
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
    if annotation.problem is not None or finite_number(score) is not None:
        return annotation
    problem = f"{row_name(annotation.id)}: score {as_json(score)}; a results list needs a finite number"
    return dataclasses.replace(annotation, problem=problem, reason=Reason.BAD_SCORE)
