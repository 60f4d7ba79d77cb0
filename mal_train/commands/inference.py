"""`mal-train inference`: adds masks to the boxes of a COCO file."""

import contextlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mal_train.commands.common import existing_file, existing_folder, task_folder
from mal_train.commands.label import open_labeling_job
from mal_train.config.spec import Spec
from mal_train.core.atomic_io import check_writable, refuse_same_file
from mal_train.core.coco.annotations import Annotation, CocoFile, JsonId, by_image, read_coco
from mal_train.core.coco.detections import read_detections, with_detector_scores
from mal_train.core.coco.output import error_fields, label_fields, labeled_file, write_json_atomic
from mal_train.core.console import Console
from mal_train.core.errors import BadDataset
from mal_train.core.masks import rle
from mal_train.core.metrics.evaluator import Evaluator
from mal_train.core.metrics.report import EvaluationReport
from mal_train.kernel.labeler.types import Label
from mal_train.offline.dataset_labeler import LabelFailure
from mal_train.training.run_files import validation_metrics
from mal_train.training.validation import add_result

LabelFields = dict[JsonId, dict[str, Any]]
"""Fields that labeling adds to an annotation, by annotation id."""


@dataclass(frozen=True)
class InferenceResult:
    """Result of labeling a file.

    Attributes:
        path: the written file.
        labeled: number of boxes with a mask; an empty mask counts.
        failed: number of boxes without a mask, by reason.
        report: metrics against the masks of the input file; None unless inference.load_mask is set.
    """

    path: Path
    labeled: int
    failed: Counter[str]
    report: EvaluationReport | None


def inference(spec: Spec, console: Console) -> InferenceResult:
    """Labels every box of inference.ann_path and writes inference.label_dump_path.

    With inference.box_inputs, labels detected boxes; ann_path then gives the images and categories. An error in one
    image or box is printed and stored in its annotation; the other boxes are still labeled.

    Raises:
        MalError: a setting, the annotation file or the checkpoint cannot be used, or the output cannot be written.
    """
    settings = spec.inference
    with task_folder(spec, "inference") as (folder, status):
        path = folder / settings.label_dump_path
        check_writable(path)
        annotations = existing_file(settings.ann_path, "inference.ann_path")
        refuse_same_file(annotations, path)
        coco = read_coco(annotations)
        if settings.box_inputs:
            coco = read_detections(existing_file(settings.box_inputs, "inference.box_inputs"), coco)
        image_dir = existing_folder(settings.img_dir, "inference.img_dir")
        job = open_labeling_job(spec, "inference", console)
        evaluator = Evaluator(coco.category_names) if settings.load_mask else None
        fields: LabelFields = {}
        with console.progress(len(coco.annotations), "box") as bar:
            for annotation, label in job.labels(list(by_image(coco)), image_dir):
                bar.update()
                if annotation.id is not None:
                    fields[annotation.id] = _label_fields(annotation, label, with_iou=settings.load_mask)
                if evaluator is not None:
                    add_result(evaluator, annotation, label)
        failed = _report_failures(coco, fields, console)
        written = labeled_file(coco, fields, job.provenance())
        write_json_atomic(path, with_detector_scores(written, coco) if settings.box_inputs else written)
        labeled = sum("error" not in row for row in fields.values())
        report = None if evaluator is None else evaluator.report()
        summary = f"{labeled} boxes labeled, {failed.total()} failed"
        status.write("RUNNING", f"{summary}.", kpi=None if report is None else validation_metrics(report))
        console.print(f"wrote {path}: {summary}")
    return InferenceResult(path, labeled, failed, report)


def _label_fields(annotation: Annotation, label: Label | LabelFailure, *, with_iou: bool) -> dict[str, Any]:
    if isinstance(label, LabelFailure):
        return error_fields(label.reason, label.message)
    fields = label_fields(label.rle.to_coco(), label.area, label.score, label.flags, label.agreement)
    segmentation = annotation.raw.get("segmentation")
    if with_iou and segmentation:
        with contextlib.suppress(BadDataset):  # the report counts unreadable masks
            truth = rle.from_segmentation(segmentation, label.rle.height, label.rle.width)
            fields["iou"] = rle.iou(truth, label.rle)
    return fields


def _report_failures(coco: CocoFile, fields: LabelFields, console: Console) -> Counter[str]:
    """Prints why boxes have no mask, in the order of the file, and returns their number by reason."""
    failed: Counter[str] = Counter()
    messages: Counter[str] = Counter()
    for annotation in coco.annotations:
        error = fields.get(annotation.id, {}).get("error") if annotation.id is not None else None
        if error is not None:
            failed[error["reason"]] += 1
            messages[error["message"]] += 1
        elif annotation.problem is not None:
            failed[str(annotation.reason)] += 1
            messages[annotation.problem] += 1
    # An unreadable image fails all of its boxes; print it once.
    for message, count in messages.items():
        console.print(f"no mask{f' for {count} boxes' if count > 1 else ''}: {message}")
    for note in coco.notes:
        console.print(note)
    return failed
