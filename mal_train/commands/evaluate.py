"""`mal-train evaluate`: compares the labels of a checkpoint with the masks of dataset.val_ann_path."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from mal_train.commands.common import image_folder, input_file, task_folder
from mal_train.commands.detections import DetectionReport, compare_detections
from mal_train.commands.label import open_labeling_job
from mal_train.config.spec import Spec
from mal_train.core.coco.annotations import Annotation, CocoFile, Reason, by_image, read_coco, row_name
from mal_train.core.coco.detections import read_detections
from mal_train.core.coco.ground_truth import NO_SEGMENTATION
from mal_train.core.coco.left_out import ignored_rows
from mal_train.core.coco.output import write_json_atomic
from mal_train.core.console import Console
from mal_train.core.errors import ConfigError
from mal_train.core.images.files import for_names, image_notes
from mal_train.core.metrics.evaluator import not_measured
from mal_train.core.metrics.report import CROWD, EvaluationReport
from mal_train.core.storage.addresses import parse_location, redact
from mal_train.kernel.labeler.types import Label
from mal_train.offline.dataset_labeler import LabelFailure, Row
from mal_train.training.run_files import validation_metrics
from mal_train.training.validation import add_result, has_masks, new_evaluator

LabelResult = tuple[Annotation, Label | LabelFailure]


def evaluate(spec: Spec, console: Console) -> EvaluationReport | DetectionReport:
    """Evaluates evaluate.checkpoint and writes results.json to the output folder.

    With evaluate.box_inputs, labels detected boxes and reports COCO's detection metrics of boxes and masks.

    Raises:
        MalError: a setting, the annotation file or the checkpoint cannot be used.
    """
    settings = spec.evaluate
    with task_folder(spec, "evaluate") as (folder, status), ExitStack() as inputs:
        if not spec.dataset.load_mask:
            raise ConfigError("dataset.load_mask: false; evaluation needs the masks; set it to true")
        annotations = inputs.enter_context(input_file(spec.dataset.val_ann_path, "dataset.val_ann_path"))
        image_dir = image_folder(spec, spec.dataset.val_img_dir, "dataset.val_img_dir", annotations)
        coco = read_coco(annotations, spec.dataset.row_rules)
        image_dir = for_names(image_dir, coco.file_names)
        ann_path = redact(parse_location(spec.dataset.val_ann_path))
        for line in ignored_rows(coco.notes, ann_path):
            console.print(line)
        prompts = coco
        if settings.box_inputs:
            prompts = read_detections(
                Path(inputs.enter_context(input_file(settings.box_inputs, "evaluate.box_inputs"))),
                coco,
                spec.dataset.row_rules,
            )
        job = open_labeling_job(spec, "evaluate", console)
        rows = list(by_image(prompts))
        # Without a mask to compare with, nothing is labeled.
        labels = job.labels(rows, image_dir) if has_masks(coco) else _unlabeled([] if settings.box_inputs else rows)
        with console.progress(len(prompts.annotations), "box") as bar:
            results = _counted(labels, bar.update)
            report: EvaluationReport | DetectionReport
            if settings.box_inputs:
                report = compare_detections(coco, prompts, results)
            else:
                report = _compare(coco, rows, results)
        for line in [*image_notes(image_dir), *_left_out(report, ann_path, redact(settings.box_inputs))]:
            console.print(line)
        content = {
            **job.provenance(),
            "annotations": ann_path,
            **({"box_inputs": redact(settings.box_inputs)} if settings.box_inputs else {}),
            "precision": job.precision,
            **report.to_dict(),
        }
        write_json_atomic(folder / "results.json", content)
        kpi = validation_metrics(report) if isinstance(report, EvaluationReport) else report.metrics
        status.write("RUNNING", "Test metrics generated.", kpi=kpi)
        console.print(f"wrote {folder / 'results.json'}")
    return report


def _counted(results: Iterable[LabelResult], count: Callable[[], object]) -> Iterator[LabelResult]:
    for result in results:
        yield result
        count()


def _unlabeled(rows: Iterable[Row]) -> Iterator[LabelResult]:
    """Yields each row that is not a crowd region, as one without a mask to compare with."""
    for _, annotations in rows:
        for row in annotations:
            if not row.iscrowd:
                message = row.problem or f"{row_name(row.id)}: {NO_SEGMENTATION}"
                yield row, LabelFailure(str(row.reason or Reason.NO_GROUND_TRUTH), message)


def _left_out(report: EvaluationReport | DetectionReport, ann_path: str, box_inputs: str) -> list[str]:
    """Returns lines that name the first rows which were not measured, with their file."""
    if isinstance(report, EvaluationReport):
        lines = not_measured(report.skipped_rows).lines(f"{ann_path}: not measured")
    else:
        lines = [
            *not_measured(report.skipped_truths).lines(f"{ann_path}: not measured"),
            *not_measured(report.skipped_detections).lines(f"{box_inputs}: not measured"),
        ]
    if not report.measured and CROWD in report.skipped:
        lines.append(
            "crowd regions (iscrowd 1) are not measured; if each is one object, as in files of CVAT, set "
            "dataset.crowd_as_objects=true"
        )
    return lines


def _compare(coco: CocoFile, rows: Sequence[Row], results: Iterable[LabelResult]) -> EvaluationReport:
    evaluator = new_evaluator(coco, rows)
    for annotation, label in results:
        add_result(evaluator, annotation, label)
    return evaluator.report()
