"""`mal-train inference`: a COCO file with boxes and its images → the same file with masks."""

import contextlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mal_train.commands.common import existing_file, existing_folder, task_folder
from mal_train.commands.label import open_labeling
from mal_train.config.spec import Spec
from mal_train.core.atomic_io import check_writable
from mal_train.core.coco.annotations import Annotation, CocoFile, JsonId, by_image, read_coco
from mal_train.core.coco.detections import read_detections, with_detector_scores
from mal_train.core.coco.output import error_fields, label_fields, labeled_file, write_json_atomic
from mal_train.core.console import Console
from mal_train.core.errors import BadDataset
from mal_train.core.masks import rle
from mal_train.core.metrics.evaluator import Evaluator
from mal_train.core.metrics.report import EvaluationReport
from mal_train.kernel.labeler.labeler import Label
from mal_train.offline.dataset_labeler import LabelFailure
from mal_train.training.run_files import figures_of
from mal_train.training.validation import add_answer

Answers = dict[JsonId, dict[str, Any]]


@dataclass(frozen=True)
class InferenceResult:
    """How labeling a file went.

    Attributes:
        path: the file that was written.
        labeled: boxes with a mask (an empty one counts).
        failed: boxes without one, by reason.
        report: figures against the file's own masks, where inference.load_mask asked for them.
    """

    path: Path
    labeled: int
    failed: Counter[str]
    report: EvaluationReport | None


def inference(spec: Spec, screen: Console) -> InferenceResult:
    """Gives every box of inference.ann_path a mask and writes inference.label_dump_path.

    With inference.box_inputs the boxes are a detector's; ann_path then names the images and categories.

    What is wrong with one image or box is said, stands in its row of the file, and stops nothing.

    Raises:
        MalError: a setting, the file as a whole or the checkpoint cannot be used, or the result cannot be written.
    """
    settings = spec.inference
    with task_folder(spec, "inference") as (folder, status):
        path = folder / settings.label_dump_path
        check_writable(path)
        coco = read_coco(existing_file(settings.ann_path, "inference.ann_path"))
        if settings.box_inputs:
            coco = read_detections(existing_file(settings.box_inputs, "inference.box_inputs"), coco)
        image_dir = existing_folder(settings.img_dir, "inference.img_dir")
        labeling = open_labeling(spec, "inference", screen)
        evaluator = Evaluator(coco.category_names) if settings.load_mask else None
        answers: Answers = {}
        with screen.progress(len(coco.annotations), "box") as bar:
            for annotation, label in labeling.labels(list(by_image(coco)), image_dir):
                bar.update()
                if annotation.id is not None:
                    answers[annotation.id] = _fields(annotation, label, with_iou=settings.load_mask)
                if evaluator is not None:
                    add_answer(evaluator, annotation, label)
        failed = _failures(coco, answers, screen)
        written = labeled_file(coco, answers, labeling.provenance())
        write_json_atomic(path, with_detector_scores(written, coco) if settings.box_inputs else written)
        labeled = sum("error" not in fields for fields in answers.values())
        report = None if evaluator is None else evaluator.report()
        text = f"{labeled} boxes labeled, {failed.total()} failed"
        status.write("RUNNING", f"{text}.", kpi=None if report is None else figures_of(report))
        screen.print(f"wrote {path}: {text}")
    return InferenceResult(path, labeled, failed, report)


def _fields(annotation: Annotation, label: Label | LabelFailure, *, with_iou: bool) -> dict[str, Any]:
    if isinstance(label, LabelFailure):
        return error_fields(label.reason, label.message)
    fields = label_fields(label.rle.to_coco(), label.area, label.score, label.flags, label.agreement)
    segmentation = annotation.raw.get("segmentation")
    if with_iou and segmentation:
        with contextlib.suppress(BadDataset):  # an unreadable mask of the file is told with the figures
            truth = rle.from_segmentation(segmentation, label.rle.height, label.rle.width)
            fields["iou"] = rle.iou(truth, label.rle)
    return fields


def _failures(coco: CocoFile, answers: Answers, screen: Console) -> Counter[str]:
    """Says why boxes have no mask, in the order of the file, and counts them by reason."""
    failed: Counter[str] = Counter()
    messages: Counter[str] = Counter()
    for annotation in coco.annotations:
        error = answers.get(annotation.id, {}).get("error") if annotation.id is not None else None
        if error is not None:
            failed[error["reason"]] += 1
            messages[error["message"]] += 1
        elif annotation.problem is not None:
            failed[str(annotation.reason)] += 1
            messages[annotation.problem] += 1
    # One bad picture fails all of its boxes; it is said once.
    for message, count in messages.items():
        screen.print(f"no mask{f' for {count} boxes' if count > 1 else ''}: {message}")
    for note in coco.notes:
        screen.print(note)
    return failed
