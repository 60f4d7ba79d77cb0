"""Results of a job by row: those of an earlier run, from the journal, and those of this run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from mal_train.core.coco.journal import Journal, RowFailure, RowResult, failed
from mal_train.core.coco.plan import DatasetPlan

NOT_LABELED: Final = RowFailure("INTERNAL", "NOT_ANSWERED", "no label was made")
"""Failure of a row without a result."""


class JobResults:
    """Rows of a job that need a label, and the results of all rows.

    A row that failed in an earlier run is tried again.

    Args:
        plan: the rows.
        journal: the open journal of the job.
        has_image: tells by index whether an image belongs to this run; None: all do.
        complete_images: label all rows of an image with a pending row, for labels that depend on each other.

    Attributes:
        pending: rows that need a label.
        retried: number of rows that failed in an earlier run.
        unavailable: failures that a later run may not have; they are not in the journal.
    """

    def __init__(
        self,
        plan: DatasetPlan,
        journal: Journal,
        has_image: Callable[[int], bool] | None = None,
        *,
        complete_images: bool = False,
    ) -> None:
        self.pending = plan.pending(journal.has_label, has_image, complete_images=complete_images)
        self.retried = sum(map(journal.has_failure, self.pending.indices.tolist()))
        self.unavailable: dict[int, RowFailure] = {}
        self._journal = journal

    @property
    def label_count(self) -> int:
        """Number of rows with a label, of this run or an earlier one."""
        return self._journal.label_count

    def resume_message(self) -> str | None:
        """Returns the message for a run that continues an earlier one; None for a run that does not."""
        if not self.label_count:
            return None
        retried = f", {self.retried} failed and are tried again" if self.retried else ""
        return (
            f"{self._journal.path}: resuming an unfinished run; {self.label_count} of {len(self.pending.to_label)} "
            f"boxes are labeled{retried}"
        )

    def add(self, results: Mapping[int, RowResult]) -> None:
        """Adds results by row to the journal. Raises OutputError when the disk is full."""
        self._journal.append(results)

    def result(self, index: int, missing: RowFailure = NOT_LABELED) -> RowResult:
        """Returns the result of a row; the failure `missing` when it has none."""
        return self._journal.result(index) or failed(self.unavailable.get(index, missing))
