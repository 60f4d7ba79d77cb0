"""Writes the labeled file of a job from its plan and the result of each row.

Knows neither servers nor devices: a single run, a resumed one and a merge of shards all write through here, and so
write the same bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path
from typing import Any

from mal_train.core.coco.annotations import Annotation
from mal_train.core.coco.journal import RowFailure, RowResult
from mal_train.core.coco.output import error_fields, labeled_row
from mal_train.core.coco.plan import DatasetPlan, RowAction
from mal_train.core.coco.stream import write_transformed


class RowOutcome(Enum):
    """Content of a written row."""

    LABELED = auto()
    FAILED = auto()
    COPIED = auto()


@dataclass
class WrittenRows:
    """Counts of the rows of a labeled file.

    Attributes:
        labeled: rows with a label.
        flags: rows with a label by flag, such as BOX_CLIPPED.
        crowds: crowd regions, which were copied.
    """

    labeled: int = 0
    flags: Counter[str] = field(default_factory=Counter)
    crowds: int = 0

    def add(self, outcome: RowOutcome, written: Any, *, is_crowd: bool) -> None:
        """Counts one row as it is written."""
        self.crowds += is_crowd
        if outcome is RowOutcome.LABELED:
            self.labeled += 1
            flags = written.get("flags")
            if flags:  # an update with nothing would take longer than all else here
                self.flags.update(flags)


FinishRow = Callable[[int, Any, Annotation, RowOutcome], Any]
"""Function from the index of a row, the row to write, the parsed row and its outcome to the row that is written."""

NameFailure = Callable[[Annotation, RowFailure], RowFailure]
"""Function that receives each failure, and returns it with a message that names the row where that is needed."""


def write_labeled_file(
    plan: DatasetPlan,
    result_of: Callable[[int], RowResult],
    output: Path,
    provenance: Mapping[str, Any],
    *,
    finish: FinishRow,
    on_failure: NameFailure,
    counts: WrittenRows | None = None,
) -> WrittenRows:
    """Writes the labeled file and returns the counts of its rows.

    Args:
        plan: the rows.
        result_of: result by the index of a row to label.
        output: the file.
        provenance: what made the masks.
        finish: changes each row before it is written.
        on_failure: receives the failures in the order of the file.
        counts: receives the counts while the file is written, and is returned; None: new ones.

    Raises:
        OutputError: the disk is full, for example; the old file is intact.
        BadDataset: the annotation file changed after the plan was made; the old file is intact.
    """
    counted = WrittenRows() if counts is None else counts

    def fields_of(index: int, annotation: Annotation) -> tuple[RowOutcome, Mapping[str, Any] | None]:
        action = plan.actions[index]
        if action == RowAction.REPORT:
            on_failure(annotation, RowFailure("INVALID_ARGUMENT", str(annotation.reason), annotation.problem or ""))
            return RowOutcome.FAILED, None
        if action != RowAction.LABEL:
            return RowOutcome.COPIED, None
        result = result_of(index)
        if "label" in result:
            return RowOutcome.LABELED, result["label"]
        failure = on_failure(annotation, RowFailure(*result["failed"]))
        return RowOutcome.FAILED, error_fields(failure.reason or failure.code, failure.message)

    def change(index: int, row: Any, annotation: Annotation) -> Any:
        outcome, fields = fields_of(index, annotation)
        keeps_mask = plan.actions[index] == RowAction.COPY
        written = labeled_row(row, annotation, plan.head.images, fields, keep_existing=keeps_mask)
        counted.add(outcome, written, is_crowd=plan.actions[index] == RowAction.COPY_CROWD)
        return finish(index, written, annotation, outcome)

    write_transformed(plan.head, output, change, provenance, plan.detections)
    return counted
