"""Writes the output of `mal-train inference` from the results of its boxes, and compares masks in the same pass."""

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from mal_train.core.coco.annotations import Annotation, Reason, row_name
from mal_train.core.coco.ground_truth import read_ground_truth
from mal_train.core.coco.journal import RowFailure, RowResult
from mal_train.core.coco.labeled_output import RowOutcome, write_labeled_file
from mal_train.core.coco.left_out import ignored_rows
from mal_train.core.coco.output import mask_score_of
from mal_train.core.coco.plan import DatasetPlan
from mal_train.core.console import Console
from mal_train.core.errors import BadGroundTruth
from mal_train.core.masks import rle
from mal_train.core.metrics.evaluator import Evaluator
from mal_train.core.metrics.lvis import Federation
from mal_train.core.metrics.report import EvaluationReport
from mal_train.core.storage.addresses import redact

MAX_MESSAGES: Final = 1000
"""Different messages of failures that are printed; the output has all of them."""

_OTHERS: Final = "other reasons; each annotation of the output has its own in `error`"


class OutputWriter:
    """Writer of the labeled file, which counts and prints the failures.

    Args:
        plan: the rows.
        console: prints progress and failures.
        compare: add the IoU with the mask of the input file to each label, for `report`. Keeps the codes of both masks
            and some 600 bytes of each box in memory; `report` takes up to 4 400 bytes more of each.

    Attributes:
        labeled: number of boxes with a mask.
        failed: number of boxes without a mask, by reason.
        crowds: crowd regions, which are copied.
    """

    def __init__(self, plan: DatasetPlan, console: Console, *, compare: bool) -> None:
        self.labeled = 0
        self.failed: Counter[str] = Counter()
        self.crowds = 0
        self._plan = plan
        self._console = console
        self._evaluator = Evaluator(plan.head.category_names, Federation.of(plan.head)) if compare else None
        self._messages: Counter[str] = Counter()

    def write(self, path: Path, result_of: Callable[[int], RowResult], provenance: Mapping[str, Any]) -> None:
        """Writes the file; then prints why boxes have no mask, in the order of the file.

        Raises:
            OutputError: it cannot be written; an existing file is unchanged.
            BadDataset: an input changed after it was read.
        """
        with self._console.progress(self._plan.head.count, "row", "write") as bar:

            def finish(index: int, row: Any, annotation: Annotation, outcome: RowOutcome) -> Any:
                bar.update()
                return self._finished(row, annotation, outcome)

            counts = write_labeled_file(self._plan, result_of, path, provenance, finish=finish, on_failure=self._note)
        self.labeled, self.crowds = counts.labeled, counts.crowds
        if counts.flags:
            flags = ", ".join(f"{count} {name}" for name, count in counts.flags.most_common())
            self._console.print(f"flags: {flags}")
        self._print_failures()

    def report(self) -> EvaluationReport | None:
        """Returns the metrics of the compared masks; None unless `compare` is set."""
        return None if self._evaluator is None else self._evaluator.report()

    def _finished(self, row: Any, annotation: Annotation, outcome: RowOutcome) -> Any:
        if self._evaluator is not None and outcome is RowOutcome.LABELED:
            return _compared(self._evaluator, row, annotation)
        return row

    def _note(self, annotation: Annotation, failure: RowFailure) -> RowFailure:
        if annotation.problem is None and failure.reason in (Reason.BAD_BOX, Reason.BAD_POINT):
            failure = failure._replace(message=f"annotation {annotation.id!r}: {failure.message}")
        self.failed[failure.reason] += 1
        # An unreadable image fails all of its boxes; its message is printed once.
        is_listed = failure.message in self._messages or len(self._messages) < MAX_MESSAGES
        self._messages[failure.message if is_listed else _OTHERS] += 1
        if self._evaluator is not None and annotation.image_id in self._plan.head.images and not annotation.iscrowd:
            self._evaluator.skip(annotation, failure.reason, failure.message)
        return failure

    def _print_failures(self) -> None:
        for message, count in self._messages.items():
            self._console.print(f"no mask{f' for {count} boxes' if count > 1 else ''}: {message}")
        for line in ignored_rows(self._plan.head.notes, redact(self._plan.head.path)):
            self._console.print(line)


def _compared(evaluator: Evaluator, row: Mapping[str, Any], annotation: Annotation) -> Mapping[str, Any]:
    """Adds a labeled row to the report; returns it with its IoU if the input file has a readable mask."""
    mask = rle.Rle.from_coco(row["segmentation"])
    evaluator.add(annotation, mask, mask_score_of(row))
    with suppress(BadGroundTruth):  # the report counts them
        truth = read_ground_truth(annotation.raw, (mask.height, mask.width), row_name(annotation.id))
        return {**row, "iou": rle.iou(truth, mask)}
    return row
