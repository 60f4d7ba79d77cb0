"""Reads the boxes of a detector: a COCO results list, with the annotation file that names its images and categories.

In the output, `score` remains the detector's score and `mask_score` is the score of the mask (`output.labeled_file`).
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mal_train.core.coco.annotations import (
    Annotation,
    CocoFile,
    ImageInfo,
    JsonId,
    Reason,
    is_id,
    read_annotation,
    record_id,
    reject_duplicate_ids,
    row_name,
)
from mal_train.core.coco.json_reader import JsonMemberReader
from mal_train.core.coco.json_values import as_json
from mal_train.core.errors import BadDataset
from mal_train.core.numbers import finite_number
from mal_train.core.settings import COCO_RULES, RowRules


class DetectionRows:
    """Rows of a results list `[{image_id, category_id, bbox, score, ...}]`, read from the file one by one.

    Rows without an `id` are numbered from 1 in list order, skipping the ids of other rows. Ids are therefore the same
    in every process and in every run.

    Args:
        path: JSON file with the results list; read once here.
        images: images by id.
        rules: how crowd regions and rotated boxes are read.

    Attributes:
        path: the file.
        sha256: SHA-256 of the file, 64 hex digits.
        count: number of rows.

    Raises:
        BadDataset: the file is missing or not a list, or an id is repeated.
    """

    def __init__(self, path: Path, images: Mapping[JsonId, ImageInfo], rules: RowRules = COCO_RULES) -> None:
        self.path = path
        self.count = 0
        self._images = images
        self._rules = rules
        self._ids: set[JsonId] = set()
        repeated: dict[JsonId, None] = {}
        reader = JsonMemberReader(path)
        for row in reader.rows():
            self.count += 1
            if isinstance(row, dict) and is_id(row.get("id")):
                record_id(row["id"], self._ids, repeated)
        reject_duplicate_ids(repeated, f"{path}: id")
        self.sha256 = reader.sha256()

    def __iter__(self) -> Iterator[tuple[Any, Annotation]]:
        """Yields (JSON value with its id, parsed row) of each row. Raises BadDataset if the file has changed."""
        reader = JsonMemberReader(self.path)
        for index, row in enumerate(self._numbered(reader.rows())):
            yield row, _with_score(read_annotation(row, index, self._images, self._rules))
        if reader.sha256() != self.sha256:
            raise BadDataset(f"{self.path}: changed while the job ran; start the job again")

    def _numbered(self, rows: Iterator[Any]) -> Iterator[Any]:
        number = 0
        for row in rows:
            if not isinstance(row, dict) or "id" in row:
                yield row
                continue
            number += 1
            while number in self._ids:
                number += 1
            yield {**row, "id": number}


def read_detections(path: Path, coco: CocoFile, rules: RowRules = COCO_RULES) -> CocoFile:
    """Returns `coco` with the rows of a results list as annotations (`DetectionRows`).

    Args:
        path: JSON file with the results list.
        coco: names the images and categories; its annotations are ignored.
        rules: how crowd regions and rotated boxes are read.

    Raises:
        BadDataset: the file is missing or not a list, or an id is repeated.
    """
    rows = list(DetectionRows(path, coco.images, rules))
    raw = {**coco.raw, "annotations": [row for row, _ in rows]}
    return dataclasses.replace(coco, raw=raw, annotations=[annotation for _, annotation in rows])


def _with_score(annotation: Annotation) -> Annotation:
    score = annotation.raw.get("score")
    if annotation.problem is not None or finite_number(score) is not None:
        return annotation
    problem = f"{row_name(annotation.id)}: score {as_json(score)}; a results list needs a finite number"
    return dataclasses.replace(annotation, problem=problem, reason=Reason.BAD_SCORE)
